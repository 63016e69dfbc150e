"""The other sides of a simulation: learner ranks, and replicas that score."""

import itertools
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from contracts.records import Assignment, Rollout
from contracts.weights import LoadReport, PublishReport
from controller.plan.schedule.calibration import PublishSpeed, RewardSpeed
from controller.plan.schedule.spans import LEARNER, PUBLISH, REWARD, SCORE, TRAIN, Lane, Spans
from controller.plan.schedule.stand_in_actor import Call, StandInActor
from controller.plan.schedule.virtual_time import Cores, VirtualTime


class StandInLearner:
    """As much of `LearnerGroup` as the fleet sees, and `update`. `cores[rank]` are those that a rank computes on."""

    def __init__(self, time: VirtualTime, cores: list[Cores], threads: float, speed: PublishSpeed, spans: Spans):
        self._time, self._cores, self._threads, self._speed, self._spans = time, cores, threads, speed, spans
        self._pulses = 0
        self._lanes = [spans.open(Lane(LEARNER, rank)) for rank in range(len(cores))]
        self.actors: list[StandInActor] = []

    def pulse(self, rank: int) -> Call:
        self._pulses += 1
        answer: Future[int] = Future()
        answer.set_result(self._pulses)
        return Call(answer)

    def update(self, seconds: list[float]) -> list[Call]:
        """Of each rank, as long as its share takes it."""
        answers = [Future[Any]() for _ in seconds]
        for rank, (took, answer) in enumerate(zip(seconds, answers, strict=True)):
            self._compute(rank, TRAIN, took, lambda answer=answer: answer.set_result({}))  # type: ignore[misc]
        return [Call(answer) for answer in answers]

    def start(self, method: str, *arguments: Any) -> list[Call]:
        """`publish` and `connect`: packed by rank 0, loaded by each engine between two steps."""
        version, answer = arguments[-1], Future[PublishReport]()
        start_s, waiting = self._time.now_s, len(self.actors)

        def pack() -> None:
            for actor in self.actors:
                actor.load(version, self._speed.pause_s, loaded)

        def loaded() -> None:
            nonlocal waiting
            waiting -= 1
            if not waiting:
                self._time.after(self._speed.rest_s + self._speed.actor_s * len(self.actors), done)

        def done() -> None:
            reports = {i: LoadReport(version) for i in range(len(self.actors))}
            answer.set_result(PublishReport(version, self._time.now_s - start_s, 0.0, 0, 0, reports, {}))

        self._compute(0, PUBLISH, self._speed.pack_s, pack)
        return [Call(answer)]

    def _compute(self, rank: int, kind: str, seconds: float, then: Callable[[], None]) -> None:
        start_s = self._time.now_s

        def done() -> None:
            self._spans.add(self._lanes[rank], kind, start_s, self._time.now_s)
            then()

        self._cores[rank].start(seconds, self._threads, done)


class StandInService:
    """`cores[replica]` of each scorer; a call waits for a replica that is free."""

    def __init__(
        self, time: VirtualTime, cores: dict[str, list[Cores]], threads: float, speed: RewardSpeed, spans: Spans
    ):
        self._time, self._cores, self._threads, self._speed, self._spans = time, cores, threads, speed, spans
        self._free = {name: deque(range(len(of_each))) for name, of_each in cores.items()}
        self._calls: dict[str, deque[tuple[float, Callable[[], None]]]] = defaultdict(deque)
        number = itertools.count()
        self._lanes = {name: [spans.open(Lane(REWARD, next(number))) for _ in each] for name, each in cores.items()}

    def score(self, rollouts: list[tuple[Assignment, Rollout]], done: Callable[[], None]) -> None:
        """By one scorer after the other, as an actor asks them."""
        names = [*dict.fromkeys(name for assignment, _ in rollouts for name in assignment.scorers)]

        def ask() -> None:
            if not names:
                done()
                return
            name = names.pop(0)
            tokens = sum(rollout.num_tokens + 1 for assignment, rollout in rollouts if name in assignment.scorers)
            self._calls[name].append((self._speed.call_s + self._speed.token_s * tokens, ask))
            self._serve(name)

        ask()

    def _serve(self, name: str) -> None:
        while self._calls[name] and self._free[name]:
            (seconds, then), replica = self._calls[name].popleft(), self._free[name].popleft()
            self._run(name, replica, seconds, then)

    def _run(self, name: str, replica: int, seconds: float, then: Callable[[], None]) -> None:
        start_s = self._time.now_s

        def done() -> None:
            self._spans.add(self._lanes[name][replica], SCORE, start_s, self._time.now_s)
            self._free[name].append(replica)
            self._serve(name)
            then()

        self._cores[name][replica].start(seconds, self._threads, done)
