"""Statistics of an evaluation: bootstrap intervals over prompts, paired comparisons, diversity of completions.

The unit of resampling is what was sampled independently: a prompt, or a text where pairs share texts. All intervals are
95% percentile bootstraps (Efron and Tibshirani 1993, chapter 13), those of shares no narrower than what so few prompts can
show. Seeds of the training run are not resampled: an interval speaks about other prompts, not about other runs.

What cannot be known is NaN, never an invented value: no data gives NaN throughout; a single observation gives its value
as the mean and NaN as both limits, since a percentile bootstrap would claim a width of zero. Comparisons with NaN are
false, so that an unknown interval passes no check. Failed scores are the caller's to drop: input that is not finite is
an error.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
# Relative to the numbers themselves. Scores and advantages are float32 sums, which keep five digits or more; a spread below
# is the computer's, and dividing by it would make units of its noise.
ROUNDING = 1e-5
BLOCK_ELEMENTS = 1_000_000  # resampled indices held at once: 8 MB

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% confidence interval, in the units of the values; NaN is what cannot be known."""

    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def row(self, name: str) -> dict[str, float]:
        """As metrics under `name`."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}


def _vector(name: str, values: ArrayLike) -> FloatArray:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not np.isfinite(vector).all():
        raise ValueError(f"{name} must be one-dimensional and finite (drop failed scores first); shape {vector.shape}")
    return vector


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[FloatArray, FloatArray]:
    first, second = _vector("a", a), _vector("b", b)
    if len(first) != len(second):
        raise ValueError(f"paired values must come from the same prompts; found {len(first)} and {len(second)} values")
    return first, second


def _resamples(count: int, samples: int, seed: int) -> Iterator[IntArray]:
    """Yield `samples` rows of `count` indices drawn with replacement, in blocks [rows, count]."""
    rng = np.random.default_rng(seed)
    rows = max(1, BLOCK_ELEMENTS // count)
    for start in range(0, samples, rows):
        yield rng.integers(0, count, size=(min(rows, samples - start), count))


def _interval(estimate: float, resampled: ArrayLike) -> Interval:
    """Percentile interval of the resampled estimates; those that are NaN (undefined in a resample) are left out."""
    draws = np.asarray(resampled, dtype=np.float64)
    draws = draws[np.isfinite(draws)]
    if draws.size == 0:
        return Interval(estimate)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(estimate, float(low), float(high))


def bootstrap_mean(values: ArrayLike, samples: int, seed: int, bounds: tuple[float, float] | None = None) -> Interval:
    """Mean of `values` [n], one for each prompt, with a bootstrap over prompts.

    No value: all NaN. One value: NaN limits.

    Args:
        bounds: of what a value may be, where that is known, as of a share. Resamples know of no other values than those
            that were seen, and of none where all are the same. So the limits also leave room for what n prompts do not show
            with a probability of 2.5%: a share 1 - 0.025^(1 / n) of the prompts (Clopper and Pearson 1934, of no success in
            n) with the lowest, or the highest, value that there may be.
    """
    vector = _vector("values", values)
    if vector.size < 2:
        return Interval(*vector.tolist())  # the one value, without limits
    means = [vector[rows].mean(axis=1) for rows in _resamples(vector.size, samples, seed)]
    found = _interval(float(vector.mean()), np.concatenate(means))
    return found if bounds is None else _with_unseen(found, vector.size, bounds)


def _with_unseen(found: Interval, count: int, bounds: tuple[float, float]) -> Interval:
    unseen = 1 - ((1 - LEVEL) / 2) ** (1 / count)
    low, high = (found.mean + unseen * (bound - found.mean) for bound in bounds)
    return Interval(found.mean, min(found.low, low), max(found.high, high))


def bootstrap_groups(
    statistic: Callable[[IntArray], float], groups: Sequence[int], samples: int, seed: int
) -> Interval:
    """A statistic of rows with a bootstrap over the groups that the rows are of, such as prompts: rows of one group come
    together.

    No row: all NaN. One group: NaN limits. Resamples in which the statistic is NaN are left out. Where the others are one
    number but for rounding, as a correlation of 1 is in every resample, the limits are NaN: how far other groups would be
    from it is not known.

    Args:
        statistic: of row numbers, in which a row may come more than once.
        groups: [rows], the group of each.
    """
    if not len(groups):
        return Interval()
    members = [np.flatnonzero(np.asarray(groups) == group) for group in sorted(set(groups))]
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of statistics that a resample does not define
        estimate = float(statistic(np.arange(len(groups))))
        if len(members) == 1:
            return Interval(estimate)
        draws = [
            float(statistic(np.concatenate([members[group] for group in drawn])))
            for block in _resamples(len(members), samples, seed)
            for drawn in block
        ]
    found = [draw for draw in draws if math.isfinite(draw)]
    return _interval(estimate, found) if found and spread(found) > 0 else Interval(estimate)


def bootstrap_group_mean(
    values: ArrayLike, groups: Sequence[int], samples: int, seed: int, bounds: tuple[float, float] | None = None
) -> Interval:
    """As `bootstrap_groups` of the mean of `values` [rows], for many groups: from their sums alone. `bounds` as
    `bootstrap_mean`, of which groups are the prompts."""
    vector, (_, numbers) = np.asarray(values, dtype=np.float64), np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(numbers, vector), np.bincount(numbers)
    if sums.size < 2:
        return bootstrap_groups(lambda rows: float(vector[rows].mean()), groups, samples, seed)
    blocks = _resamples(sums.size, samples, seed)
    found = _interval(float(vector.mean()), np.concatenate([sums[b].sum(1) / counts[b].sum(1) for b in blocks]))
    return found if bounds is None else _with_unseen(found, sums.size, bounds)


def paired_gain(
    a: ArrayLike, b: ArrayLike, samples: int, seed: int, bounds: tuple[float, float] | None = None
) -> Interval:
    """Mean of a - b over prompts; row i of both [n] belongs to the same prompt. Undefined cases, and `bounds` (of the
    differences), as `bootstrap_mean`."""
    first, second = _paired(a, b)
    return bootstrap_mean(first - second, samples, seed, bounds)


def win_rate(a: ArrayLike, b: ArrayLike, samples: int, seed: int) -> Interval:
    """Share of prompts where a > b, a tie counting half. Undefined cases as `bootstrap_mean`."""
    first, second = _paired(a, b)
    return bootstrap_mean((first > second) + 0.5 * (first == second), samples, seed, bounds=(0, 1))


def matched_length(
    a_scores: ArrayLike, b_scores: ArrayLike, a_lengths: ArrayLike, b_lengths: ArrayLike, tolerance: float = 0.1
) -> IntArray:
    """Indices of the prompts whose two completions are equally long: |la - lb| <= max(1, tolerance * max(la, lb)).

    Lengths are in tokens. A prompt with a failed (NaN) score on either side is left out, so that the indices can be
    used as they are. No match gives an empty array.
    """
    scores = np.asarray(a_scores, dtype=np.float64) + np.asarray(b_scores, dtype=np.float64)
    first, second = _paired(a_lengths, b_lengths)
    if scores.shape != first.shape:
        raise ValueError(f"scores and lengths must come from the same prompts; found {scores.shape} and {first.shape}")
    close = np.abs(first - second) <= np.maximum(1.0, tolerance * np.maximum(first, second))
    return np.flatnonzero(close & np.isfinite(scores))


def _intercepts(gain: FloatArray, difference: FloatArray) -> FloatArray:
    """Least-squares intercept of each row [rows, n]: mean(y) - cov(x, y) / var(x) * mean(x).

    Without spread in x the slope is unknown: the intercept is mean(y) where every x is 0, else NaN.
    """
    x_mean, y_mean = difference.mean(axis=1), gain.mean(axis=1)
    centred = difference - x_mean[:, None]
    spread = np.ptp(difference, axis=1) > 0  # exact, where a sum of squares may round to a little over zero
    variance = np.where(spread, (centred**2).sum(axis=1), 1.0)
    intercept = y_mean - (centred * (gain - y_mean[:, None])).sum(axis=1) / variance * x_mean
    return np.where(spread, intercept, np.where(x_mean == 0.0, y_mean, np.nan))


def length_adjusted_gain(gain: ArrayLike, length_difference: ArrayLike, samples: int, seed: int) -> Interval:
    """Paired gain expected at equal length: the intercept of the regression of gain [n] on length difference [n].

    Adjusts for a linear effect of length only (Dubois 2024, arXiv 2404.04475, does so with a logistic model). No
    prompt, or one length difference other than 0 throughout: the mean is NaN. Fewer than three prompts: NaN limits, as
    the line then passes through every point. Resamples that do not determine the intercept are left out.
    """
    y, x = _paired(gain, length_difference)
    if y.size == 0:
        return Interval()
    estimate = float(_intercepts(y[None], x[None])[0])
    if y.size < 3 or np.isnan(estimate):
        return Interval(estimate)
    draws = [_intercepts(y[rows], x[rows]) for rows in _resamples(y.size, samples, seed)]
    return _interval(estimate, np.concatenate(draws))


def pair_accuracy(scores: ArrayLike, ratings: ArrayLike, pairs: ArrayLike, samples: int, seed: int) -> Interval:
    """Share of `pairs` [m, 2] (row numbers of texts) whose higher-rated text has the higher score; equal scores half.

    Pairs share texts and so are not independent: the bootstrap draws texts, as multinomial counts, and a pair weighs
    the product of the counts of its two texts (Owen 2007, "The pigeonhole bootstrap"). Texts outside all pairs are not
    drawn. No pair: all NaN; one pair: NaN limits; resamples in which no pair is left are left out.

    Raises:
        ValueError: a pair of equal ratings has no right answer.
    """
    score, rating = _paired(scores, ratings)
    table = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    if len(table) == 0:
        return Interval()
    left, right = table.T
    rated = np.sign(rating[left] - rating[right])
    if (rated == 0).any():
        raise ValueError(f"{int((rated == 0).sum())} pairs have equal ratings; leave them out, as random_pairs does")
    right_share = 0.5 * (1.0 + rated * np.sign(score[left] - score[right]))  # [m]: 1 right, 0.5 tie, 0 wrong
    estimate = float(right_share.mean())
    if len(table) == 1:
        return Interval(estimate)

    texts, members = np.unique(table, return_inverse=True)
    members = members.reshape(table.shape)
    uniform = np.full(len(texts), 1.0 / len(texts))
    rng = np.random.default_rng(seed)
    draws = np.full(samples, np.nan)
    for sample in range(samples):
        counts = rng.multinomial(len(texts), uniform)
        weights = counts[members[:, 0]] * counts[members[:, 1]]
        total = weights.sum()
        if total > 0:
            draws[sample] = (weights * right_share).sum() / total
    return _with_unseen(_interval(estimate, draws), max(1, len(texts) // 2), (0, 1))  # so many pairs share no text


def random_pairs(ratings: ArrayLike, count: int, seed: int) -> IntArray:
    """`count` distinct pairs (i < j) [count, 2] of texts with unequal ratings, uniform over all such pairs.

    Where fewer exist, all of them; none gives shape [0, 2].
    """
    rating = _vector("ratings", ratings)
    order = np.argsort(rating, kind="stable")
    # In rating order, the partners of a text are those after the end of its group of equals: number the pairs by that.
    ends = np.searchsorted(rating[order], rating[order], side="right")
    last = np.cumsum(len(rating) - ends)  # number of pairs up to and including each lower text
    total = int(last[-1]) if len(last) else 0
    chosen = np.random.default_rng(seed).choice(total, size=min(count, total), replace=False) if total else np.arange(0)
    lower = np.searchsorted(last, chosen, side="right")
    higher = len(rating) - (last[lower] - chosen)
    return np.sort(np.stack([order[lower], order[higher]], axis=1), axis=1).astype(np.int64)


def _ngrams(token_ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(token_ids[start:] for start in range(n)), strict=False))


def distinct_n(token_lists: Sequence[Sequence[int]], n: int = 2) -> float:
    """Distinct n-grams over all n-grams of all completions (Li 2016, arXiv 1510.03055); NaN where there is none.

    Falls with the amount of text: compare sets of about as many tokens.
    """
    ngrams = [ngram for token_ids in token_lists for ngram in _ngrams(token_ids, n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def repeat_fraction(token_ids: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams of one completion that occurred in it before; 0 where it is shorter than n tokens."""
    ngrams = _ngrams(token_ids, n)
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def spread(values: Sequence[float] | np.ndarray) -> float:
    """Standard deviation (the population's) of at least one value; 0 where it is rounding: at most `ROUNDING` of the largest
    magnitude."""
    vector = np.asarray(values, dtype=np.float64)
    deviation = float(vector.std())
    return deviation if deviation > ROUNDING * float(np.abs(vector).max()) else 0.0
