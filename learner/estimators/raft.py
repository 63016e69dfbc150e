"""RAFT: the best rollout of each group trains as in SFT."""

from typing import TYPE_CHECKING

from contracts.config import PPOConfig
from contracts.estimators import Estimator, Found, Rollouts
from contracts.metrics import Metric

if TYPE_CHECKING:
    from torch import Tensor


def best_of_groups(outcomes: "Tensor", groups: "Tensor", trains: "Tensor") -> "Tensor":
    """1 for the rollout with the highest outcome of each group, the first of equals; 0 for the others. float64 [N].

    Source: Dong et al. 2023 (arXiv 2304.06767), algorithm 1.
    """
    import torch

    from learner.outcomes import members

    weights = torch.zeros_like(outcomes)
    for rows in members(groups, trains):
        weights[rows[outcomes[rows].argmax()]] = 1.0
    return weights


def coefficients(rollouts: Rollouts, ppo: PPOConfig) -> Found:
    """c_i = T / T_kept for what `best_of_groups` keeps, 0 else: the loss is the mean over the T_kept tokens of T."""
    from learner.outcomes import normalised

    weights = best_of_groups(rollouts.outcomes, rollouts.groups, rollouts.trains)
    return normalised(weights, rollouts.units), {"raft/kept_frac": weights.mean().item()}


ESTIMATOR = Estimator(
    title="RAFT",
    of_rollouts=coefficients,
    needs_groups=True,
    reads_log_ratios=False,
    kl="none",
    aggregation="tokens",
    loss="likelihood",
    metrics=(
        Metric(
            "raft/kept_frac",
            "share of rollouts",
            "Rollouts that RAFT keeps: the best of each group.",
            "neither",
            title="Kept by RAFT",
        ),
    ),
)
