"""One stream of batches for all calls that a replica has open.

    calls ──items──> waiting ──the oldest and its neighbours in length──> one thread, one batch ──> each item's future

A call of one item costs the same forward pass as a call of many: what arrives while a batch is computed travels in the next.
A call of many fills batches of its own: in bfloat16 a score depends in its second digit on its neighbours, and so those of a
PPO update do not depend on the time.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field

from common.microbatches import cut_padded
from contracts.records import Score

Sequence = tuple[int, ...]
OWN_BATCHES = 16  # items of a call that shares its batches with no other


@dataclass(eq=False)
class _Waiting:
    """A sequence and everyone who waits for its score."""

    sequence: Sequence
    number: int  # order of arrival
    call: int  # whose batches it may share; 0: those of all small calls
    expires: float  # on the monotonic clock: the latest of its callers' deadlines
    futures: list[asyncio.Future] = field(default_factory=list)

    @property
    def is_wanted(self) -> bool:
        return self.expires > time.monotonic() and any(not f.done() for f in self.futures)


class RequestBatcher:
    """Batches for `score`, which runs in `executor` and returns one Score a sequence.

    Args:
        batch_tokens: of one batch, longest x count.
    """

    def __init__(self, score: Callable[[list[Sequence]], list[Score]], executor: Executor, batch_tokens: int):
        self._score = score
        self._executor = executor
        self._batch_tokens = batch_tokens
        self._waiting: dict[tuple[int, Sequence], _Waiting] = {}
        self._arrivals = self._calls = 0
        self._running: asyncio.Task | None = None
        self._busy_since: float | None = None

    @property
    def busy_s(self) -> float:
        """For how long the batch that is being computed has been computed."""
        return time.monotonic() - self._busy_since if self._busy_since is not None else 0.0

    async def score(self, sequences: list[Sequence], deadline_s: float) -> list[Score]:
        """Scores in order, or what `score` raised.

        What is not computed after `deadline_s` seconds is a time-out, and is computed no more unless another call waits
        for it too.
        """
        if not sequences:
            return []
        expires = time.monotonic() + deadline_s
        self._calls += 1
        call = self._calls if len(sequences) >= OWN_BATCHES else 0
        futures = [self._enqueue(sequence, call, expires) for sequence in sequences]
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        try:
            await asyncio.wait(futures, timeout=deadline_s)
        except asyncio.CancelledError:  # the caller has left: what only it waits for is computed no more
            for future in futures:
                future.cancel()
            raise
        late = Score(None, f"timeout: not scored within {deadline_s:.0f} s")
        return [f.result() if f.done() else late for f in futures]

    def _enqueue(self, sequence: Sequence, call: int, expires: float) -> asyncio.Future:
        future = asyncio.get_running_loop().create_future()
        item = self._waiting.get((call, sequence))
        if item is None:
            self._arrivals += 1
            item = self._waiting[call, sequence] = _Waiting(sequence, self._arrivals, call, expires)
        item.expires = max(item.expires, expires)
        item.futures.append(future)
        return future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next_batch():
            futures = [item.futures for item in batch]
            self._busy_since = time.monotonic()
            try:
                scores = await loop.run_in_executor(self._executor, self._score, [item.sequence for item in batch])
                if len(scores) != len(batch):
                    raise RuntimeError(f"{len(scores)} scores for {len(batch)} sequences")
            except Exception as fault:
                # The callers' error; a loop that ended here would leave every later call waiting.
                for future in (f for waiting in futures for f in waiting if not f.done()):
                    future.set_exception(fault)
                continue
            finally:
                self._busy_since = None
            for waiting, score in zip(futures, scores, strict=True):
                for future in (f for f in waiting if not f.done()):
                    future.set_result(score)

    def _next_batch(self) -> list[_Waiting]:
        """The oldest sequence that somebody still waits for, and its neighbours in length; they wait no more."""
        self._waiting = {key: item for key, item in self._waiting.items() if item.is_wanted}
        if not self._waiting:
            return []
        oldest = min(self._waiting.values(), key=lambda item: item.number)
        items = [item for item in self._waiting.values() if item.call == oldest.call]
        cut = cut_padded([len(item.sequence) for item in items], self._batch_tokens)
        batch = next(batch for rows in cut if oldest in (batch := [items[i] for i in rows]))
        for item in batch:
            del self._waiting[item.call, item.sequence]
        return batch
