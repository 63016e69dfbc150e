"""What a learner rank holds: weights, masters and moments as DeepSpeed keeps them, gradients, and the activations of a pass.

With P weights, of which T train, e bytes a weight, and N ranks, as DeepSpeed 0.19 allocates:

    ZeRO   weights         masters   moments   in a backward pass                  in the optimizer step
    0      e P             4 T       8 T       e T, and e T to reduce them          e T + 4 T
    1      e P             4 T / N   8 T / N   e T, e T in a bucket and e T / N     (4 + 2 e) T / N
    2      e P             4 T / N   8 T / N   e T in a bucket, 2 e T / N besides   (4 + 2 e) T / N
    3      e P / N         4 T / N   8 T / N   e T in a bucket, e T / N besides,    e T, (4 + 2 e) T / N
                                               e P of gathered weights

A bucket has 5e8 weights at most, and 1e9 are gathered at most: larger models have less than that at a time. In float32 a
gradient is not converted in the step (2 e in place of 4 + 2 e), and without ZeRO the weights are their own masters.

On a CPU a weight that does not train stays in the pages of its checkpoint's file, which all processes of a node share, where
the file has the number format of the run.

With LoRA the T are adapters and heads. Policy and value model have one frozen base where both have adapters, and the
reference is the policy without its adapter (`learner/adapted_models.py`).
"""

from dataclasses import dataclass, replace

import torch

from common.models.adapters import split
from common.models.forward import Form
from common.models.lora import add_adapter, target_modules
from common.processes.heap import GROWTH
from common.processes.process_env import LEARNER_PRODUCTS
from common.text.tokenizers import load_config
from contracts.config import LearnerConfig, ModelConfig, TandemConfig
from contracts.estimators import chosen_estimator
from contracts.lora_roles import Role, lora_key, role_model, shares_base
from contracts.methods import chosen_preference
from contracts.scorer_roles import reward_model_origin, starts_value_model
from controller.plan.activations import FUSED, PassMemory, pass_memory
from controller.plan.measured import measured
from controller.plan.memory_items import MIB, Item, shown
from controller.plan.microbatch_lengths import Lengths
from learner.models import (
    PolicyModel,
    ScalarModel,
    freeze_below,
    policy_shapes,
    prove_policy,
    prove_scalar,
    scalar_config,
    scalar_shapes,
)

MASTER, MOMENTS = 4, 8  # bytes a weight: float32, and Adam's two
ATTENTION_PRODUCTS = 6  # two, each with two in the backward pass
BUCKET, LIVE = 500_000_000, 1_000_000_000  # DeepSpeed's reduce_bucket_size and stage3_max_live_parameters


@dataclass(frozen=True)
class Network:
    """One of the learner's models."""

    name: str  # policy, value model, ...
    path: str
    is_scalar: bool = False
    trainable_layers: int | None = None
    freeze_embeddings: bool = False
    trains: bool = True
    role: Role = "policy"  # whose adapters it has
    made: str = ""  # the result that the run makes and this loads, which `path` stands for in shape alone


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights."""

    total: int
    trained: int


def stage_networks(config: TandemConfig, stage: str) -> list[Network]:
    """What the learner of a stage loads, in order."""
    path, ppo = config.model.path, config.ppo
    if stage == "sft":
        return [Network("policy", path, trainable_layers=config.sft.trainable_layers)]
    if stage == "filtered_sft":
        return [replace(_sft(config), trainable_layers=config.sft.trainable_layers)]
    if stage == "preference":
        return [replace(_sft(config), trainable_layers=chosen_preference(config).trainable_layers)]
    if stage == "reward_model":
        chosen = config.reward_model
        layers, embeddings = chosen.trainable_layers, chosen.freeze_embeddings
        origin = _sft(config) if reward_model_origin(config) == "sft" else Network("", path)
        return [
            replace(
                origin,
                name="reward model",
                is_scalar=True,
                trainable_layers=layers,
                freeze_embeddings=embeddings,
                role="reward_model",
            )
        ]
    policy = Network("policy", path) if ppo.init_from == "base" else _sft(config)
    networks = [replace(policy, trainable_layers=ppo.trainable_layers)]
    if chosen_estimator(ppo).has_value_model:
        start, made = policy.path, policy.made
        if starts_value_model(config):
            start, made = config.proxy_model or path, "" if config.proxy_model else "reward_model/proxy"
        networks.append(Network("value model", start, True, ppo.value_trainable_layers, role="value_model", made=made))
    return [*networks, *([served_policy(config)] if role_model(config.model, "policy").lora is None else [])]


def _sft(config: TandemConfig) -> Network:
    return Network("policy", config.sft_model or config.model.path, made="" if config.sft_model else "sft")


def served_policy(config: TandemConfig) -> Network:
    """The policy as actors have it, and the reference."""
    policy = Network("policy", config.model.path) if config.ppo.init_from == "base" else _sft(config)
    return replace(policy, name="reference", trains=False)


def network_shapes(
    config: TandemConfig, network: Network, model: ModelConfig | None = None
) -> PolicyModel | ScalarModel:
    """The network on the meta device, in the form in which it is computed, with what trains marked; `model` as it is loaded
    where that is not as the learner does."""
    learner, on_cpu = config.learner, config.cluster.gpus_per_learner_rank == 0
    model = model or model_of(config, network)
    key = repr((network, model, learner.attention, learner.gradient_checkpointing, learner.checkpointed_layers, on_cpu))
    if key in _SHAPES:
        return _SHAPES[key]
    found = load_config(network.path, model)
    form = Form(FUSED, "packed")
    make = scalar_shapes if network.is_scalar else policy_shapes
    if on_cpu:
        prove = prove_scalar if network.is_scalar else prove_policy
        form = prove(scalar_config(found) if network.is_scalar else found, model, learner, on_cpu).form
    shapes = make(found, model, learner, form, on_cpu)
    shapes.lm.requires_grad_(network.trains)
    if network.trains and model.lora:
        written = lora_key(config.model, network.role, "targets")
        if modules := target_modules(shapes.lm, model.lora, network.trainable_layers, written):
            add_adapter(shapes.lm, model.lora, modules, seed=0)
        else:
            shapes.lm.requires_grad_(False)
        if isinstance(shapes, ScalarModel):
            shapes.lm.score.weight.requires_grad_(True)
    elif network.trains:
        freeze_below(shapes.lm, network.trainable_layers, network.freeze_embeddings)
    return _SHAPES.setdefault(key, shapes)


_SHAPES: dict[str, PolicyModel | ScalarModel] = {}


def model_of(config: TandemConfig, network: Network) -> ModelConfig:
    """With the adapters of its role."""
    model = role_model(config.model, network.role)
    return model.at(network.path)


def sizes(shapes: torch.nn.Module) -> Sizes:
    parameters = list(shapes.parameters())
    return Sizes(
        total=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
    )


@dataclass(frozen=True)
class State:
    """Bytes of one network on one rank."""

    weights: float
    masters: float
    moments: float
    backward: float  # in a backward pass, beside activations
    earlier: float  # of that, what is there before the last microbatch
    step: float  # in the optimizer step
    gathered: float = 0.0  # of `backward`, full weights


def zero_pieces(learner: LearnerConfig) -> tuple[int, int]:
    """Weights in a bucket, and weights that ZeRO-3 gathers, at most."""
    options = learner.deepspeed.get("zero_optimization", {})
    return int(options.get("reduce_bucket_size", BUCKET)), int(options.get("stage3_max_live_parameters", LIVE))


def network_state(found: Sizes, size: int, zero: int, ranks: int, pieces: tuple[int, int] = (BUCKET, LIVE)) -> State:
    """As the module's docstring has it. `size` is e, `pieces` as `zero_pieces` has them."""
    total, trained, mine = found.total, found.trained, found.trained / (ranks if zero else 1)
    converted = 0 if size == MASTER else MASTER
    if zero == 0:
        masters = converted * trained
        gradients = size * trained
        return State(size * total, masters, MOMENTS * trained, 2 * gradients, gradients, gradients + masters)
    bucket, step = size * min(trained, pieces[0]), (converted + 2 * size) * mine
    if zero == 1:  # reduces at the end of a step alone: until then every rank has all gradients
        return State(
            size * total, MASTER * mine, MOMENTS * mine, bucket + size * (trained + mine), size * trained, step
        )
    if zero == 2:
        return State(size * total, MASTER * mine, MOMENTS * mine, bucket + 2 * size * mine, size * mine, step)
    gathered = size * min(total, pieces[1]) if trained or ranks > 1 else 0
    kept = bucket + size * mine
    step = kept + step - size * mine
    return State(size * total / ranks, MASTER * mine, MOMENTS * mine, gathered + kept, kept, step, gathered)


def learner_items(config: TandemConfig, stage: str, lengths: Lengths, selected: int) -> list[Item]:
    """What one rank holds at its peak, beside its libraries and the buffer of the transfer.

    Args:
        selected: positions of the largest microbatch that reach the head.
    """
    networks = stage_networks(config, stage)
    shapes = {network.name: network_shapes(config, network) for network in networks}
    size, zero = getattr(torch, config.model.dtype).itemsize, config.learner.zero_stage
    ranks, on_gpu = config.cluster.num_learner_ranks, config.cluster.gpus_per_learner_rank > 0
    counts, offload = {name: sizes(shape) for name, shape in shapes.items()}, config.learner.offload
    if "value model" in counts and shares_base(config.model):  # the policy's
        trained = counts["value model"].trained
        counts["value model"] = Sizes(trained, trained)
    pieces = zero_pieces(config.learner)
    states = {name: network_state(found, size, zero, ranks, pieces) for name, found in counts.items()}
    items = []
    for network in networks:
        found, state = counts[network.name], states[network.name]
        over = f" over {ranks} ranks by ZeRO-{zero}" if zero and ranks > 1 else ""
        file = mapped_file(network, model_of(config, network)) if zero < 3 and not on_gpu else None
        frozen = size * (found.total - found.trained) if file else 0
        how = (
            f"{found.total / 1e6:.1f}M, {found.trained / 1e6:.1f}M train, {size} bytes each{over if zero == 3 else ''}"
        )
        if file and frozen:
            items.append(Item(f"frozen weights of the {network.name}", frozen, "in the file", False, file))
        if state.weights - frozen:
            items.append(
                Item(f"weights of the {network.name}", state.weights - frozen, how, on_gpu and offload != "parameters")
            )
        if state.moments:
            how = f"4 bytes of a master and 8 of moments for each that trains{over}"
            how = how if state.masters else f"8 bytes of moments for each that trains{over}; it is its own master"
            what = f"masters and moments of the {network.name}"
            items.append(Item(what, state.masters + state.moments, how, on_gpu and offload == "none"))
    passes = {name: pass_memory(shape, lengths.largest, selected) for name, shape in shapes.items()}
    working = _working(config, stage, lengths, states, passes, on_gpu)
    items.append(working)
    if not on_gpu:
        slack = measured()["slack"]
        how = f"{slack:.0%} of the last: copies that products make, and pieces of the heap that nothing fits (measured)"
        items.append(Item("slack of the heap", slack * working.nbytes, how, least=0.0))
    if not on_gpu and zero:
        share = measured()["bucket"]
        how = f"{share:.0%} of DeepSpeed's bucket of {pieces[0]:.0e} weights, whose place others take meanwhile (measured)"
        items.append(Item("place of the bucket", share * size * pieces[0], how, least=0.0))
    if not on_gpu and config.model.dtype == "bfloat16":
        items.append(_compiled([(shapes[n.name], n.trains) for n in networks], lengths))
    return items


def _compiled(networks: list[tuple[torch.nn.Module, bool]], lengths: Lengths) -> Item:
    """oneDNN compiles a bfloat16 product for each shape. Every microbatch has a number of tokens of its own, and so its own
    shapes: a product for each kind of linear layer, one more where what lies below it trains, as an adapter does, and
    another where it trains itself."""
    kinds = dict[tuple[int, ...], int]()
    for network, trains in networks:
        for name, module in network.named_modules():
            if isinstance(module, torch.nn.Linear):
                shape = tuple(module.weight.shape)
                products = 3 if module.weight.requires_grad else 2 if name.endswith(".base_layer") else 1
                kinds[shape] = max(kinds.get(shape, 1), products if trains else 1)
    a_size = sum(kinds.values()) + ATTENTION_PRODUCTS
    each = measured()["product_mib"]
    nbytes = min(lengths.sizes * a_size * each * MIB, most_compiled())
    how = (
        f"{lengths.sizes} microbatch sizes x {a_size} shapes, {each} MiB each with what it pins of the heap (measured), or "
        f"{LEARNER_PRODUCTS} of them and the {GROWTH // MIB} MiB by which the heap may grow"
    )
    return Item("compiled products", nbytes, how, least=0.0)


def most_compiled() -> float:
    """Bytes, however many microbatches there are: what oneDNN keeps, and growth that is not given back yet."""
    return LEARNER_PRODUCTS * measured()["product_mib"] * MIB + GROWTH


def mapped_file(network: Network, model: ModelConfig, dtype: str | None = None) -> str | None:
    """The checkpoint in whose pages a network's weights stay, when it is loaded in `dtype` (None: that of `model`); None
    where transformers converts them from another number format. What a run makes is in the format of `model`."""
    wanted = dtype or model.dtype
    if network.made and not model.lora:
        return network.made if model.dtype == wanted else None
    stored = str(getattr(load_config(network.path, model), "dtype", None)).removeprefix("torch.")
    return split(network.path)[0] if stored == wanted else None


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
    tokens, held = sum(lengths.largest), held_tokens(config, stage, lengths)
    # The value model is walked back first, and at once: its gradients are there in the policy's first backward pass.
    is_early = {name: lengths.microbatches > 1 or name == "value model" for name in trained}
    earlier = sum(states[name].earlier for name in trained if is_early[name])
    waits = {name: passes[name].kept for name in trained if name != "value model"}
    kept = sum(waits.values()) * held / tokens
    # Graphs wait when the largest is walked back, which is among them where it is held.
    among = waits if held >= tokens else {}
    activations = kept + max(passes[name].peak - among.get(name, 0.0) for name in trained)
    complete = sum(states[name].earlier for name in trained)
    gathered = max(state.gathered for state in states.values())
    starts = earlier + gathered + max(activations, kept + max(found.inference for found in passes.values()))
    ends = complete + max(state.backward - state.earlier for state in states.values())  # activations are gone
    step = complete + max(states[name].step - states[name].earlier for name in trained)
    words = f"{lengths.sequences} sequences of {tokens} tokens, {lengths.microbatches} microbatches a step"
    words += f", graphs of {held} tokens kept" if held > tokens else ""
    largest = max(starts, ends, step)
    how = (
        f"{words}: a backward pass {shown(starts)}, its end {shown(ends)}, an optimizer step {shown(step)}; the largest"
    )
    least = largest if lengths.certain else max(ends, step)
    return Item("activations and gradients", largest, how, on_gpu, least=least)


def held_tokens(config: TandemConfig, stage: str, lengths: Lengths) -> int:
    """Tokens of a rank whose graphs wait for the others': a reward model compares all texts of a batch. 0: none waits."""
    if stage == "reward_model":
        return lengths.tokens
    if stage in ("sft", "filtered_sft") or (stage == "ppo" and chosen_estimator(config.ppo).trains_at_once):
        return 0
    largest, most = sum(lengths.largest), config.learner.held_tokens
    return min(most, lengths.tokens if largest <= most else max(0, lengths.tokens - largest))
