"""The front with scorers that misbehave on purpose: what one item does must never show in another's score."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from contracts.config import ScorerConfig
from contracts.records import Score, ScoringItem
from reward_service.front import Front, FrontLimits, UnknownScorer
from reward_service.replica_dispatcher import ReplicaDied, Unavailable
from reward_service.scorer_kind import ScorerSpec
from reward_service.service_metrics import Metrics

POISON = 13
CALL_ITEMS = 8
LIMITS = FrontLimits(max_queued_items=1000, cache_items=100, deadline_s=5.0)
Answer = Callable[[list[ScoringItem]], Any]


def item(*token_ids: int, prompt_tokens: int = 0, label: str | None = None) -> ScoringItem:
    return ScoringItem(token_ids, prompt_tokens, label)


def total(items: list[ScoringItem]) -> list[Score]:
    return [Score(float(sum(i.token_ids)), raw=float(sum(i.token_ids))) for i in items]


class Replicas:
    """Stands for every replica of every application; keeps the calls it got."""

    def __init__(self, answers: dict[str, Answer]):
        self.answers = answers
        self.calls: list[tuple[str, list[ScoringItem]]] = []
        self.killed_by: list[set[int]] = []

    async def __call__(self, application: str, items: list[ScoringItem], deadline_s: float) -> list[Score]:
        await asyncio.sleep(0)
        if not items:  # is a replica there?
            return []
        self.calls.append((application, items))
        answer = self.answers[application](items)
        return await answer if isinstance(answer, Awaitable) else answer


def spec(
    name: str, kind: str = "model", weights: tuple[float, ...] = (), std_coef: float = 1.0, **values: Any
) -> ScorerSpec:
    entry = ScorerConfig(kind=kind, weights=list(weights), std_coef=std_coef)
    application = name if kind in ("model", "function") else None
    return ScorerSpec(name, entry, f"{name}-v1", application, **values)


def front(answers: dict[str, Answer], *more: ScorerSpec, limits: FrontLimits = LIMITS) -> tuple[Front, Replicas]:
    replicas = Replicas(answers)
    scorers = {name: spec(name, max_tokens=8, call_items=CALL_ITEMS) for name in answers}
    scorers |= {s.name: s for s in more}
    return Front(scorers, limits, replicas, Metrics()), replicas


def score(service: Front, name: str, items: list[ScoringItem], **options: Any) -> list[Score]:
    return asyncio.run(service.score(service.find(name), items, **options))


def values(scores: list[Score]) -> list[float | None]:
    return [s.value for s in scores]


def count(service: Front, sample: str) -> float:
    lines = service.metrics.text().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(sample))


# ---- one scorer


def test_scores_keep_their_order_and_say_their_version() -> None:
    service, replicas = front({"m": total})
    items = [item(*range(n)) for n in (5, 2, 7, 3)]
    scores = score(service, "m", items)
    assert values(scores) == [10.0, 1.0, 21.0, 3.0]
    assert {s.version for s in scores} == {"m-v1"}
    assert [len(i.token_ids) for i in replicas.calls[0][1]] == [2, 3, 5, 7]  # neighbours in length travel together


def test_identical_items_are_scored_once_and_remembered() -> None:
    service, replicas = front({"m": total})
    first = score(service, "m", [item(1, 2), item(3), item(1, 2)])
    again = score(service, "m", [item(3), item(4)])
    assert values(first) == [3.0, 3.0, 3.0]
    assert values(again) == [3.0, 4.0]
    assert [s.is_cached for s in (*first, *again)] == [False, False, False, True, False]
    assert [i.token_ids for _, items in replicas.calls for i in items] == [(3,), (1, 2), (4,)]


def test_a_function_sees_more_than_tokens_so_its_items_differ_by_it() -> None:
    service, replicas = front({}, spec("rule", "function"))
    replicas.answers["rule"] = lambda items: [Score(float(i.prompt_tokens)) for i in items]
    others = [replace(item(1, 2), row=row) for row in ('{"a": 1}', '{"a": 2}')] + [replace(item(1, 2), messages="[]")]
    scores = score(service, "rule", [item(1, 2), item(1, 2, prompt_tokens=1), item(1, 2, label="x"), *others])
    assert values(scores) == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert sum(len(items) for _, items in replicas.calls) == 6
    assert all(s.is_cached for s in score(service, "rule", others))


def test_a_reward_model_sees_tokens_alone_whatever_the_row() -> None:
    service, replicas = front({"m": total})
    score(service, "m", [item(1, 2), replace(item(1, 2), row='{"a": 1}', messages="[]")])
    assert sum(len(items) for _, items in replicas.calls) == 1


def test_parts_come_through_the_front_and_one_that_is_no_number_leaves_no_score() -> None:
    service, replicas = front({}, spec("rule", "function"))
    replicas.answers["rule"] = lambda items: [Score(1.0, parts={"format": float(i.token_ids[0] - 1)}) for i in items]
    assert [s.parts for s in score(service, "rule", [item(1), item(3)])] == [{"format": 0.0}, {"format": 2.0}]
    replicas.answers["rule"] = lambda items: [Score(1.0, parts={"format": float("nan")}) for _ in items]
    assert [(s.value, s.error, s.parts) for s in score(service, "rule", [item(5)])] == [(None, "non_finite", None)]


def test_the_cache_is_bounded() -> None:
    service, _ = front({"m": total}, limits=FrontLimits(1000, 3, 5.0))
    score(service, "m", [item(n) for n in range(1, 11)])
    assert len(service._cache) == 3


def test_what_would_fail_deep_inside_is_refused_at_the_door() -> None:
    service, replicas = front({"m": total})
    scores = score(service, "m", [item(), item(*range(9)), item(1)])
    assert [s.error for s in scores] == ["empty", "too_long: 9 tokens, the limit is 8", None]
    assert [len(items) for _, items in replicas.calls] == [1]


def test_items_of_many_requests_share_calls() -> None:
    """At most `calls` are under way; what comes meanwhile waits and shares the next ones."""
    under_way, most = 0, 0

    async def slow(items: list[ScoringItem]) -> list[Score]:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.01)
        under_way -= 1
        return total(items)

    service, replicas = front({"m": slow})

    async def run() -> list[list[Score]]:
        return await asyncio.gather(*(service.score(service.find("m"), [item(n)]) for n in range(1, 101)))

    assert [values(scores) for scores in asyncio.run(run())] == [[float(n)] for n in range(1, 101)]
    assert most == 4
    assert len(replicas.calls) == -(-100 // CALL_ITEMS)


@pytest.mark.parametrize(("call_s", "sizes"), [(0.2, [1, 2, 4, 8, 8, 8, 8, 1]), (0.001, [1] * 40), (None, [8] * 5)])
def test_calls_of_a_function_grow_while_they_are_quick(call_s: float | None, sizes: list[int]) -> None:
    """One that is slow has its items one by one, so that none waits for the others of its call."""
    rule = spec("f", "function", calls=1, call_items=CALL_ITEMS, call_s=call_s)

    async def quick(items: list[ScoringItem]) -> list[Score]:
        await asyncio.sleep(0.002)
        return total(items)

    service, replicas = front({"m": total}, rule)
    replicas.answers["f"] = quick
    assert values(score(service, "f", [item(n) for n in range(1, 41)])) == [float(n) for n in range(1, 41)]
    assert [len(items) for _, items in replicas.calls] == sizes


def test_after_a_slow_call_come_smaller_ones() -> None:
    async def slow_of_many(items: list[ScoringItem]) -> list[Score]:
        await asyncio.sleep(0.3 if len(items) > 2 else 0)
        return total(items)

    service, replicas = front({"m": total}, spec("f", "function", calls=1, call_items=CALL_ITEMS, call_s=0.2))
    replicas.answers["f"] = slow_of_many
    score(service, "f", [item(n) for n in range(1, 14)])
    assert [len(items) for _, items in replicas.calls] == [1, 2, 4, 2, 4]


def test_an_item_that_expires_in_the_queue_is_not_sent() -> None:
    async def slow(items: list[ScoringItem]) -> list[Score]:
        await asyncio.sleep(0.2)
        return total(items)

    service, replicas = front({"m": slow})

    async def run() -> tuple[list[Score], list[Score]]:
        busy = asyncio.create_task(service.score(service.find("m"), [item(n) for n in range(1, 4 * CALL_ITEMS + 1)]))
        await asyncio.sleep(0.01)
        late = await service.score(service.find("m"), [item(99)], deadline_s=0.05)
        return late, await busy

    late, busy = asyncio.run(run())
    assert late[0].code == "timeout"
    assert None not in values(busy)
    assert 99 not in [t for _, items in replicas.calls for i in items for t in i.token_ids]


def test_truncation_keeps_the_end() -> None:
    service, replicas = front({"m": total})
    scores = score(service, "m", [item(*range(10), 2, prompt_tokens=4), item(5)], truncate=True)
    assert [s.is_truncated for s in scores] == [True, False]
    assert [i.token_ids for _, items in replicas.calls for i in items] == [(5,), (3, 4, 5, 6, 7, 8, 9, 2)]
    assert [i.prompt_tokens for _, items in replicas.calls for i in items] == [0, 1]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (lambda items: total(items)[1:], "wrong_count"),
        (lambda items: total(items) * 2, "wrong_count"),
        (lambda items: (_ for _ in ()).throw(Unavailable("ValueError")), "unavailable"),
        (lambda items: [Score(None, "non_finite") for _ in items], "non_finite"),
    ],
)
def test_an_answer_that_cannot_be_read_is_no_score(answer: Answer, code: str) -> None:
    service, _ = front({"m": answer})
    scores = score(service, "m", [item(1), item(2)])
    assert [(s.value, s.code) for s in scores] == [(None, code)] * 2
    assert len(service._cache) == 0


def test_a_scorer_that_does_not_answer_is_a_time_out_and_frees_its_place() -> None:
    service, _ = front({"m": lambda items: asyncio.sleep(60), "other": total})
    scores = score(service, "m", [item(1)], deadline_s=0.05)
    assert (scores[0].value, scores[0].code) == (None, "timeout")
    assert service.queued == 0
    assert values(score(service, "other", [item(1)])) == [1.0]


def test_more_than_the_queue_holds_is_turned_away() -> None:
    service, replicas = front({"m": total}, limits=FrontLimits(4, 100, 5.0))
    waiting: asyncio.Event

    async def slow(items: list[ScoringItem]) -> list[Score]:
        await waiting.wait()
        return total(items)

    async def run() -> tuple[list[Score], list[Score], list[Score]]:
        nonlocal waiting
        waiting = asyncio.Event()
        replicas.answers["m"] = slow
        first = asyncio.create_task(service.score(service.find("m"), [item(n) for n in (1, 2, 3)]))
        await asyncio.sleep(0.01)
        rejected = await service.score(service.find("m"), [item(4), item(5)])
        waiting.set()
        return await first, rejected, await service.score(service.find("m"), [item(4), item(5)])

    first, rejected, later = asyncio.run(run())
    assert values(first) == [1.0, 2.0, 3.0]
    assert [(s.value, s.code) for s in rejected] == [(None, "overloaded")] * 2
    assert values(later) == [4.0, 5.0]
    assert count(service, "tandem_reward_rejected_requests_total") == 1


# ---- poison


def killer(replicas: Replicas, poison: set[int]) -> Answer:
    """Dies of any call with one of the poisonous tokens."""

    def answer(items: list[ScoringItem]) -> list[Score]:
        found = {t for i in items for t in i.token_ids} & poison
        if found:
            replicas.killed_by.append(found)
            raise ReplicaDied("killed")
        return total(items)

    return answer


def test_an_item_that_kills_two_replicas_is_tried_no_more() -> None:
    service, replicas = front({"m": total})
    replicas.answers["m"] = killer(replicas, {POISON})
    items = [item(n) for n in (1, 2, 3, POISON, 4, 5, 6, 7)]
    scores = score(service, "m", items)
    assert values(scores) == [1.0, 2.0, 3.0, None, 4.0, 5.0, 6.0, 7.0]
    assert scores[3].code == "poison"
    assert len(replicas.killed_by) == 2
    again = score(service, "m", [item(POISON), item(8)])
    assert (again[0].code, again[1].value) == ("poison", 8.0)
    assert len(replicas.killed_by) == 2
    assert count(service, "tandem_reward_quarantined_items_total") == 1


def test_every_poison_is_found_and_no_innocent_with_it() -> None:
    """Items of several concurrent requests die together; of them only the poisonous are kept out."""
    service, replicas = front({"m": total})
    poison = {101, 150, 190}
    replicas.answers["m"] = killer(replicas, poison)
    shares = [list(range(100, 140)), list(range(140, 180)), list(range(180, 220))]

    async def run() -> list[list[Score]]:
        calls = [service.score(service.find("m"), [item(n) for n in share]) for share in shares]
        return await asyncio.gather(*calls)

    for share, scores in zip(shares, asyncio.run(run()), strict=True):
        assert values(scores) == [None if n in poison else float(n) for n in share]
    # Together they die at most once for each; then each poison kills once more, alone.
    assert len(poison) < len(replicas.killed_by) <= 2 * len(poison)


def test_a_replica_that_dies_of_itself_loses_nothing() -> None:
    service, replicas = front({"m": total})
    deaths = iter([True, False, True])

    def dies_at_first(items: list[ScoringItem]) -> list[Score]:
        if next(deaths, False):
            raise ReplicaDied("killed")
        return total(items)

    replicas.answers["m"] = dies_at_first
    items = [item(n) for n in range(1, CALL_ITEMS + 1)]
    first = score(service, "m", items)
    # The second death of its own hits one item in a call of its own: the rule cannot know that it is innocent.
    assert values(first) == [1.0, None, *map(float, range(3, CALL_ITEMS + 1))]
    assert first[1].code == "poison"


def test_an_item_that_was_scored_alone_is_no_suspect_any_more() -> None:
    service, replicas = front({"m": total})
    deaths = iter([True])
    replicas.answers["m"] = lambda items: total(items) if not next(deaths, False) else _die()
    assert values(score(service, "m", [item(1), item(2)])) == [1.0, 2.0]
    assert service._quarantine._kills == {}


def _die() -> Any:
    raise ReplicaDied("killed")


# ---- names and versions


def test_a_scorer_is_found_by_name_version_and_checkpoint() -> None:
    service, _ = front({"m": total, "n": total}, spec("third", source="/models/third"))
    assert service.find(None).name == "m"
    assert service.find("n").name == "n"
    assert service.find("n@n-v1").name == "n"
    assert service.find("n", "n-v1").name == "n"
    assert service.find("/models/third").name == "third"
    with pytest.raises(UnknownScorer, match="there are m, n, third") as unknown:
        service.find("nobody")
    assert not unknown.value.is_gone
    with pytest.raises(UnknownScorer, match="n is served in version n-v1; the pinned one is gone") as gone:
        service.find("n@n-v0")
    assert gone.value.is_gone


# ---- composites


def test_composites_of_composites() -> None:
    both = spec("both", "weighted_sum", parts=("a", "b"), weights=(1.0, 0.5))
    spread = spec("spread", "ensemble", parts=("a", "b", "both"), std_coef=2.0)
    service, replicas = front({"a": total, "b": lambda items: [Score(2.0) for _ in items]}, both, spread)
    scores = score(service, "spread", [item(4)])
    # a = 4, b = 2, both = 5: mean 11/3, variance (1/9 + 25/9 + 16/9) / 3 = 14/9
    assert scores[0].value == pytest.approx(11 / 3 - 2 * math.sqrt(14 / 9))
    assert scores[0].spread == pytest.approx(math.sqrt(14 / 9))
    assert scores[0].version == "spread-v1"
    assert len(replicas.calls) == 2  # what two composites share is scored once
    assert count(service, "tandem_reward_ensemble_spread_sum") == pytest.approx(math.sqrt(14 / 9))


def test_a_part_without_a_score_leaves_the_whole_without_one() -> None:
    both = spec("both", "weighted_sum", parts=("a", "b"), weights=(1.0, 1.0))
    service, _ = front({"a": total, "b": lambda items: [Score(None, "non_finite"), Score(1.0)]}, both)
    scores = score(service, "both", [item(4), item(1, 4)])
    assert [(s.value, s.error) for s in scores] == [(None, "non_finite: b"), (6.0, None)]


@pytest.mark.parametrize(
    ("kind", "options", "values_of_a", "code"),
    [
        ("weighted_sum", {"weights": (1e10, 1.0)}, 1e300, "non_finite"),
        ("weighted_sum", {"weights": (1e10, -1e10)}, 1e300, "non_finite"),  # inf - inf
        ("ensemble", {"std_coef": 0.0}, 1e200, "non_finite"),  # of the square within the spread
        ("ensemble", {"std_coef": 1.0}, 1e308, "non_finite"),
    ],
)
def test_a_formula_that_overflows_costs_its_own_item(kind: str, options: dict, values_of_a: float, code: str) -> None:
    both = spec("both", kind, parts=("a", "b"), **options)

    def large(items: list[ScoringItem]) -> list[Score]:
        return [Score(values_of_a if POISON in i.token_ids else 1.0) for i in items]

    answers = {"a": large, "b": lambda items: [Score(-s.value if s.value != 1.0 else 1.0) for s in large(items)]}
    if options.get("weights") == (1e10, -1e10):
        answers["b"] = large
    service, _ = front(answers, both)
    scores = score(service, "both", [item(1), item(POISON), item(2)])
    assert [s.code for s in scores] == [None, code, None]
