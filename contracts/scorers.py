"""Which scorers a run starts."""

from contracts.config import ScorerConfig, TandemConfig

ROLES = ("proxy", "gold")  # what a run asks for: PPO trains on the first and is measured by the second
CHECKPOINTS = ("proxy_model", "gold_model")  # their reward models, as composites name them


def chosen_scorers(configured: dict[str, ScorerConfig], checkpoints: dict[str, str]) -> dict[str, ScorerConfig]:
    """What the service runs for the roles of `checkpoints`: each is its reward model unless it is configured otherwise; a
    composite names the reward models of the roles `proxy_model` and `gold_model`. Nothing else is started."""
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
    return config.data.gold is not None or config.gold_model is not None


def num_models(config: TandemConfig) -> int:
    """How many reward models PPO and evaluation start."""
    checkpoints = {role: role for role in ROLES if role == "proxy" or has_gold(config)}
    chosen = chosen_scorers(config.reward_service.scorers, checkpoints)
    return len({entry.path for entry in chosen.values() if entry.kind == "model"})
