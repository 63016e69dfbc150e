"""The reward service: one Ray Serve application a scorer. Actors reach it by handle; no HTTP port is opened."""

import asyncio
import logging
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve

from contracts.config import ClusterConfig, RewardServiceConfig
from contracts.records import Score
from reward_service.client import HandleClient, application_name


class RewardReplica:
    """One process with one reward model."""

    def __init__(self, path: str, config: RewardServiceConfig):
        from reward_service.model import RewardModel

        # One thread loads the model and runs every forward pass: a second pass would only contend for the same cores, and a
        # second thread would bring an OpenMP team of its own. The replica answers health checks meanwhile.
        self._thread = ThreadPoolExecutor(1)
        arguments = (path, config.dtype, config.batch_tokens, config.max_tokens)
        self._model = self._thread.submit(RewardModel, *arguments).result()

    async def score(self, sequences: list[list[int]]) -> list[Score]:
        return await asyncio.wrap_future(self._thread.submit(self._model.score, sequences))


def start_service(
    scorers: dict[str, str],
    config: RewardServiceConfig,
    cluster: ClusterConfig,
    env: dict[str, str],
    placement: list[dict[str, Any]] | None = None,
) -> HandleClient:
    """Deploy {scorer: checkpoint}; `wait_for_service` says when every replica can score.

    Args:
        placement: resources of a replica of each scorer, as Ray options; None takes them from anywhere.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="Disabled")
    anywhere = {"num_cpus": cluster.cpus_per_process, "num_gpus": cluster.gpus_per_reward_replica}
    deployment = serve.deployment(RewardReplica).options(num_replicas=config.replicas, max_ongoing_requests=16)
    targets = []
    for (scorer, path), resources in zip(scorers.items(), placement or [anywhere] * len(scorers), strict=False):
        options = resources | {"runtime_env": {"env_vars": env}}
        target = deployment.options(name=scorer, ray_actor_options=options).bind(path, config)
        targets.append(serve.RunTarget(target=target, name=application_name(scorer), route_prefix=None))
    serve.run_many(targets, wait_for_applications_running=False)
    return HandleClient(config.deadline_s)


def wait_for_service(scorers: Iterable[str], timeout_s: float) -> None:
    """Return once every scorer's replicas run.

    Raises:
        RuntimeError: where a replica cannot start, with the replica's own error, or after `timeout_s`.
    """
    names, end = {application_name(scorer) for scorer in scorers}, time.monotonic() + timeout_s
    while True:
        states = {name: app for name, app in serve.status().applications.items() if name in names}
        if len(states) == len(names) and all(app.status == "RUNNING" for app in states.values()):
            return
        failed = [app for app in states.values() if app.status in ("DEPLOY_FAILED", "UNHEALTHY")]
        if failed or time.monotonic() > end:
            reasons = [d.message for app in failed for d in app.deployments.values() if d.message]
            raise RuntimeError(f"the reward service does not start: {'; '.join(reasons) or 'no answer'}")
        time.sleep(0.25)


def stop_service() -> None:
    serve.shutdown()
