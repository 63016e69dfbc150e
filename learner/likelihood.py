"""Coefficients of the log-likelihood: what RAFT, reward-weighted regression and online DPO make of an update's rollouts.

All three are loss = -sum_t c_t log pi(t), with neither a ratio nor a clip; they differ in c, which is one number a rollout.
Here are the N rollouts of the global batch in one vector, the same on every rank; nothing carries a gradient.

    outcomes   float64 [N], the sum of a rollout's rewards
    groups     int64 [N], which rollouts share their prompt
    trains     bool [N], false for a rollout without a token that trains: it is never chosen
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.statistics import ROUNDING


@torch.no_grad()
def best_of_groups(outcomes: Tensor, groups: Tensor, trains: Tensor) -> Tensor:
    """RAFT: 1 for the rollout with the highest outcome of each group, the first of equals; 0 for the others.

    Source: Dong et al. 2023 (arXiv 2304.06767), algorithm 1.

    Returns:
        float64 [N].
    """
    weights = torch.zeros_like(outcomes)
    for members in _members(groups, trains):
        weights[members[outcomes[members].argmax()]] = 1.0
    return weights


@torch.no_grad()
def reward_weights(outcomes: Tensor, trains: Tensor, temperature: float) -> Tensor:
    """Reward-weighted regression: exp((R_i - max R) / temperature). The maximum cancels in `normalised`.

    Source: Peters & Schaal 2007, "Reinforcement learning by reward-weighted regression for operational space control".

    Args:
        temperature: of the outcomes' units, above 0; towards 0 the best rollout of the batch is left alone, far above the
            spread of the outcomes all count alike.

    Returns:
        float64 [N], in [0, 1].
    """
    if not trains.any():
        return torch.zeros_like(outcomes)
    return torch.where(trains, ((outcomes - outcomes[trains].max()) / temperature).exp(), 0.0)


@torch.no_grad()
def normalised(weights: Tensor, units: Tensor) -> Tensor:
    """Weights whose mean over the units is 1: the loss is then a weighted mean of negative log-likelihoods.

    Args:
        weights: float64 [N], 0 or more.
        units: float64 [N], what each rollout counts in the mean: its tokens, or 1.
    """
    total = (weights * units).sum()
    return weights * units.sum() / total if total > 0 else weights


def effective_share(weights: Tensor) -> float:
    """Effective sample size over n, (sum w)^2 / (n sum w^2): 1 where all weights are equal, 1/n where one carries all."""
    squares = weights.square().sum()
    return (weights.sum().square() / (len(weights) * squares)).item() if squares > 0 else 0.0


@dataclass
class Pairs:
    """The best and the worst rollout of each group, as DPO sees them."""

    coefficients: Tensor  # float64 [N], 0 for a rollout without a pair
    margins: Tensor  # float64 [P], beta * (log-ratio of the best - log-ratio of the worst)


@torch.no_grad()
def preference_pairs(outcomes: Tensor, log_ratios: Tensor, groups: Tensor, trains: Tensor, beta: float) -> Pairs:
    """Online DPO: the loss of a pair is -log sigmoid(m), m = beta (l_best - l_worst), l = log pi(o) - log pi_ref(o).

    Its gradient is -beta sigmoid(-m) (grad log pi(best) - grad log pi(worst)). So -sum c log pi with
    c = +-beta sigmoid(-m) / P of the policy before the step has exactly the gradient of the mean over the P pairs, at that
    step; at a second one c would be that of the first. c is given for a mean over N rollouts: times N / P.

    Sources: Rafailov et al. 2023 (arXiv 2305.18290), equation 7; Guo et al. 2024 (arXiv 2402.04792), online.

    Args:
        log_ratios: float64 [N], l of each rollout, summed over the tokens that train.

    Returns:
        A group whose outcomes are all equal but for rounding makes no pair; among equals the first counts.
    """
    best, worst = [], []
    for members in _members(groups, trains):
        of_group = outcomes[members]
        if of_group.max() - of_group.min() > ROUNDING * of_group.abs().max():
            best.append(members[of_group.argmax()])
            worst.append(members[of_group.argmin()])
    coefficients = torch.zeros_like(outcomes)
    if not best:
        return Pairs(coefficients, outcomes.new_zeros(0))
    chosen, rejected = torch.stack(best), torch.stack(worst)
    margins = beta * (log_ratios[chosen] - log_ratios[rejected])
    pull = beta * torch.sigmoid(-margins) * len(outcomes) / len(best)
    coefficients[chosen] = pull
    coefficients[rejected] = -pull
    return Pairs(coefficients, margins)


def pair_metrics(margins: Tensor) -> dict[str, float]:
    """Before the step: number of pairs, their mean loss and margin, and the share on which the policy, against its
    reference, already prefers the better rollout. Of no pair there is only the number."""
    metrics = {"online_dpo/pairs": float(len(margins))}
    if len(margins):
        metrics["online_dpo/loss"] = F.softplus(-margins).mean().item()
        metrics["online_dpo/margin_mean"] = margins.mean().item()
        metrics["online_dpo/accuracy"] = (margins > 0).double().mean().item()
    return metrics


def _members(groups: Tensor, trains: Tensor) -> list[Tensor]:
    """Row numbers of each group, in ascending order, without rows that do not train."""
    rows = trains.nonzero().squeeze(1)
    return [rows[groups[rows] == group] for group in groups[rows].unique()]
