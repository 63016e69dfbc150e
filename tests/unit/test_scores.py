"""Metrics of what the reward service answers."""

import numpy as np

from contracts.records import Completion, Prompt, Rollout, Score
from controller.loop.score_metrics import score_metrics


def rollout(**scores: Score) -> Rollout:
    ids = np.array([5], dtype=np.int32)
    completion = Completion(ids, np.zeros(1, dtype=np.float32), ids, "stop", "")
    return Rollout((0, 0, 0), Prompt(0, "", (1,)), completion, scores)


def test_an_ensembles_disagreement_and_the_versions() -> None:
    rollouts = [rollout(proxy=Score(1.0, version="a", spread=s)) for s in (0.1, 0.5)]
    assert score_metrics(rollouts) == {"reward/versions": 1.0, "reward/spread_mean": 0.3, "reward/spread_max": 0.5}
    rollouts.append(rollout(proxy=Score(None, "timeout", version="b")))
    assert score_metrics(rollouts)["reward/versions"] == 2.0


def test_a_single_model_has_no_disagreement() -> None:
    assert score_metrics([rollout(proxy=Score(1.0))]) == {}
    assert score_metrics([rollout(gold=Score(1.0, spread=0.2))]) == {}
