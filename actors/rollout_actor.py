"""Ray actor: requests in, scored rollouts out. It owns one generation engine and asks the reward service itself, so that
texts and scores travel in one hop."""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import ray

from actors.turn_scores import score_rollouts
from contracts.config import ClusterConfig, EngineConfig, EnvironmentConfig, ModelConfig, SamplingConfig
from contracts.interfaces import Engine, EngineLostError, RewardClient
from contracts.records import Assignment, Delivery, Rollout, RolloutRequest
from contracts.weights import LoadReport, SegmentAddress, WeightUpdate

END_S = 10.0  # after the time that it has to finish what it holds, a process that was asked to end does, unheard or not


class RolloutActor:
    """One engine and its control plane.

    `serve` is the only method of Ray's default group, whose one thread builds the engine and runs it; all others have
    threads of the group "control", so that a weight transfer gets through while a rollout call waits.

    SIGTERM to the process is a wish to leave: the waiting `collect` says so at once, and the controller ends the actor when
    it has finished what it holds.
    """

    def __init__(
        self,
        model: ModelConfig,
        engine: EngineConfig,
        weight_transfer: str,
        on_cpu: bool,
        end_ids: tuple[int, ...],
        reward_client: RewardClient | None,
        environment: EnvironmentConfig,
        leave_grace_s: float,
        publish_timeout_s: float,
    ):
        self._arguments = (model, engine, weight_transfer, on_cpu, end_ids)
        self._publish_timeout_s = publish_timeout_s
        self._rewards, self._environment = reward_client, environment
        self._started: Future[Engine] = Future()
        # Guards everything below: requests come and completions end in several threads.
        self._changed = threading.Condition()
        self._unfinished = 0
        self._finished: list[tuple[Assignment, Future[Rollout]]] = []
        self._busy_since, self._generate_s = 0.0, 0.0
        self._lost: BaseException | None = None
        self._is_leaving = self._will_tell = False
        self._end_s = leave_grace_s + END_S
        # Ray constructs actors in the main thread, the only one that may; its own handler ends the process at once.
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=self._asked_to_end, daemon=True).start())

    def _asked_to_end(self) -> None:
        with self._changed:
            self._is_leaving = self._will_tell = True
            self._changed.notify_all()
        time.sleep(self._end_s)
        os._exit(0)

    def serve(self) -> None:
        """Build the engine and run it; returns never, or raises what ended the engine."""
        from actors.conversation import start_conversations
        from actors.vllm_engine import VLLMEngine

        model, config, *_ = self._arguments
        try:
            engine = VLLMEngine(*self._arguments, publish_timeout_s=self._publish_timeout_s)
            self._conversations = start_conversations(engine, self._environment, model, config)
        except BaseException as error:
            self._started.set_exception(error)
            raise
        self._started.set_result(engine)
        try:
            engine.run()
        except BaseException as error:
            with self._changed:
                self._lost = error
                self._changed.notify_all()
            raise

    @property
    def _engine(self) -> Engine:
        return self._started.result()

    @ray.method(concurrency_group="control")
    def ready(self) -> int:
        """Process id, once the engine can serve."""
        self._started.result()
        return os.getpid()

    @ray.method(concurrency_group="control")
    def pulse(self) -> int:
        """Decoding steps so far, of an idle engine with one more: whether it can generate, not whether it answers."""
        return self._engine.pulse()

    @ray.method(concurrency_group="control")
    def assign(self, assignments: list[Assignment], sampling: SamplingConfig) -> None:
        """Start to sample; `collect` has the rollouts, and whatever goes wrong with one."""
        with self._changed:
            if not self._unfinished:
                self._busy_since = time.perf_counter()
            self._unfinished += len(assignments)
        with self._started.result().together():
            for assignment in assignments:
                rollout = self._conversations.submit(assignment.request, sampling)
                rollout.add_done_callback(partial(self._finish, assignment))

    def _finish(self, assignment: Assignment, rollout: "Future[Rollout]") -> None:
        with self._changed:
            self._finished.append((assignment, rollout))
            self._unfinished -= 1
            if not self._unfinished:
                self._generate_s += time.perf_counter() - self._busy_since
            self._changed.notify_all()

    @ray.method(concurrency_group="control")
    def collect(self, score_batch: int, timeout_s: float) -> Delivery:
        """Scored rollouts, by lease. The engine samples on while they are scored.

        Waits for `score_batch` completions, or for all that were assigned, at most `timeout_s`; scores what is there. Comes
        at once where its process has been asked to end.

        Raises:
            ValueError: where a prompt leaves no room for a completion.
            EngineLostError: where the engine has ended.
        """
        self._started.result(timeout_s)
        with self._changed:
            self._changed.wait_for(lambda: self._lost or self._will_tell or self._can_score(score_batch), timeout_s)
            if self._lost:
                raise EngineLostError(str(self._lost)) from self._lost
            finished, self._finished = self._finished, []
            self._will_tell = False
            now = time.perf_counter()
            if self._unfinished:
                self._generate_s += now - self._busy_since
                self._busy_since = now
            generate_s, self._generate_s = self._generate_s, 0.0
        finished.sort(key=lambda pair: pair[0].lease)
        rollouts = [(assignment, rollout.result()) for assignment, rollout in finished]
        for scorer in dict.fromkeys(name for a, _ in rollouts for name in a.scorers):
            if self._rewards is None:
                raise RuntimeError("this actor was started without a reward service")
            score_rollouts(self._rewards, scorer, [r for a, r in rollouts if scorer in a.scorers], self._arguments[-1])
        done = [(a.lease, rollout) for a, rollout in rollouts]
        return Delivery(done, generate_s, time.perf_counter() - now, self._is_leaving)

    def _can_score(self, score_batch: int) -> bool:
        return len(self._finished) >= score_batch or (bool(self._finished) and not self._unfinished)

    @ray.method(concurrency_group="control")
    def rollout(
        self, requests: list[RolloutRequest], sampling: SamplingConfig, scorers: list[str], timeout_s: float
    ) -> list[Rollout]:
        """Sample every request and let every scorer score it, for callers that want nothing else of this actor.

        Returns:
            The rollouts in the order of the requests.

        Raises:
            As `collect`, and TimeoutError after `timeout_s`. An actor whose process has been asked to end goes on until it
            ends.
        """
        assignments = [Assignment(i, request, tuple(scorers)) for i, request in enumerate(requests)]
        self.assign(assignments, sampling)  # type: ignore[operator]  # Ray's stub knows only its remote form
        found: dict[int, Rollout] = {}
        end = time.monotonic() + timeout_s
        while (missing := len(requests) - len(found)) and (left_s := end - time.monotonic()) > 0:
            delivery: Delivery = self.collect(missing, left_s)  # type: ignore[operator]  # likewise
            found |= delivery.rollouts
        if missing:
            raise TimeoutError(f"{len(found)} of {len(requests)} rollouts after {timeout_s:.0f} s")
        return [found[i] for i in range(len(requests))]

    @ray.method(concurrency_group="control")
    def token_logprobs(self, sequences: list[tuple[list[int], int]]) -> list[list[float]]:
        return self._engine.token_logprobs(sequences)

    # ---- weights, as `learner/receivers.py` sends them

    @ray.method(concurrency_group="control")
    def connect_weights(self, publisher: str, address: SegmentAddress | None) -> bool:
        return self._engine.connect_weights(publisher, address)

    @ray.method(concurrency_group="control")
    def load_weights(self, update: WeightUpdate) -> LoadReport:
        return self._engine.load_weights(update)

    # ---- the same by vLLM's own protocol, for its transports

    @ray.method(concurrency_group="control")
    def init_weight_transfer_engine(self, request: Any) -> None:
        self._engine.control("init_weight_transfer_engine", {"init_info": request.init_info})

    @ray.method(concurrency_group="control")
    def start_weight_update(self) -> None:
        self._engine.control("start_weight_update")

    @ray.method(concurrency_group="control")
    def update_weights(self, request: Any) -> None:
        self._engine.control("update_weights", {"update_info": request.update_info})

    @ray.method(concurrency_group="control")
    def finish_weight_update(self) -> None:
        self._engine.control("finish_weight_update")

    @ray.method(concurrency_group="control")
    def update_weight_version(self, version: str) -> None:
        self._engine.control("set_weight_version", {"version": version})

    @ray.method(concurrency_group="control")
    def shutdown_weight_transfer_engine(self) -> None:
        self._engine.control("shutdown_weight_transfer_engine")


def start_actors(
    placement: list[dict[str, Any]],
    cluster: ClusterConfig,
    model: ModelConfig,
    engine: EngineConfig,
    weight_transfer: str,
    end_ids: tuple[int, ...],
    reward_client: RewardClient | None,
    env: dict[str, str],
    environment: EnvironmentConfig | None = None,
    created: Callable[[ray.actor.ActorHandle], None] = lambda actor: None,
) -> list[ray.actor.ActorHandle]:
    """Start an actor for each of `placement`, the Ray options of one; returns when all of them can serve.

    Args:
        end_ids: the tokens that end a completion (`common.text.end_tokens`).
        created: is told of each actor before it has begun to start.

    Raises:
        ray.exceptions.RayTaskError: where an engine cannot start, with the engine's own error.
        ray.exceptions.GetTimeoutError: after `cluster.start_timeout_s`.
    """
    on_cpu = cluster.gpus_per_actor == 0
    # Ray's stub of `remote` lacks the option.
    remote = ray.remote(concurrency_groups={"control": 4})(RolloutActor)  # type: ignore[call-overload]
    arguments = (model, engine, weight_transfer, on_cpu, end_ids, reward_client)
    talks_to = environment or EnvironmentConfig()
    actors = []
    for options in placement:
        made = remote.options(**options, runtime_env={"env_vars": env})
        actors.append(made.remote(*arguments, talks_to, cluster.leave_grace_s, cluster.publish_timeout_s))
        created(actors[-1])
    for actor in actors:
        actor.serve.remote()
    try:
        ray.get([actor.ready.remote() for actor in actors], timeout=cluster.start_timeout_s)
    except BaseException:
        for actor in actors:
            ray.kill(actor)
        raise
    return actors
