"""How many of the held-out prompts are answered right: pass@k, the probability that one of k completions is."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from common import statistics
from contracts.config import EvaluateConfig
from contracts.records import Prompt, Rollout
from controller.data.kept_columns import source_of

# k -> float64 [P], pass@k of each prompt; NaN where fewer than k completions have a score
Rates = dict[int, np.ndarray]


def pass_at(sampled: int, right: int, k: int) -> float:
    """1 - C(sampled - right, k) / C(sampled, k): of all subsets of k completions, the share with a right one. Unbiased,
    where 1 - (1 - right / sampled)^k is too low (Chen et al. 2021, arXiv 2107.03374, equation 1); as a product, in which no
    number is large.

    Raises:
        ValueError: without k completions.
    """
    if not 1 <= k <= sampled or not 0 <= right <= sampled:
        raise ValueError(f"pass@{k} needs {k} completions or more, of which some are right; found {right} of {sampled}")
    wrong = sampled - right
    return 1.0 if wrong < k else 1.0 - float(np.prod(1.0 - k / np.arange(wrong + 1, sampled + 1)))


def rates(groups: Sequence[Sequence[Rollout]], config: EvaluateConfig) -> Rates:
    """Of the completions of each prompt, those that have a score by the proxy: it is right from `success` on. A k that no
    prompt has completions for is left out."""
    found: Rates = {}
    values = [[v for r in group if (v := r.scores["proxy"].value) is not None] for group in groups]
    assert config.success is not None
    right = [sum(value >= config.success for value in given) for given in values]
    for k in config.pass_at:
        if any(len(group) >= k for group in groups):
            pairs = zip(values, right, strict=True)
            found[k] = np.array([pass_at(len(v), c, k) if len(v) >= k else np.nan for v, c in pairs])
    return found


def summary(found: Rates, prompts: Sequence[Prompt], config: EvaluateConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Means with their intervals over prompts: pass_at_K, and of the prompts of each source pass_at_K/SOURCE."""
    names = np.array([source_of(prompt, config.by) for prompt in prompts])
    rows: dict[str, Any] = {}
    for k, values in found.items():
        known = np.isfinite(values)
        rows[f"pass_at_{k}"] = statistics.bootstrap_mean(values[known], **options, bounds=(0, 1)).as_dict()
        for source in sorted(set(names)) if config.by else ():
            chosen = values[known & (names == source)]
            rows[f"pass_at_{k}/{source}"] = statistics.bootstrap_mean(chosen, **options, bounds=(0, 1)).as_dict()
    return rows


def gains(mine: Rates, theirs: Rates, options: dict[str, Any]) -> dict[str, Any]:
    """pass_at_K_gain: paired by prompt, of the prompts that both have enough scored completions of."""
    rows = {}
    for k in mine.keys() & theirs.keys():
        both = np.isfinite(mine[k]) & np.isfinite(theirs[k])
        gain = statistics.paired_gain(mine[k][both], theirs[k][both], **options, bounds=(-1, 1))
        rows[f"pass_at_{k}_gain"] = gain.as_dict()
    return dict(sorted(rows.items()))
