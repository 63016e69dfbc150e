"""What estimators make of the outcomes of a global batch: groups, their moments, and weights for a mean over rollouts."""

import torch
from torch import Tensor

from contracts.estimators import Rollouts


def group_moments(rollouts: Rollouts) -> Tensor:
    """Count, sum and sum of squares of the outcomes in the group of each rollout, float64 [N, 3], as `learner.advantages.
    variance` wants them. Rollouts without a token that trains do not count."""
    outcomes = torch.where(rollouts.trains, rollouts.outcomes, 0.0)
    rows = torch.stack([rollouts.trains.double(), outcomes, outcomes.square()], dim=1)
    return torch.zeros_like(rows).index_add_(0, rollouts.groups, rows)[rollouts.groups]


def centred(rollouts: Rollouts, moments: Tensor) -> Tensor:
    """R_i - mean of the group: float64 [N]; `moments` are those of `group_moments`."""
    return rollouts.outcomes - moments[:, 1] / moments[:, 0].clamp(min=1)


def members(groups: Tensor, trains: Tensor) -> list[Tensor]:
    """Row numbers of each group, in ascending order, without rows that do not train."""
    rows = trains.nonzero().squeeze(1)
    return [rows[groups[rows] == group] for group in groups[rows].unique()]


def normalised(weights: Tensor, units: Tensor) -> Tensor:
    """Weights whose mean over the units is 1: the loss is then a weighted mean of negative log-likelihoods.

    Args:
        weights: float64 [N], 0 or more.
        units: float64 [N], what each rollout counts in the mean: its tokens, or 1.
    """
    total = (weights * units).sum()
    return weights * units.sum() / total if total > 0 else weights
