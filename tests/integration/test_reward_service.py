"""Real Ray Serve with a tiny reward model, reached by handle as the actors do."""

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from contracts.config import ClusterConfig, RewardServiceConfig
from controller.runtime import environments
from reward_service.app import start_service, stop_service, wait_for_service
from reward_service.client import HandleClient, application_name

SEQUENCES = [[5, 9, 7, 2], [8, 2], [5, 9, 7, 2], [*range(10, 60), 2]]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory, tiny_float32: Path) -> Path:
    import torch
    from transformers import AutoModelForSequenceClassification

    path = tmp_path_factory.mktemp("reward") / "model"
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_float32, num_labels=1, pad_token_id=2)
    model.score.weight.data.normal_()
    model.config.score_mean, model.config.score_std = 0.5, 2.0
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def client(ray_runtime: None, reward_model: Path) -> Iterator[HandleClient]:
    cluster = ClusterConfig(threads_per_reward_replica=1)
    service = RewardServiceConfig(dtype="float32", max_tokens=64, deadline_s=60)
    scorers = {"proxy": str(reward_model), "gold": str(reward_model)}
    started = start_service(scorers, service, cluster, environments(cluster)["reward"])
    wait_for_service(scorers, timeout_s=120)
    yield started
    stop_service()


def expected(reward_model: Path) -> list[float]:
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    values = []
    for sequence in SEQUENCES:
        hidden = model.model(input_ids=torch.tensor([sequence])).last_hidden_state[0, -1]
        values.append((model.score(hidden).item() - 0.5) / 2.0)
    return values


def test_scores_equal_transformers_one_by_one(client: HandleClient, reward_model: Path) -> None:
    scores = [s.value for s in client.score("proxy", SEQUENCES)]
    np.testing.assert_allclose(scores, expected(reward_model), atol=1e-4)
    assert scores[0] == scores[2]


def test_a_bad_item_harms_itself_alone(client: HandleClient) -> None:
    scores = client.score("proxy", [[5, 9, 2], [], [10**6], [7] * 65, [5, 9, 2]])
    assert [s.error and s.error.split(":")[0] for s in scores] == [None, "empty", "out_of_vocabulary", "too_long", None]
    assert [s.value is None for s in scores] == [False, True, True, True, False]


def test_a_killed_replica_loses_nothing(client: HandleClient, reward_model: Path) -> None:
    before = [s.value for s in client.score("gold", SEQUENCES)]
    ours = psutil.Process().children(recursive=True)
    replicas = [p for p in ours if any("ServeReplica:reward-gold" in part for part in p.cmdline())]
    assert len(replicas) == 1
    replicas[0].send_signal(signal.SIGKILL)
    assert [s.value for s in client.score("gold", SEQUENCES)] == before


def test_an_unreachable_scorer_is_an_error_not_a_score(client: HandleClient) -> None:
    impatient = HandleClient(deadline_s=1.0)
    with pytest.raises(Exception, match=application_name("nobody")):
        impatient.score("nobody", SEQUENCES)
