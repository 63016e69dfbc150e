"""Several sources of prompts: shares, passes, ids, scorers and what is refused."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from common.text.encoding import DataError
from contracts.checks.validation import ConfigError, validate
from contracts.config import (
    CurriculumConfig,
    DataConfig,
    ModelConfig,
    PromptSourceConfig,
    RewardServiceConfig,
    ScorerConfig,
    SourceConfig,
    TandemConfig,
)
from contracts.records import SOURCE_STRIDE, Completion, Prompt, Rollout, Score, ScoringItem, row_text
from controller.data.inputs import Inputs, load_inputs
from controller.data.mixture import exact_shares, next_turn, of_source
from controller.data.prompts import PromptStream, Success, curriculum_problems
from controller.ledger.audit import Audit, _Accounts
from controller.ledger.ledger import Ledger
from controller.stages.ppo import mixture_weights
from controller.start_checks.row_checks import check_rows
from reward_service.resolve import resolve
from reward_service.scorer_kind import ScorerSpec, scorer_kind
from tests.unit.test_reward_front import front, score, total


def turns(weights: list[float], count: int) -> list[int]:
    shares, drawn = exact_shares(weights), [0] * len(weights)
    found = []
    for _ in range(count):
        found.append(next_turn(drawn, shares))
        drawn[found[-1]] += 1
    return found


def test_turns_by_hand() -> None:
    """Of two sources each waits until it is 1/2 behind. 3/4 and 1/4: at the second turn both are, due at
    (1 + 1/2) / (3/4) = 2 and (0 + 1/2) / (1/4) = 2, and the first goes; at the third only the second is 3/4 behind."""
    assert turns([0.75, 0.25], 8) == [0, 0, 1, 0, 0, 0, 1, 0]
    assert turns([0.5, 0.5], 4) == [0, 1, 0, 1]
    assert turns([1.0], 3) == [0, 0, 0]


@pytest.mark.parametrize(
    "weights",
    [
        [0.7, 0.3],
        [0.1] * 10,
        [0.9, 0.05, 0.05],
        [0.5, 0.3, 0.15, 0.04, 0.01],
        [0.333333, 0.333333, 0.333334],
        [0.999, 0.001],
    ],
)
def test_every_prefix_has_the_shares_to_less_than_a_prompt(weights: list[float]) -> None:
    drawn, shares = [0] * len(weights), exact_shares(weights)
    bound = 1 - Fraction(1, 2 * len(weights) - 2)
    for count, turn in enumerate(turns(weights, 2000), 1):
        drawn[turn] += 1
        assert max(abs(share * count - n) for share, n in zip(shares, drawn, strict=True)) <= bound


def test_shares_are_the_written_numbers() -> None:
    assert exact_shares([0.1, 0.9]) == [Fraction(1, 10), Fraction(9, 10)]
    assert sum(exact_shares([0.333333] * 3)) == 1


def mixed(**sizes: int) -> list[Prompt]:
    prompts = []
    for place, (name, size) in enumerate(sorted(sizes.items()), 1):
        prompts += of_source(
            [Prompt(i, f"{name} {i}", (place, i), row_text({"n": i})) for i in range(size)], name, place
        )
    return prompts


WEIGHTS = {"easy": 0.75, "hard": 0.25}


def test_ids_are_unique_and_rows_know_their_source() -> None:
    prompts = mixed(easy=2, hard=1)
    assert [p.prompt_id for p in prompts] == [SOURCE_STRIDE, SOURCE_STRIDE + 1, 2 * SOURCE_STRIDE]
    assert [p.columns for p in prompts] == [
        {"n": 0, "source": "easy"},
        {"n": 1, "source": "easy"},
        {"n": 0, "source": "hard"},
    ]
    assert prompts[1].place == "row 1 of source easy"
    assert Prompt(7, "", ()).place == "row 7"


def test_a_column_source_of_the_rows_own_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"row 3 has 'web' there; name the columns to keep .*prompt_sources\.easy\.keep"
    ):
        of_source([Prompt(3, "", (), row_text({"source": "web"}))], "easy", 1)


def test_each_source_is_passed_through_in_its_own_time() -> None:
    """Of 40 prompts 30 are of the 5 easy ones, six passes, and 10 of the 20 hard ones, half a pass."""
    requests = PromptStream(mixed(easy=5, hard=20), 1, 3, WEIGHTS).next_requests(40)
    names = [r.prompt.columns["source"] for r in requests]
    assert Counter(names) == {"easy": 30, "hard": 10}
    easy = [r.prompt.prompt_id for r in requests if r.prompt.columns["source"] == "easy"]
    passes = [easy[i : i + 5] for i in range(0, 30, 5)]
    assert all(len(set(one)) == 5 for one in passes)
    assert len({tuple(one) for one in passes}) > 1  # each in an order of its own
    assert len({r.prompt.prompt_id for r in requests if r.prompt.columns["source"] == "hard"}) == 10
    assert [r.epoch for r in requests] == sorted(r.epoch for r in requests)
    assert requests[-1].epoch == 5
    assert len({r.key for r in requests}) == len({r.seed for r in requests}) == 40
    ledger = Ledger(200, 0)
    ledger.admit(PromptStream(mixed(easy=5, hard=20), 2, 3, WEIGHTS).next_requests(100))


def test_without_weights_every_prompt_counts_the_same() -> None:
    requests = PromptStream(mixed(easy=5, hard=20), 1, 3).next_requests(50)
    assert [r.epoch for r in requests] == [0] * 25 + [1] * 25
    assert len({r.prompt.prompt_id for r in requests[:25]}) == 25


@pytest.mark.parametrize("taken", [0, 1, 5, 6, 7, 31])
def test_a_mixture_is_resumed_exactly(taken: int) -> None:
    one = PromptStream(mixed(easy=5, hard=20), 2, 9, WEIGHTS)
    one.next_requests(taken)
    other = PromptStream(mixed(easy=5, hard=20), 2, 9, WEIGHTS)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.next_requests(30) == one.next_requests(30)
    assert other.state_dict() == one.state_dict()


@pytest.mark.parametrize("state", [{"epoch": 0, "position": 1}, {"drawn": {"easy": 1, "web": 0}}])
def test_the_state_of_other_sources_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="there are easy, hard: resume with the sources"):
        PromptStream(mixed(easy=5, hard=20), 1, 9, WEIGHTS).load_state_dict(state)
    with pytest.raises(ValueError, match="25 prompts: resume with the data set"):
        PromptStream(mixed(easy=5, hard=20), 1, 9).load_state_dict({"drawn": {"easy": 1, "hard": 0}})


def test_the_audit_knows_passes_of_several_sources() -> None:
    def faults(keys: list[tuple[int, int, int]]) -> list[str]:
        accounts = _Accounts()
        accounts.add(np.array(keys))
        accounts.check(result := Audit())
        return result.faults

    keys = [r.key for r in PromptStream(mixed(easy=5, hard=20), 1, 3, WEIGHTS).next_requests(40)]
    assert faults(keys) == []
    lost = [key for key in keys if key[1] != SOURCE_STRIDE] + [(0, SOURCE_STRIDE, 0)]  # five of its six times
    assert faults(lost) == [f"source 1: prompt {SOURCE_STRIDE} came 1 times, others 6 times"]


def test_sources_are_read_as_one(tiny_config: TandemConfig, tmp_path: Path) -> None:
    """Each with its own columns and limits; the same prompt in two of them is two prompts."""
    sums, facts = tmp_path / "sums.jsonl", tmp_path / "facts.jsonl"
    sums.write_text('{"prompt": "2 + 2 =", "answer": 4}\n{"prompt": "2 + 3 =", "answer": 5}\n')
    facts.write_text('{"question": "2 + 2 =", "hint": "sum"}\n{"question": "Who?", "hint": null}\n{"question": "x"}\n')
    config = tiny_config
    config.data.prompts.path, config.data.prompt_words, config.stage = "", None, "ppo"
    config.data.prompt_sources = {
        "sums": PromptSourceConfig(path=str(sums), weight=0.5),
        "facts": PromptSourceConfig(path=str(facts), prompt_column="question", max_rows=2, weight=0.5),
    }
    config.sft_model = config.proxy_model = config.gold_model = config.model.path
    validate(config)
    said: list[str] = []
    found = load_inputs(config, AutoTokenizer.from_pretrained(config.model.path), said.append)["prompts"]
    assert [(p.prompt_id, p.text, p.columns) for p in found] == [
        (1_000_000_000, "2 + 2 =", {"hint": "sum", "source": "facts"}),
        (1_000_000_001, "Who?", {"hint": None, "source": "facts"}),
        (2_000_000_000, "2 + 2 =", {"answer": 4, "source": "sums"}),
        (2_000_000_001, "2 + 3 =", {"answer": 5, "source": "sums"}),
    ]
    assert said == [
        "  data.prompt_sources.facts: columns that travel with a prompt: hint",
        "  data.prompt_sources.sums: columns that travel with a prompt: answer",
    ]
    stream = PromptStream(found, 1, 1, mixture_weights(config))
    assert [r.prompt.columns["source"] for r in stream.next_requests(4)] == ["facts", "sums", "facts", "sums"]


# ---- a curriculum


def test_a_curriculum_orders_the_first_pass_alone() -> None:
    levels = [3, 1, 2, 1, 3, 2]
    prompts = [Prompt(i, "", (i,), row_text({"level": level})) for i, level in enumerate(levels)]
    plain = [r.prompt for r in PromptStream(prompts, 1, 4).next_requests(12)]
    rising = [r.prompt for r in PromptStream(prompts, 1, 4, None, CurriculumConfig("level")).next_requests(12)]
    falling = PromptStream(prompts, 1, 4, None, CurriculumConfig("level", "descending")).next_requests(6)
    assert [p.columns["level"] for p in rising[:6]] == [1, 1, 2, 2, 3, 3]
    assert [r.prompt.columns["level"] for r in falling] == [3, 3, 2, 2, 1, 1]
    assert [p for p in rising[:6] if p.columns["level"] == 1] == [p for p in plain[:6] if p.columns["level"] == 1]
    assert rising[6:] == plain[6:]


def answered(stream: PromptStream, prompts: int, solved: dict[int, int]) -> list[int]:
    """Ids of the next prompts, each with four samples, of which the first `solved` score 1 and the others 0.4."""
    requests = stream.next_requests(prompts)
    scores = [1.0 if r.sample_index < solved[r.prompt.prompt_id] else 0.4 for r in requests]
    completion = Completion(np.array([1]), np.zeros(1), np.zeros(1), "stop", "")
    stream.measure(
        [
            Rollout(r.key, r.prompt, completion, {"proxy": Score(score)})
            for r, score in zip(requests, scores, strict=True)
        ]
    )
    return [r.prompt.prompt_id for r in requests[::4]]


def test_a_curriculum_by_success_begins_with_what_is_solved_half_the_time() -> None:
    """Of four samples 4, 2, 0, 1, 3 are solved: 0.5, 0, 0.5, 0.25, 0.25 from a half."""
    prompts = [Prompt(i, "", (i,)) for i in range(5)]
    solved, plain = dict(enumerate([4, 2, 0, 1, 3])), PromptStream(prompts, 4, 4)
    stream = PromptStream(prompts, 4, 4, None, CurriculumConfig(success=0.5))
    passes = [[r.prompt.prompt_id for r in plain.next_requests(5)[::4]] for _ in range(3)]
    assert answered(stream, 5, solved) == passes[0]
    second = answered(stream, 5, solved | {0: 2, 1: 4})  # the next time the first is the one, and the second too easy
    assert second[0] == 1
    assert second[1:] == [i for i in passes[1] if i in (3, 4)] + [i for i in passes[1] if i in (0, 2)]
    third = answered(stream, 5, solved)
    assert third[0] == 0
    assert third[1:] == [i for i in passes[2] if i in (3, 4)] + [i for i in passes[2] if i in (1, 2)]


def test_a_score_that_is_missing_or_late_measures_nothing() -> None:
    prompt, completion = Prompt(0, "", (1,)), Completion(np.array([1]), np.zeros(1), np.zeros(1), "stop", "")
    success = Success(1.0)
    for epoch, found in [(1, Score(1.0)), (1, Score(None, "down")), (1, Score(0.9)), (0, Score(1.0)), (1, Score(0.0))]:
        success.measure([Rollout((epoch, 0, 0), prompt, completion, {"proxy": found})])
    assert success.state_dict() == {"0": [1, 1, 3]}
    assert success.distances([prompt, Prompt(7, "", (1,))]) == {0: pytest.approx(1 / 6)}


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_curriculum_by_success_goes_on_as_if_it_had_not_stopped(weights: dict[str, float] | None) -> None:
    """Stopped at any place: a pass keeps the order that it began with, whatever is measured in the middle of it."""
    prompts = mixed(easy=4, hard=5)
    solved = {p.prompt_id: i % 5 for i, p in enumerate(prompts)}

    def stream() -> PromptStream:
        return PromptStream(prompts, 4, 4, weights, CurriculumConfig(success=1.0))

    unbroken = stream()
    wanted = [answered(unbroken, 1, solved) for _ in range(40)]
    for stop in range(40):
        before = stream()
        assert [answered(before, 1, solved) for _ in range(stop)] == wanted[:stop]
        after = stream()
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert [answered(after, 1, solved) for _ in range(stop, 40)] == wanted[stop:]


@pytest.mark.parametrize(
    ("values", "said"),
    [([1, "two"], "1 in row 0, 'two' in row 1"), ([1.5, None], "None in row 1"), ([True, False], "True in row 0")],
)
def test_what_has_no_order_is_refused(values: list[Any], said: str) -> None:
    prompts = [Prompt(i, "", (i,), row_text({"level": value})) for i, value in enumerate(values)]
    (problem,) = curriculum_problems(prompts, CurriculumConfig("level"))
    assert said in problem
    assert "there are level" in problem
    assert curriculum_problems(prompts, CurriculumConfig()) == []


# ---- the configuration


def with_sources(alone: str = "", **weights: float | None) -> TandemConfig:
    sources = {name: PromptSourceConfig(path=f"{name}.jsonl", weight=weight) for name, weight in weights.items()}
    paths = {
        name: SourceConfig(path=f"{name}.jsonl") for name in ("sft", "preferences", "test", "eval_prompts", "gold")
    }
    data = DataConfig(prompts=SourceConfig(path=alone), prompt_sources=sources, **paths)  # type: ignore[arg-type]
    return TandemConfig(run_dir="run", cache_dir="cache", model=ModelConfig(path="model"), data=data)


@pytest.mark.parametrize(
    "weights", [{"a": 0.7, "b": 0.3}, {"a": None, "b": None}, {"a": 1.0}, {"a": 0.5, "b": 0.4999995}]
)
def test_weights_that_are_shares_pass(weights: dict[str, float | None]) -> None:
    validate(with_sources(**weights))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (
            {"a": 0.7, "b": 0.4},
            r"prompt_sources\.\*\.weight must be numbers that sum to 1.*a: 0.7, b: 0.4; their sum is 1.1",
        ),
        ({"a": 0.5, "b": None}, r"found a: 0.5, b: null; their sum is 0.5"),
        ({"a": 1.5, "b": -0.5}, r"prompt_sources\.b\.weight must be null or above 0; found -0.5"),
        ({"a": 1.0, "b": 0.0}, r"prompt_sources\.b\.weight must be null or above 0; found 0.0"),
        ({"a b": None}, r"data\.prompt_sources must be names of letters.*found a b"),
        ({"a": 1.0, "alone": "prompts.jsonl"}, r"data\.prompts\.path must be left open where data\.prompt_sources"),
    ],
)
def test_other_weights_are_refused(weights: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(with_sources(**weights))


# ---- scorers by source

ENTRY = ScorerConfig(kind="by_source", parts=["m", "rule"], options={"easy": "m"})


def item(source: Any, *ids: int) -> ScoringItem:
    return ScoringItem(ids, row=None if source is None else row_text({"source": source}))


def test_an_item_is_scored_by_the_part_of_its_source_alone() -> None:
    routed = ScorerSpec("proxy", ENTRY, "proxy-v1", parts=("m", "rule"))
    service, replicas = front({"m": total, "rule": total}, routed)
    items = [item("easy", 1, 2), item("rule", 3), item("web", 4), item("easy", 5), item(None, 6), item(["easy"], 7)]
    scores = score(service, "proxy", items)
    assert [s.value for s in scores] == [3.0, 3.0, None, 5.0, None, None]
    assert {s.version for s in scores} == {routed.version}
    assert scores[2].error == "bad_row: source must be one of easy, m, rule; found 'web'"
    assert scores[4].error == "bad_row: source must be one of easy, m, rule; found no such column"
    assert scores[5].code == "bad_row"
    seen = {
        name: sorted(i.token_ids for n, items in replicas.calls if n == name for i in items) for name in ("m", "rule")
    }
    assert seen == {"m": [(1, 2), (5,)], "rule": [(3,)]}


def test_its_version_says_which_part_scores_which_source() -> None:
    def version(options: dict[str, str], parts: list[str]) -> str:
        scorers = {name: ScorerConfig(kind="verifier", verifier="exact") for name in ("a", "b")}
        scorers["proxy"] = ScorerConfig(kind="by_source", parts=parts, options=options)
        return resolve(scorers, RewardServiceConfig(), None)["proxy"].version

    ways = [({}, ["a", "b"]), ({}, ["b", "a"]), ({"web": "a"}, ["a", "b"]), ({"web": "b"}, ["a", "b"])]
    assert len({version(*way) for way in ways}) == 4
    assert version({"web": "a"}, ["a", "b"]) == version({"web": "a"}, ["a", "b"])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"options": {"easy": "gauge"}}, r"options must be parts \(math, rule\) by source; found easy: gauge"),
        ({"parts": []}, "parts must be 1 scorers or more"),
    ],
)
def test_parts_that_are_none_are_refused(values: dict[str, Any], said: str) -> None:
    scorers = {name: ScorerConfig(kind="verifier", verifier="exact") for name in ("math", "rule")}
    entry = ScorerConfig(**({"kind": "by_source", "parts": ["math", "rule"]} | values))
    checks = scorer_kind("by_source").checks("k", entry, RewardServiceConfig(scorers=scorers))
    assert any(said.replace("\\", "") in check.message for check in checks if not check.holds)


def test_rows_are_checked_by_the_scorer_of_their_source() -> None:
    """A number is no choice, nor a letter a number: each verifier looks at the rows of its own source."""
    config = TandemConfig()
    config.reward_service.scorers = {
        "proxy": ScorerConfig(kind="by_source", parts=["sums", "letters"]),
        "sums": ScorerConfig(kind="verifier", verifier="exact", answer="answer"),
        "letters": ScorerConfig(kind="verifier", verifier="choice", answer="answer"),
    }

    def prompts(*rows: dict[str, Any]) -> Inputs:
        return Inputs({"prompts": [Prompt(SOURCE_STRIDE + i, "", (i,), row_text(row)) for i, row in enumerate(rows)]})

    check_rows(config, prompts({"answer": "72", "source": "sums"}, {"answer": "B", "source": "letters"}))
    with pytest.raises(ConfigError) as raised:
        check_rows(config, prompts({"answer": "72", "source": "letters"}, {"answer": "B", "source": "web"}))
    lines = str(raised.value).splitlines()
    assert len(lines) == 2
    assert "scorers.proxy" in lines[0]
    assert "row 1 of source web: source must be one of letters, sums; found 'web'" in lines[0]
    assert "scorers.letters" in lines[1]
    assert "row 0 of source letters: answer must be" in lines[1]
