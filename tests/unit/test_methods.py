"""What a run makes and reads with each method: the stages, the data, the settings of stage preference."""

import pytest

from contracts.config import RoleLoraConfig, ScorerConfig, SourceConfig, TandemConfig
from contracts.methods import chosen_preference, results_needed, sources_read, stages_to_run
from contracts.scorer_roles import judges, num_models, reward_model_origin, starts_value_model
from contracts.stages import method_titles

JUDGES = {"reward_model/proxy", "reward_model/gold"}


def config_of(**values: object) -> TandemConfig:
    config = TandemConfig()
    config.data.gold = SourceConfig(path="gold.jsonl")
    for key, value in values.items():
        setattr(config, key, value)
    return config


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("ppo", ["ppo"]),
        ("dpo", ["preference"]),
        ("rank", ["preference"]),
        ("filtered_sft", ["filtered_sft"]),
        ("best_of_n", []),
        ("none", []),
    ],
)
def test_stages_of_a_pipeline(method: str, trained: list[str]) -> None:
    config = config_of(method=method)
    assert stages_to_run(config) == ["sft", "reward_model", *trained, "evaluate"]
    assert results_needed(config) == {"sft", *JUDGES, *trained}
    config.stage = "evaluate"  # takes the same from the cache
    assert results_needed(config) == {"sft", *JUDGES, *trained}


def test_every_method_is_tested() -> None:
    assert set(method_titles()) == {"ppo", "dpo", "rank", "filtered_sft", "best_of_n", "none"}


@pytest.mark.parametrize(
    ("values", "read"),
    [
        ({}, {"sft", "prompts", "preferences", "gold", "test", "eval_prompts"}),
        ({"method": "dpo"}, {"sft", "preferences", "gold", "test", "eval_prompts"}),
        ({"stage": "preference"}, {"sft", "preferences", "test"}),
        ({"stage": "preference", "sft_model": "x"}, {"preferences", "test"}),
        # What is named must not be made: a stage that is asked for is made all the same.
        ({"stage": "preference", "sft_model": "x", "preference_model": "y"}, {"preferences", "test"}),
        ({"stage": "filtered_sft", "sft_model": "x"}, {"preferences"}),
        ({"stage": "sft"}, {"sft"}),
        (
            {"stage": "evaluate", "method": "dpo", "preference_model": "x", "proxy_model": "p", "gold_model": "g"},
            {"sft", "eval_prompts"},
        ),
        (
            {"method": "rank", "sft_model": "s", "proxy_model": "p", "gold_model": "g"},
            {"preferences", "test", "eval_prompts"},
        ),
    ],
)
def test_sources_that_are_read(values: dict[str, str], read: set[str]) -> None:
    assert sources_read(config_of(**values)) == read


RULE = ScorerConfig(kind="function", function="rules.py:brevity")
PARTS = ScorerConfig(kind="weighted_sum", parts=["proxy_model", "brevity"], weights=[1.0, 0.1])


@pytest.mark.parametrize(
    ("values", "scorers", "needed", "read"),
    [
        ({}, {"proxy": RULE}, {"sft", "ppo"}, {"sft", "prompts", "eval_prompts"}),
        ({"stage": "ppo", "sft_model": "s"}, {"proxy": RULE}, {"ppo"}, {"prompts"}),
        ({"stage": "evaluate"}, {"proxy": RULE}, {"sft", "ppo"}, {"sft", "prompts", "eval_prompts"}),
        ({"method": "best_of_n"}, {"proxy": RULE}, {"sft"}, {"sft", "eval_prompts"}),
        # What is asked for is made all the same, and so is what another method learns from.
        ({"stage": "reward_model"}, {"proxy": RULE}, {"reward_model/proxy"}, {"preferences", "test"}),
        (
            {"method": "dpo"},
            {"proxy": RULE},
            {"sft", "preference"},
            {"sft", "preferences", "test", "eval_prompts"},
        ),
        (
            {"stage": "reward_model", "reward_init": "sft"},
            {"proxy": RULE},
            {"sft", "reward_model/proxy"},
            {"sft", "preferences", "test"},
        ),
        (
            {"stage": "reward_model", "reward_init": "sft", "sft_model": "s"},
            {"proxy": RULE},
            {"reward_model/proxy"},
            {"preferences", "test"},
        ),
        # Beside a reward model, or with a value model that starts from one.
        (
            {"stage": "ppo"},
            {"proxy": PARTS, "brevity": RULE},
            {"sft", "reward_model/proxy", "ppo"},
            {"sft", "prompts", "preferences", "test"},
        ),
        (
            {"stage": "ppo", "init_value_from": "reward_model"},
            {"proxy": RULE},
            {"sft", "reward_model/proxy", "ppo"},
            {"sft", "prompts", "preferences", "test"},
        ),
        (
            {"stage": "ppo", "init_value_from": "reward_model", "estimator": "grpo"},
            {"proxy": RULE},
            {"sft", "ppo"},
            {"sft", "prompts"},
        ),
        # The judge of a run may be a rule too; `gold` then trains nothing.
        ({"gold": "g.jsonl"}, {"proxy": RULE, "gold": RULE}, {"sft", "ppo"}, {"sft", "prompts", "eval_prompts"}),
        (
            {"gold": "g.jsonl"},
            {"proxy": RULE},
            {"sft", "reward_model/gold", "ppo"},
            {"sft", "prompts", "gold", "test", "eval_prompts"},
        ),
    ],
)
def test_rules_need_no_reward_model(
    values: dict[str, str], scorers: dict[str, ScorerConfig], needed: set[str], read: set[str]
) -> None:
    ppo = {key: values[key] for key in ("init_value_from", "estimator") if key in values}
    beside = (*ppo, "gold", "reward_init")
    config = config_of(**{key: value for key, value in values.items() if key not in beside})
    config.reward_model.init_from = values.get("reward_init", "base")
    config.data.gold = SourceConfig(path=values["gold"]) if "gold" in values else None
    for key, value in ppo.items():
        setattr(config.ppo, key, value)
    config.reward_service.scorers = scorers
    assert results_needed(config) == needed
    assert sources_read(config) == read


def test_reward_models_that_are_placed() -> None:
    config = config_of()
    assert (judges(config), num_models(config)) == (("proxy", "gold"), 2)
    config.reward_service.scorers = {"proxy": RULE}
    assert (judges(config), num_models(config)) == (("proxy", "gold"), 1)
    config.data.gold = None
    assert (judges(config), num_models(config)) == (("proxy",), 0)
    config.reward_service.scorers["gold"] = RULE
    assert (judges(config), num_models(config)) == (("proxy", "gold"), 0)


@pytest.mark.parametrize(
    ("chosen", "given", "texts", "adapted", "origin"),
    [
        ("base", "my/sft", "sft.jsonl", None, "base"),
        ("sft", None, "", None, "sft"),
        ("auto", None, "sft.jsonl", None, "sft"),
        ("auto", "my/sft", "", None, "sft"),
        ("auto", None, "", None, "base"),  # preferences alone are what there is
        ("auto", "my/sft", "sft.jsonl", "policy", "base"),
        ("auto", "my/sft", "sft.jsonl", "reward_model", "base"),
        ("auto", "my/sft", "sft.jsonl", "value_model", "sft"),
    ],
)
def test_what_reward_models_start_from(
    chosen: str, given: str | None, texts: str, adapted: str | None, origin: str
) -> None:
    config = config_of(stage="reward_model")
    config.reward_model.init_from, config.sft_model, config.data.sft.path = chosen, given, texts
    if adapted:
        setattr(config.model.lora_by_role, adapted, RoleLoraConfig(rank=8))
    assert reward_model_origin(config) == origin
    assert ("sft" in sources_read(config)) == (origin == "sft" and given is None)


@pytest.mark.parametrize(
    ("scorers", "chosen", "starts"),
    [
        ({}, None, True),
        ({}, "policy", False),
        ({"proxy": RULE}, None, False),
        ({"proxy": RULE}, "reward_model", True),
        ({"proxy": PARTS, "brevity": RULE}, None, True),
    ],
)
def test_what_the_value_model_starts_from(scorers: dict[str, ScorerConfig], chosen: str | None, starts: bool) -> None:
    config = config_of()
    config.reward_service.scorers, config.ppo.init_value_from = scorers, chosen
    assert starts_value_model(config) is starts
    config.ppo.estimator = "rloo"
    assert not starts_value_model(config)


def test_ptx_reads_the_texts_of_sft() -> None:
    config = config_of(stage="ppo", sft_model="s", proxy_model="p", gold_model="g")
    assert sources_read(config) == {"prompts"}
    config.ppo.ptx_coef = 0.1
    assert sources_read(config) == {"prompts", "sft"}


@pytest.mark.parametrize(
    ("method", "loss", "beta", "chosen"),
    [
        ("ppo", None, None, ("dpo", 0.1)),
        ("ppo", "rank", None, ("rank", 2.0)),
        ("rank", None, None, ("rank", 2.0)),
        ("dpo", None, 0.3, ("dpo", 0.3)),
    ],
)
def test_the_loss_follows_the_method(
    method: str, loss: str | None, beta: float | None, chosen: tuple[str, float]
) -> None:
    config = config_of(method=method)
    config.preference.loss, config.preference.beta = loss, beta
    found = chosen_preference(config)
    assert (found.loss, found.beta) == chosen
    assert config.preference.loss == loss  # a copy
