"""Checkpoints of a run with and without `model.lora`: which may be adapters, and of which base."""

from pathlib import Path

from common.files.fingerprints import MEMORY, checkpoint_fingerprint
from common.models.adapters import is_adapter, misfit, split
from common.models.loading import refuse_adapter
from contracts.checks.check import Check
from contracts.config import TandemConfig
from contracts.methods import runs
from contracts.scorer_roles import CHECKPOINTS, starts_value_model


def adapter_problems(config: TandemConfig, key: str, path: str) -> list[str]:
    """What is wrong with the checkpoint at `path`, which the configuration names at `key`, as an adapter or as none.

    With `model.lora` whatever trains lies on `model.path`. What only scores may be a whole model or an adapter of any base.

    Raises:
        LoadingError: it cannot be read, or its base is not there.
        OSError, ValueError: there is no such checkpoint.
    """
    lora, base = config.model.lora, config.model.path
    trains = key not in CHECKPOINTS or (key == "proxy_model" and runs(config, "ppo") and starts_value_model(config))
    if key == "model.path":
        if not is_adapter(path):
            return []
        rule, instead = "a whole model", f"model.path={split(path)[0]} sft_model={path} with its model.lora"
        return [Check(False, f"{key}={path}", rule, "an adapter of PEFT", instead).message]
    if not trains:
        split(path)
        return []
    if lora is None:
        refuse_adapter(path, key)
        return []
    memory = Path(config.cache_dir) / MEMORY
    if is_adapter(path):
        split(path)
        found = misfit(path, key, base, lora, memory)
        return [found] if found else []
    if checkpoint_fingerprint(path, memory=memory) == checkpoint_fingerprint(base, memory=memory):
        return []
    rule = f"an adapter of model.path={base}, or that checkpoint itself, with model.lora"
    instead = f"model.path={path} as well, or model.lora=null"
    if key == "proxy_model":
        instead = "ppo.init_value_from=policy, or model.lora=null"
    return [Check(False, f"{key}={path}", rule, "another whole model", instead).message]
