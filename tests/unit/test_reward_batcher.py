"""Batches within a replica: isolation of bad items, and one stream of batches for all calls."""

import asyncio
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from common.microbatches import cut_padded
from contracts.records import Score
from reward_service.isolate import isolate
from reward_service.request_batcher import RequestBatcher

Sequence = tuple[int, ...]


def lengths(batch: list[Sequence]) -> list[Score]:
    return [Score(float(len(s))) for s in batch]


# ---- isolation


@pytest.mark.parametrize("bad", [0, 3, 7])
def test_pitfall_poison_costs_one_item_of_eight(bad: int) -> None:
    def score(items: list[int]) -> list[float]:
        if bad in items:
            raise ValueError(f"cannot score item {bad}")
        return [float(i) for i in items]

    scores = isolate(score, list(range(8)))
    assert [s.value for s in scores] == [None if i == bad else float(i) for i in range(8)]
    assert scores[bad].error == "poison: ValueError"  # the exception's text may quote the completion


def test_one_nan_does_not_reach_its_neighbours() -> None:
    """A batch whose NaN spreads to all its members, as padding can spread it."""

    def score(items: list[float]) -> list[float]:
        return [math.nan if any(map(math.isnan, items)) else i for i in items]

    scores = isolate(score, [1.0, math.nan, 2.0])
    assert [s.value for s in scores] == [1.0, None, 2.0]
    assert scores[1].error == "non_finite"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ([], "wrong_count: 0 scores for 1 items"),
        ([1.0, 2.0], "wrong_count: 2 scores for 1 items"),
        (None, "wrong_type: NoneType instead of a list"),
        ([None], "not_applicable: None in place of a score"),
        (["1.0"], "wrong_type: str instead of a number"),
        ([True], "wrong_type: bool instead of a number"),
        ([math.inf], "non_finite"),
        ([{"format": 1.0}], "wrong_type: dict without a score"),
        ([{"score": 1.0, "format": math.nan}], "non_finite"),
        ([{"score": 1.0, "format": "1"}], "wrong_type: str instead of a number"),
        ([10**400], "non_finite: an integer beyond the range of float"),
    ],
)
def test_what_is_not_a_score_is_an_error(answer: object, error: str) -> None:
    scores = isolate(lambda items: answer, ["x"])  # type: ignore[arg-type, return-value]
    assert [(s.value, s.error) for s in scores] == [(None, error)]


def test_a_dict_is_a_score_with_parts_and_none_costs_no_other_item() -> None:
    answers = {"a": {"score": 1, "format": 0.5}, "b": None, "c": 2.0}
    calls: list[list[str]] = []

    def score(items: list[str]) -> list[Any]:
        calls.append(items)
        return [answers[item] for item in items]

    scores = isolate(score, ["a", "b", "c"])
    assert [(s.value, s.raw, s.parts) for s in scores] == [
        (1.0, 1.0, {"format": 0.5}),
        (None, None, None),
        (2.0, 2.0, None),
    ]
    assert calls == [["a", "b", "c"]]


def test_cut_padded_caps_longest_times_count() -> None:
    sizes = [10, 1, 1, 1, 9, 30, 2]
    batches = cut_padded(sizes, 20)
    assert batches == [[1, 2, 3, 6], [4, 0], [5]]
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert cut_padded([], 20) == []


# ---- one stream of batches


def test_what_arrives_during_a_batch_travels_in_the_next() -> None:
    batches: list[list[Sequence]] = []
    first_runs, release = threading.Event(), threading.Event()

    def score(batch: list[Sequence]) -> list[Score]:
        batches.append(batch)
        first_runs.set()
        release.wait(5)
        return lengths(batch)

    async def run() -> list[list[Score]]:
        batcher = RequestBatcher(score, ThreadPoolExecutor(1), 100)
        calls = [asyncio.create_task(batcher.score([(1,)], 5))]
        await asyncio.to_thread(first_runs.wait, 5)
        calls += [asyncio.create_task(batcher.score([(1, n), (7, 7)], 5)) for n in range(3)]
        await asyncio.sleep(0.01)
        release.set()
        return await asyncio.gather(*calls)

    answers = asyncio.run(run())
    assert [[s.value for s in scores] for scores in answers] == [[1.0], [2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    assert [len(batch) for batch in batches] == [1, 4]  # three of them wait for one (7, 7)


def test_the_oldest_goes_first_with_its_neighbours_in_length() -> None:
    batches: list[list[int]] = []

    def score(batch: list[Sequence]) -> list[Score]:
        batches.append([len(s) for s in batch])
        return lengths(batch)

    async def run() -> None:
        batcher = RequestBatcher(score, ThreadPoolExecutor(1), 40)
        sizes = [20, 3, 18, 2, 40, 1]
        await batcher.score([tuple(range(n)) for n in sizes], 5)

    asyncio.run(run())
    assert batches == [[18, 20], [1, 2, 3], [40]]


@pytest.mark.parametrize("is_late", [False, True])
def test_a_call_of_many_has_the_same_batches_whatever_else_waits(is_late: bool) -> None:
    """32 and 32 items of one PPO update, which arrive at once or one after the other, beside a small call."""
    batches: list[list[int]] = []

    def score(batch: list[Sequence]) -> list[Score]:
        batches.append([len(s) for s in batch])
        return lengths(batch)

    async def run() -> None:
        batcher = RequestBatcher(score, ThreadPoolExecutor(1), 160)
        short = [(n, *[0] * (n % 5)) for n in range(32)]
        long = [(n, *[0] * (8 + n % 3)) for n in range(32)]
        calls = [asyncio.create_task(batcher.score(short, 5)), asyncio.create_task(batcher.score([(1,), (2, 2)], 5))]
        if is_late:
            await calls[0]
        scores = await batcher.score(long, 5)
        await asyncio.gather(*calls)
        assert [s.value for s in scores] == [9.0 + n % 3 for n in range(32)]

    asyncio.run(run())
    short = sorted(1 + n % 5 for n in range(32))  # 32 of up to 5 tokens are 160
    long = [[9] * 11 + [10] * 5, [10] * 6 + [11] * 8, [11] * 2]  # 16 of up to 10 are 160, 14 of up to 11 are 154
    assert sorted(batches) == sorted([short, [1, 2], *long])


def test_late_items_are_time_outs_and_are_computed_no_more() -> None:
    computed: list[Sequence] = []

    def score(batch: list[Sequence]) -> list[Score]:
        computed.extend(batch)
        time.sleep(0.15)
        return lengths(batch)

    async def run() -> tuple[list[Score], list[Score]]:
        batcher = RequestBatcher(score, ThreadPoolExecutor(1), 1)
        late = await batcher.score([(1,), (2,), (3,), (4,)], 0.05)
        return late, await batcher.score([(5,)], 5)

    late, next_call = asyncio.run(run())
    assert [s.code for s in late] == ["timeout"] * 4
    assert next_call[0].value == 1.0
    assert computed == [(1,), (5,)]


def test_a_failure_of_the_batcher_reaches_its_callers_and_ends_nothing() -> None:
    """ray#66140: an exception while batches are made hung the replica for good."""
    answers = iter([RuntimeError("out of memory"), None])

    def score(batch: list[Sequence]) -> list[Score]:
        fault = next(answers)
        if fault:
            raise fault
        return lengths(batch)

    async def run() -> list[Score]:
        batcher = RequestBatcher(score, ThreadPoolExecutor(1), 100)
        with pytest.raises(RuntimeError, match="out of memory"):
            await batcher.score([(1,)], 5)
        assert batcher.busy_s == 0
        return await batcher.score([(1,)], 5)

    assert asyncio.run(run())[0].value == 1.0


def test_how_long_a_batch_runs_is_known() -> None:
    async def run() -> float:
        batcher = RequestBatcher(lambda batch: time.sleep(0.2) or lengths(batch), ThreadPoolExecutor(1), 100)
        call = asyncio.create_task(batcher.score([(1,)], 5))
        await asyncio.sleep(0.1)
        busy = batcher.busy_s
        await call
        return busy

    assert 0.05 < asyncio.run(run()) < 0.2


def test_what_a_caller_that_has_left_asked_for_is_computed_no_more() -> None:
    computed: list[Sequence] = []

    def score(batch: list[Sequence]) -> list[Score]:
        computed.extend(batch)
        time.sleep(0.1)
        return lengths(batch)

    async def run() -> list[Score]:
        batcher = RequestBatcher(score, ThreadPoolExecutor(1), 1)
        first = asyncio.create_task(batcher.score([(1,)], 5))
        left = asyncio.create_task(batcher.score([(2, 2), (3, 3)], 5))
        stays = asyncio.create_task(batcher.score([(3, 3)], 5))
        await asyncio.sleep(0.05)
        left.cancel()
        return [*await first, *await stays]

    assert [s.value for s in asyncio.run(run())] == [1.0, 2.0]
    assert computed == [(1,), (3, 3)]
