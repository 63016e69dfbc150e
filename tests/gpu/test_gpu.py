"""The same proofs on CUDA devices: vLLM's NCCL weight transfer and a learner on a GPU. Not run where there is none."""

from pathlib import Path

import numpy as np
import pytest
import ray

from tests.conftest import kill, make_config
from tests.integration.test_engines import EOS, rollouts, sequences, train

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("ray_runtime")]


def test_nccl_publish_reaches_the_engine(tiny_model: Path, tmp_path: Path) -> None:
    from actors.rollout_actor import start_actors
    from controller.runtime import environments
    from learner.learner_actor import LearnerGroup

    config = make_config(tiny_model, tmp_path)
    config.ppo.optimizer.learning_rate = 1e-3
    config.cluster.gpus_per_actor = config.cluster.gpus_per_learner_rank = 1.0
    env = environments(config.cluster)
    placement = [{"num_cpus": 0.1, "num_gpus": 1}]
    actors = start_actors(placement, config.cluster, config.model, config.engine, "nccl", EOS, None, env["actor"])
    path = config.model.path
    group = LearnerGroup(config.cluster, "ppo", 1, (config, path, path, EOS, []), env["learner"])
    try:
        group.wait_ready()
        group.call("connect", "nccl", actors)
        samples = rollouts(actors[0])
        train(group, config, samples)
        group.call("publish", 1)
        mine = np.concatenate(group.call("token_logprobs", sequences(samples))[0])
        theirs = np.concatenate(ray.get(actors[0].token_logprobs.remote(sequences(samples)), timeout=120))
        assert np.abs(mine - theirs).mean() < 0.05
    finally:
        group.stop()
        kill(actors)
