"""The same proofs on CUDA devices: vLLM's own weight transfers and a learner on a GPU. Not run where there is none."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from contracts.config import TandemConfig
from contracts.transports import weight_backend
from controller.cluster.runtime import Runtime
from tests.conftest import kill, make_config
from tests.integration.test_engines import EOS, logprobs, rollouts, sequences, train

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("ray_runtime")]


@contextmanager
def started(config: TandemConfig) -> Iterator[tuple[Any, list[Any], str]]:
    """Learner, actors and the transport that connects them."""
    runtime, path, backend = Runtime(config), config.model.path, weight_backend(config)
    try:
        with (
            runtime.learner("ppo", config, path, path, (EOS,), []) as group,
            runtime.actors(path, backend, (EOS,), None) as actors,
        ):
            group.wait_ready()
            yield group, actors, backend
    finally:
        runtime.release()


def assert_agree(group: Any, actors: list[Any], samples: list[Any]) -> None:
    mine = np.concatenate(group.call("token_logprobs", sequences(samples))[0])
    for actor in actors:
        assert np.abs(mine - logprobs(actor, samples)).mean() < 0.05


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> TandemConfig:
    config = make_config(tiny_model, tmp_path)
    config.stage = "ppo"
    config.ppo.optimizer.learning_rate = 1e-3
    config.cluster.gpus_per_actor = config.cluster.gpus_per_learner_rank = 1.0
    return config


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_nccl_publish_reaches_every_worker_of_two_engines(config: TandemConfig, tensor_parallel_size: int) -> None:
    config.cluster.num_actors = 2
    config.engine.tensor_parallel_size = tensor_parallel_size
    config.cluster.gpus_per_actor = float(tensor_parallel_size)
    with started(config) as (group, actors, backend):
        assert backend == "nccl"
        group.call("connect", backend, actors)
        samples = rollouts(actors[0])
        train(group, config, samples)
        group.call("publish", 1)
        assert_agree(group, actors, samples)


def test_ipc_serves_an_actor_on_the_learners_device(config: TandemConfig) -> None:
    config.cluster.layout = "colocated"
    config.cluster.gpus_per_actor = config.cluster.gpus_per_learner_rank = 0.5
    config.engine.gpu_memory_utilization = 0.4
    with started(config) as (group, actors, backend):
        assert backend == "ipc"
        group.call("connect", backend, actors)
        samples = rollouts(actors[0])
        train(group, config, samples)
        group.call("publish", 1)
        assert_agree(group, actors, samples)


def test_connecting_again_builds_a_group_without_the_dead(config: TandemConfig) -> None:
    config.cluster.num_actors = 2
    with started(config) as (group, actors, backend):
        group.call("connect", backend, actors)
        samples = rollouts(actors[0])
        train(group, config, samples)
        kill([actors[1]])
        with pytest.raises(ray.exceptions.RayTaskError, match="ready did not reach every actor: actor 1"):
            group.call("publish", 1)
        group.call("connect", backend, actors[:1], 1)
        assert_agree(group, actors[:1], samples)
