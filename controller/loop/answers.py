"""What the controller's one thread waits for. Answers of all remote calls arrive in one queue, in the order in which they
come, so that an answer costs the same with one actor and with a thousand; whatever is waited for, all are heard."""

import queue
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from ray.exceptions import RayTaskError

from common.error_text import typed_line
from common.processes.ray_access import process_is_gone
from contracts.config import ClusterConfig
from contracts.interfaces import CollectiveError, LearnerLostError
from controller.loop.clock import Clock
from controller.loop.liveness import LivenessMonitor

CHECK_S = 0.5  # between two looks at what does not tell by itself

Failed = Callable[[BaseException], None]


class Answers:
    """`pulse(rank)` calls a learner rank for its pulse; `check(now)` is called every CHECK_S of waiting."""

    def __init__(
        self, cluster: ClusterConfig, pulse: Callable[[int], Any], check: Callable[[float], None], clock: Clock
    ):
        self._inbox: queue.SimpleQueue[tuple[Callable[[Any], None], Failed | None, Future[Any]]] = clock.inbox()
        self._now = clock.now
        self._timeout_s = cluster.step_timeout_s
        self._check, self._next_check_s = check, 0.0
        self._ranks = range(cluster.num_learner_ranks)
        self._learner_liveness = LivenessMonitor(pulse, cluster.learner_silence_s, clock.now)
        self._learner_works = False
        self._round = 0  # of calls that are waited for

    def on_call(self, call: Any, handle: Callable[[Any], None], failed: Failed | None = None) -> None:
        """Hand the result of a remote call to `handle`, or its error to `failed` (None: it ends the wait), from within
        whatever the controller waits for then."""
        self.on_future(call.future(), handle, failed)

    def on_future(self, future: Future[Any], handle: Callable[[Any], None], failed: Failed | None = None) -> None:
        future.add_done_callback(lambda answer: self._inbox.put((handle, failed, answer)))

    def on_answers(self, calls: list[Any], done: Callable[[list[Any]], None]) -> None:
        """Call `done` with the results of remote calls, an error in the place of one that fails, when all are there."""
        answers: dict[int, Any] = {}

        def take(i: int, answer: Any) -> None:
            answers[i] = answer
            if len(answers) == len(calls):
                done([answers[i] for i in range(len(calls))])

        for i, call in enumerate(calls):
            self.on_call(call, partial(take, i), partial(take, i))

    def wake(self) -> None:
        """End the pause of the wait that goes on, whose condition may have changed. Safe in a signal handler."""
        nothing = Future[None]()
        nothing.set_result(None)
        self._inbox.put((lambda _: None, None, nothing))

    def wait_until(self, done: Callable[[], bool], what: str) -> None:
        """Hear all answers until `done`. Raises TimeoutError after the time that a step may take, naming `what`."""
        end = self._now() + self._timeout_s
        while not done():
            now = self._now()
            if now >= self._next_check_s:
                self._next_check_s = now + CHECK_S
                self._check_learner()
                self._check(now)
            try:
                handle, failed, answer = self._inbox.get(timeout=max(0.0, min(end, self._next_check_s) - now))
            except queue.Empty:
                if now < end:
                    continue
                raise TimeoutError(f"waited {self._timeout_s:.0f} s (cluster.step_timeout_s) for {what}") from None
            error = answer.exception()
            if error is None:
                handle(answer.result())
            elif failed is None:
                raise error
            else:
                failed(error)

    # ---- of the learner

    def wait(self, calls: list[Any], what: str) -> list[Any]:
        """The results of remote calls of the learner, one for each rank.

        Raises:
            LearnerLostError: a rank is gone, cannot reach the others, or has been silent for too long.
            TimeoutError: after the time that a step may take, naming `what`.
            Exception: the first error that comes.
        """
        results: dict[int, Any] = {}
        self._round += 1
        for i, call in enumerate(calls):
            self.on_call(call, partial(results.__setitem__, i), partial(self._on_learner_error, self._round))
        self.wait_for_learner(lambda: len(results) == len(calls), what)
        return [results[i] for i in range(len(calls))]

    def wait_for_learner(self, done: Callable[[], bool], what: str) -> None:
        """As `wait_until`, until the learner has done something. Raises LearnerLostError, too."""
        self._learner_works = True
        try:
            self.wait_until(done, what)
        finally:
            self._learner_works = False
            for rank in self._ranks:
                self._learner_liveness.forget(rank)

    def _check_learner(self) -> None:
        silent = self._learner_liveness.silent(self._ranks) if self._learner_works else {}
        if silent:
            raise LearnerLostError(f"learner rank {min(silent)} has not got on for {max(silent.values()):.0f} s")

    def _on_learner_error(self, round_: int, error: BaseException) -> None:
        if round_ != self._round:
            return  # of a call that nobody waits for any more
        cause = error.cause if isinstance(error, RayTaskError) else error
        if process_is_gone(cause) or isinstance(cause, CollectiveError):
            raise LearnerLostError(f"a learner rank is lost: {typed_line(cause)}") from error
        raise error
