"""A real placement group: every process of a job runs from its own bundle, or the job does not start."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group_table

from contracts.checks.validation import ConfigError
from contracts.config import ScorerConfig, SourceConfig, TandemConfig
from controller.cluster.placement_group import Placement
from controller.cluster.runtime import environments
from reward_service.app import RewardService
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


def wait_free(placement: Placement, expected: list[float]) -> None:
    """Until Ray, which learns of it with a delay, says that this many CPUs are left in each bundle."""
    names = [f"CPU_group_{i}_{placement._group.id.hex()}" for i in range(len(placement.plan.bundles))]
    end = time.monotonic() + 20
    while True:
        left = ray.available_resources()
        found = [round(left.get(name, 0.0), 4) for name in names]
        if found == expected:
            return
        assert time.monotonic() < end, found
        time.sleep(0.1)


def test_each_process_runs_from_its_bundle(placement: Placement) -> None:
    wait_free(placement, [0.1, 0.1, 0.1, 0.2, 0.2])
    started = [Process.options(**o).remote() for o in (placement.actor(1), placement.learner(0))]
    groups = ray.get([process.bundle.remote() for process in started], timeout=60)
    assert groups == [placement._group.id.hex()] * 2
    wait_free(placement, [0.1, 0.0, 0.0, 0.2, 0.2])
    for process in started:
        ray.kill(process)


def test_the_replicas_of_a_scorer_run_from_the_jobs_group(
    placement: Placement, config: TandemConfig, classifier: Path, tmp_path: Path
) -> None:
    other = tmp_path / "gold"
    shutil.copytree(classifier, other)
    (other / "config.json").write_text(
        (other / "config.json").read_text().replace('"score_std": 0.5', '"score_std": 2.0')
    )
    resources = [placement.scorer(0), placement.scorer(1)]
    env = environments(config.cluster)["reward"]
    service = RewardService(config.reward_service, config.cluster, env, str(classifier), resources)
    service.start({"proxy": ScorerConfig(path=str(classifier)), "gold": ScorerConfig(path=str(other))})
    try:
        service.wait(timeout_s=120)
        wait_free(placement, [0.1, 0.1, 0.1, 0.0, 0.0])
        assert service.client().score("gold", [[5, 9, 2]])[0].value is not None
    finally:
        service.stop()


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
        assert sum(1 for entry in placement_group_table().values() if entry["state"] != "REMOVED") == 1
    finally:
        first.release()


def test_an_impossible_job_is_refused_at_once(config: TandemConfig) -> None:
    config.cluster.gpus_per_actor = 1
    with pytest.raises(ConfigError, match=r"2 actors x 1 GPU = 2 GPUs; the cluster has 0 GPUs \(1 node x 0\)"):
        Placement(config)
