"""Signs of life and stragglers, on a clock that the test sets."""

from concurrent.futures import Future
from typing import Any

import pytest

from controller.loop.liveness import LivenessMonitor, Stragglers


class Process:
    """Answers with what it has done, unless it is stopped."""

    def __init__(self) -> None:
        self.count, self.asked = 0, list[Future[int | None]]()

    def ask(self) -> Any:
        self.asked.append(Future())
        return self

    def future(self) -> Future[int | None]:
        return self.asked[-1]

    def answer(self, count: int | None) -> None:
        self.asked[-1].set_result(count)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_who_gets_on_is_asked_four_times_and_is_not_silent(clock: Clock) -> None:
    process = Process()
    watch = LivenessMonitor(lambda number: process.ask(), 60, clock)
    for second in range(240):
        clock.now = 100.0 + second
        assert watch.silent([0]) == {}
        if not process.asked[-1].done():
            process.answer(second)
    assert len(process.asked) == 16


def test_who_does_not_answer_is_silent_since_the_question(clock: Clock) -> None:
    watch = LivenessMonitor(lambda number: Process().ask(), 60, clock)
    watch.silent([3])
    clock.now += 60
    assert watch.silent([3]) == {}
    clock.now += 0.5
    assert watch.silent([3]) == {3: 60.5}


def test_an_answer_that_is_the_one_of_before_is_silence(clock: Clock) -> None:
    process = Process()
    watch = LivenessMonitor(lambda number: process.ask(), 60, clock)
    found: list[float] = []
    for second in range(0, 110, 1):
        clock.now = 100.0 + second
        if watch.silent([0]):
            found.append(second)
            break
        if not process.asked[-1].done():
            process.answer(min(second, 20))  # from second 20 on it is stuck
    assert found == [106]  # the last that grew was answered at 30; asked again at 45, so silent after 105


def test_an_asker_who_was_away_blames_nobody(clock: Clock) -> None:
    process = Process()
    watch = LivenessMonitor(lambda number: process.ask(), 60, clock)
    watch.silent([0])
    process.answer(1)
    clock.now += 1000  # nobody looked
    assert watch.silent([0]) == {}
    clock.now += 59
    assert watch.silent([0]) == {}


def test_one_in_the_place_of_another_starts_anew(clock: Clock) -> None:
    first, second = Process(), Process()
    processes = [first]
    watch = LivenessMonitor(lambda number: processes[-1].ask(), 60, clock)
    watch.silent([0])
    first.answer(900)
    watch.silent([0])
    watch.forget(0)
    processes.append(second)
    for _ in range(3):
        clock.now += 30
        assert watch.silent([0]) == {}
        second.answer(len(second.asked))
    assert len(second.asked) == 3


def test_an_error_is_no_sign_of_life(clock: Clock) -> None:
    process = Process()
    watch = LivenessMonitor(lambda number: process.ask(), 60, clock)
    for second in range(70):
        clock.now = 100.0 + second
        silent = watch.silent([0])
        if not process.asked[-1].done():
            process.asked[-1].set_exception(RuntimeError("cannot generate"))
    assert silent == {0: 69}


def test_the_deadline_of_a_rollout() -> None:
    stragglers = Stragglers(floor_s=10)
    assert stragglers.deadline_s() == 10
    for seconds in range(1, 21):
        stragglers.took(seconds)
    assert stragglers.deadline_s() == 3 * 19  # 19 of 20 took at most 19 s
    for _ in range(512):
        stragglers.took(1)
    assert stragglers.deadline_s() == 10


def test_a_rank_that_writes_excuses_those_that_wait_for_it(clock: Clock) -> None:
    """Rank 0 writes a commit for 400 s, while rank 1 waits for it in a collective; then both hang."""
    ranks = [Process(), Process()]
    watch = LivenessMonitor(lambda number: ranks[number].ask(), 60, clock)
    silent_at: list[int] = []
    for second in range(520):
        clock.now = 100.0 + second
        if watch.silent([0, 1]):
            silent_at.append(second)
        for number, rank in enumerate(ranks):
            if not rank.asked[-1].done():
                rank.answer(None if number == 0 and second < 400 else 7)
    assert silent_at[0] > 400
    assert silent_at[0] <= 400 + 15 + 60 + 15


def test_a_stopped_rank_is_silent_although_another_has_written(clock: Clock) -> None:
    writes, stopped = Process(), Process()
    watch = LivenessMonitor(lambda number: (writes, stopped)[number].ask(), 60, clock)
    silent: dict[int, float] = {}
    for second in range(200):
        clock.now = 100.0 + second
        silent = watch.silent([0, 1])
        if silent:
            break
        if not writes.asked[-1].done():
            writes.answer(None if second < 30 else second)
    assert set(silent) == {1}
    assert second <= 30 + 15 + 60 + 15
