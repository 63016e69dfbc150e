"""Ray actor: requests in, scored rollouts out. It owns one generation engine and asks the reward service itself, so that
texts and scores travel in one hop."""

import time
from concurrent.futures import Future
from typing import Any

import ray

from actors.turn_scores import score_rollouts
from contracts.config import ClusterConfig, EngineConfig, EnvironmentConfig, ModelConfig, SamplingConfig
from contracts.interfaces import Engine, RewardClient
from contracts.records import Rollout, RolloutRequest


class RolloutActor:
    """One engine and its control plane. The weight-transfer methods are the ones that vLLM's `RayVLLMWeightSyncClient`
    calls on an actor handle.

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
        environment: EnvironmentConfig,
    ):
        self._arguments = (model, engine, weight_transfer, on_cpu)
        self._rewards, self._environment = reward_client, environment
        self._eos = eos_token_id
        self._started: Future[Engine] = Future()

    def serve(self) -> None:
        """Build the engine and run it; returns never, or raises what ended the engine."""
        from actors.conversation import start_conversations
        from actors.vllm_engine import VLLMEngine

        model, config, *_ = self._arguments
        try:
            engine = VLLMEngine(*self._arguments)
            self._conversations = start_conversations(engine, self._environment, model, config)
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
        self._started.result()
        waiting = [self._conversations.submit(request, sampling) for request in requests]
        rollouts = [done.result() for done in waiting]
        generated = time.perf_counter()
        for scorer, number in scorers.items():
            if self._rewards is None:
                raise RuntimeError("this actor was started without a reward service")
            score_rollouts(self._rewards, scorer, rollouts[:number], self._eos)
        return rollouts, {"generate_s": generated - start, "score_s": time.perf_counter() - generated}

    @ray.method(concurrency_group="control")
    def token_logprobs(self, sequences: list[tuple[list[int], int]]) -> list[list[float]]:
        return self._engine.token_logprobs(sequences)

    # ---- vLLM's weight-transfer protocol

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


def start_actors(
    cluster: ClusterConfig,
    model: ModelConfig,
    engine: EngineConfig,
    weight_transfer: str,
    eos_token_id: int,
    reward_client: RewardClient | None,
    env: dict[str, str],
    environment: EnvironmentConfig | None = None,
) -> list[ray.actor.ActorHandle]:
    """Start `cluster.num_actors` actors; returns when all of them can serve.

    Raises:
        ray.exceptions.RayTaskError: where an engine cannot start, with the engine's own error.
        ray.exceptions.GetTimeoutError: after `cluster.start_timeout_s`.
    """
    on_cpu = cluster.gpus_per_actor == 0
    options = {
        "num_cpus": cluster.cpus_per_process,
        "num_gpus": cluster.gpus_per_actor,
        "runtime_env": {"env_vars": env},
    }
    remote = ray.remote(concurrency_groups={"control": 4})(RolloutActor)
    arguments = (model, engine, weight_transfer, on_cpu, eos_token_id, reward_client)
    actors = [
        remote.options(**options).remote(*arguments, environment or EnvironmentConfig())
        for _ in range(cluster.num_actors)
    ]
    for actor in actors:
        actor.serve.remote()
    ray.get([actor.ready.remote() for actor in actors], timeout=cluster.start_timeout_s)
    return actors
