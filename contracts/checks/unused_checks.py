"""Keys that are set and change nothing, as what reads them is off: whoever set them expects something of them."""

from typing import Any

from contracts.checks.check import Check, shown
from contracts.config import TandemConfig
from contracts.methods import LAST, checkpoints_read, method_stage, reads, runs, samples
from contracts.scorer_roles import ROLES, chosen_scorers
from contracts.stages import all_stages


def unused_checks(config: TandemConfig) -> list[Check]:
    curriculum, ppo, every = config.data.curriculum, config.ppo, config.evaluate.every
    checks = _checkpoint_checks(config) + (_scorer_checks(config) if samples(config) else [])
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


def _scorer_checks(config: TandemConfig) -> list[Check]:
    """Scorers beside a proxy of its own may be there to choose parts from."""
    scorers = config.reward_service.scorers
    idle = sorted(scorers.keys() - chosen_scorers(scorers, dict.fromkeys(ROLES)).keys())
    return [
        Check(
            "proxy" in scorers or not idle,
            "reward_service.scorers",
            "proxy, on which PPO trains, gold, or parts of these: nothing starts another",
            ", ".join(idle),
            f"reward_service.scorers.proxy in the place of {idle[0] if idle else ''}",
        )
    ]


def _checkpoint_checks(config: TandemConfig) -> list[Check]:
    """Of one that the stage itself makes; and of another method's stage where that of this method is not given: a model
    would be judged that nobody meant."""
    judged, read = method_stage(config), checkpoints_read(config)
    has_own = any(stage.name == judged and {*stage.checkpoint_keys.values()} & read.keys() for stage in all_stages())
    checks = []
    for stage in all_stages():
        is_anothers = runs(config, LAST) and stage.methods and config.method not in stage.methods and not has_own
        for key in filter(None, stage.checkpoint_keys.values()):
            if stage.name == config.stage:
                rule, instead = f"null with stage {config.stage}, which makes it", f"{key}=null, or stage=evaluate"
            elif is_anothers:
                rule = f"null with method {config.method}, whose model is judged: nothing reads it"
                instead = f"method={' or '.join(stage.methods)} as well"
            else:
                continue
            checks.append(Check(getattr(config, key) is None or key in read, key, rule, getattr(config, key), instead))
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
