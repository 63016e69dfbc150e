"""Keys that are set and change nothing, as what reads them is off: whoever set them expects something of them."""

from typing import Any

from contracts.checks.check import Check, shown
from contracts.config import TandemConfig
from contracts.methods import method_stage, reads, runs


def unused_checks(config: TandemConfig) -> list[Check]:
    curriculum, ppo, every = config.data.curriculum, config.ppo, config.evaluate.every
    checks: list[Check] = []
    if reads(config, "ppo"):
        checks += _unread("data.curriculum", curriculum, ["order"], "column", ", a column of the rows")
        checks += _unread("ppo.overlong", ppo.overlong, ["penalty"], "buffer_tokens", ", for example 16")
        names = ["learning_rate", "initial", "max"]
        checks += _unread("ppo.combined", ppo.combined, names, "target", ", for example 0.5")
    if reads(config, "evaluate"):
        checks.append(
            Check(
                every is None or runs(config, "ppo") or method_stage(config) == "ppo",
                "evaluate.every",
                f"null with method {config.method}, which has no policy versions: it is PPO's loop that asks so often",
                every,
                "evaluate.every=null, or method=ppo",
            )
        )
    return checks


def _unread(prefix: str, section: Any, names: list[str], switch: str, on: str) -> list[Check]:
    """Of keys that only what `switch` switches on reads."""
    default, is_on = type(section)(), getattr(section, switch) is not None
    return [
        Check(
            is_on or getattr(section, name) == getattr(default, name),
            f"{prefix}.{name}",
            f"{shown(getattr(default, name))} (the default) where {prefix}.{switch} is null: nothing reads it",
            getattr(section, name),
            f"{prefix}.{switch} as well{on}",
        )
        for name in names
    ]
