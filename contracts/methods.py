"""What a pipeline trains after SFT and judges against SFT: the methods behind the key `method`."""

from dataclasses import replace
from typing import NamedTuple

from contracts.config import PPOConfig, PreferenceConfig, TandemConfig
from contracts.estimators import known_estimator
from contracts.plugins import names
from contracts.preference_losses import PREFERENCE_LOSSES, find_preference_loss
from contracts.scorer_roles import scoring_models, starts_value_model


class Method(NamedTuple):
    title: str
    stage: str | None  # trains the judged model; None: there is nothing to train


METHODS = {
    "ppo": Method("PPO", "ppo"),
    **{loss: Method(find_preference_loss(loss).title, "preference") for loss in names(PREFERENCE_LOSSES)},
    "filtered_sft": Method("Filtered SFT", "filtered_sft"),
    "best_of_n": Method("Best of n", None),
    "none": Method("SFT alone", None),
}
STAGES = ("sft", "reward_model", "ppo", "preference", "filtered_sft", "evaluate")
SOURCES = ("sft", "prompts", "preferences", "gold", "test", "eval_prompts")
# Whose results a stage starts from; evaluation needs those of its method too.
NEEDS = {
    "ppo": ("sft", "reward_model"),
    "preference": ("sft",),
    "filtered_sft": ("sft",),
    "evaluate": ("sft", "reward_model"),
}
# Keys that name a checkpoint to use instead of running the stage that makes it.
GIVEN = {
    "sft": "sft_model",
    "reward_model/proxy": "proxy_model",
    "reward_model/gold": "gold_model",
    "ppo": "ppo_model",
    "preference": "preference_model",
    "filtered_sft": "filtered_sft_model",
}


def method_title(method: str, estimator: str | None) -> str:
    """As a reader knows what was trained: PPO, GRPO, DPO, ... In the loop it is the estimator that has a name."""
    if method != "ppo":
        return METHODS[method].title if method in METHODS else method
    known = known_estimator(estimator or PPOConfig().estimator)
    return known.title if known else str(estimator).rpartition(":")[2]


def method_stage(config: TandemConfig) -> str | None:
    return METHODS[config.method].stage if config.method in METHODS else None


def stages_to_run(config: TandemConfig) -> list[str]:
    """The stages of this run, in order."""
    if config.stage != "pipeline":
        return [config.stage]
    trained = method_stage(config)
    return ["sft", "reward_model", *([trained] if trained else []), "evaluate"]


def runs(config: TandemConfig, stage: str) -> bool:
    return stage in stages_to_run(config)


def _stages_involved(config: TandemConfig) -> set[str]:
    """The stages of this run and those whose results they start from."""
    stages = set(stages_to_run(config))
    if "evaluate" in stages and (trained := method_stage(config)):
        stages.add(trained)
    return stages.union(*(NEEDS.get(stage, ()) for stage in stages))


def checkpoints_read(config: TandemConfig) -> dict[str, str]:
    """The checkpoints that are given and that this run reads, by the key that names them."""
    stages = _stages_involved(config)
    keys = [key for name, key in GIVEN.items() if (stage := name.split("/")[0]) in stages and stage != config.stage]
    return {key: path for key in keys if (path := getattr(config, key))}


def results_needed(config: TandemConfig) -> set[str]:
    """Results (keys of GIVEN) that this run makes, or looks up in the cache by their inputs: none that is given."""
    stages = _stages_involved(config)

    models = scoring_models(config) | ({"proxy"} if "ppo" in stages and starts_value_model(config) else set())

    def is_needed(name: str) -> bool:
        stage, _, role = name.partition("/")
        if config.stage == stage:
            return True
        return stage in stages and getattr(config, GIVEN[name]) is None and (not role or role in models)

    needed = {name for name in GIVEN if is_needed(name)}
    return needed if config.data.gold is not None else needed - {"reward_model/gold"}


def sources_read(config: TandemConfig) -> set[str]:
    """The names under `data` that this run reads."""
    needed = results_needed(config)
    readers = {
        "sft": {"sft", *(["ppo"] if config.ppo.ptx_coef > 0 else [])},
        "prompts": {"ppo"},
        "preferences": {"reward_model/proxy", "preference", "filtered_sft"},
        "gold": {"reward_model/gold"},
        "test": {"reward_model/proxy", "reward_model/gold", "preference"},
    }
    read = {name for name, results in readers.items() if results & needed}
    return read | ({"eval_prompts"} if runs(config, "evaluate") else set())


def reads(config: TandemConfig, key: str) -> bool:
    """Whether the value of a key matters to this run. Those of a pipeline all do; a stage by itself reads what it uses, and
    what the results that it starts from were made of."""
    if config.stage not in STAGES:
        return True
    needed, stages = results_needed(config), stages_to_run(config)
    samples, evaluates = "ppo" in stages or "evaluate" in stages, "evaluate" in stages
    scores = any(name.startswith("reward_model") for name in needed)
    read = {
        "sft": bool({"sft", "filtered_sft"} & needed) or ("ppo" in needed and config.ppo.ptx_coef > 0),
        "reward_model": scores,
        "preference": "preference" in needed,
        "ppo": "ppo" in needed,
        "ppo.seed": True,  # of whatever the method trains or samples
        "checkpoint": "ppo" in stages,
        "environment": samples,
        "evaluate": evaluates,
        "evaluate.bootstrap_samples": evaluates or scores or "preference" in needed,
        "engine": samples,
        "reward_service": samples,
        "data.max_prompt_tokens": samples,
        **{f"data.{name}": name in sources_read(config) for name in SOURCES},
    }
    parts = key.split(".")
    known = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((read[prefix] for prefix in known if prefix in read), True)


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
