"""An actor of a simulation: what `actors/rollout_actor.py` and its engine do, with time in place of computing.

    assign ──> waiting ──prompt computed──> running, one token a step ──> finished ──collect──> scored ──> Delivery

A step takes as long as its running requests and the prompt tokens of those that begin in it. Between two steps new requests
begin, and weights are loaded. Steps in which nothing changes are one event.
"""

import heapq
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from contracts.records import Assignment, Completion, Delivery, Rollout, RolloutRequest
from controller.plan.schedule.calibration import EngineSpeed
from controller.plan.schedule.spans import ACTOR, GENERATE, LOAD, Lane, Spans
from controller.plan.schedule.virtual_time import Cores, Event, VirtualTime, Work

# (rollouts, what is called when they have their scores)
Score = Callable[[list[tuple[Assignment, Rollout]], Callable[[], None]], None]


class Call:
    """What `.remote()` returns."""

    def __init__(self, answer: "Future[Any]"):
        self._answer = answer

    def future(self) -> "Future[Any]":
        return self._answer


class Remote:
    def __init__(self, function: Callable[..., Any]):
        self.remote = function


@dataclass(frozen=True)
class EngineLimits:
    max_num_seqs: int
    max_step_tokens: int  # of one step: running requests and prompts
    threads: float


@dataclass(order=True)
class _Running:
    end_step: int
    order: int
    start_step: int
    assignment: Assignment


class StandInActor:
    """One of a fleet, whose handle and process it is at once."""

    def __init__(
        self,
        number: int,
        time: VirtualTime,
        cores: Cores,
        speed: EngineSpeed,
        limits: EngineLimits,
        length_of: Callable[[RolloutRequest], int],
        score: Score,
        spans: Spans,
    ):
        self._lane, self._time, self._cores = spans.open(Lane(ACTOR, number)), time, cores
        self._speed, self._limits, self._length_of = speed, limits, length_of
        self._score, self._spans = score, spans
        self._waiting: deque[Assignment] = deque()
        self._running: list[_Running] = []
        self._finished: list[tuple[Assignment, Rollout]] = []
        self._to_load: deque[tuple[int, float, Callable[[], None]]] = deque()
        self._loads = [(-1, 0)]  # step after which a version was served, version
        self._known = set[int]()  # prompts whose blocks the engine has
        self._steps = self._order = self._unfinished = self._pulses = 0
        self._work: Work | None = None
        self._step_s: float | None = None  # of each of the steps that the work is; None: it loads weights
        self._asked: tuple[Future[Delivery], int, Event] | None = None
        self._busy_since_s = self._generate_s = 0.0
        self.assign, self.collect, self.pulse = Remote(self._assign), Remote(self._collect), Remote(self._pulse)

    # ---- the calls of `RolloutActor`

    def _pulse(self) -> Call:
        self._pulses += 1
        answer: Future[int] = Future()
        answer.set_result(self._pulses)
        return Call(answer)

    def _assign(self, work: list[Assignment], sampling: Any) -> None:
        self._time.after(self._speed.call_s, lambda: self._take(work))

    def _take(self, work: list[Assignment]) -> None:
        if not self._unfinished:
            self._busy_since_s = self._time.now_s
            self._known.clear()  # an idle engine forgets the prefixes that it has seen
        self._unfinished += len(work)
        self._waiting += work
        self._look_between_steps()

    def _collect(self, score_batch: int, timeout_s: float) -> Call:
        answer: Future[Delivery] = Future()
        self._asked = answer, score_batch, self._time.after(timeout_s, self._deliver)
        self._deliver_if_due()
        return Call(answer)

    def load(self, version: int, seconds: float, done: Callable[[], None]) -> None:
        """New weights, between two steps."""
        self._to_load.append((version, seconds, done))
        self._look_between_steps()

    # ---- the engine

    def _look_between_steps(self) -> None:
        """The step that goes on is the last one before something changes."""
        if self._work is None:
            self._go_on()
        elif self._step_s and (self._to_load or len(self._running) < self._limits.max_num_seqs):
            begun = int(self._cores.progress_s(self._work) / self._step_s * (1 - 1e-12)) + 1
            self._cores.shorten(self._work, min(self._work.seconds, begun * self._step_s))

    def _go_on(self) -> None:
        if self._to_load:
            version, seconds, done = self._to_load.popleft()
            self._step_s = None
            self._compute(LOAD, seconds, lambda _: self._loaded(version, done))
        elif self._waiting or self._running:
            is_prompt_step, tokens = self._begin_requests()
            self._step_s = self._speed.step_s(len(self._running), tokens)
            steps = 1 if is_prompt_step else self._running[0].end_step - self._steps
            self._compute(GENERATE, steps * self._step_s, self._stepped)

    def _compute(self, kind: str, seconds: float, then: Callable[[float], None]) -> None:
        """`then` gets the seconds that the work took alone: it may have been shortened."""
        start_s = self._time.now_s

        def done() -> None:
            self._work = None
            self._spans.add(self._lane, kind, start_s, self._time.now_s)
            then(work.seconds)
            if self._work is None:
                self._go_on()

        self._work = work = self._cores.start(seconds, self._limits.threads, done)

    def _begin_requests(self) -> tuple[bool, int]:
        """Those that may join the next step; whether there are any, and the tokens of their prompts."""
        tokens, begun = 0, 0
        while self._waiting and len(self._running) < self._limits.max_num_seqs:
            request = self._waiting[0].request
            new = self._new_tokens(request)
            if begun and tokens + new + len(self._running) > self._limits.max_step_tokens:
                break
            assignment = self._waiting.popleft()
            self._known.add(request.prompt.prompt_id)
            tokens, begun, self._order = tokens + new, begun + 1, self._order + 1
            end = self._steps + max(1, self._length_of(request))
            heapq.heappush(self._running, _Running(end, self._order, self._steps, assignment))
        return begun > 0, tokens

    def _new_tokens(self, request: RolloutRequest) -> int:
        """Of a prompt, less the whole blocks that a sibling has computed."""
        length, block = len(request.prompt.token_ids), self._speed.block_tokens
        if not block or request.prompt.prompt_id not in self._known:
            return length
        return length - (length - 1) // block * block

    def _stepped(self, seconds: float) -> None:
        assert self._step_s
        self._steps += round(seconds / self._step_s)
        while self._running and self._running[0].end_step <= self._steps:
            done = heapq.heappop(self._running)
            self._finished.append((done.assignment, self._rollout(done)))
            self._unfinished -= 1
        if not self._unfinished:
            self._generate_s += self._time.now_s - self._busy_since_s
        self._deliver_if_due()

    def _loaded(self, version: int, done: Callable[[], None]) -> None:
        self._loads.append((self._steps, version))
        self._known.clear()
        done()

    def _rollout(self, running: _Running) -> Rollout:
        request, length = running.assignment.request, running.end_step - running.start_step
        # Loads from the last one before its first token on.
        first = len(self._loads) - 1
        while self._loads[first][0] > running.start_step:
            first -= 1
        versions = np.broadcast_to(np.int32(self._loads[first][1]), length)
        if first < len(self._loads) - 1:
            versions = versions.copy()
            for step, version in self._loads[first + 1 :]:
                versions[step - running.start_step :] = version
        tokens = np.broadcast_to(np.int32(0), length)
        completion = Completion(tokens, np.broadcast_to(np.float32(0), length), versions, "stop", "")
        return Rollout(request.key, request.prompt, completion)

    # ---- deliveries

    def _deliver_if_due(self) -> None:
        if self._asked and self._finished and (len(self._finished) >= self._asked[1] or not self._unfinished):
            self._deliver()

    def _deliver(self) -> None:
        assert self._asked is not None
        (answer, _, deadline), self._asked = self._asked, None
        deadline.cancel()
        finished, self._finished = self._finished, []
        now_s = self._time.now_s
        if self._unfinished:
            self._generate_s += now_s - self._busy_since_s
            self._busy_since_s = now_s
        generate_s, self._generate_s = self._generate_s, 0.0
        rollouts = [(assignment.lease, rollout) for assignment, rollout in finished]

        def scored() -> None:
            answer.set_result(Delivery(rollouts, generate_s, self._time.now_s - now_s))

        self._score(finished, scored)
