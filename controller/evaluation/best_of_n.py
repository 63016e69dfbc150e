"""Best of n: of n completions that SFT samples for a prompt, the one that the proxy scores highest.

Nothing is trained; what it costs is n times the sampling, at every use."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from common import statistics
from contracts.records import Rollout


def kl_bound(n: int) -> float:
    """Upper bound in nats of the KL of best-of-n from the model that samples: log n - (n - 1) / n (Stiennon et al. 2020,
    arXiv 2009.01325, appendix G.3; that it is a bound: Beirami et al. 2024, arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def choose(samples: Sequence[Rollout]) -> Rollout:
    """The highest proxy score, of equal ones the first; one without a score only where none has any."""
    return max(samples, key=lambda rollout: -math.inf if (v := rollout.scores["proxy"].value) is None else v)


def expected_best(by_proxy: np.ndarray, values: np.ndarray, k: int) -> np.ndarray:
    """Mean value of the best of k, over all subsets of k of the n samples of each prompt.

    sum over the i-th worst by the proxy of C(i - 1, k - 1) / C(n, k) * value_i (Nakano et al. 2021, arXiv 2112.09332,
    appendix I): unbiased, with much less variance than one subset.

    Args:
        by_proxy: [P, n], what chooses.
        values: [P, n], what is measured of the chosen one.

    Returns:
        float64 [P]
    """
    n = by_proxy.shape[1]
    by_proxy, values = by_proxy[:, ::-1], values[:, ::-1]  # of equal ones the first counts as the best, as in `choose`
    order = np.argsort(by_proxy, axis=1, kind="stable")
    weights = np.array([math.comb(i, k - 1) for i in range(n)]) / math.comb(n, k)
    return np.take_along_axis(values, order, axis=1) @ weights


def curve(samples: list[list[Rollout]], judges: list[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Scores of the best of 1, 2, 4, ... n against the bound of the KL. Prompts where a judge failed on any sample are left
    out."""

    def values(judge: str) -> np.ndarray:
        rows = [[np.nan if (v := r.scores[judge].value) is None else v for r in group] for group in samples]
        return np.array(rows)

    n = len(samples[0])
    scores = {judge: values(judge) for judge in judges}
    complete = np.isfinite(np.stack(list(scores.values()))).all(axis=(0, 2))
    rows = []
    for k in [*(2**i for i in range(n.bit_length()) if 2**i < n), n]:
        row: dict[str, Any] = {"n": k, "kl": kl_bound(k)}
        for judge, table in scores.items():
            best = expected_best(scores["proxy"][complete], table[complete], k)
            row[judge] = statistics.bootstrap_mean(best, **options).as_dict()
        rows.append(row)
    return rows
