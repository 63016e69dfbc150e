"""Ray and the engines of a run: started when first needed, stopped whatever happens."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from contracts.config import ClusterConfig, TandemConfig
from contracts.process_env import worker_env


def weight_backend(config: TandemConfig) -> str:
    """The transport that `learner.weight_transfer` stands for on this cluster."""
    chosen = config.learner.weight_transfer
    if chosen != "auto":
        return chosen
    return "nccl" if config.cluster.gpus_per_actor else "ray_object"


def environments(cluster: ClusterConfig) -> dict[str, dict[str, str]]:
    """Environment of the processes of each role."""
    roles = {
        "actor": (cluster.threads_per_actor, cluster.gpus_per_actor),
        "learner": (cluster.threads_per_learner_rank, cluster.gpus_per_learner_rank),
        "reward": (cluster.threads_per_reward_replica, cluster.gpus_per_reward_replica),
    }
    return {role: worker_env(threads, on_cpu=gpus == 0) for role, (threads, gpus) in roles.items()}


class Runtime:
    """One Ray for all stages of a run; `with Runtime(config) as runtime` leaves no process behind."""

    def __init__(self, config: TandemConfig):
        self.config = config
        self._scorers: dict[str, str] = {}
        self._client: Any = None

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *error: object) -> None:
        if not ray.is_initialized():
            return
        if self._scorers and self.config.cluster.address != "local":
            from reward_service.app import stop_service

            stop_service()
        ray.shutdown()  # an embedded Ray takes every process with it

    def start(self) -> None:
        """Start or join Ray; does nothing where it runs already."""
        if ray.is_initialized():
            return
        cluster = self.config.cluster
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": "tandem"}
        if cluster.address == "local":
            options |= {
                "num_cpus": max(os.cpu_count() or 1, 2),
                "object_store_memory": int(cluster.object_store_gib * 2**30),
                "include_dashboard": False,
            }
        ray.init(address=cluster.address, **options)

    def service(self, scorers: dict[str, str]) -> Any:
        """The client of a reward service with {scorer: checkpoint}, which may still be starting: `wait_for_service`.
        The service lives as long as this runtime; stages that ask for the same scorers share it."""
        from reward_service.app import start_service

        self.start()
        if scorers != self._scorers:
            config = self.config
            env = environments(config.cluster)["reward"]
            self._client = start_service(scorers, config.reward_service, config.cluster, env)
            self._scorers = scorers
        return self._client

    def wait_for_service(self) -> None:
        from reward_service.app import wait_for_service

        wait_for_service(self._scorers, self.config.cluster.start_timeout_s)

    @contextmanager
    def actors(self, model_path: str, backend: str, eos_token_id: int, reward_client: Any) -> Iterator[list[Any]]:
        """Rollout actors that serve the checkpoint at `model_path`."""
        from dataclasses import replace

        from actors.rollout_actor import start_actors

        self.start()
        config = self.config
        started = start_actors(
            config.cluster,
            replace(config.model, path=model_path),
            config.engine,
            backend,
            eos_token_id,
            reward_client,
            environments(config.cluster)["actor"],
            config.environment,
        )
        yield started
        for actor in started:
            ray.kill(actor)

    @contextmanager
    def learner(self, task: str, *arguments: Any) -> Iterator[Any]:
        """The learner's ranks with the task of a stage; `wait_ready()` before the first call."""
        from learner.learner_actor import LearnerGroup

        self.start()
        cluster = self.config.cluster
        group = LearnerGroup(cluster, task, self.config.seed, arguments, environments(cluster)["learner"])
        yield group
        group.stop()
