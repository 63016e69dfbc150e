"""The controller's side of the actors: who gets which rollout, and what they have finished.

    stream ──admit──> ledger ──lease──> an actor's `assign`      as many as it may hold at once
                        ▲
                        └──complete── an actor's `collect`       one call always waits at each actor

Whatever the controller waits for, it goes on serving the actors: loop/answers.py.

An actor that is lost, or silent for `cluster.actor_silence_s`, costs the tokens that it was sampling: its leases end, others
get them, and a new actor takes its place in a thread, while everything else goes on. It is handed work only when it serves
the weights of the ledger's version. What an actor holds for much longer than usual, one with empty hands gets too.

Who joins starts as a replacement does. Who leaves gets nothing new, has `cluster.leave_grace_s` to finish what it holds, and
others get the rest.
"""

import itertools
import threading
from collections.abc import Iterator
from functools import partial

from ray.exceptions import GetTimeoutError, ObjectLostError, RayTaskError

from common.error_text import typed_line
from common.processes.ray_access import process_is_gone
from contracts.config import ClusterConfig, PPOConfig, SamplingConfig
from contracts.interfaces import EngineLostError
from contracts.records import Assignment, Delivery, Rollout, RolloutRequest
from controller.data.prompts import PromptStream
from controller.ledger.entries import Key, Lease
from controller.ledger.ledger import Ledger
from controller.loop.answers import Answers
from controller.loop.clock import WALL_CLOCK, Clock
from controller.loop.fleet import Fleet, Joined
from controller.loop.liveness import LivenessMonitor, Stragglers

NO_BATCH = 2**31 - 1  # more completions than an actor ever holds: it waits for all that it was assigned
PATIENCE_S = 2.0  # how long a completion waits for others that are scored with it, where actors and learner overlap


class Stopping(Exception):
    """`interrupt` was called: no more updates are wanted."""


class Dispatcher:
    """Keeps every actor supplied within the ledger's bound. All calls come from the controller's one thread."""

    def __init__(
        self,
        fleet: Fleet,
        ledger: Ledger,
        stream: PromptStream,
        ppo: PPOConfig,
        scorers: list[str],
        cluster: ClusterConfig,
        clock: Clock = WALL_CLOCK,
    ):
        actors = fleet.actors
        self._fleet, self._actors = fleet, actors  # the list in which a new actor takes its place
        self._ledger = ledger
        self._now = clock.now
        self._stream = stream
        self._ppo = ppo
        self._scorers = scorers
        # Where phases take turns, scoring begins when the last completion is there, however long that takes: each phase may
        # then use every core, and what a text is scored beside does not depend on the clock.
        self._scoring = (ppo.score_batch, PATIENCE_S) if ledger.max_staleness else (NO_BATCH, threading.TIMEOUT_MAX)
        self._held: list[dict[int, float]] = [{} for _ in actors]  # leases at each actor, and since when
        self._life = [0] * len(actors)  # which actor in this place: answers of an earlier one no longer count
        self._serving = fleet.present()  # actors that may be handed work
        self._behind: set[int] = set()  # actors that are up, with other weights
        self._leaving: dict[int, float] = {}  # who get nothing new, and until when they may finish what they hold
        self._leave_grace_s = cluster.leave_grace_s
        self._publishing = False
        # A rollout group trains as a whole, so its rollouts are completed together: {group: {key: (lease, rollout)}}.
        self._parts: dict[tuple[int, int], dict[Key, tuple[int, Rollout]]] = {}
        # Completions of held-out prompts, by numbers below 0, which are no leases of the ledger's.
        self._aside, self._held_out = itertools.count(-1, -1), dict[int, Rollout]()
        self._nobodys: list[int] = []  # of those numbers, which no actor holds or has answered
        self.answers = Answers(cluster, fleet.pulse_learner, self._check_actors, clock)
        self._paused = False
        self._interrupted = False
        self._usage = [(0.0, 0.0) for _ in actors]  # seconds of generating, scoring
        self._tokens = 0
        self.num_lost = self.num_silent = 0
        self._actor_liveness = LivenessMonitor(
            lambda number: self._actors[number].pulse.remote(), cluster.actor_silence_s, clock.now
        )
        self._stragglers = Stragglers(cluster.hedge_after_s)
        for number in self._serving:
            self._request_delivery(number)

    # ---- what the controller calls

    def admit_rollouts(self, updates_left: int) -> None:
        """Admit as many rollouts as the staleness bound allows now and the updates left will use, and hand them out."""
        wanted = updates_left * self._ledger.rollouts_per_update - self._ledger.num_open
        groups = min(self._ledger.capacity(), wanted) // self._ppo.samples_per_prompt
        if groups > 0:
            self._ledger.admit(self._stream.next_requests(groups))
        self._lease_to_all()

    def wait_for_batch(self, version: int, number: int | None = None) -> list[Rollout]:
        """The rollouts of the next update, by a learner at `version`.

        Args:
            number: of them; None: all that an update takes. Fewer where some of these are there and others have closed.

        Raises:
            Stopping: after `interrupt`.
            TimeoutError: after the time that a step may take.
            ActorLostError: more actors are lost than `cluster.max_actor_restarts`.
            Exception: what a new actor cannot start for.
        """
        n = self._ledger.rollouts_per_update if number is None else number

        def ready() -> bool:
            if self._interrupted:
                raise Stopping
            self._publish_to_latecomers()
            return self._ledger.ready(n, version)

        self.answers.wait_until(ready, f"{n} rollouts for the update of version {version}")
        return self._ledger.take(n, version)

    def sample_held_out(self, requests: list[RolloutRequest], sampling: SamplingConfig) -> list[Rollout]:
        """Scored completions of prompts that nothing trains on, in order: the ledger does not know them, nor does `usage`
        where nothing else is sampled meanwhile.

        Raises:
            As `wait_for_batch`.
        """
        wanted = {next(self._aside): request for request in requests}
        self._held_out, used = {}, ([*self._usage], self._tokens)
        self._nobodys = [*wanted]  # all at first, then those that a lost actor held

        def ready() -> bool:
            if self._interrupted:
                raise Stopping
            self._publish_to_latecomers()
            if self._nobodys and self._serving:
                left, self._nobodys = sorted(self._nobodys, reverse=True), []
                numbers = sorted(self._serving)
                for i, number in enumerate(numbers[: len(left)]):
                    work = [Assignment(lease, wanted[lease], ("proxy",)) for lease in left[i :: len(numbers)]]
                    self._hand_out(number, work, sampling)
            return len(self._held_out) == len(wanted)

        self.answers.wait_until(ready, f"{len(requests)} completions of held-out prompts")
        if self._ppo.max_staleness == 0:
            self._usage, self._tokens = used
        return [self._held_out[lease] for lease in wanted]

    def interrupt(self) -> None:
        """End the wait for rollouts with Stopping, now or when it is next begun. Safe in a signal handler."""
        self._interrupted = True
        self.answers.wake()

    def drain(self) -> None:
        """Hand out nothing new and wait until nothing is being sampled; the next `admit_rollouts` goes on.

        A delivered rollout whose group is not whole keeps its lease: the rest of the group may be waiting to be handed out.
        """
        self._paused = True
        busy = [number for number, held in enumerate(self._held) if held]

        def finished() -> bool:
            while busy and not self._held[busy[-1]]:
                busy.pop()
            return not busy and not any(self._held)

        self.answers.wait_until(finished, "the actors to finish what they hold")
        self._paused = False

    def usage(self) -> dict[str, float]:
        """Since the last call: what the busiest actor spent, and sampled tokens a second of its generating."""
        generate_s = max(seconds for seconds, _ in self._usage)
        score_s = max(seconds for _, seconds in self._usage)
        rate = self._tokens / generate_s if generate_s else 0.0
        self._usage, self._tokens = [(0.0, 0.0) for _ in self._actors], 0
        return {"perf/generate_s": generate_s, "perf/score_s": score_s, "perf/gen_tokens_per_s": rate}

    @property
    def _share(self) -> int:
        """How many rollouts an actor may hold."""
        wanted = (self._ledger.max_staleness + 1) * self._ledger.rollouts_per_update
        return -(-wanted // max(len(self._serving), self._fleet.least))

    def faults(self) -> dict[str, float]:
        """Of the run so far."""
        return {"fault/actors_lost": float(self.num_lost), "fault/actors_silent": float(self.num_silent)} | {
            "fault/rollouts_hedged": float(self._ledger.counts["hedged"])
        }

    def publish(self, version: int) -> dict[str, float]:
        """Give every actor the learner's weights as `version`; the learner must have nothing else to do. Actors that they
        do not reach are replaced. Returns metrics of the transfer."""
        self._publishing, lives = True, {number: self._life[number] for number in self._fleet.present()}
        report = self.answers.wait(self._fleet.start_publish(version), f"the engines to load version {version}")[0]
        self._publishing = False
        self._fleet.published(report)
        for number, reason in report.missing.items():
            if lives.get(number) == self._life[number]:  # the others have been lost before
                self._replace_lost(number, f"it did not take version {version}: {reason}")
        # An actor that took another's place meanwhile has the weights that it started with.
        for number in [n for n in self._behind if lives.get(n) == self._life[n]]:
            self._behind.discard(number)
            self._serving.add(number)
        self._lease_to_all()
        return report.metrics()

    # ---- answers

    def _request_delivery(self, number: int) -> None:
        call, life = self._actors[number].collect.remote(*self._scoring), self._life[number]
        self.answers.on_call(
            call, partial(self._on_delivery, number, life), partial(self._on_actor_error, number, life)
        )

    def _on_delivery(self, number: int, life: int, delivery: Delivery) -> None:
        if life != self._life[number]:
            return
        self._request_delivery(number)
        generate_s, score_s = self._usage[number]
        self._usage[number] = generate_s + delivery.generate_s, score_s + delivery.score_s
        now = self._now()
        for lease, rollout in delivery.rollouts:
            self._tokens += len(rollout.completion.sampled_ids)
            if lease < 0:
                if self._held[number].pop(lease, None) is not None:  # else of a wait that the loss of the learner ended
                    self._held_out[lease] = rollout
                continue
            self._stragglers.took(now - self._held[number].pop(lease, now))
            if self._ledger.is_late(lease):
                continue
            siblings = self._parts.setdefault(rollout.group, {})
            siblings.setdefault(rollout.key, (lease, rollout))
            if len(siblings) == self._ppo.samples_per_prompt:
                self._ledger.complete_group(list(self._parts.pop(rollout.group).values()))
        if number in self._leaving and not self._held[number] and not self._publishing:
            self._left(number)
        elif delivery.is_leaving and number in self._fleet.present():
            self._leave(number, "its process was asked to end")
        self._lease_to(number)

    def _lease_to(self, number: int, level: int | None = None) -> bool:
        """What the actor may hold, at most `level` rollouts. False where nothing is left to hand out."""
        if self._paused or number not in self._serving:
            return False
        most = self._share if level is None else min(level, self._share)
        room = max(0, most - len(self._held[number]))
        leases = self._ledger.lease(room, _holder(number))
        if leases:
            self._assign(number, leases)
        return len(leases) == room

    def _assign(self, number: int, leases: list[Lease]) -> None:
        work = [Assignment(lease.number, lease.request, self._scorers_of(lease.order)) for lease in leases]
        self._hand_out(number, work, self._ppo.sampling)

    def _hand_out(self, number: int, work: list[Assignment], sampling: SamplingConfig) -> None:
        self._held[number].update(dict.fromkeys((assignment.lease for assignment in work), self._now()))
        # Without a result to wait for: what goes wrong with an assignment is the next `collect`'s answer.
        self._actors[number].assign.remote(work, sampling)

    def _scorers_of(self, order: int) -> tuple[str, ...]:
        """Who scores the rollout that was admitted as number `order`: the gold judge sees an even share."""
        gold, all_rollouts = self._ppo.gold_rollouts, self._ledger.rollouts_per_update
        sees = (order * gold) % all_rollouts < gold
        return tuple(scorer for scorer in self._scorers if scorer != "gold" or sees)

    # ---- slow and lost actors

    def _check_actors(self, now: float) -> None:
        """For those that are there and do nothing, who come and go, and rollouts that take too long."""
        for number, seconds in self._actor_liveness.silent(self._serving | self._behind | self._leaving.keys()).items():
            self.num_silent += 1
            self._replace_lost(number, f"it has generated nothing for {seconds:.0f} s")
        self._change_fleet(now)
        idle = [number for number in sorted(self._serving) if not self._held[number]]
        if not idle or len(self._serving | self._leaving.keys()) == 1:
            return
        late = self._held_since_before(now - self._stragglers.deadline_s())
        for number in idle:
            hedged = filter(None, (self._ledger.hedge(lease, _holder(number)) for lease in late))
            if second := list(itertools.islice(hedged, self._share)):
                self._assign(number, second)

    def _held_since_before(self, end: float) -> Iterator[int]:
        """Leases, actor by actor."""
        for held in self._held:
            for lease, since in held.items():
                if since >= end:
                    break  # they are in the order of time
                yield lease

    def _on_actor_error(self, number: int, life: int, error: BaseException) -> None:
        if life != self._life[number]:
            return
        if not _is_loss(error):
            raise error  # of one rollout: a prompt that cannot be sampled
        self._replace_lost(number, typed_line(error))

    def _replace_lost(self, number: int, reason: str) -> None:
        """What the actor held is handed out again, and another starts in its place."""
        held = self._take_back(number)
        self.num_lost += 1
        self._fleet.lost(number, held, reason)
        self._start_actors()
        self._lease_to_all()

    def _take_back(self, number: int) -> int:
        """All that an actor holds, which is no more one of the run. Returns how many rollouts."""
        self._life[number] += 1
        self._serving.discard(number)
        self._behind.discard(number)
        self._leaving.pop(number, None)
        self._actor_liveness.forget(number)
        held, self._held[number] = self._held[number], {}
        for lease in held:
            self._ledger.release(lease)
        self._nobodys += [lease for lease in held if lease < 0]
        return len(held)

    def _lease_to_all(self) -> None:
        """Evenly: who holds least gets most, so that nobody waits while another has a whole update to sample."""
        if not self._ledger.num_pending:
            return
        order = sorted(self._serving, key=lambda number: (len(self._held[number]), number))
        level = even_level([len(self._held[number]) for number in order], self._ledger.num_pending)
        for number in order:
            if not self._lease_to(number, level):
                break

    # ---- who joins and who leaves

    def _change_fleet(self, now: float) -> None:
        """Towards what is wanted of it."""
        for number, why in self._fleet.leavers().items():
            self._leave(number, why)
        if not self._publishing:  # over NCCL or IPC the others would be left with half an update
            for number in [n for n, end in self._leaving.items() if now >= end or not self._held[n]]:
                self._left(number)
        self._start_actors()

    def _leave(self, number: int, why: str) -> None:
        self._serving.discard(number)
        self._behind.discard(number)
        self._leaving[number] = self._now() + self._leave_grace_s
        self._fleet.leave(number, len(self._held[number]), why)

    def _left(self, number: int) -> None:
        self._fleet.left(number, self._take_back(number))
        self._lease_to_all()

    def _start_actors(self) -> None:
        for number in self._fleet.starts():
            self.answers.on_future(
                self._fleet.start(number), partial(self._on_joined, number), partial(self._on_not_started, number)
            )

    def _on_not_started(self, number: int, error: BaseException) -> None:
        self._fleet.not_started(number, error, _is_loss(error) or isinstance(error, GetTimeoutError))

    def _on_joined(self, number: int, joined: Joined) -> None:
        """A new actor is there."""
        self._fleet.joined(number)
        self._request_delivery(number)
        if self._fleet.serves(joined, self._ledger.version) and not self._publishing:
            self._serving.add(number)
            self._lease_to(number)
        else:
            self._behind.add(number)

    # ---- a lost learner

    def abandon_leases(self) -> None:
        """Ledger and learner are back at a commit: what the actors hold is nobody's any more, and nothing samples before
        the next `publish`."""
        self._publishing = False
        self._parts.clear()
        self._held = [{} for _ in self._actors]
        self._behind |= self._serving
        self._serving = set()
        self._fleet.learner_restarted()

    def _publish_to_latecomers(self) -> None:
        """Actors that came while weights went out get them now that the learner has nothing else to do."""
        if self._behind:
            self.publish(self._ledger.version)


def even_level(held: list[int], more: int) -> int:
    """How much each holds once `more` is shared out so that the least is as high as can be, rounded up.

    Args:
        held: what each has, ascending.
    """
    level = total = 0
    for number, has in enumerate(held, 1):
        if number > 1 and level <= has:
            break
        total += has
        level = -(-(total + more) // number)
    return level


def _holder(number: int) -> str:
    return f"actor-{number}"


def _is_loss(error: BaseException) -> bool:
    """Whether it says that a process or its engine is gone, or its node with an answer that nobody had fetched: another can
    replace it."""
    if isinstance(error, RayTaskError):
        error = error.cause
    return process_is_gone(error) or isinstance(error, (EngineLostError, ObjectLostError))
