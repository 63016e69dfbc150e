"""Who gives no sign of life, and who takes too long: what Ray cannot see of a process that is there.

A stopped process answers nothing, a stuck one answers with the number of before; both are silent. Healthy is who got on. A
learner rank that waits for a slow disk says so, and meanwhile the others that wait for it are not silent either.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

REMEMBERED = 512  # durations; old ones are of other weights and other lengths
FACTOR = 3.0  # of the 95th percentile: a rollout that takes longer is a straggler


@dataclass
class _Pulse:
    count: int = -1  # of the last answer
    asked_s: float = -math.inf  # the last question
    waiting_s: float | None = None  # the first question since the count grew last
    answer: "Future[int | None] | None" = None


class LivenessMonitor:
    """Asks processes for a count of what they have done, four times within `silence_s`.

    Silence is measured from a question, and an answer counts when it came: how often `silent` is called makes no difference.
    """

    def __init__(self, ask: Callable[[int], Any], silence_s: float, clock: Callable[[], float] = time.monotonic):
        """`ask(number)` is a remote call that counts on, or tries to, at each question; None: all of them may wait."""
        self._ask = ask
        self._silence_s = silence_s
        self._clock = clock
        self._pulses: dict[int, _Pulse] = {}

    def silent(self, numbers: Iterable[int]) -> dict[int, float]:
        """Who of them has not got on for too long, and for how many seconds. Asks whose turn has come."""
        now, silent, numbers = self._clock(), {}, list(numbers)
        for number in numbers:
            pulse = self._pulses.setdefault(number, _Pulse())
            if pulse.answer is not None and pulse.answer.done():
                # One that cannot answer gets its chance again; one that is lost is reported by its other calls.
                count = pulse.count if pulse.answer.exception() else pulse.answer.result()
                if count is None:
                    for other in self._pulses.values():
                        other.waiting_s = None if other.waiting_s is None else now
                elif count > pulse.count:
                    pulse.count, pulse.waiting_s = count, None
                pulse.answer = None
            if pulse.answer is None and now - pulse.asked_s >= self._silence_s / 4:
                pulse.answer, pulse.asked_s = self._ask(number).future(), now
                pulse.waiting_s = now if pulse.waiting_s is None else pulse.waiting_s
        for number in numbers:
            since = self._pulses[number].waiting_s
            if since is not None and now - since > self._silence_s:
                silent[number] = now - since
        return silent

    def forget(self, number: int) -> None:
        """Another process has its place."""
        self._pulses.pop(number, None)


class Stragglers:
    """When a rollout has taken too long: later than `max(floor_s, 3 x p95)` of the last durations."""

    def __init__(self, floor_s: float):
        self._floor_s = floor_s
        self._durations: deque[float] = deque(maxlen=REMEMBERED)

    def took(self, seconds: float) -> None:
        self._durations.append(seconds)

    def deadline_s(self) -> float:
        if not self._durations:
            return self._floor_s
        ordered = sorted(self._durations)
        return max(self._floor_s, FACTOR * ordered[math.ceil(0.95 * len(ordered)) - 1])
