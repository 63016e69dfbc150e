"""Pass@k by hand and against a count of all subsets."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contracts.checks.validation import ConfigError, validate
from contracts.config import DataConfig, EvaluateConfig, ModelConfig, SourceConfig, TandemConfig
from contracts.records import Completion, Prompt, Rollout, Score, row_text
from controller.data.inputs import Inputs
from controller.data.kept_columns import source_of
from controller.evaluation.judging import Judged, summarize
from controller.evaluation.pass_at import pass_at, rates, summary
from controller.pipeline.summary import summary_rows
from controller.record.evaluation import evaluation_metrics, measured_passes
from controller.record.reader import load
from controller.report.run_page import run_page
from controller.start_checks.amounts import check_amounts
from tests.unit.test_report import invented_evaluation, write_run

SOURCES = ("sft", "prompts", "preferences", "test", "eval_prompts")
OPTIONS = {"samples": 200, "seed": 3}


def rollout(number: int, value: float | None, source: Any = None, index: int = 0) -> Rollout:
    ids = np.arange(3, dtype=np.int32)
    completion = Completion(ids, np.zeros(3, dtype=np.float32), ids, "stop", "fine")
    row = None if source is None else row_text({"source": source})
    return Rollout((0, number, index), Prompt(number, "2 + 2 =", (7,), row), completion, {"proxy": Score(value)})


def group(number: int, values: list[float | None], source: Any = None) -> list[Rollout]:
    return [rollout(number, value, source, index) for index, value in enumerate(values)]


def chosen(**evaluate: Any) -> TandemConfig:
    """The defaults with the paths that have none."""
    paths = {source: SourceConfig(path=f"{source}.jsonl") for source in SOURCES}
    data = DataConfig(**paths, gold=SourceConfig(path="gold.jsonl"))  # type: ignore[arg-type]
    model = ModelConfig(path="model")
    return TandemConfig(run_dir="run", cache_dir="cache", model=model, data=data, evaluate=EvaluateConfig(**evaluate))


@pytest.mark.parametrize(
    ("sampled", "right", "k", "value"),
    [
        (5, 2, 2, 0.7),  # 1 - C(3, 2) / C(5, 2) = 1 - 3 / 10
        (5, 2, 1, 0.4),
        (4, 1, 4, 1.0),
        (4, 0, 4, 0.0),
        (3, 3, 1, 1.0),
        (10, 1, 3, 0.3),  # 1 - C(9, 3) / C(10, 3) = 1 - 84 / 120
    ],
)
def test_pass_at_k_by_hand(sampled: int, right: int, k: int, value: float) -> None:
    assert pass_at(sampled, right, k) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("sampled", [1, 4, 7])
def test_pass_at_k_is_the_share_of_all_subsets(sampled: int) -> None:
    for right in range(sampled + 1):
        for k in range(1, sampled + 1):
            subsets = [*combinations(range(sampled), k)]
            share = sum(min(subset) < right for subset in subsets) / len(subsets)
            assert pass_at(sampled, right, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_of_many_completions_is_finite() -> None:
    """C(100000, 50000) is no float. One right one is in half of the halves."""
    assert pass_at(100_000, 1, 50_000) == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize(("sampled", "right", "k"), [(3, 1, 4), (3, 4, 1), (3, 1, 0)])
def test_what_is_no_pass_at_k_is_refused(sampled: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match="needs"):
        pass_at(sampled, right, k)


def test_completions_without_a_score_count_neither_way() -> None:
    config = EvaluateConfig(success=1.0, samples=3, pass_at=[1, 2, 3])
    found = rates([group(0, [1.0, 0.0, 0.999]), group(1, [1.5, None, 0.0]), group(2, [None, None, 1.0])], config)
    np.testing.assert_allclose(found[1], [1 / 3, 1 / 2, 1.0])
    np.testing.assert_allclose(found[2], [2 / 3, 1.0, np.nan])  # the third prompt has one scored completion
    np.testing.assert_allclose(found[3], [1.0, np.nan, np.nan])


def test_sources_have_their_own_accuracy() -> None:
    config = EvaluateConfig(success=1.0, by="source")
    groups = [group(0, [1.0], "easy"), group(1, [1.0], "easy"), group(2, [0.0], 7), group(3, [0.0], None)]
    prompts = [g[0].prompt for g in groups]
    found = summary(rates(groups, config), prompts, config, OPTIONS)
    assert {name: row["mean"] for name, row in found.items()} == {
        "pass_at_1": 0.5,
        "pass_at_1/7": 0.0,
        "pass_at_1/easy": 1.0,
        "pass_at_1/none": 0.0,
    }
    assert found["pass_at_1"]["low"] < 0.5 < found["pass_at_1"]["high"]
    assert np.isnan(found["pass_at_1/7"]["low"])  # of one prompt nothing more is known
    assert [source_of(p, "source") for p in prompts] == ["easy", "easy", "7", "none"]


def judged(values: list[list[float]], source: list[str]) -> Judged:
    """A model that answered prompt i with the scores values[i]."""
    groups = [group(number, [*row], source[number]) for number, row in enumerate(values)]
    first, *others = (list(column) for column in zip(*groups, strict=True))
    return Judged(first, np.zeros(len(first)), others=others)


def test_the_evaluation_has_it_of_every_model_and_paired() -> None:
    config = TandemConfig()
    config.evaluate = EvaluateConfig(success=1.0, samples=2, pass_at=[1, 2], by="source", bootstrap_samples=2000)
    source = ["a", "a", "b"]
    both = {
        "ppo": judged([[1, 1], [0, 1], [0, 1]], source),  # pass@1 2/3, pass@2 1
        "sft": judged([[0, 1], [0, 0], [0, 0]], source),  # pass@1 1/6, pass@2 1/3
    }
    result = summarize(both, ["proxy"], config)
    ppo, against = result["models"]["ppo"], result["comparisons"]["ppo_vs_sft"]
    assert [ppo[name]["mean"] for name in measured_passes(ppo)] == pytest.approx([2 / 3, 1, 0.75, 1, 0.5, 1])
    assert measured_passes(ppo) == [f"pass_at_{k}{of}" for of in ("", "/a", "/b") for k in (1, 2)]
    assert against["pass_at_1_gain"]["mean"] == pytest.approx(0.5)
    # Each of the three prompts gains 0.5: three cannot show that none would lose 1 (`statistics.bootstrap_mean`).
    unseen = 1 - 0.025 ** (1 / 3)
    assert against["pass_at_1_gain"]["low"] == pytest.approx(0.5 - 1.5 * unseen)
    assert against["pass_at_2_gain"]["mean"] == pytest.approx(2 / 3)
    assert evaluation_metrics(result, 10.0)["pass_at_2"] == pytest.approx(1.0)
    rows = dict(summary_rows(config, {"evaluate": result}, "report.html"))  # type: ignore[arg-type]
    assert rows["pass@1"] == "66.7% [19.5%, 100.0%]; against SFT +50.0% [-56.1%, +85.4%]"
    assert rows["pass@2, b"].startswith("100.0%")


def test_without_a_threshold_nothing_is_counted() -> None:
    config = TandemConfig()
    config.evaluate.bootstrap_samples = 50
    both = {name: judged([[1.0], [0.0]], ["a", "a"]) for name in ("ppo", "sft")}
    result = summarize(both, ["proxy"], config)
    assert measured_passes(result["models"]["ppo"]) == []
    assert not [name for name in result["comparisons"]["ppo_vs_sft"] if name.startswith("pass")]


def test_the_report_shows_pass_rates_and_held_out_curves(tmp_path: Path) -> None:
    path, found = write_run(tmp_path / "run", versions=4), invented_evaluation()
    found["models"]["ppo"] |= {f"pass_at_4{of}": {"mean": 0.875, "low": 0.8, "high": 0.925} for of in ("", "/easy")}
    found["comparisons"]["ppo_vs_sft"]["pass_at_4_gain"] = {"mean": 0.25, "low": 0.125, "high": 0.375}
    (path / "evaluation.json").write_text(json.dumps(found))
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for number, row in enumerate(row for row in rows if row["stage"] == "ppo"):
        row |= {"heldout/accuracy": number / 10, "heldout/accuracy/easy": number / 5}
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = run_page(load(path))
    for part in ("pass@4, easy", "87.5%", "pass@4 gain", "+0.250", "Held-out accuracy", "Held-out accuracy by source"):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"success": 1.0, "pass_at": [1, 4]}, r"evaluate\.samples must be at least the largest .* \(4\); found 1"),
        ({"success": 1.0, "pass_at": [1, 1]}, r"evaluate\.pass_at must be a list of different numbers"),
        ({"success": 1.0, "pass_at": []}, r"evaluate\.pass_at must be"),
        ({"success": 1.0, "pass_at": [0]}, r"evaluate\.pass_at must be"),
        ({"samples": 4}, r"evaluate\.samples must be 1 where evaluate\.success is null"),
        ({"by": "source"}, r"evaluate\.by must be null where evaluate\.success is null"),
    ],
)
def test_what_cannot_be_counted_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(chosen(**changes))


def test_a_column_that_does_not_travel_is_refused() -> None:
    config = chosen(success=1.0, by="sourc")
    validate(config)
    data = Inputs({"eval_prompts": [rollout(0, 1.0, "a").prompt]})
    with pytest.raises(ConfigError, match=r"found 'sourc', did you mean 'source'\?; there are source"):
        check_amounts(config, data)
    trained = dict.fromkeys(("sft_model", "ppo_model", "proxy_model", "gold_model"), "model")
    check_amounts(replace(chosen(success=1.0, by="source"), stage="evaluate", **trained), data)


def test_a_column_that_tells_every_prompt_apart_is_refused() -> None:
    data = Inputs({"eval_prompts": [rollout(i, 1.0, i).prompt for i in range(51)]})
    with pytest.raises(ConfigError, match=r"at most 50 values, each a row of tables; found 51 in 'source'"):
        check_amounts(chosen(success=1.0, by="source"), data)
