"""Ray actor: requests in, scored rollouts out. It owns one generation engine and asks the reward service itself, so that
texts and scores travel in one hop."""

import time
from concurrent.futures import Future
from typing import Any

import ray

from contracts.config import ClusterConfig, EngineConfig, ModelConfig, SamplingConfig
from contracts.interfaces import Engine, RewardClient
from contracts.records import Rollout, RolloutRequest, Score
from contracts.scoring import scoring_ids
from contracts.segment import SegmentAddress
from contracts.weights import LoadReport, WeightUpdate


class RolloutActor:
    """One engine and its control plane.

    `serve` is the only method of Ray's default group, whose one thread builds the engine and runs it; all others have
    threads of the group "control", so that a weight transfer gets through while a rollout call waits.
    """

    def __init__(
        self,
        model: ModelConfig,
        engine: EngineConfig,
        weight_transfer: str,
        on_cpu: bool,
        eos_token_id: int,
        reward_client: RewardClient | None,
    ):
        self._arguments = (model, engine, weight_transfer, on_cpu)
        self._rewards = reward_client
        self._eos = eos_token_id
        self._started: Future[Engine] = Future()

    def serve(self) -> None:
        """Build the engine and run it; returns never, or raises what ended the engine."""
        from actors.vllm_engine import VLLMEngine

        try:
            engine = VLLMEngine(*self._arguments)
        except BaseException as error:
            self._started.set_exception(error)
            raise
        self._started.set_result(engine)
        engine.run()

    @property
    def _engine(self) -> Engine:
        return self._started.result()

    @ray.method(concurrency_group="control")
    def ready(self) -> int:
        """Process id, once the engine can serve."""
        import os

        self._started.result()
        return os.getpid()

    @ray.method(concurrency_group="control")
    def rollout(
        self, requests: list[RolloutRequest], sampling: SamplingConfig, scorers: dict[str, int]
    ) -> tuple[list[Rollout], dict[str, float]]:
        """Sample every request and score the completions.

        Scoring starts when the last completion is there: on a machine where one phase may use every core, overlapping
        the two costs more than it saves.

        Args:
            scorers: how many of the rollouts, from the front, each scorer sees.

        Returns:
            The rollouts in the order of the requests, and seconds: `generate_s`, `score_s`.
        """
        start = time.perf_counter()
        waiting = [self._engine.submit(list(r.prompt.token_ids), sampling, r.seed) for r in requests]
        rollouts = [Rollout(r.key, r.prompt, done.result()) for r, done in zip(requests, waiting, strict=True)]
        generated = time.perf_counter()
        for scorer, number in scorers.items():
            chosen = rollouts[:number]
            for rollout, score in zip(chosen, self._score(scorer, chosen), strict=True):
                rollout.scores[scorer] = score
        return rollouts, {"generate_s": generated - start, "score_s": time.perf_counter() - generated}

    def _score(self, scorer: str, rollouts: list[Rollout]) -> list[Score]:
        if self._rewards is None:
            raise RuntimeError("this actor was started without a reward service")
        return self._rewards.score(
            scorer,
            [scoring_ids([*r.prompt.token_ids, *r.completion.token_ids.tolist()], self._eos) for r in rollouts],
        )

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
    eos_token_id: int,
    reward_client: RewardClient | None,
    env: dict[str, str],
) -> list[ray.actor.ActorHandle]:
    """Start an actor for each of `placement`, the Ray options of one; returns when all of them can serve.

    Raises:
        ray.exceptions.RayTaskError: where an engine cannot start, with the engine's own error.
        ray.exceptions.GetTimeoutError: after `cluster.start_timeout_s`.
    """
    on_cpu = cluster.gpus_per_actor == 0
    remote = ray.remote(concurrency_groups={"control": 4})(RolloutActor)
    actors = [
        remote.options(**options, runtime_env={"env_vars": env}).remote(
            model, engine, weight_transfer, on_cpu, eos_token_id, reward_client
        )
        for options in placement
    ]
    for actor in actors:
        actor.serve.remote()
    ray.get([actor.ready.remote() for actor in actors], timeout=cluster.start_timeout_s)
    return actors
