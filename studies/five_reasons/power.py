"""`python -m studies.five_reasons.power STUDY`: how many seeds and prompts decide a claim, from an earlier study.json.

    p-value, interval and means by seed of a claim ── mean squares ──> variance components
    components, effect ── simulated studies, judged as a study is (`contrasts`) ──> how often the verdict is right
    the fewest seeds at each number of prompts ── minutes of a member ──> the cheapest design

The difference of seed s on prompt p is D[s, p] = effect + seed_s + prompt_p + rest_sp, all normal, as `crossed_error`
takes it. Completions beyond the first on a prompt, instead of more prompts, are not tried: both halve what is left over, and
only more prompts halve the prompts' own part too.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, stats

from common.statistics import FloatArray
from studies.five_reasons.contrasts import Estimate, crossed_error, holm_levels, resample, verdict
from studies.five_reasons.registration import Bootstrap, StudyError

BOOTSTRAP = Bootstrap(samples=1000, seed=0)  # a simulated study; a real one takes more
MOST_SEEDS = 40
# Effects under which a claim must be decided, in margins, and the verdict that is then right.
SCENES = {"the margin": (1.0, "reproduced"), "no effect": (0.0, "equivalent")}


@dataclass(frozen=True)
class Components:
    """Variances of a claim's differences, in squares of the gold judge's unit."""

    seeds: float
    prompts: float
    rest: float

    def mean_variance(self, seeds: int, prompts: int) -> float:
        """Of the mean over so many of both."""
        return self.seeds / seeds + self.prompts / prompts + self.rest / (seeds * prompts)

    def draw(self, effect: float, seeds: int, prompts: int, rng: np.random.Generator) -> FloatArray:
        """Differences [seeds, prompts] of a simulated study."""
        of_seed = rng.normal(0, math.sqrt(self.seeds), (seeds, 1))
        of_prompt = rng.normal(0, math.sqrt(self.prompts), (1, prompts))
        return effect + of_seed + of_prompt + rng.normal(0, math.sqrt(self.rest), (seeds, prompts))


# ---- variance components from what a study.json keeps


def standard_error(p_value: float, mean: float, reach: float, level: float) -> tuple[float, float]:
    """Standard error and degrees of freedom of the t interval that reaches `reach` from `mean` to either side at `level`, and
    whose two-sided p-value against 0 is `p_value`.

    Raises:
        StudyError: there are none: the bootstrap was the wider one, or the effect is 0.
    """

    def off(freedom: float) -> float:
        error = reach / stats.t.ppf((1 + level) / 2, freedom)
        return float(2 * stats.t.sf(abs(mean) / error, freedom) - p_value)

    ends = 1.0, 1e4
    if off(ends[0]) * off(ends[1]) > 0:
        raise StudyError("its p-value and its interval are not those of one t interval: its components are not known")
    freedom = float(optimize.brentq(off, *ends, xtol=1e-13, rtol=1e-13))
    return reach / float(stats.t.ppf((1 + level) / 2, freedom)), freedom


def components_of(claim: Mapping[str, Any]) -> Components:
    """Of one row of `claims` of a study.json with two seeds or more, exactly: `crossed_error` turned round.

    With S seeds, P prompts and the mean squares MS, whole = se^2 S P = MS_seeds + MS_prompts - MS_rest and whole^2 / freedom is
    the sum of MS^2 over their degrees of freedom; MS_seeds is P times the variance of the means by seed. Two equations are
    left for MS_prompts and MS_rest, and the components are those of the expected mean squares (Cornfield & Tukey 1956).
    Components below 0 count as 0.

    Raises:
        StudyError: it has one seed or none, or its interval is not the t interval.
    """
    found = claim["estimate"]
    seeds, prompts = len(found["seeds"]), found["prompts"]
    if seeds < 2:
        raise StudyError(f"claim {claim['number']} has {seeds} seeds; variance components need two or more")
    reach = (found["high"] - found["low"]) / 2
    error, freedom = standard_error(claim["p_value"], found["mean"], reach, found["level"])
    whole = error**2 * seeds * prompts
    of_seeds = prompts * float(np.var(found["by_seed"], ddof=1))
    difference = whole - of_seeds  # MS_prompts - MS_rest
    free = prompts - 1, (seeds - 1) * (prompts - 1)
    left = whole**2 / freedom - of_seeds**2 / (seeds - 1)
    a, b, c = 1 / free[0] + 1 / free[1], 2 * difference / free[0], difference**2 / free[0] - left
    inside = b**2 - 4 * a * c
    if inside < 0:
        raise StudyError(f"claim {claim['number']}: no mean squares give its interval; its components are not known")
    rest = (-b + math.sqrt(inside)) / (2 * a)
    return Components(max(0.0, (of_seeds - rest) / prompts), max(0.0, difference / seeds), rest)


def cautious(found: Mapping[int, Components]) -> dict[int, Components]:
    """The variance of seeds of each claim, or the mean of all where that is larger: each comes from few seeds."""
    mean = float(np.mean([part.seeds for part in found.values()]))
    return {number: Components(max(c.seeds, mean), c.prompts, c.rest) for number, c in found.items()}


# ---- simulated studies


def judged(table: FloatArray) -> Estimate:
    """As `contrasts.estimate` judges the differences [seeds, prompts] of a study."""
    return Estimate(float(table.mean()), resample(table, BOOTSTRAP), error=crossed_error(table))


def power(
    parts: Components, margin: float, seeds: int, prompts: int, *, level: float, scene: str, studies: int
) -> float:
    """Share of simulated studies with the right verdict on one claim that is tested at `level` (two-sided)."""
    size, right = SCENES[scene]
    rng = np.random.default_rng([seeds, prompts])
    found = [judged(parts.draw(size * margin, seeds, prompts, rng)) for _ in range(studies)]
    return float(np.mean([verdict(*row.interval(1 - level), margin) == right for row in found]))


def family(
    parts: Mapping[int, Components],
    effects: Mapping[int, float],
    margin: float,
    seeds: Mapping[int, int],
    prompts: int,
    *,
    alpha: float,
    known: Sequence[float] = (),
    studies: int,
) -> dict[int, Counter[str]]:
    """Verdicts of whole studies, by claim, at Holm's levels.

    Args:
        effects: true ones by claim, independent draws.
        known: p-values of further claims of the family, which do not vary.
    """
    rng = np.random.default_rng(prompts)
    said: dict[int, Counter[str]] = {number: Counter() for number in parts}
    for _ in range(studies):
        rows = [judged(parts[n].draw(effects[n], seeds[n], prompts, rng)) for n in parts]
        levels = holm_levels([*(row.p_value for row in rows), *known], alpha)
        for number, row, level in zip(parts, rows, levels, strict=False):
            said[number][verdict(*row.interval(1 - level), margin)] += 1
    return said


def fewest_seeds(
    parts: Components, margin: float, prompts: int, *, level: float, scene: str, target: float, studies: int
) -> int | None:
    """By bisection; None where `MOST_SEEDS` are too few."""

    def enough(seeds: int) -> bool:
        return power(parts, margin, seeds, prompts, level=level, scene=scene, studies=studies) >= target

    if not enough(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
