"""What a learner rank holds: weights, masters and moments as DeepSpeed keeps them, gradients, and the activations of a pass.

With P weights, of which T train, e bytes a weight, and N ranks:

    ZeRO   weights       masters   moments   gradients   in the optimizer step, beside all of them
    0      e P           4 T       8 T       e T         4 T, the gradients in float32
    1, 2   e P           4 T / N   8 T / N   e T         (4 + 2 e) T / N
    3      e P / N + a   4 T / N   8 T / N   e T / N     (4 + e) T / N
           gathered layer

In float32 without ZeRO the weights are their own masters, and the gradients are float32 already.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from common.models.forward import Form
from common.text.tokenizers import load_config
from contracts.config import ModelConfig, TandemConfig
from contracts.estimators import chosen_estimator
from contracts.methods import chosen_preference
from controller.plan.activations import FUSED, PassMemory, pass_memory
from controller.plan.memory_items import Item, shown
from controller.plan.microbatch_lengths import Lengths
from learner.models import (
    PolicyModel,
    ScalarModel,
    decoder_layers,
    freeze_below,
    policy_shapes,
    prove_policy,
    prove_scalar,
    scalar_config,
    scalar_shapes,
)

MASTER, MOMENTS = 4, 8  # bytes a weight: float32, and Adam's two


@dataclass(frozen=True)
class Network:
    """One of the learner's models."""

    name: str  # policy, value model, ...
    path: str
    is_scalar: bool = False
    trainable_layers: int | None = None
    freeze_embeddings: bool = False
    trains: bool = True


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights."""

    total: int
    trained: int
    largest_layer: int  # of what ZeRO-3 gathers at a time


def stage_networks(config: TandemConfig, stage: str) -> list[Network]:
    """What the learner of a stage loads, in order."""
    path, ppo = config.model.path, config.ppo
    if stage in ("sft", "filtered_sft"):
        return [Network("policy", path, trainable_layers=config.sft.trainable_layers)]
    if stage == "preference":
        return [Network("policy", path, trainable_layers=chosen_preference(config).trainable_layers)]
    if stage == "reward_model":
        chosen = config.reward_model
        layers, embeddings = chosen.trainable_layers, chosen.freeze_embeddings
        return [Network("reward model", path, True, layers, freeze_embeddings=embeddings)]
    networks = [Network("policy", config.sft_model or path, trainable_layers=ppo.trainable_layers)]
    if chosen_estimator(ppo).has_value_model:
        networks.append(Network("value model", config.proxy_model or path, True, ppo.value_trainable_layers))
    return [*networks, Network("reference", config.sft_model or path, trains=False)]


def network_shapes(
    config: TandemConfig, network: Network, model: ModelConfig | None = None
) -> PolicyModel | ScalarModel:
    """The network on the meta device, in the form in which it is computed, with what trains marked; `model` as it is loaded
    where that is not as the learner does."""
    learner, on_cpu = config.learner, config.cluster.gpus_per_learner_rank == 0
    if model is None:
        model = config.model if network.path == config.model.path else replace(config.model, revision=None)
    found = load_config(network.path, model)
    form = Form(FUSED, "packed")
    make = scalar_shapes if network.is_scalar else policy_shapes
    if on_cpu:
        prove = prove_scalar if network.is_scalar else prove_policy
        form = prove(scalar_config(found) if network.is_scalar else found, model, learner, on_cpu).form
    shapes = make(found, model, learner, form, on_cpu)
    shapes.lm.requires_grad_(network.trains)
    if network.trains:
        freeze_below(shapes.lm, network.trainable_layers, network.freeze_embeddings)
    return shapes


def sizes(shapes: torch.nn.Module) -> Sizes:
    parameters = list(shapes.parameters())
    lm: Any = shapes.lm
    parts = [*decoder_layers(lm), lm.get_input_embeddings()]
    return Sizes(
        total=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        largest_layer=max(sum(p.numel() for p in part.parameters()) for part in parts),
    )


@dataclass(frozen=True)
class State:
    """Bytes of one network on one rank."""

    weights: float
    masters: float
    moments: float
    gradients: float
    step: float  # in the optimizer step, beside all of the others
    how: str


def network_state(found: Sizes, size: int, zero: int, ranks: int) -> State:
    """As the module's docstring has it. `size` is e."""
    total, trained = found.total, found.trained
    share = 1 / ranks if zero else 1.0
    weights, gradients = size * total, size * trained
    masters, step = MASTER * trained * share, (MASTER + 2 * size) * trained * share
    if zero == 3:
        weights = size * total / ranks + size * found.largest_layer
        gradients, step = size * trained / ranks, (MASTER + size) * trained / ranks
    if zero == 0:
        masters, step = (MASTER * trained, MASTER * trained) if size < MASTER else (0.0, 0.0)
    of = f"{total / 1e6:.1f}M weights" + ("" if trained == total else f", {trained / 1e6:.1f}M train")
    over = f" over {ranks} ranks by ZeRO-{zero}" if zero and ranks > 1 else ""
    return State(weights, masters, MOMENTS * trained * share, gradients, step, f"{of}, {size} bytes each{over}")


def learner_items(config: TandemConfig, stage: str, lengths: Lengths, selected: int) -> list[Item]:
    """What one rank holds at its peak, beside its libraries and the buffer of the transfer.

    Args:
        selected: positions of the largest microbatch that reach the head.
    """
    networks = stage_networks(config, stage)
    shapes = {network.name: network_shapes(config, network) for network in networks}
    size, zero = getattr(torch, config.model.dtype).itemsize, config.learner.zero_stage
    ranks, on_gpu = config.cluster.num_learner_ranks, config.cluster.gpus_per_learner_rank > 0
    states = {n: network_state(sizes(shape), size, zero, ranks) for n, shape in shapes.items()}
    items = []
    for name, state in states.items():
        items.append(Item(f"weights of the {name}", state.weights, state.how, on_gpu))
        if state.moments:
            how = f"float32: 4 bytes of a master, 8 of Adam's moments for each that trains (ZeRO-{zero})"
            items.append(Item(f"masters and moments of the {name}", state.masters + state.moments, how, on_gpu))
    passes = {name: pass_memory(shape, lengths.largest, selected) for name, shape in shapes.items()}
    return [*items, _working(config, stage, lengths, states, passes, on_gpu)]


def _working(
    config: TandemConfig,
    stage: str,
    lengths: Lengths,
    states: dict[str, State],
    passes: dict[str, PassMemory],
    on_gpu: bool,
) -> Item:
    """Activations and gradients: the larger of a backward pass and an optimizer step, which do not coincide."""
    trained = [name for name, state in states.items() if state.moments]
    gradients = sum(states[name].gradients for name in trained)
    step = gradients + max(states[name].step for name in trained)
    tokens = sum(lengths.largest)
    held = _held_tokens(config, stage, lengths)
    kept = sum(passes[name].kept for name in trained) / tokens * max(0, held - tokens)
    if held >= tokens and len(trained) > 1:  # the graphs of all models are kept, and one of them is walked back
        first = max(trained, key=lambda name: passes[name].peak - passes[name].kept)
        kept += sum(passes[name].kept for name in trained if name != first)
        peak = passes[first].peak
    else:
        peak = max(passes[name].peak for name in trained)
    peak = max(peak, *(found.inference for found in passes.values()))
    earlier = gradients if lengths.microbatches > 1 else 0.0
    backward = kept + peak + earlier
    words = f"{lengths.sequences} sequences of {tokens} tokens, {lengths.microbatches} microbatches a step"
    if kept:
        words += f", graphs of {held} tokens kept"
    how = f"{words}: backward pass {shown(backward)}, optimizer step {shown(step)}; the larger"
    return Item("activations and gradients", max(backward, step), how, on_gpu)


def _held_tokens(config: TandemConfig, stage: str, lengths: Lengths) -> int:
    """Tokens of a rank whose graphs wait for the others': a reward model compares all texts of a batch."""
    if stage == "reward_model":
        return lengths.tokens
    if stage in ("sft", "filtered_sft"):
        return sum(lengths.largest)
    return min(config.learner.held_tokens, lengths.tokens)
