"""Models as a stage trains them: in full (or their top layers), or with LoRA as adapters and heads on a frozen base.

A rank holds one base. The classifier of transformers around it, which is the value model, has the policy's own tensors in
its backbone; the reference is the policy while another adapter counts, or none. Adapters and heads alone are trained,
published and saved.
"""

from pathlib import Path
from typing import Any

import torch

from common.files.fingerprints import MEMORY, checkpoint_fingerprint
from common.models.adapters import HEAD, fill, modules_in, read_tensors, split
from common.models.forward import decoder_layers
from common.models.lora import REFERENCE, add_adapter, counting, target_modules
from contracts.config import TandemConfig
from learner.engine import TrainEngine, frozen
from learner.models import Adapter, PolicyModel, ScalarModel, freeze_below, load_policy, load_scalar
from learner.ranks import Ranks

DROPS = ("sft", "reward_model")  # tasks in which every graph is built once, so that dropout changes no comparison


def trained_policy(
    path: str,
    config: TandemConfig,
    ranks: Ranks,
    trainable_layers: int | None,
    task: str = "",
    has_reference: bool = False,
) -> PolicyModel:
    """The policy at `path`, of which the top layers train (None: all).

    Args:
        task: in `DROPS` where `model.lora.dropout` counts.
        has_reference: keep what it starts from, as `Reference` needs it.
    """
    model = load_policy(path, config.model, config.learner, ranks.on_cpu)
    if config.model.lora is None:
        freeze_below(model.lm, trainable_layers, freeze_embeddings=False)
    else:
        _adapt(model, path, config, trainable_layers, config.seed, task, has_reference)
    return model


def trained_scalar(
    path: str,
    config: TandemConfig,
    ranks: Ranks,
    trainable_layers: int | None,
    freeze_embeddings: bool = False,
    task: str = "",
    base: PolicyModel | None = None,
) -> ScalarModel:
    """As `trained_policy`. `base` is as in `load_scalar`."""
    model = load_scalar(path, config.model, config.learner, ranks.on_cpu, config.seed, base)
    if config.model.lora is None:
        freeze_below(model.lm, trainable_layers, freeze_embeddings)
        return model
    _adapt(model, path, config, trainable_layers, config.seed + 1, task)
    model.lm.score.weight.requires_grad_(True)
    return model


def trained_pair(
    policy: str, value: str | None, config: TandemConfig, ranks: Ranks
) -> tuple[PolicyModel, ScalarModel | None]:
    """Policy and value model of PPO, which starts from `value` (None: there is none); with LoRA on one base."""
    ppo = config.ppo
    if config.model.lora is None or value is None:
        model = trained_policy(policy, config, ranks, ppo.trainable_layers, has_reference=True)
        return model, None if value is None else trained_scalar(value, config, ranks, ppo.value_trainable_layers)
    model = load_policy(policy, config.model, config.learner, ranks.on_cpu)
    # Before the policy's layers are replaced by PEFT's.
    scalar = trained_scalar(value, config, ranks, ppo.value_trainable_layers, base=model)
    _adapt(model, policy, config, ppo.trainable_layers, config.seed, has_reference=True)
    return model, scalar


@torch.no_grad()
def _adapt(
    model: PolicyModel | ScalarModel,
    path: str,
    config: TandemConfig,
    top: int | None,
    seed: int,
    task: str = "",
    has_reference: bool = False,
) -> None:
    """Put a new adapter on the targets in the top layers, and that of the directory `path`, if it is one, where it was. In
    the layers below it stays as it is."""
    lora, (base, adapter), layers = config.model.lora, split(path), decoder_layers(model.lm)
    assert lora is not None
    if top is not None and not 0 <= top <= len(layers):
        raise ValueError(f"trainable_layers is {top}, the model has {len(layers)}: write 0..{len(layers)}")
    tensors = read_tensors(adapter) if adapter else {}
    old = modules_in(tensors)
    modules = list(dict.fromkeys([*old, *target_modules(model.lm, lora, top)]))
    model.lm.requires_grad_(False)
    if modules:
        add_adapter(model.lm, lora, modules, seed, dropout=lora.dropout if task in DROPS else 0.0)
        fill(model.lm, tensors, path)
    if old and has_reference:
        add_adapter(model.lm, lora, old, seed, REFERENCE)
        fill(model.lm, tensors, path, REFERENCE)
    for layer in layers[: len(layers) - (len(layers) if top is None else top)]:
        layer.requires_grad_(False)
    if isinstance(model, ScalarModel) and f"{HEAD}.weight" in tensors:
        model.lm.score.weight.copy_(tensors[f"{HEAD}.weight"])
    model.adapter = Adapter(lora, base, checkpoint_fingerprint(base, memory=Path(config.cache_dir) / MEMORY))


def reference_of(engine: TrainEngine, path: str, config: TandemConfig, ranks: Ranks) -> Any:
    """What gives log-probabilities as the policy at `path` does, whatever `engine` has learnt since."""
    if config.model.lora is None:
        return frozen(load_policy(path, config.model, config.learner, ranks.on_cpu), config.learner, ranks)
    return Reference(engine)


class Reference:
    """The policy with the adapter that it started from in place of the one that trains, or with none."""

    def __init__(self, engine: TrainEngine):
        self._engine = engine

    def __call__(self, *args: Any) -> Any:
        with counting(self._engine.model.lm, REFERENCE):
            return self._engine(*args)
