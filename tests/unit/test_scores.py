"""Metrics of what the reward service answers."""

import numpy as np

from contracts.records import Completion, Prompt, Rollout, Score
from controller.loop.score_metrics import part_metrics, rollout_metrics, sample_row, score_metrics


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


def test_parts_are_logged_as_their_mean_over_those_that_have_them() -> None:
    rollouts = [
        rollout(proxy=Score(1.0, parts={"format": 0.5, "right": 1.0}), gold=Score(2.0, parts={"right": 0.0})),
        rollout(proxy=Score(0.0, parts={"format": 0.0}), gold=Score(None, "timeout")),
    ]
    expected = {"score/proxy/format": 0.25, "score/proxy/right": 1.0, "score/gold/right": 0.0}
    assert part_metrics(rollouts) == expected
    assert expected.items() <= rollout_metrics(rollouts).items()


def test_a_sample_shows_its_row_and_its_parts() -> None:
    made = rollout(proxy=Score(1.0, parts={"format": 0.5}), gold=Score(0.5))
    made.prompt = Prompt(7, "2+3", (1,), '{"answer": {"value": 5}}')
    assert sample_row(made, 3) == {
        "stage": "ppo",
        "step": 3,
        "prompt_id": 7,
        "prompt": "2+3",
        "completion": "",
        "tokens": 1,
        "proxy": 1.0,
        "gold": 0.5,
        "eos": True,
        "row": {"answer": {"value": 5}},
        "parts": {"proxy": {"format": 0.5}},
    }
    assert not {"row", "parts"} & sample_row(rollout(proxy=Score(1.0)), 3).keys()
