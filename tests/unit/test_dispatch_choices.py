"""Who gets what, with thousands of actors as with a few: the dispatcher does not look at all of them at each answer, and
chooses what the plain rules below do, which look at all."""

import random
import time
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest

from contracts.config import SamplingConfig
from contracts.interfaces import EngineLostError
from contracts.records import Assignment, Delivery, RolloutRequest
from controller.ledger.entries import Lease, State
from controller.loop.clock import Clock
from controller.loop.dispatcher import Dispatcher
from controller.loop.fleet import Fleet, Joined
from tests.unit.test_dispatch import Actor, Learner, held_out, in_background, sampled, start, until

PATIENT = SamplingConfig(max_completion_tokens=7)


class Plain(Dispatcher):
    """The rules as they read."""

    def sample_held_out(self, requests: list[RolloutRequest], sampling: SamplingConfig) -> Any:
        wanted = {next(self._aside): request for request in requests}
        self._held_out = {}

        def ready() -> bool:
            self._publish_to_latecomers()
            held = {lease for leases in self._held for lease in leases}
            left = [lease for lease in wanted if lease not in held and lease not in self._held_out]
            numbers = sorted(self._serving)
            for i, number in enumerate(numbers):
                if mine := left[i :: len(numbers)]:
                    self._hand_out(number, [Assignment(lease, wanted[lease], ("proxy",)) for lease in mine], sampling)
            return len(self._held_out) == len(wanted)

        self.answers.wait_until(ready, "held-out prompts")
        return [self._held_out[lease] for lease in wanted]

    def drain(self) -> None:
        self._paused = True
        self.answers.wait_until(lambda: not any(self._held), "the actors")
        self._paused = False

    def _check_actors(self, now: float) -> None:
        self._change_fleet(now)
        idle = [number for number in sorted(self._serving) if not self._held[number]]
        if not idle or len(self._serving | self._leaving.keys()) == 1:
            return
        end = now - self._stragglers.deadline_s()
        late = [lease for held in self._held for lease, since in held.items() if since < end]
        for number in idle:
            second: list[Lease] = []
            while late and len(second) < self._share:
                lease = self._ledger.hedge(late.pop(0), f"actor-{number}")
                second += [lease] if lease else []
            if second:
                self._assign(number, second)

    def _lease_to_all(self) -> None:
        """Level by level: the water in cups that stand side by side."""
        number_of = sum(entry.state is State.PENDING for entry in self._ledger._open.values())
        held = {number: len(self._held[number]) for number in self._serving}
        level = min(held.values(), default=0)
        while sum(max(0, level - has) for has in held.values()) < number_of and held:
            level += 1
        for number in sorted(held, key=lambda number: (held[number], number)):
            self._lease_to(number, level)


class Crew(Fleet):
    """Whose new actors are there at once."""

    def start(self, number: int) -> Future[Joined]:
        self._starting.add(number)
        self.actors[number] = self.make(number)
        fresh: Future[Joined] = Future()
        fresh.set_result((True, self._update))
        return fresh

    make: Any


class Busy(Actor):
    """Finishes some of what it has, by chance, as soon as it is asked; now and then it dies instead. All that it is given it
    writes into a log."""

    def __init__(self, number: int, rng: random.Random, log: list[Any], version: list[int]):
        super().__init__()
        self.number, self.rng, self.log, self.version = number, rng, log, version
        self.is_frozen = self.is_dead = False

    def _assign(self, work: list[Assignment], sampling: Any) -> None:
        super()._assign(work, sampling)
        self.log.append((self.number, [a.request.key for a in work], [a.scorers for a in work]))
        self.go_on()

    def _collect(self, score_batch: int, patience_s: float) -> Any:
        call = super()._collect(score_batch, patience_s)
        self.go_on()
        return call

    def go_on(self) -> None:
        if self.is_frozen or self.is_dead or not self.work or not self.asked:
            return
        if self.rng.random() < 0.04:
            self.is_dead = True
            self.asked.pop()[0].set_exception(EngineLostError("by chance"))
            return
        chosen = [a for a in self.work if self.rng.random() < 0.5] or self.work[:1]
        self.work = [a for a in self.work if a not in chosen]
        self.asked.pop()[0].set_result(Delivery([(a.lease, sampled(a, (*self.version,))) for a in chosen], 0.0, 0.0))


def history(kind: type[Dispatcher], seed: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All that the actors are given, in order, in a run with losses, stragglers, drains and held-out prompts."""
    rng, log, clock, serves = random.Random(seed), list[Any](), [0.0], [0]
    monkeypatch.setattr("tests.unit.test_dispatch.Dispatcher", partial(kind, clock=Clock(now=lambda: clock[0])))
    monkeypatch.setattr("controller.loop.fleet.time.monotonic", lambda: clock[0])
    crew = [Busy(number, random.Random(rng.random()), log, serves) for number in range(rng.randint(2, 9))]
    fleet: Any = Crew(crew, Learner(crew), "shared", lambda *_: True, 10**6, lambda _: None)  # type: ignore[arg-type]
    fleet.make = lambda number: Busy(number, random.Random(rng.random()), log, serves)
    actors: list[Any] = fleet.actors
    rollouts = rng.randint(2, 20)
    dispatcher, ledger = start(actors, staleness=rng.randint(0, 2), rollouts=rollouts, fleet=fleet, actor_silence_s=1e9)
    for version in range(6):
        for actor in actors:
            actor.is_frozen = rng.random() < 0.4
        dispatcher.admit_rollouts(100)
        for _ in range(rng.randint(0, 3)):
            # Whoever has nothing may get what the others hold for too long.
            clock[0] += rng.choice((0.1, 20.0, 31.0))
            dispatcher._check_actors(clock[0])
        for actor in actors:
            actor.is_frozen = False
            actor.go_on()
        dispatcher.wait_for_batch(version)
        if rng.random() < 0.5:
            clock[0] += 31.0  # within it, too
            dispatcher.drain()
            log.append([dict(held) for held in dispatcher._held if held])
        log.append([rollout.key for rollout in dispatcher.sample_held_out(held_out(rng.randint(1, 30)), PATIENT)])
        serves[0] = version + 1
        dispatcher.publish(version + 1)
        ledger.trained(version + 1)
    log.append((dispatcher.num_lost, dict(ledger.counts)))
    return log


def test_the_choices_are_those_of_the_plain_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = hedged = given = 0
    for seed in range(60):
        found = history(Dispatcher, seed, monkeypatch)
        assert found == history(Plain, seed, monkeypatch), seed
        lost, hedged, given = lost + found[-1][0], hedged + found[-1][1].get("hedged", 0), given + len(found)
    assert lost > 50
    assert hedged > 50
    assert given > 1000


def test_a_held_out_prompt_of_a_wait_that_has_ended_is_no_answer_in_the_next() -> None:
    """The learner was lost within the wait, the actor works on."""
    actor = Actor()
    dispatcher, _ = start([actor])
    found = in_background(dispatcher, held_out(2))
    while len(actor.work) < 2:
        time.sleep(0.005)
    dispatcher.interrupt()
    assert found.exception(5) is not None
    dispatcher._interrupted = False
    dispatcher.abandon_leases()
    dispatcher.publish(0)
    again = in_background(dispatcher, held_out(2))
    while len(actor.work) < 4:
        time.sleep(0.005)
    actor.finish(0, 1)  # of before
    while not actor.asked:
        time.sleep(0.005)
    actor.finish(0, 1)
    assert [rollout.prompt.prompt_id for rollout in again.result(5)] == [1000, 1001]


def test_who_has_room_gets_what_another_gave_back() -> None:
    """Nothing is left over where the first actors have no room."""
    full, lost, free = Actor(), Actor(), Actor()
    actors = [full, lost, free]
    fleet = Fleet(actors, Learner(actors), "", lambda *_: False, 1, print)  # type: ignore[arg-type]
    dispatcher, _ = start(actors, rollouts=6, fleet=fleet)
    dispatcher.admit_rollouts(updates_left=1)
    assert [len(actor.work) for actor in actors] == [2, 2, 2]
    given_back = [*lost.prompts]
    free.finish(0, 1)
    lost.asked.pop()[0].set_exception(EngineLostError("out of memory"))
    until(dispatcher, lambda: bool(free.work))
    assert free.prompts == given_back
    assert len(full.work) == 2
