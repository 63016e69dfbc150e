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
from contracts.config import LoraConfig, TandemConfig
from contracts.lora_roles import Role, role_model, shares_base
from learner.engine import TrainEngine, frozen
from learner.models import Adapter, PolicyModel, ScalarModel, freeze_below, load_policy, load_scalar
from learner.ranks import Ranks


def trained_policy(
    path: str,
    config: TandemConfig,
    ranks: Ranks,
    trainable_layers: int | None,
    has_dropout: bool = False,
    has_reference: bool = False,
) -> PolicyModel:
    """The policy at `path`, of which the top layers train (None: all).

    Args:
        has_dropout: that of its adapters counts: every graph is built once, so that it changes no comparison.
        has_reference: keep what it starts from, as `Reference` needs it.
    """
    mine = role_model(config.model, "policy")
    model = load_policy(path, mine, config.learner, ranks.on_cpu)
    if mine.lora is None:
        freeze_below(model.lm, trainable_layers, freeze_embeddings=False)
    else:
        _adapt(model, path, config, mine.lora, trainable_layers, config.seed, has_dropout, has_reference)
    return model


def trained_scalar(
    path: str,
    config: TandemConfig,
    ranks: Ranks,
    role: Role,
    trainable_layers: int | None,
    freeze_embeddings: bool = False,
    base: PolicyModel | None = None,
) -> ScalarModel:
    """As `trained_policy`, of a reward model or PPO's value model. `base` is as in `load_scalar`."""
    mine = role_model(config.model, role)
    model = load_scalar(path, mine, config.learner, ranks.on_cpu, config.seed, base)
    if mine.lora is None:
        freeze_below(model.lm, trainable_layers, freeze_embeddings)
        return model
    _adapt(model, path, config, mine.lora, trainable_layers, config.seed + 1, has_dropout=role == "reward_model")
    model.lm.score.weight.requires_grad_(True)
    return model


def trained_pair(
    policy: str, value: str | None, config: TandemConfig, ranks: Ranks
) -> tuple[PolicyModel, ScalarModel | None]:
    """Policy and value model of PPO, which starts from `value` (None: there is none); on one base where both have
    adapters."""
    ppo, mine = config.ppo, role_model(config.model, "policy")
    layers, value_layers = ppo.trainable_layers, ppo.value_trainable_layers
    if value is None:
        return trained_policy(policy, config, ranks, layers, has_reference=True), None
    if mine.lora is None or not shares_base(config.model):
        model = trained_policy(policy, config, ranks, layers, has_reference=True)
        return model, trained_scalar(value, config, ranks, "value_model", value_layers)
    model = load_policy(policy, mine, config.learner, ranks.on_cpu)
    # Before the policy's layers are replaced by PEFT's.
    scalar = trained_scalar(value, config, ranks, "value_model", value_layers, base=model)
    _adapt(model, policy, config, mine.lora, layers, config.seed, has_reference=True)
    return model, scalar


@torch.no_grad()
def _adapt(
    model: PolicyModel | ScalarModel,
    path: str,
    config: TandemConfig,
    lora: LoraConfig,
    top: int | None,
    seed: int,
    has_dropout: bool = False,
    has_reference: bool = False,
) -> None:
    """Put a new adapter on the targets in the top layers, and that of the directory `path`, if it is one, where it was. In
    the layers below it stays as it is."""
    (base, adapter), layers = split(path), decoder_layers(model.lm)
    if top is not None and not 0 <= top <= len(layers):
        raise ValueError(f"trainable_layers is {top}, the model has {len(layers)}: write 0..{len(layers)}")
    tensors = read_tensors(adapter) if adapter else {}
    old = modules_in(tensors)
    modules = list(dict.fromkeys([*old, *target_modules(model.lm, lora, top)]))
    model.lm.requires_grad_(False)
    if modules:
        add_adapter(model.lm, lora, modules, seed, dropout=lora.dropout if has_dropout else 0.0)
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
    mine = role_model(config.model, "policy")
    if mine.lora is None:
        return frozen(load_policy(path, mine, config.learner, ranks.on_cpu), config.learner, ranks)
    return Reference(engine)


class Reference:
    """The policy with the adapter that it started from in place of the one that trains, or with none."""

    def __init__(self, engine: TrainEngine):
        self._engine = engine

    def __call__(self, *args: Any) -> Any:
        with counting(self._engine.model.lm, REFERENCE):
            return self._engine(*args)
