"""A real placement group: every process of a job runs from its own bundle, or the job does not start."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from contracts.config import SourceConfig, TandemConfig
from contracts.validation import ConfigError
from controller.placement import Placement
from controller.runtime import environments
from reward_service.app import start_service, stop_service, wait_for_service
from tests.stand_ins import Process

pytestmark = pytest.mark.usefixtures("ray_runtime")


@pytest.fixture
def config() -> TandemConfig:
    config = TandemConfig(stage="ppo")
    config.data.gold = SourceConfig(path="gold.jsonl")
    config.cluster.num_actors, config.cluster.num_learner_ranks = 2, 1
    config.cluster.threads_per_reward_replica = 1
    config.reward_service.replicas, config.reward_service.dtype = 2, "float32"
    return config


@pytest.fixture
def placement(config: TandemConfig) -> Iterator[Placement]:
    made = Placement(config)
    yield made
    made.release()


def free(placement: Placement) -> dict[int, float]:
    """CPUs left in each bundle."""
    group = placement._group.id.hex()
    left: dict[str, Any] = ray.available_resources()
    return {i: round(left.get(f"CPU_group_{i}_{group}", 0.0), 4) for i in range(len(placement.plan.bundles))}


def test_each_process_runs_from_its_bundle(placement: Placement) -> None:
    assert free(placement) == {0: 0.1, 1: 0.1, 2: 0.1, 3: 0.2, 4: 0.2}
    started = [Process.options(**o).remote() for o in (placement.actor(1), placement.learner(0))]
    groups = ray.get([process.bundle.remote() for process in started], timeout=60)
    assert groups == [placement._group.id.hex()] * 2
    assert free(placement) == {0: 0.1, 1: 0.0, 2: 0.0, 3: 0.2, 4: 0.2}
    for process in started:
        ray.kill(process)


def test_the_replicas_of_a_scorer_run_from_the_jobs_group(
    placement: Placement, config: TandemConfig, classifier: Path
) -> None:
    env = environments(config.cluster)["reward"]
    scorers = {"proxy": str(classifier), "gold": str(classifier)}
    resources = [placement.scorer(0), placement.scorer(1)]
    client = start_service(scorers, config.reward_service, config.cluster, env, resources)
    try:
        wait_for_service(scorers, timeout_s=120)
        assert free(placement) == {0: 0.1, 1: 0.1, 2: 0.1, 3: 0.0, 4: 0.0}
        assert client.score("gold", [[5, 9, 2]])[0].value is not None
    finally:
        stop_service()


def test_two_jobs_cannot_each_hold_half(config: TandemConfig) -> None:
    """Four CPUs: the second job gets nothing at all, says so, and leaves nothing behind."""
    config.cluster.cpus_per_process = 0.5
    first = Placement(config)  # 2 + 1 + 4 processes
    config.cluster.start_timeout_s, config.cluster.num_actors = 2.0, 1
    try:
        with pytest.raises(
            ConfigError, match=r"did not grant .* = 3 CPUs within cluster\.start_timeout_s \(2 s\); free are"
        ):
            Placement(config)
        assert ray.available_resources()["CPU"] == pytest.approx(0.5)
    finally:
        first.release()


def test_an_impossible_job_is_refused_at_once(config: TandemConfig) -> None:
    config.cluster.gpus_per_actor = 1
    with pytest.raises(ConfigError, match=r"2 actors x 1 GPU = 2 GPUs; the cluster has 0 GPUs \(1 node x 0\)"):
        Placement(config)
