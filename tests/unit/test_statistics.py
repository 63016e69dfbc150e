"""Values are worked out by hand, or come from the normal distribution where a bootstrap is checked for coverage."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import scipy.stats

from common.statistics import (
    Interval,
    bootstrap_group_mean,
    bootstrap_groups,
    bootstrap_mean,
    distinct_n,
    length_adjusted_gain,
    matched_length,
    pair_accuracy,
    paired_gain,
    random_pairs,
    repeat_fraction,
    win_rate,
)


def is_unknown(interval: Interval) -> bool:
    return all(math.isnan(value) for value in interval.as_dict().values())


def has_mean_only(interval: Interval, mean: float) -> bool:
    return interval.mean == pytest.approx(mean) and math.isnan(interval.low) and math.isnan(interval.high)


def test_interval_as_dict():
    assert Interval(0.5, 0.25, 0.75).as_dict() == {"mean": 0.5, "low": 0.25, "high": 0.75}


def test_bootstrap_mean_of_two_values_reaches_both():
    # Means of resamples of {0, 1}: 0, 1/2 and 1 with probabilities 1/4, 1/2, 1/4.
    assert bootstrap_mean([0.0, 1.0], samples=500, seed=0) == Interval(0.5, 0.0, 1.0)


def test_bootstrap_mean_is_reproducible_and_depends_on_the_seed():
    values = np.arange(20.0)
    assert bootstrap_mean(values, 200, seed=3) == bootstrap_mean(values, 200, seed=3)
    assert bootstrap_mean(values, 200, seed=3) != bootstrap_mean(values, 200, seed=4)


def test_bootstrap_mean_in_blocks_uses_every_resample(monkeypatch):
    monkeypatch.setattr("common.statistics.BLOCK_ELEMENTS", 7)
    interval = bootstrap_mean([0.0, 1.0], samples=500, seed=0)
    assert interval == Interval(0.5, 0.0, 1.0)


def test_bootstrap_interval_has_the_width_of_the_normal_one():
    values = np.random.default_rng(0).normal(2.0, 3.0, size=900)
    interval = bootstrap_mean(values, samples=4000, seed=1)
    half_width = 1.96 * values.std(ddof=1) / 30  # sqrt(900)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.high - interval.mean == pytest.approx(half_width, rel=0.1)
    assert interval.mean - interval.low == pytest.approx(half_width, rel=0.1)


def test_bootstrap_interval_covers_a_known_mean_in_about_95_of_100():
    rng = np.random.default_rng(7)
    intervals = [bootstrap_mean(rng.normal(1.0, 1.0, size=60), samples=400, seed=run) for run in range(400)]
    coverage = np.mean([interval.low <= 1.0 <= interval.high for interval in intervals])
    assert 0.90 <= coverage <= 0.98  # one standard error is 1.1%


@pytest.mark.parametrize("values", [[], np.empty(0)])
def test_no_data_is_unknown(values):
    assert is_unknown(bootstrap_mean(values, 100, 0))
    assert is_unknown(paired_gain(values, values, 100, 0))
    assert is_unknown(win_rate(values, values, 100, 0))
    assert is_unknown(length_adjusted_gain(values, values, 100, 0))
    assert is_unknown(pair_accuracy(values, values, np.empty((0, 2)), 100, 0))
    assert matched_length(values, values, values, values).tolist() == []
    assert random_pairs(values, 5, 0).shape == (0, 2)


def test_one_value_has_no_interval():
    assert has_mean_only(bootstrap_mean([3.0], 100, 0), 3.0)
    assert has_mean_only(paired_gain([3.0], [1.0], 100, 0), 2.0)
    assert has_mean_only(win_rate([3.0], [1.0], 100, 0), 1.0)
    assert has_mean_only(length_adjusted_gain([2.0], [0.0], 100, 0), 2.0)
    assert has_mean_only(pair_accuracy([1.0, 0.0], [1.0, 0.0], [[0, 1]], 100, 0), 1.0)


@pytest.mark.parametrize("values", [[1.0, math.nan], [math.inf, 0.0], [[1.0], [2.0]]])
def test_values_that_are_not_finite_numbers_are_refused(values):
    with pytest.raises(ValueError, match="one-dimensional and finite"):
        bootstrap_mean(values, 100, 0)


def test_unequal_numbers_of_prompts_are_refused():
    with pytest.raises(ValueError, match="found 2 and 1"):
        paired_gain([1.0, 2.0], [1.0], 100, 0)
    with pytest.raises(ValueError, match="same prompts"):
        matched_length([1.0], [1.0], [3, 4], [3, 4])


@pytest.mark.parametrize("count", [2, 20, 500])
def test_what_was_seen_in_every_prompt_is_not_known_of_all(count):
    """Limits of a share that is 0 or 1 throughout are Clopper and Pearson's: (alpha / 2)^(1 / n)."""
    exact = scipy.stats.binomtest(count, count).proportion_ci(0.95, method="exact")
    unseen = 1 - exact.low
    assert bootstrap_mean(np.ones(count), 100, 0, bounds=(0, 1)).as_dict() == pytest.approx(
        {"mean": 1.0, "low": exact.low, "high": 1.0}
    )
    for value, low, high in ((0.0, 0.0, unseen), (0.5, 0.5 - unseen / 2, 0.5 + unseen / 2)):
        found = bootstrap_mean(np.full(count, value), 100, 0, bounds=(0, 1))
        assert (found.mean, found.low, found.high) == pytest.approx((value, low, high))
    won = win_rate(np.ones(count), np.zeros(count), 100, 0)
    assert (won.mean, won.low, won.high) == pytest.approx((1.0, 1 - unseen, 1.0))
    same = paired_gain(np.ones(count), np.ones(count), 100, 0, bounds=(-1, 1))
    assert (same.mean, same.low, same.high) == pytest.approx((0.0, -unseen, unseen))


@pytest.mark.parametrize("count", [10, 20, 100])
def test_one_wrong_answer_more_lowers_both_limits(count):
    found = [
        bootstrap_mean([1.0] * (count - wrong) + [0.0] * wrong, 2000, 0, bounds=(0, 1)) for wrong in range(count + 1)
    ]
    for better, worse in pairwise(found):
        assert better.mean > worse.mean
        assert better.low >= worse.low
        assert better.high >= worse.high
    half = [1.0] * (count // 2) + [0.0] * (count // 2)
    assert found[count // 2] == bootstrap_mean(half, 2000, 0)  # in the middle the bootstrap decides


def test_pairs_that_are_all_right_have_an_interval():
    ratings = np.arange(40.0)
    found = pair_accuracy(ratings, ratings, [[i, i + 20] for i in range(20)], 200, 0)
    assert (found.mean, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(scipy.stats.binomtest(20, 20).proportion_ci(0.95, method="exact").low)


def test_paired_gain_uses_the_pairing():
    a, b = [1.5, 10.5, 100.5], [1.0, 10.0, 100.0]
    assert paired_gain(a, b, 100, 0) == Interval(0.5, 0.5, 0.5)


def test_win_rate_counts_a_tie_half():
    # win, loss, tie, win: (1 + 0 + 0.5 + 1) / 4
    assert win_rate([2, 0, 1, 5], [1, 3, 1, 4], 100, 0).mean == 0.625


def test_matched_length_keeps_prompts_of_equal_length():
    # 20 / 18: off by 2 = 10% of 20. 20 / 17: 3. 5 / 4: within one token. 5 / 3: 2 > 1. 0 / 1: within one token.
    a, b = [20, 20, 5, 5, 0], [18, 17, 4, 3, 1]
    assert matched_length(np.zeros(5), np.zeros(5), a, b).tolist() == [0, 2, 4]
    assert matched_length(np.zeros(5), np.zeros(5), a, b, tolerance=0.4).tolist() == [0, 1, 2, 3, 4]
    assert matched_length([0, 0, math.nan, 0, 0], np.zeros(5), a, b).tolist() == [0, 4]


def test_length_adjusted_gain_is_the_intercept():
    # Least squares through (-1, 1), (0, 1), (1, 4): slope 3/2, mean (0, 2), intercept 2.
    assert length_adjusted_gain([1, 1, 4], [-1, 0, 1], 200, 0).mean == pytest.approx(2.0)
    # Exactly gain = 0.5 - 0.1 * difference: every resample with a spread has the same intercept.
    difference = np.array([-10.0, -6.0, -3.0, -8.0])
    interval = length_adjusted_gain(0.5 - 0.1 * difference, difference, 200, 0)
    assert interval.as_dict() == pytest.approx({"mean": 0.5, "low": 0.5, "high": 0.5})


def test_length_adjusted_gain_covers_a_known_intercept():
    rng = np.random.default_rng(5)
    difference = rng.normal(-6.0, 3.0, size=400)
    gain = 0.2 - 0.05 * difference + rng.normal(0.0, 0.5, size=400)
    interval = length_adjusted_gain(gain, difference, 2000, 0)
    # Standard error of an intercept: sigma * sqrt(1/n + mean(x)^2 / sum((x - mean)^2)).
    error = 0.5 * math.sqrt(1 / 400 + difference.mean() ** 2 / (400 * difference.var()))
    assert interval.low < 0.2 < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_length_adjusted_gain_without_a_spread_of_lengths():
    interval = length_adjusted_gain([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], 200, 0)
    assert interval.mean == 2.0  # nothing to adjust
    assert interval.low < 2.0 < interval.high
    # 0.1 is not exact in binary: a spread that is only rounding error must not give a slope.
    assert is_unknown(length_adjusted_gain([1.0, 2.0, 3.0], [0.1, 0.1, 0.1], 200, 0))
    assert has_mean_only(length_adjusted_gain([1.0, 2.0], [0.0, 1.0], 200, 0), 1.0)


def test_pair_accuracy_counts_right_wrong_and_ties():
    scores, ratings = [0.0, 1.0, 1.0, -1.0], [1, 2, 3, 4]
    # (0, 1) right; (2, 1) tie; (0, 3) wrong; (3, 2) wrong: 1.5 / 4
    assert pair_accuracy(scores, ratings, [[0, 1], [2, 1], [0, 3], [3, 2]], 100, 0).mean == 0.375


def test_pair_accuracy_refuses_pairs_of_equal_ratings():
    with pytest.raises(ValueError, match="1 pairs have equal ratings"):
        pair_accuracy([0, 1, 2], [1, 1, 2], [[0, 1], [1, 2]], 100, 0)


def test_pair_accuracy_interval_is_wider_when_pairs_share_texts():
    rng = np.random.default_rng(2)
    ratings = rng.normal(size=40)
    scores = ratings + rng.normal(size=40)
    shared = np.array(list(combinations(range(40), 2)))  # 780 pairs of 40 texts
    clustered = pair_accuracy(scores, ratings, shared, 1000, 0)
    right = (np.sign(scores[shared[:, 0]] - scores[shared[:, 1]])) == np.sign(
        ratings[shared[:, 0]] - ratings[shared[:, 1]]
    )
    naive = bootstrap_mean(right, 1000, 0)
    assert clustered.mean == pytest.approx(naive.mean)
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)


def test_pair_accuracy_ignores_texts_outside_all_pairs():
    scores, ratings = [0.0, 1.0, 2.0, 0.5], [1.0, 3.0, 2.0, 4.0]
    pairs = np.array([[0, 1], [1, 2], [0, 2], [2, 3]])
    shifted = pair_accuracy([9.0, *scores], [9.0, *ratings], pairs + 1, 300, 0)
    assert shifted == pair_accuracy(scores, ratings, pairs, 300, 0)


def test_random_pairs_are_distinct_ordered_and_unequal():
    ratings = np.random.default_rng(0).integers(0, 4, size=50)
    pairs = random_pairs(ratings, 300, seed=1)
    assert pairs.shape == (300, 2)
    assert len({tuple(pair) for pair in pairs.tolist()}) == 300
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert (ratings[pairs[:, 0]] != ratings[pairs[:, 1]]).all()
    assert (random_pairs(ratings, 300, seed=1) == pairs).all()


def test_random_pairs_gives_all_where_fewer_exist():
    # Ratings 2, 1, 2, 3: six pairs, of which (0, 2) is equal.
    pairs = random_pairs([2.0, 1.0, 2.0, 3.0], 100, seed=0)
    assert sorted(map(tuple, pairs.tolist())) == [(0, 1), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert random_pairs([1.0, 1.0], 100, seed=0).shape == (0, 2)


def test_random_pairs_are_uniform():
    counts = np.zeros((4, 4))
    for seed in range(2000):
        (pair,) = random_pairs([2.0, 1.0, 2.0, 3.0], 1, seed)
        counts[tuple(pair)] += 1
    assert (counts[counts > 0] > 320).all()  # 400 expected for each of five, one standard error is 18
    assert np.count_nonzero(counts) == 5


def test_distinct_n():
    # Bigrams: 12 23 31 12 | 12: five, of which 12, 23, 31 are distinct. None crosses from one completion to the next.
    assert distinct_n([[1, 2, 3, 1, 2], [1, 2]]) == pytest.approx(3 / 5)
    assert distinct_n([np.array([1, 1, 2])], n=1) == pytest.approx(2 / 3)
    assert math.isnan(distinct_n([]))
    assert math.isnan(distinct_n([[1], []]))


def test_repeat_fraction():
    assert repeat_fraction([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)  # 1234 2341 3412 4123 1234
    assert repeat_fraction(np.full(7, 5)) == pytest.approx(3 / 4)
    assert repeat_fraction([1, 2, 3, 4, 5]) == 0.0
    assert repeat_fraction([1, 1, 1]) == 0.0
    assert repeat_fraction([]) == 0.0


def test_the_mean_over_groups_is_that_of_their_rows() -> None:
    rng = np.random.default_rng(3)
    values, groups = rng.normal(size=200), rng.integers(0, 40, 200).tolist()
    slow = bootstrap_groups(lambda rows: float(values[rows].mean()), groups, 300, seed=5)
    fast = bootstrap_group_mean(values, groups, 300, seed=5)
    assert fast.mean == pytest.approx(slow.mean)
    assert (fast.low, fast.high) == pytest.approx((slow.low, slow.high))
    assert bootstrap_group_mean([1.0, 0.0], [7, 7], 300, seed=5).mean == 0.5
