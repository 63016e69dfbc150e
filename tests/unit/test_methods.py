"""What a run makes and reads with each method: the stages, the data, the settings of stage preference."""

import pytest

from contracts.config import SourceConfig, TandemConfig
from contracts.methods import METHODS, chosen_preference, results_needed, sources_read, stages_to_run

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
    assert set(METHODS) == {"ppo", "dpo", "rank", "filtered_sft", "best_of_n", "none"}


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
