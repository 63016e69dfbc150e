"""Time that passes when everybody waits: events in their order, and processes that share cores."""

import heapq
import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from controller.loop.clock import Clock


class Event:
    def __init__(self, function: Callable[[], None]):
        self.function: Callable[[], None] | None = function

    def cancel(self) -> None:
        self.function = None


class VirtualTime:
    """`now_s` is the time of whoever runs: of the controller, or of an event while that happens.

    Args:
        cost_s: what it takes the controller to hear an answer, during which the others go on.
    """

    def __init__(self, cost_s: Callable[[Any], float] = lambda answer: 0.0):
        self.now_s = 0.0
        self.cost_s = cost_s
        self._events: list[tuple[float, int, Event]] = []
        self._number = 0
        self.clock = Clock(lambda: self.now_s, lambda: _Inbox(self))

    def after(self, seconds: float, function: Callable[[], None]) -> Event:
        event = Event(function)
        self._number += 1
        heapq.heappush(self._events, (self.now_s + seconds, self._number, event))
        return event

    def spend(self, seconds: float) -> None:
        """The controller computes for so long."""
        end_s = self.now_s + seconds
        while self.run_next(end_s):
            pass
        self.now_s = end_s

    def run_next(self, end_s: float) -> bool:
        """The next event up to `end_s`, if there is one."""
        while self._events and self._events[0][0] <= end_s:
            when_s, _, event = heapq.heappop(self._events)
            if event.function is not None:
                self.now_s = when_s
                event.function()
                return True
        return False


class _Inbox:
    """In place of `queue.SimpleQueue`."""

    def __init__(self, time: VirtualTime):
        self._time = time
        self._items: deque[tuple[Any, Any, Future[Any]]] = deque()

    def put(self, item: tuple[Any, Any, Future[Any]]) -> None:
        self._items.append(item)

    def get(self, timeout: float) -> tuple[Any, Any, Future[Any]]:
        end_s = self._time.now_s + timeout
        while not self._items:
            if not self._time.run_next(end_s):
                self._time.now_s = end_s
                raise queue.Empty
        item = self._items.popleft()
        if item[2].exception() is None:
            self._time.spend(self._time.cost_s(item[2].result()))
        return item


class Work:
    """`seconds` of computing, as it takes alone."""

    def __init__(self, seconds: float, threads: float, done: Callable[[], None]):
        self.seconds, self.threads, self.done = seconds, threads, done
        self.progress_s = 0.0
        self.end = Event(done)


class Cores:
    """Those that some processes share, all alike: where more threads compute than there are cores, each is slower.

    Args:
        beside: speed of one that does not compute alone, as a share of its speed alone.
    """

    def __init__(self, time: VirtualTime, count: float, beside: float = 1.0):
        self._time, self._count, self._beside = time, count, beside
        self._running: list[Work] = []
        self._rate, self._since_s = 1.0, 0.0

    def start(self, seconds: float, threads: float, done: Callable[[], None]) -> Work:
        work = Work(seconds, threads, done)
        self._settle()
        self._running.append(work)
        self._schedule()
        return work

    def progress_s(self, work: Work) -> float:
        self._settle()
        return work.progress_s

    def shorten(self, work: Work, seconds: float) -> None:
        """It ends when so much of it is done."""
        self._settle()
        work.seconds = seconds
        self._schedule()

    def _settle(self) -> None:
        passed = (self._time.now_s - self._since_s) * self._rate
        self._since_s = self._time.now_s
        for work in self._running:
            work.progress_s += passed

    def _schedule(self) -> None:
        threads = sum(work.threads for work in self._running)
        shared = self._beside if len(self._running) > 1 else 1.0
        self._rate = shared * min(1.0, self._count / threads) if threads else 1.0
        for work in self._running:
            work.end.cancel()
            left_s = max(0.0, work.seconds - work.progress_s) / self._rate
            work.end = self._time.after(left_s, lambda work=work: self._end(work))  # type: ignore[misc]

    def _end(self, work: Work) -> None:
        self._settle()
        self._running.remove(work)
        self._schedule()
        work.done()
