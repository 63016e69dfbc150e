"""From configured scorers to what runs: composites' arithmetic, versions, names."""

import json
import math
import shutil
from pathlib import Path

import pytest

from contracts.checks.validation import ConfigError
from contracts.config import ClusterConfig, RewardServiceConfig, ScorerConfig
from contracts.records import Score
from contracts.scorer_roles import chosen_scorers
from contracts.scoring import write_golden
from controller.start_checks.model_checks import check_weights_and_code
from reward_service.kinds.function import function_version
from reward_service.kinds.model import model_version
from reward_service.model import check_golden
from reward_service.resolve import ScorerError, resolve
from reward_service.scorer_kind import scorer_kind
from tests.conftest import make_config

CONFIG = RewardServiceConfig()


def function(name: str, **values: object) -> ScorerConfig:
    return ScorerConfig(kind="function", function=name, **values)  # type: ignore[arg-type]


# ---- composites


def weighted_sum(parts: dict[str, list[Score]], weights: list[float]) -> list[Score]:
    return scorer_kind("weighted_sum").combine(ScorerConfig(weights=weights), parts)


def ensemble(parts: dict[str, list[Score]], std_coef: float) -> list[Score]:
    return scorer_kind("ensemble").combine(ScorerConfig(std_coef=std_coef), parts)


def scored(*values: float) -> list[Score]:
    return [Score(v) for v in values]


def test_weighted_sum() -> None:
    result = weighted_sum({"a": scored(1, 2), "b": scored(10, -20)}, [1.0, 0.1])
    assert [s.value for s in result] == [2.0, 0.0]


def test_ensemble_is_the_mean_less_k_standard_deviations() -> None:
    result = ensemble({"a": scored(1, 3), "b": scored(3, 3), "c": scored(5, 3)}, std_coef=0.5)
    std = math.sqrt(8 / 3)  # of 1, 3, 5
    assert [s.value for s in result] == pytest.approx([3 - 0.5 * std, 3.0])
    assert [s.spread for s in result] == pytest.approx([std, 0.0])


def test_a_final_error_of_a_part_comes_before_one_that_a_retry_may_heal() -> None:
    parts = {"a": [Score(None, "timeout: late")], "b": [Score(None, "poison")], "c": scored(1)}
    assert ensemble(parts, 1.0)[0].error == "poison: b"
    assert weighted_sum({"a": parts["a"], "c": parts["c"]}, [1, 1])[0].error == "timeout: a: late"


@pytest.mark.parametrize("values", [(1e200, -1e200), (1.7e308, 1.7e308), (1e160, 3.0)])
def test_parts_too_large_to_combine_cost_their_own_item(values: tuple[float, float]) -> None:
    """Squares and sums overflow: as an error of Python's, or as infinity."""
    parts = {"a": scored(values[0], 1), "b": scored(values[1], 3)}
    found = ensemble(parts, 1.0)
    assert [(s.value, s.error) for s in found] == [(None, "non_finite"), (1.0, None)]
    assert found[0].spread is None
    found = weighted_sum(parts, [1e200, 1e200])
    assert (found[0].value, found[0].error) == (None, "non_finite")
    assert found[1].value == pytest.approx(4e200)


# ---- versions


def test_a_model_version_changes_with_everything_that_decides_its_scores(classifier: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(classifier, copy)
    before = model_version(str(copy), "float32")
    assert before == model_version(str(classifier), "float32")  # not the path
    assert len(before) == 16
    seen = {before, model_version(str(copy), "bfloat16")}
    write_golden(str(copy), [[1, 2]], [0.5])
    (copy / "README.md").write_text("notes")
    assert model_version(str(copy), "float32") == before
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"score_mean": 0.8}))  # the normaliser
    seen.add(model_version(str(copy), "float32"))
    (copy / "tokenizer_config.json").write_text("{}")
    seen.add(model_version(str(copy), "float32"))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1  # one bit in the middle
    (copy / "model.safetensors").write_bytes(weights)
    seen.add(model_version(str(copy), "float32"))
    assert len(seen) == 5


def test_a_function_version_is_its_source(tmp_path: Path) -> None:
    source = tmp_path / "rules.py"
    source.write_text("def a(**_): return []\ndef b(**_): return []\n")
    first = function_version(f"{source}:a")
    assert first != function_version(f"{source}:b")
    source.write_text("def a(**_): return [0.0]\n")
    assert function_version(f"{source}:a") != first


# ---- resolving


@pytest.fixture
def rules(tmp_path: Path) -> str:
    (tmp_path / "rules.py").write_text("def a(**_): return []\ndef b(**_): return []\n")
    return str(tmp_path / "rules.py")


def test_composites_resolve_to_their_parts(rules: str) -> None:
    scorers = {
        "proxy": ScorerConfig(kind="ensemble", parts=["a", "sum"], std_coef=2.0),
        "a": function(f"{rules}:a"),
        "sum": ScorerConfig(kind="weighted_sum", parts=["a", "b"], weights=[1.0, -1.0]),
        "b": function(f"{rules}:b"),
    }
    specs = resolve(scorers, CONFIG)
    assert list(specs) == ["proxy", "a", "sum", "b"]
    assert specs["proxy"].parts == ("a", "sum")
    assert specs["proxy"].application is None
    assert specs["a"].application == f"reward-a-{specs['a'].version}"
    Path(rules).write_text(Path(rules).read_text() + "# another\n")
    again = resolve(scorers, CONFIG)
    assert all(again[name].version != specs[name].version for name in specs)


def test_two_names_of_one_checkpoint_share_its_replicas(classifier: Path) -> None:
    specs = resolve({"proxy": ScorerConfig(path=str(classifier)), "gold": ScorerConfig(path=str(classifier))}, CONFIG)
    assert specs["proxy"].application == specs["gold"].application


def test_everything_that_cannot_be_served_is_named_at_once(rules: str) -> None:
    scorers = {
        "one": ScorerConfig(path="/no/such/model"),
        "two": function("/no/such/file.py:f"),
        "three": function("not a function"),
        "four": function(f"{rules}:a"),
    }
    with pytest.raises(ScorerError) as refused:
        resolve(scorers, CONFIG)
    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == ["one", "two", "three"]


def test_a_model_with_another_vocabulary_is_refused(classifier: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(classifier, other)
    state = json.loads((other / "tokenizer.json").read_text())
    first, second = list(state["model"]["vocab"])[500:502]
    vocab = state["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(state))
    resolve({"proxy": ScorerConfig(path=str(classifier))}, CONFIG, str(classifier))
    with pytest.raises(ScorerError, match=r"proxy: .*other has another vocabulary than .*classifier, whose token ids"):
        resolve({"proxy": ScorerConfig(path=str(other))}, CONFIG, str(classifier))


def test_a_model_without_its_weights_is_refused_before_anything_starts(
    classifier: Path, small_vocab: Path, tmp_path: Path
) -> None:
    """By the service, and by a run, which checks the scorers that it serves."""
    config = make_config(small_vocab, tmp_path)
    ensemble = ScorerConfig(kind="ensemble", parts=["proxy_model", "second"])
    config.reward_service.scorers = {"proxy": ensemble, "second": ScorerConfig(path=str(small_vocab))}
    expected = rf"path={small_vocab} must be a checkpoint with every weight of its model .*; found no score\.weight"
    with pytest.raises(ScorerError, match=f"^second: {expected}"):
        resolve({"second": config.reward_service.scorers["second"]}, CONFIG)
    with pytest.raises(ConfigError, match=rf"^reward_service\.scorers\.second\.{expected}"):
        check_weights_and_code(config)
    config.stage = "sft"  # starts no service
    check_weights_and_code(config)
    config.stage, config.reward_service.scorers = "pipeline", {"unused": ScorerConfig(path=str(small_vocab))}
    check_weights_and_code(config)
    config.reward_service.scorers = {"proxy": ScorerConfig(path=str(classifier))}
    check_weights_and_code(config)


def test_a_scorer_that_is_a_part_of_itself_or_has_a_part_that_is_none() -> None:
    loop = {
        "a": ScorerConfig(kind="ensemble", parts=["b"]),
        "b": ScorerConfig(kind="weighted_sum", parts=["a"], weights=[1]),
    }
    with pytest.raises(ScorerError, match="a is a part of itself: a -> b -> a"):
        resolve(loop, CONFIG)
    with pytest.raises(ScorerError, match="a has the part b, which is no scorer"):
        resolve({"a": loop["a"]}, CONFIG)


# ---- what a run starts


def test_a_run_starts_what_its_roles_need_and_nothing_else() -> None:
    checkpoints = {"proxy": "/p", "gold": "/g"}
    assert chosen_scorers({}, checkpoints) == {"proxy": ScorerConfig(path="/p"), "gold": ScorerConfig(path="/g")}
    configured = {
        "proxy": ScorerConfig(kind="weighted_sum", parts=["proxy_model", "rule"], weights=[1, 1]),
        "rule": function("rules:a"),
        "unused": function("rules:b"),
    }
    chosen = chosen_scorers(configured, checkpoints)
    assert list(chosen) == ["proxy", "gold", "proxy_model", "rule"]
    assert (chosen["proxy_model"].path, chosen["gold"].path) == ("/p", "/g")


# ---- golden scores


def test_golden_scores_stop_what_loads_and_scores_wrongly(tmp_path: Path) -> None:
    texts = [[1, 2], [3], [4, 5, 6]]
    write_golden(str(tmp_path), texts, [2.0, 1.0, 3.0])

    def right(sequences: list[list[int]]) -> list[Score]:
        return [Score(len(s) + 0.1) for s in sequences]

    check_golden(str(tmp_path), right, tolerance=0.15)
    with pytest.raises(RuntimeError, match=r"missed by 0\.100 on average"):
        check_golden(str(tmp_path), right, tolerance=0.05)
    with pytest.raises(RuntimeError, match="no score for a first batch: non_finite"):
        check_golden(str(tmp_path), lambda s: [Score(None, "non_finite")] * len(s), tolerance=9)


def test_a_checkpoint_without_golden_scores_must_still_score(tmp_path: Path) -> None:
    check_golden(str(tmp_path), lambda s: [Score(5.0)] * len(s), tolerance=0.1)
    with pytest.raises(RuntimeError, match="poison: RuntimeError"):
        check_golden(str(tmp_path), lambda s: [Score(None, "poison: RuntimeError")] * len(s), tolerance=0.1)


@pytest.mark.parametrize(
    "content",
    [
        '[{"token_ids": [1], "score": NaN}]',
        '[{"token_ids": [1], "score": 1e999}]',
        '[{"token_ids": [1]}]',
        '[{"token_ids": "abc", "score": 1}]',
        '{"token_ids": [1], "score": 1}',
        "[" * 100_000,
        '[{"token_ids": [1], "score"',
        "\xff",
    ],
)
def test_golden_scores_that_are_none_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "golden.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(RuntimeError, match=r"golden\.json has no golden scores: "):
        check_golden(str(tmp_path), lambda s: [Score(1.0)] * len(s), tolerance=0.1)


def test_serve_starts_the_most_replicas_where_all_their_calls_are_under_way(small_vocab: Path, tmp_path: Path) -> None:
    from reward_service.app import RewardService

    (tmp_path / "rules.py").write_text("def score(completions): return [1.0 for _ in completions]")
    entry = ScorerConfig(kind="function", function=f"{tmp_path}/rules.py:score", processes=2)
    for most, calls, options in (
        (None, 6, {"num_replicas": 3}),
        (5, 10, {"autoscaling_config": {"min_replicas": 3, "max_replicas": 5, "target_ongoing_requests": 2.0}}),
    ):
        config = RewardServiceConfig(replicas=3, max_replicas=most)
        spec = resolve({"proxy": entry}, config, str(small_vocab))["proxy"]
        assert spec.calls == calls
        assert RewardService(config, ClusterConfig(), {}, str(small_vocab))._number(spec) == options
