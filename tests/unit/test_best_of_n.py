"""Best of n: its bound, its choice, and the mean over all subsets, by hand."""

import math
from itertools import combinations

import numpy as np
import pytest

from contracts.records import Completion, Prompt, Rollout, Score
from controller.evaluation.best_of_n import choose, curve, expected_best, kl_bound


def rollout(sample: int, proxy: float | None, gold: float | None, prompt_id: int = 0) -> Rollout:
    empty = np.zeros(1, dtype=np.int32)
    completion = Completion(empty, np.zeros(1, dtype=np.float32), empty, "stop", "")
    scores = {"proxy": Score(proxy), "gold": Score(gold)}
    return Rollout((0, prompt_id, sample), Prompt(prompt_id, "", (7,)), completion, scores)


def test_the_bound() -> None:
    assert kl_bound(1) == 0.0
    assert kl_bound(2) == pytest.approx(math.log(2) - 0.5)
    assert kl_bound(16) == pytest.approx(1.8350887)


def test_the_bound_is_reached_where_scores_tell_all_samples_apart() -> None:
    """Best of 4 from a uniform distribution over many outcomes, all scored differently: the density of the best is
    n F^(n - 1), and its KL the bound."""
    ranks = (np.arange(100_000) + 0.5) / 100_000
    density = 4 * ranks**3
    assert np.mean(density * np.log(density)) == pytest.approx(kl_bound(4), abs=1e-4)


def test_the_highest_score_is_chosen_and_a_failed_one_only_for_want_of_others() -> None:
    samples = [rollout(1, None, 5.0), rollout(2, -3.0, 0.0), rollout(3, -1.0, 0.0), rollout(4, -1.0, 9.0)]
    assert choose(samples).key == (0, 0, 3)
    assert choose(samples[:1]).key == (0, 0, 1)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_mean_over_all_subsets(k: int) -> None:
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(2, 5)), rng.normal(size=(2, 5))
    for row in range(2):
        best = [max(subset, key=lambda i: proxy[row, i]) for subset in combinations(range(5), k)]
        assert expected_best(proxy, gold, k)[row] == pytest.approx(np.mean([gold[row, i] for i in best]))


def test_of_equal_ones_the_curve_takes_the_one_that_is_judged() -> None:
    group = [rollout(i, 1.0, gold) for i, gold in enumerate([3.0, 0.0, 0.0, 5.0])]
    assert choose(group).scores["gold"].value == 3.0
    assert expected_best(np.ones((1, 4)), np.array([[3.0, 0.0, 0.0, 5.0]]), 4) == pytest.approx([3.0])


def test_the_curve_by_hand() -> None:
    """Two prompts with three samples; the third prompt has one without a gold score and is left out."""
    samples = [
        [rollout(i, p, g, prompt_id) for i, (p, g) in enumerate(rows)]
        for prompt_id, rows in enumerate(
            [
                [(1.0, 10.0), (2.0, 20.0), (3.0, 0.0)],
                [(1.0, 1.0), (2.0, 1.0), (3.0, 1.0)],
                [(1.0, 99.0), (2.0, None), (3.0, 99.0)],
            ]
        )
    ]
    rows = curve(samples, ["proxy", "gold"], {"samples": 50, "seed": 1})
    assert [row["n"] for row in rows] == [1, 2, 3]
    assert [row["kl"] for row in rows] == [kl_bound(n) for n in (1, 2, 3)]
    # Best of two of the first prompt: (1, 2) -> 20, (1, 3) and (2, 3) -> 0.
    assert [row["gold"]["mean"] for row in rows] == pytest.approx([(10 + 1) / 2, (20 / 3 + 1) / 2, (0 + 1) / 2])
    assert [row["proxy"]["mean"] for row in rows] == pytest.approx([2.0, 8 / 3, 3.0])
