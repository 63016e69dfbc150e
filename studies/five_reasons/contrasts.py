"""From scores by seed and prompt to verdicts: the wider of two intervals, Holm's levels, four possible conclusions.

Every arm answers the same prompts in every seed, so a contrast is a table D [seeds, prompts] of paired differences, and
seeds and prompts are two crossed samples.

    bootstrap    draws of seeds, then of prompts, the same prompts in every seed that was drawn: drawn anew for each they
                 would pretend that prompts differ between seeds (Owen 2007, "The pigeonhole bootstrap")
    t interval   from the mean squares of seeds, prompts and what is left (`crossed_error`); from two seeds on

The bootstrap of S seeds underestimates their variance by the factor (S - 1) / S and knows nothing of how few they are;
the t interval does. With one seed there is the bootstrap over prompts, and the interval is about other prompts alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import stats

from common import statistics
from common.statistics import FloatArray
from studies.five_reasons.members import Member
from studies.five_reasons.registration import Bootstrap, Check, Contrast, Preregistration

NOT_JUDGED = "not judged"  # no verdict: what its contrast needs has not run
VERDICTS = ("reproduced", "opposite", "equivalent", "inconclusive")


@dataclass
class Estimate:
    """A contrast with its bootstrap. Without data the mean is NaN, and `missing` says why."""

    mean: float
    draws: FloatArray  # [samples], empty without data
    seeds: list[int] = field(default_factory=list)
    by_seed: list[float] = field(default_factory=list)
    prompts: int = 0
    left_out: int = 0  # prompts without a score somewhere
    missing: str = ""
    error: tuple[float, float] | None = None  # `crossed_error`, from two seeds on

    @property
    def _known(self) -> FloatArray:
        return self.draws[np.isfinite(self.draws)]

    def interval(self, level: float) -> tuple[float, float]:
        """At this confidence level, from the lower of both lower ends to the higher of both higher ones: those of the
        percentiles of the draws and of the t interval over seeds, where there is one; NaN without data."""
        known = self._known
        if known.size == 0:
            return math.nan, math.nan
        low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
        if self.error is not None:
            reach = float(stats.t.ppf((1 + level) / 2, self.error[1])) * self.error[0]
            low, high = min(low, self.mean - reach), max(high, self.mean + reach)
        return float(low), float(high)

    @property
    def p_value(self) -> float:
        """Two-sided, of no difference: twice the share of draws on the other side of 0, never quite 0, or that of the t
        interval where it is larger; 1 without data."""
        known = self._known
        if known.size == 0:
            return 1.0
        below, above = (known <= 0).sum(), (known >= 0).sum()
        p = min(1.0, 2 * (min(below, above) + 1) / (known.size + 1))
        if self.error is not None:
            se, freedom = self.error
            p = max(p, 2 * float(stats.t.sf(abs(self.mean) / se, freedom)) if se else p)
        return float(p)

    def as_dict(self, level: float = statistics.LEVEL) -> dict[str, Any]:
        low, high = self.interval(level)
        known = {"mean": self.mean, "low": low, "high": high}
        rows: dict[str, Any] = {name: None if math.isnan(value) else value for name, value in known.items()}
        return rows | {
            "level": level,
            "seeds": self.seeds,
            "by_seed": self.by_seed,
            "prompts": self.prompts,
            "prompts_left_out": self.left_out,
            "missing": self.missing,
        }


def absent(why: str) -> Estimate:
    return Estimate(math.nan, np.empty(0), missing=why)


@lru_cache(maxsize=8)
def _draws(seeds: int, prompts: int, samples: int, seed: int) -> tuple[FloatArray, FloatArray]:
    """How often each seed [samples, seeds] and each prompt [samples, prompts] is drawn; the same in every contrast."""
    rng = np.random.default_rng(seed)
    return (
        rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=samples).astype(float),
        rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=samples).astype(float),
    )


def resample(table: FloatArray, bootstrap: Bootstrap) -> FloatArray:
    """Means of `table` [seeds, prompts] over draws of seeds and prompts: [samples]. NaN cells do not count; a draw without
    any other is NaN."""
    of_seeds, of_prompts = _draws(*table.shape, bootstrap.samples, bootstrap.seed)
    known = np.isfinite(table)
    if known.all():
        return np.einsum("ij,ij->i", of_seeds @ table, of_prompts) / table.size
    total = ((of_seeds @ np.where(known, table, 0.0)) * of_prompts).sum(axis=1)
    count = ((of_seeds @ known.astype(float)) * of_prompts).sum(axis=1)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def crossed_error(table: FloatArray) -> tuple[float, float] | None:
    """Standard error of the mean of `table` [seeds, prompts], both random, and its degrees of freedom; None with fewer
    than two of either.

    Var = (MS_seeds + MS_prompts - MS_rest) / (S P), the mean squares of the two-way table without replication (Cornfield &
    Tukey 1956), not below MS_prompts / (S P); degrees of freedom by Satterthwaite (1946).
    """
    seeds, prompts = table.shape
    if min(seeds, prompts) < 2:
        return None
    of_seed, of_prompt = table.mean(axis=1, keepdims=True), table.mean(axis=0, keepdims=True)
    free = seeds - 1, prompts - 1, (seeds - 1) * (prompts - 1)
    squares = (
        prompts * ((of_seed - table.mean()) ** 2).sum() / free[0],
        seeds * ((of_prompt - table.mean()) ** 2).sum() / free[1],
        ((table - of_seed - of_prompt + table.mean()) ** 2).sum() / free[2],
    )
    whole = max(squares[0] + squares[1] - squares[2], squares[1])
    weights = sum(square**2 / n for square, n in zip(squares, free, strict=True))
    return math.sqrt(whole / table.size), float(whole**2 / weights) if weights else math.inf


def cells(
    members: Sequence[Member], contrast: Contrast, checks: Sequence[Check]
) -> tuple[dict[int, dict[str, dict[int, float]]], list[int]]:
    """By seed the scores of each cell by prompt, for the seeds that have every cell; and the seeds that do not. A member
    that has missed a check has none."""
    planned = sorted({m.seed for m in members if m.arm in contrast.arms})
    by_key = {(m.arm, m.seed): m for m in members if not m.missed_checks(checks)}
    found: dict[int, dict[str, dict[int, float]]] = {}
    for seed in planned:
        row: dict[str, dict[int, float]] = {}
        for cell in contrast.contrast:
            arm, _, model = cell.partition(":")
            member = by_key.get((arm, seed))
            scores = member.scores.get(model or "own", {}).get(contrast.metric) if member else None
            if scores:
                row[cell] = scores
        if len(row) == len(contrast.contrast):
            found[seed] = row
    return found, [seed for seed in planned if seed not in found]


def tables(found: dict[int, dict[str, dict[int, float]]]) -> tuple[dict[str, FloatArray], int]:
    """Scores of each cell [seeds, prompts] on the prompts that every cell of every seed has a score for; how many have
    not."""
    prompts = sorted({p for row in found.values() for scores in row.values() for p in scores})
    names = list(next(iter(found.values())))
    stacked = {
        name: np.array([[row[name].get(p, math.nan) for p in prompts] for row in found.values()]) for name in names
    }
    whole = np.logical_and.reduce([np.isfinite(table).all(axis=0) for table in stacked.values()])
    return {name: table[:, whole] for name, table in stacked.items()}, int((~whole).sum())


def estimate(
    members: Sequence[Member], contrast: Contrast, plan: Preregistration, seeds: Sequence[int] | None = None
) -> Estimate:
    """A contrast by the rules of the pre-registration, over these seeds or over all that ran."""
    members = [m for m in members if seeds is None or m.seed in seeds]
    not_run = [arm for arm in contrast.arms if not any(m.arm == arm for m in members)]
    if not_run:
        return absent(f"not in this study: {', '.join(not_run)}")
    found, lost = cells(members, contrast, plan.checks)
    if not found or len(found) < plan.min_seed_share * (len(found) + len(lost)):
        missed = [text for m in members if m.arm in contrast.arms for text in m.missed_checks(plan.checks)]
        why = f"no evaluation of every arm in seeds {', '.join(map(str, lost))}" if lost else "nothing was judged"
        return absent("; ".join([why, *missed]))
    scores, left_out = tables(found)
    table = sum((weight * scores[cell] for cell, weight in contrast.contrast.items()), start=np.zeros(()))
    prompts = table.shape[1]
    if prompts < 2 or left_out > plan.max_missing_prompts * (prompts + left_out):
        return absent(f"{left_out} of {prompts + left_out} prompts have no score somewhere")
    draws = resample(table, plan.bootstrap)
    by_seed = table.mean(axis=1).tolist()
    return Estimate(float(table.mean()), draws, list(found), by_seed, prompts, left_out, error=crossed_error(table))


# ---- conclusions


def holm_levels(p_values: Sequence[float], alpha: float) -> list[float]:
    """The level at which each hypothesis is tested (Holm 1979): alpha / (m - k + 1) for the k-th smallest p-value.

    The first that is not rejected ends it: the larger ones keep its level, at which they are not rejected either.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    levels = [alpha] * len(p_values)
    level, ended = alpha / max(1, len(p_values)), False
    for place, i in enumerate(order):
        if not ended:
            level = alpha / (len(p_values) - place)
            ended = p_values[i] > level
        levels[i] = level
    return levels


def verdict(interval: tuple[float, float], wide: tuple[float, float], margin: float) -> str:
    """From the intervals of a contrast that the claim says is positive.

    equivalent: all of `wide` is closer to 0 than the margin, even where it does not hold 0: too small to matter.
    reproduced, opposite: all of `interval` is above, below 0. inconclusive: anything else. Without data there is no
    verdict.

    Args:
        interval: at the level of `holm_levels`.
        wide: at alpha / m for m claims, as "no difference", by which Holm orders claims, is another hypothesis than "a
            difference of the margin": with his levels some claim that is off by the margin would be called equivalent in up
            to 1 - (1 - alpha / 2)^m of all studies.
    """
    low, high = interval
    if math.isnan(low) or math.isnan(high):
        return NOT_JUDGED
    if -margin < wide[0] and wide[1] < margin:
        return "equivalent"
    return "reproduced" if low > 0 else "opposite" if high < 0 else "inconclusive"


# ---- the same at equal length and equal KL


def length_matched_wins(members: Sequence[Member], first: str, second: str, plan: Preregistration) -> Estimate:
    """Share of prompts where `first` has the higher gold score, a tie counting half, among those where both completions
    are equally long (`statistics.matched_length`)."""
    both = {first: 1.0, second: -1.0}
    gold, lengths = (
        cells(members, Contrast(title=metric, metric=metric, contrast=both), plan.checks)[0]
        for metric in ("gold", "length")
    )
    if not gold or list(gold) != list(lengths):
        return absent("not judged")
    scores, _ = tables(gold)
    rows = []
    for i, row in enumerate(gold.values()):
        whole = [p for p in sorted({*row[first], *row[second]}) if _known(gold, p)]
        length = lengths[list(gold)[i]]
        a, b = (np.array([length[cell][p] for p in whole]) for cell in (first, second))
        x, y = scores[first][i], scores[second][i]
        wins = np.full(len(whole), np.nan)
        same = statistics.matched_length(x, y, a, b)
        wins[same] = (x[same] > y[same]) + 0.5 * (x[same] == y[same])
        rows.append(wins)
    table = np.array(rows)
    matched = int(np.isfinite(table).sum())
    if matched < 2:
        return absent(f"{matched} pairs of equal length")
    draws = resample(table, plan.bootstrap)
    by_seed = [float(np.nanmean(row)) if np.isfinite(row).any() else math.nan for row in table]
    return Estimate(float(np.nanmean(table)), draws, list(gold), by_seed, matched)


def _known(found: dict[int, dict[str, dict[int, float]]], prompt: int) -> bool:
    return all(math.isfinite(scores.get(prompt, math.nan)) for row in found.values() for scores in row.values())
