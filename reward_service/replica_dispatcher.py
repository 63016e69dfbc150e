"""One queue for the replicas of a scorer: a call takes what waits by then, whoever asked.

Under load most requests have one item and a call costs milliseconds of its own, so items of many requests share one. At most
`calls` are under way: what a replica's death takes with it stays small, and what waits here can still expire here. What is
in one call waits for the slowest of it: where calls are to take `call_s`, they grow while they take less, and one that took
longer is followed by smaller ones, down to single items.

Nobody waits behind all that another has asked for: the PPO loop's calls and those of HTTP take turns, and within a call of
HTTP its clients do, item by item. HTTP leaves half of the calls to a loop that uses the scorer.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial

from contracts.records import Score, ScoringItem

PROBE_S, PAUSE_S = 30.0, 0.1
Call = Callable[[str, list[ScoringItem], float], Awaitable[list[Score]]]
_Waiting = tuple[ScoringItem, float, asyncio.Future[Score]]  # its deadline on the monotonic clock


class ReplicaDied(RuntimeError):
    """The replica that had a call ended before it answered. Serve does not repeat such a call."""


class Unavailable(RuntimeError):
    """The call reached no replica, or its answer cannot be read."""


class ReplicaDispatcher:
    """Calls to one Serve application.

    Args:
        call: sends items with a deadline in seconds; raises ReplicaDied or Unavailable.
        calls: under way at a time. items: of one call, at most.
        call_s: seconds that a call should take at most; None: it has as many items as wait.
    """

    def __init__(self, call: Call, application: str, calls: int, items: int, call_s: float | None = None):
        self._call = call
        self._application = application
        self._calls = calls
        self._most = items
        self._call_s = call_s
        self._items = items if call_s is None else 1  # of the next call
        # By client, whose turn it is first; None: the loop.
        self._waiting: dict[str | None, dict[asyncio.Future[Score], _Waiting]] = {}
        self._under_way: set[asyncio.Task] = set()
        self._of_http = 0  # of those under way
        self._has_loop = self._was_loop = False  # one asks at all; its call was the last
        self._will_pump = False

    async def score(self, item: ScoringItem, expires: float, client: str | None = None) -> Score:
        """The score of one item, or a time-out at `expires` (monotonic clock). Raises ReplicaDied.

        Args:
            client: who asks over HTTP; None: the PPO loop.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Score] = loop.create_future()
        self._has_loop = self._has_loop or client is None
        self._waiting.setdefault(client, {})[future] = (item, expires, future)
        if not self._will_pump:  # after whoever else is about to ask
            self._will_pump = True
            loop.call_soon(self._pump)
        try:
            return await asyncio.wait_for(future, max(0.0, expires - time.monotonic()))
        except TimeoutError:
            return Score(None, "timeout: no score before the deadline")
        finally:  # where the deadline or the end of its request came first
            self._forget(client, future)

    async def score_alone(self, item: ScoringItem, expires: float) -> Score:
        """The same in a call of its own, once a replica is known to be there: a call that one which is dead already refuses
        says nothing of the item."""
        while expires > time.monotonic():
            try:
                await asyncio.wait_for(self._call(self._application, [], expires - time.monotonic()), PROBE_S)
                break
            except (ReplicaDied, Unavailable, TimeoutError):
                await asyncio.sleep(PAUSE_S)
        else:
            return Score(None, "timeout: no replica before the deadline")
        future: asyncio.Future[Score] = asyncio.get_running_loop().create_future()
        await self._send([(item, expires, future)])
        return await future

    def _forget(self, client: str | None, future: asyncio.Future[Score]) -> None:
        queue = self._waiting.get(client, {})
        if queue.pop(future, None) and not queue:
            del self._waiting[client]

    def _pump(self) -> None:
        self._will_pump = False
        while len(self._under_way) < self._calls:
            for is_loop in (not self._was_loop, self._was_loop):
                if batch := self._next_batch(is_loop):
                    break
            else:
                return
            self._was_loop = is_loop
            self._of_http += not is_loop
            task = asyncio.create_task(self._send(batch))
            self._under_way.add(task)
            task.add_done_callback(partial(self._ended, is_loop))

    def _next_batch(self, is_loop: bool) -> list[_Waiting]:
        if not is_loop and self._has_loop and self._of_http >= max(1, self._calls // 2):
            return []
        batch: list[_Waiting] = []
        turns = deque(client for client in self._waiting if (client is None) == is_loop)
        while turns and len(batch) < self._items:
            client = turns.popleft()
            queue = self._waiting.pop(client)
            entry = queue.pop(next(iter(queue)))
            if not entry[2].done():  # expired, or its request was given up, just now
                batch.append(entry)
            if queue:
                self._waiting[client] = queue  # behind the others
                turns.append(client)
        return batch

    def _ended(self, is_loop: bool, task: asyncio.Task) -> None:
        self._under_way.discard(task)
        self._of_http -= not is_loop
        self._pump()

    async def _send(self, batch: list[_Waiting]) -> None:
        """Until it is answered, or nobody waits for it any more."""
        start = time.monotonic()
        left_s = max(expires for _, expires, _ in batch) - start
        items = [item for item, _, _ in batch]
        call = asyncio.ensure_future(self._call(self._application, items, left_s))
        wanted = {future for _, _, future in batch}

        def forget(future: asyncio.Future[Score]) -> None:
            wanted.discard(future)
            if not wanted:
                call.cancel()

        for future in tuple(wanted):
            future.add_done_callback(forget)
        try:
            scores = await asyncio.wait_for(call, max(0.0, left_s))
            if len(scores) != len(items):
                scores = [Score(None, f"wrong_count: {len(scores)} scores for {len(items)} items")] * len(items)
        except TimeoutError:
            scores = [Score(None, "timeout: no score before the deadline")] * len(items)
        except asyncio.CancelledError:
            if wanted:  # the task itself was cancelled
                raise
            return
        except Unavailable as fault:
            scores = [Score(None, f"unavailable: {fault}")] * len(items)
        except Exception as fault:  # every waiting request's, ReplicaDied above all; this task has nobody to tell
            for _, _, future in batch:
                if not future.done():
                    future.set_exception(fault)
            return
        finally:
            self._fit(len(items), time.monotonic() - start)
        for (_, _, future), score in zip(batch, scores, strict=True):
            if not future.done():
                future.set_result(score)

    def _fit(self, count: int, took_s: float) -> None:
        """How many items the next calls have, after one of `count`."""
        if self._call_s is None:
            return
        if took_s > self._call_s:
            self._items = max(1, count // 2)
        elif count == self._items:
            self._items = min(self._most, 2 * count)
