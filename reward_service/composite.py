"""Scores made of other scores. Pure arithmetic: a part without a score leaves the whole without one."""

import math
from collections.abc import Callable

from contracts.records import Score
from contracts.scoring import RETRYABLE


def weighted_sum(parts: dict[str, list[Score]], weights: list[float]) -> list[Score]:
    """sum_i w_i s_i for each item."""
    return [
        _combined(dict(zip(parts, scores, strict=True)), lambda v: sum(w * x for w, x in zip(weights, v, strict=True)))
        for scores in zip(*parts.values(), strict=True)
    ]


def ensemble(parts: dict[str, list[Score]], std_coef: float) -> list[Score]:
    """mean_i s_i - k std_i s_i for each item: what the parts disagree on is worth less (Coste et al. 2023, who take the
    variance; the standard deviation keeps the unit). The population's formula: two parts at distance d have d / 2. The
    disagreement itself is the `spread` of the score.
    """
    result = []
    for scores in zip(*parts.values(), strict=True):
        named = dict(zip(parts, scores, strict=True))
        result.append(_combined(named, lambda v: _mean(v) - std_coef * _std(v)))
        if result[-1].value is not None:
            result[-1].spread = _std([s.value for s in scores if s.value is not None])
    return result


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _std(values: list[float]) -> float:
    center = _mean(values)
    return math.sqrt(math.fsum((v - center) ** 2 for v in values) / len(values))


def _combined(scores: dict[str, Score], formula: Callable[[list[float]], float]) -> Score:
    """The formula over the values, or a part's error: a final one first, since no retry helps against it."""
    failed = [(name, s) for name, s in scores.items() if s.value is None]
    if failed:
        name, score = min(failed, key=lambda entry: entry[1].code in RETRYABLE)
        code, _, detail = (score.error or "unavailable").partition(": ")
        return Score(None, f"{code}: {name}: {detail}" if detail else f"{code}: {name}")
    try:
        value = formula([s.value for s in scores.values() if s.value is not None])
    except OverflowError:  # of a square, or within a sum
        value = math.inf
    if not math.isfinite(value):  # though every part is
        return Score(None, "non_finite")
    return Score(
        value,
        raw=value,
        is_cached=all(s.is_cached for s in scores.values()),
        is_truncated=any(s.is_truncated for s in scores.values()),
    )
