"""Which scorers a run starts, and which reward models it needs for them."""

from collections.abc import Mapping
from typing import Any

from contracts.config import ScorerConfig, TandemConfig
from contracts.estimators import known_estimator
from contracts.lora_roles import role_model
from contracts.plugins import Kind, UnknownPlugin, find

SCORER_KINDS = Kind("scorer kind", "reward_service.kinds", "KIND")  # declarations: reward_service/scorer_kind.py
ROLES = ("proxy", "gold")  # what a run asks for: PPO trains on the first and is measured by the second
CHECKPOINTS = ("proxy_model", "gold_model")  # their reward models, as composites name them


def chosen_scorers(
    configured: dict[str, ScorerConfig], checkpoints: Mapping[str, str | None]
) -> dict[str, ScorerConfig]:
    """What the service runs for the roles of `checkpoints`: each is its reward model unless it is configured otherwise; a
    composite names the reward models of the roles `proxy_model` and `gold_model`. Nothing else is started, so a role whose
    reward model does not score (`scoring_models`) may have None for it."""
    models = {role: ScorerConfig(path=path) for role, path in checkpoints.items()}
    known = {**models, **{f"{role}_model": model for role, model in models.items()}, **configured}
    chosen: dict[str, ScorerConfig] = {}
    todo = list(checkpoints)
    while todo:
        name = todo.pop(0)
        if name in known and name not in chosen:
            chosen[name] = known[name]
            todo += known[name].parts
    return chosen


def has_gold(config: TandemConfig) -> bool:
    """Whether there is a judge that PPO never sees."""
    return config.data.gold is not None or config.gold_model is not None or "gold" in config.reward_service.scorers


def judges(config: TandemConfig) -> tuple[str, ...]:
    """The roles that this run asks for scores."""
    return ROLES if has_gold(config) else ROLES[:1]


def _chosen(config: TandemConfig) -> tuple[dict[str, ScorerConfig], dict[str, str]]:
    """The scorers of a run, with a stand-in for the path of each role's reward model."""
    stand_ins = {role: f"the reward model of {role}" for role in judges(config)}
    return chosen_scorers(config.reward_service.scorers, stand_ins), stand_ins


def scoring_models(config: TandemConfig) -> set[str]:
    """The roles whose reward models score, alone or in a composite. The other roles are configured without: a rule function
    needs neither a reward model nor preferences to train one on."""
    chosen, stand_ins = _chosen(config)
    paths = {entry.path for entry in chosen.values()}
    return {role for role, path in stand_ins.items() if path in paths}


def scored_by_a_model(config: TandemConfig) -> bool:
    """Whether a reward model scores: of a role, or another that the configuration names."""
    kinds = map(_kind, _chosen(config)[0].values())
    return any(kind is not None and kind.is_reward_model for kind in kinds)


def has_value_model(config: TandemConfig) -> bool:
    """Whether PPO's estimator, if it is known, has one."""
    estimator = known_estimator(config.ppo.estimator)
    return estimator is not None and estimator.has_value_model


def starts_value_model(config: TandemConfig) -> bool:
    """Whether PPO's value model starts from the reward model of the role proxy; else from the policy, where there is one."""
    chosen = config.ppo.init_value_from
    if not has_value_model(config):
        return False
    return "proxy" in scoring_models(config) if chosen is None else chosen == "reward_model"


def reward_model_origin(config: TandemConfig) -> str:
    """What the reward models that this run makes start from, as `ppo.init_from` has it: sft or base."""
    chosen = config.reward_model.init_from
    if chosen != "auto":
        return chosen
    adapters = any(role_model(config.model, role).lora for role in ("policy", "reward_model"))
    return "sft" if not adapters and (config.sft_model or config.data.sft.path) else "base"


def value_model_key(config: TandemConfig) -> str | None:
    """The key of the checkpoint that PPO's value model starts from; None where there is no value model."""
    if not has_value_model(config):
        return None
    policy = "sft_model" if config.ppo.init_from == "sft" else "model.path"
    given = "proxy_model" if starts_value_model(config) else policy
    return given if given != "model.path" and getattr(config, given) else "model.path"


def num_models(config: TandemConfig) -> int:
    """How many reward models PPO and evaluation start: each once, however many names it has."""
    chosen, _ = _chosen(config)
    return len(
        {entry.path or name for name, entry in chosen.items() if (kind := _kind(entry)) and kind.has_place(entry)}
    )


def _kind(entry: ScorerConfig) -> Any:
    try:
        return find(SCORER_KINDS, entry.kind)
    except UnknownPlugin:  # for `scorer_checks` to say
        return None
