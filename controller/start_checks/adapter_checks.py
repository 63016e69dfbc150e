"""Checkpoints of a run with and without adapters: which may be adapters, and of which base."""

from pathlib import Path

from common.files.fingerprints import MEMORY, checkpoint_fingerprint
from common.models.adapters import is_adapter, misfit, split
from common.models.loading import refuse_adapter
from contracts.checks.check import Check
from contracts.config import TandemConfig
from contracts.lora_roles import Role, role_model, shares_base, without_lora
from contracts.methods import runs
from contracts.scorer_roles import CHECKPOINTS, has_value_model, starts_value_model


def adapter_problems(config: TandemConfig, key: str, path: str) -> list[str]:
    """What is wrong with the checkpoint at `path`, which the configuration names at `key`, as an adapter or as none.

    What trains with adapters lies on `model.path`, but for a value model beside a policy that trains itself. What only
    scores may be a whole model or an adapter of any base.

    Raises:
        LoadingError: it cannot be read, or its base is not there.
        OSError, ValueError: there is no such checkpoint.
    """
    if key == "model.path":
        if not is_adapter(path):
            return []
        rule, instead = "a whole model", f"model.path={split(path)[0]} sft_model={path} with its model.lora"
        return [Check(False, f"{key}={path}", rule, "an adapter of PEFT", instead).message]
    roles = _roles(config, key)
    if not roles:
        split(path)
    problems = (_role_problem(config, key, path, role) for role in roles)
    return list(dict.fromkeys(problem for problem in problems if problem))


def _roles(config: TandemConfig, key: str) -> list[Role]:
    """Which models go on from the checkpoint that `key` names, or are served in its place."""
    has_value = runs(config, "ppo") and has_value_model(config)
    from_reward_model = starts_value_model(config)
    if key in CHECKPOINTS:
        return ["value_model"] if key == "proxy_model" and has_value and from_reward_model else []
    is_start = key == f"{config.ppo.init_from}_model" and has_value and not from_reward_model
    return ["policy", "value_model"] if is_start else ["policy"]


def _role_problem(config: TandemConfig, key: str, path: str, role: Role) -> str | None:
    base = config.model.path
    if role_model(config.model, role).lora is None:
        refuse_adapter(path, key)
        return None
    memory = Path(config.cache_dir) / MEMORY
    if is_adapter(path):
        split(path)
        return misfit(path, key, config.model, memory, role)
    is_alone = role == "value_model" and not shares_base(config.model)
    if is_alone or checkpoint_fingerprint(path, memory=memory) == checkpoint_fingerprint(base, memory=memory):
        return None
    rule = f"an adapter of model.path={base}, or that checkpoint itself, with model.lora"
    instead = "ppo.init_value_from=policy" if key == "proxy_model" else f"model.path={path} as well"
    instead += f", or {without_lora(config.model, role)}"
    return Check(False, f"{key}={path}", rule, "another whole model", instead).message
