"""The controller's side of the actors: who gets which rollout, and what they have finished.

    stream ──admit──> ledger ──lease──> an actor's `assign`      as many as it may hold at once
                        ▲
                        └──complete── an actor's `collect`       one call always waits at each actor

Whatever the controller waits for, it goes on serving the actors: answers of all remote calls arrive in one queue, in the
order in which they come, so that an answer costs the same with one actor and with a thousand.
"""

import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from contracts.config import PPOConfig
from contracts.records import Assignment, Delivery, Rollout
from controller.ledger import Key, Ledger
from controller.prompts import PromptStream

PATIENCE_S = 2.0  # how long a completion waits for others that are scored with it, where actors and learner overlap


class Dispatcher:
    """Keeps every actor supplied within the ledger's bound. All calls come from the controller's one thread."""

    def __init__(
        self,
        actors: list[Any],
        ledger: Ledger,
        stream: PromptStream,
        ppo: PPOConfig,
        scorers: list[str],
        timeout_s: float,
    ):
        self._actors = {f"actor-{i}": actor for i, actor in enumerate(actors)}
        self._ledger, self._stream, self._ppo, self._timeout_s = ledger, stream, ppo, timeout_s
        self._scorers = scorers
        self._share = -(-(ledger.max_staleness + 1) * ledger.rollouts_per_update // len(actors))
        # Where phases take turns, scoring begins when the last completion is there: each may then use every core.
        self._scoring = (
            (ppo.score_batch, PATIENCE_S) if ledger.max_staleness else (ledger.rollouts_per_update, timeout_s)
        )
        self._held = dict.fromkeys(self._actors, 0)  # rollouts at each actor
        # A rollout group trains as a whole, so its rollouts are completed together: {group: {key: (lease, rollout)}}.
        self._parts: dict[tuple[int, int], dict[Key, tuple[int, Rollout]]] = {}
        self._inbox: queue.SimpleQueue[tuple[Callable[[Any], None], Future[Any]]] = queue.SimpleQueue()
        self._paused = False
        self._usage = dict.fromkeys(self._actors, (0.0, 0.0))  # seconds of generating, scoring
        self._tokens = 0
        for holder in self._actors:
            self._ask(holder)

    # ---- what the controller calls

    def feed(self, updates_left: int) -> None:
        """Admit as many rollouts as the staleness bound allows now and the updates left will use, and hand them out."""
        wanted = updates_left * self._ledger.rollouts_per_update - self._ledger.num_open
        groups = min(self._ledger.capacity(), wanted) // self._ppo.samples_per_prompt
        if groups > 0:
            self._ledger.admit(self._stream.next_requests(groups))
        for holder in self._actors:
            self._supply(holder)

    def next_batch(self, version: int) -> list[Rollout]:
        """The rollouts of the next update, by a learner at `version`.

        Raises:
            TimeoutError: after the time that a step may take.
            ray.exceptions.RayError: what ended an actor.
        """
        n = self._ledger.rollouts_per_update
        self._until(lambda: self._ledger.ready(n, version), f"{n} rollouts for the update of version {version}")
        return self._ledger.take(n, version)

    def wait(self, calls: list[Any], what: str) -> list[Any]:
        """The results of remote calls. Raises the first error that comes, or TimeoutError naming `what`."""
        results: dict[int, Any] = {}
        for i, call in enumerate(calls):
            self._watch(call, partial(results.__setitem__, i))
        self._until(lambda: len(results) == len(calls), what)
        return [results[i] for i in range(len(calls))]

    def drain(self) -> None:
        """Hand out nothing more and wait until no rollout is at an actor; the next `feed` goes on."""
        self._paused = True
        self._until(lambda: not any(self._held.values()), "the actors to finish what they hold")
        self._paused = False

    def usage(self) -> dict[str, float]:
        """Since the last call: what the busiest actor spent, and sampled tokens a second of its generating."""
        generate_s = max(seconds for seconds, _ in self._usage.values())
        score_s = max(seconds for _, seconds in self._usage.values())
        rate = self._tokens / generate_s if generate_s else 0.0
        self._usage, self._tokens = dict.fromkeys(self._actors, (0.0, 0.0)), 0
        return {"perf/generate_s": generate_s, "perf/score_s": score_s, "perf/gen_tokens_per_s": rate}

    # ---- answers

    def _until(self, done: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + self._timeout_s
        while not done():
            try:
                handle, answer = self._inbox.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"waited {self._timeout_s:.0f} s (cluster.step_timeout_s) for {what}") from None
            handle(answer.result())

    def _watch(self, call: Any, handle: Callable[[Any], None]) -> None:
        call.future().add_done_callback(lambda answer: self._inbox.put((handle, answer)))

    def _ask(self, holder: str) -> None:
        call = self._actors[holder].collect.remote(*self._scoring)
        self._watch(call, partial(self._deliver, holder))

    def _deliver(self, holder: str, delivery: Delivery) -> None:
        self._ask(holder)
        self._held[holder] -= len(delivery.rollouts)
        generate_s, score_s = self._usage[holder]
        self._usage[holder] = generate_s + delivery.generate_s, score_s + delivery.score_s
        for lease, rollout in delivery.rollouts:
            self._tokens += len(rollout.completion.sampled_ids)
            siblings = self._parts.setdefault(rollout.group, {})
            siblings[rollout.key] = lease, rollout
            if len(siblings) == self._ppo.samples_per_prompt:
                self._ledger.complete_group(list(self._parts.pop(rollout.group).values()))
        self._supply(holder)

    def _supply(self, holder: str) -> None:
        if self._paused:
            return
        leases = self._ledger.lease(self._share - self._held[holder], holder)
        if not leases:
            return
        self._held[holder] += len(leases)
        work = [Assignment(lease.number, lease.request, self._judges(lease.order)) for lease in leases]
        # Without a result to wait for: what goes wrong with an assignment is the next `collect`'s answer.
        self._actors[holder].assign.remote(work, self._ppo.sampling)

    def _judges(self, order: int) -> tuple[str, ...]:
        """Who scores the rollout that was admitted as number `order`: the gold judge sees an even share."""
        gold, all_rollouts = self._ppo.gold_rollouts, self._ledger.rollouts_per_update
        sees = (order * gold) % all_rollouts < gold
        return tuple(scorer for scorer in self._scorers if scorer != "gold" or sees)
