"""What a run does: its stages, the results that they need, and the data and keys that it reads for them. `method` says what
a pipeline trains after SFT and judges against SFT. All of it is read off what the stages say of themselves.
"""

from dataclasses import replace

from contracts.config import PPOConfig, PreferenceConfig, TandemConfig
from contracts.estimators import known_estimator
from contracts.plugins import names
from contracts.preference_losses import PREFERENCE_LOSSES, find_preference_loss
from contracts.scorer_roles import scoring_models
from contracts.stages import Reading, Stage, all_stages, find_stage, method_titles

SOURCES = ("sft", "prompts", "preferences", "gold", "test", "eval_prompts")
LAST = "evaluate"  # of a pipeline
# Keys that matter to what samples, where it runs.
SAMPLING = ("environment", "engine", "reward_service", "data.max_prompt_tokens")


def method_title(method: str, estimator: str | None) -> str:
    """As a reader knows what was trained: PPO, GRPO, DPO, ... In the loop it is the estimator that has a name."""
    if method != "ppo":
        stage = find_stage(method) if ":" in method else None
        return stage.title if stage else method_titles().get(method, method)
    known = known_estimator(estimator or PPOConfig().estimator)
    return known.title if known else str(estimator).rpartition(":")[2]


def method_stage(config: TandemConfig) -> str | None:
    """The stage that trains the judged model; None where there is nothing to train."""
    known = [find_stage(config.method)] if ":" in config.method else all_stages()
    return next((s.name for s in known if s and s.name != LAST and config.method in s.methods), None)


def method_config(config: TandemConfig) -> TandemConfig:
    """With the seed of what comes after SFT."""
    return config if config.ppo.seed is None else replace(config, seed=config.ppo.seed)


def _with_origins(config: TandemConfig, *stages: str) -> list[Stage]:
    """These stages and those whose results they start from, in order; an evaluation starts from that of its method too."""
    found: dict[str, Stage] = {}
    left = list(stages)
    while left:
        stage = find_stage(left.pop())
        if stage is not None and stage.name not in found:
            found[stage.name] = stage
            trained = method_stage(config) if stage.name == LAST else None
            left += [*stage.origins(config), *([trained] if trained else [])]
    return sorted(found.values(), key=lambda stage: (stage.position, stage.name))


def stages_to_run(config: TandemConfig) -> list[str]:
    """The stages of this run, in order."""
    if config.stage != "pipeline":
        return [config.stage]
    return [stage.name for stage in _with_origins(config, LAST)]


def running_stages(config: TandemConfig) -> list[Stage]:
    """As `stages_to_run`, but what they say of themselves."""
    return [stage for name in stages_to_run(config) if (stage := find_stage(name))]


def runs(config: TandemConfig, stage: str) -> bool:
    return stage in stages_to_run(config)


def samples(config: TandemConfig) -> bool:
    """Whether a stage of this run does."""
    return any(stage.samples for stage in running_stages(config))


def checkpoints_read(config: TandemConfig) -> dict[str, str]:
    """The checkpoints that are given and that this run reads, by the key that names them."""
    stages = _with_origins(config, *stages_to_run(config))
    keys = [key for stage in stages if stage.name != config.stage for key in stage.checkpoint_keys.values() if key]
    return {key: path for key in keys if (path := getattr(config, key))}


def _needed(config: TandemConfig) -> list[tuple[Stage, str, str]]:
    """Stage, result and role of each result in `results_needed`, and of the stages of this run that have none."""
    stages = _with_origins(config, *stages_to_run(config))
    models = scoring_models(config).union(*(stage.roles(config) for stage in stages))
    found = []
    for stage in stages:
        for role, (name, key) in zip(stage.results, stage.checkpoint_keys.items(), strict=True):
            is_given = key is not None and getattr(config, key) is not None
            has_data = all(getattr(config.data, reading.source) for reading in stage.reads(config, role))
            if has_data and (stage.name == config.stage or (not is_given and (not role or role in models))):
                found.append((stage, name, role))
        if not stage.results and runs(config, stage.name):
            found.append((stage, "", ""))
    return found


def results_needed(config: TandemConfig) -> set[str]:
    """Results that this run makes, or looks up in the cache by their inputs: none that is given."""
    return {name for _, name, _ in _needed(config) if name}


def readings(config: TandemConfig) -> dict[str, Reading]:
    """The data sets that this run reads, by item."""
    return {reading.item: reading for stage, _, role in _needed(config) for reading in stage.reads(config, role)}


def sources_read(config: TandemConfig) -> set[str]:
    """The names under `data` that this run reads."""
    return {reading.source for reading in readings(config).values()}


def reads(config: TandemConfig, key: str) -> bool:
    """Whether the value of a key matters to this run. Those of a pipeline all do; a stage by itself reads what it uses, and
    what the results that it starts from were made of."""
    if config.stage == "pipeline" or find_stage(config.stage) is None or key == "ppo.seed":
        return True
    needed, running = [stage for stage, _, _ in _needed(config)], running_stages(config)
    read = {key for stage in [*needed, *running] for key in stage.keys}
    read |= {limit for reading in readings(config).values() for limit in reading.limits}
    read |= {key for stage in running for key in (*stage.keys_to_run(config), *(SAMPLING if stage.samples else ()))}
    read |= {f"data.{name}" for name in sources_read(config)}
    ours = all_stages()
    known = {key for stage in ours for key in (*stage.keys, *stage.keys_to_run(config))} | {
        f"data.{name}" for name in SOURCES
    }
    parts = key.split(".")
    prefixes = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return not prefixes.isdisjoint(read) or prefixes.isdisjoint({*known, *SAMPLING})


def chosen_preference(config: TandemConfig) -> PreferenceConfig:
    """The settings of stage preference with what is null filled in."""
    chosen = config.preference
    loss = chosen.loss or (config.method if config.method in names(PREFERENCE_LOSSES) else "dpo")
    paper = find_preference_loss(loss)
    return replace(
        chosen,
        loss=loss,
        beta=paper.beta if chosen.beta is None else chosen.beta,
        nll_coef=paper.nll_coef if chosen.nll_coef is None else chosen.nll_coef,
    )
