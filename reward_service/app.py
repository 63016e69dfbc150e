"""The reward service: one Ray Serve application a scorer. Actors reach it by handle; no HTTP port is opened."""

import asyncio
import logging

from ray import serve

from contracts.config import ClusterConfig, RewardServiceConfig
from contracts.records import Score
from reward_service.client import HandleClient, application_name


class RewardReplica:
    """One process with one reward model."""

    def __init__(self, path: str, config: RewardServiceConfig):
        from reward_service.model import RewardModel

        self._model = RewardModel(path, config.dtype, config.batch_tokens, config.max_tokens)
        self._one_at_a_time = asyncio.Lock()  # a second forward pass would only contend for the same cores

    async def score(self, sequences: list[list[int]]) -> list[Score]:
        async with self._one_at_a_time:
            # In a thread, so that the replica answers health checks meanwhile.
            return await asyncio.to_thread(self._model.score, sequences)


def start_service(
    scorers: dict[str, str], config: RewardServiceConfig, cluster: ClusterConfig, env: dict[str, str]
) -> HandleClient:
    """Deploy {scorer: checkpoint} and return once every replica can score.

    Raises:
        RuntimeError: where a replica cannot start, with the replica's own error.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="Disabled")
    deployment = serve.deployment(RewardReplica).options(
        num_replicas=config.replicas,
        max_ongoing_requests=16,
        ray_actor_options={
            "num_cpus": cluster.cpus_per_process,
            "num_gpus": cluster.gpus_per_reward_replica,
            "runtime_env": {"env_vars": env},
        },
    )
    targets = [
        serve.RunTarget(
            target=deployment.options(name=scorer).bind(path, config), name=application_name(scorer), route_prefix=None
        )
        for scorer, path in scorers.items()
    ]
    serve.run_many(targets)
    return HandleClient(config.deadline_s)


def stop_service() -> None:
    serve.shutdown()
