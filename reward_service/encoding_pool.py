"""Threads in which long requests are read: not the event loop, which answers the others meanwhile, nor the threads that it
shares with everything else."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakValueDictionary

THREADS = 2  # they take turns with the event loop, so more would only slow it down
OF_ONE_CLIENT = 1
Result = TypeVar("Result")


class Late(Exception):
    """It was not done at its deadline, or nobody waits for it any more."""


class EncodingPool:
    """Runs work for clients, each of whom has `of_one_client` threads at a time.

    A thread cannot be ended, so work is asked to end itself, and holds its client's place until it has.
    """

    def __init__(self, threads: int = THREADS, of_one_client: int = OF_ONE_CLIENT):
        self._threads = ThreadPoolExecutor(threads, "encode")
        self._of_one_client = of_one_client
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def run(self, client: str, expires: float, work: Callable[[Callable[[], None]], Result]) -> Result:
        """What `work` returns. It gets a function to call between steps, which raises where it is to end.

        Args:
            expires: on the monotonic clock.

        Raises:
            Late: at `expires`; what has not ended by then is asked to.
        """
        loop, is_over = asyncio.get_running_loop(), False
        turn = self._turns.setdefault(client, asyncio.Semaphore(self._of_one_client))

        def check() -> None:
            if is_over or time.monotonic() > expires:
                raise Late

        def start() -> Result:
            check()
            return work(check)

        def ended(_: Any) -> None:
            with suppress(RuntimeError):  # the loop has ended before the thread
                loop.call_soon_threadsafe(turn.release)

        try:
            async with asyncio.timeout(max(0.0, expires - time.monotonic())):
                await turn.acquire()
                future = self._threads.submit(start)
                future.add_done_callback(ended)
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise Late from None
        finally:
            is_over = True


class StoppableEncoder:
    """An encoder that calls `check` before each item."""

    def __init__(self, encoder: Any, check: Callable[[], None]):
        self._encoder, self._check = encoder, check

    def __getattr__(self, name: str) -> Any:
        self._check()
        return getattr(self._encoder, name)
