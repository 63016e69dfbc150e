"""Online DPO: the best and the worst rollout of a group are a pair."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.statistics import ROUNDING
from contracts.checks.check import Check
from contracts.config import PPOConfig
from contracts.estimators import Estimator, Found, Rollouts
from contracts.metrics import Metric

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Pairs:
    """The best and the worst rollout of each group, as DPO sees them."""

    coefficients: "Tensor"  # float64 [N], 0 for a rollout without a pair
    margins: "Tensor"  # float64 [P], beta * (log-ratio of the best - log-ratio of the worst)


def preference_pairs(
    outcomes: "Tensor", log_ratios: "Tensor", groups: "Tensor", trains: "Tensor", beta: float
) -> Pairs:
    """The loss of a pair is -log sigmoid(m), m = beta (l_best - l_worst), l = log pi(o) - log pi_ref(o).

    Its gradient is -beta sigmoid(-m) (grad log pi(best) - grad log pi(worst)). So -sum c log pi with
    c = +-beta sigmoid(-m) / P of the policy before the step has exactly the gradient of the mean over the P pairs, at that
    step; at a second one c would be that of the first. c is given for a mean over N rollouts: times N / P.

    Sources: Rafailov et al. 2023 (arXiv 2305.18290), equation 7; Guo et al. 2024 (arXiv 2402.04792), online.

    Args:
        log_ratios: float64 [N], l of each rollout, summed over the tokens that train.

    Returns:
        A group whose outcomes are all equal but for rounding makes no pair; among equals the first counts.
    """
    import torch

    from learner.outcomes import members

    best, worst = [], []
    for rows in members(groups, trains):
        of_group = outcomes[rows]
        if of_group.max() - of_group.min() > ROUNDING * of_group.abs().max():
            best.append(rows[of_group.argmax()])
            worst.append(rows[of_group.argmin()])
    coefficients = torch.zeros_like(outcomes)
    if not best:
        return Pairs(coefficients, outcomes.new_zeros(0))
    chosen, rejected = torch.stack(best), torch.stack(worst)
    margins = beta * (log_ratios[chosen] - log_ratios[rejected])
    pull = beta * torch.sigmoid(-margins) * len(outcomes) / len(best)
    coefficients[chosen] = pull
    coefficients[rejected] = -pull
    return Pairs(coefficients, margins)


def pair_metrics(margins: "Tensor") -> dict[str, float]:
    """Before the step: number of pairs, their mean loss and margin, and the share on which the policy, against its
    reference, already prefers the better rollout. Of no pair there is only the number."""
    import torch.nn.functional as F

    metrics = {"online_dpo/pairs": float(len(margins))}
    if len(margins):
        metrics["online_dpo/loss"] = F.softplus(-margins).mean().item()
        metrics["online_dpo/margin_mean"] = margins.mean().item()
        metrics["online_dpo/accuracy"] = (margins > 0).double().mean().item()
    return metrics


def coefficients(rollouts: Rollouts, ppo: PPOConfig) -> Found:
    """Those of `preference_pairs`, with beta = ppo.dpo_beta."""
    pairs = preference_pairs(rollouts.outcomes, rollouts.log_ratios, rollouts.groups, rollouts.trains, ppo.dpo_beta)
    return pairs.coefficients, pair_metrics(pairs.margins)


def checks(ppo: PPOConfig) -> list[Check]:
    """What would make another gradient than DPO's of the coefficients that are fixed before the first step."""
    steps = ppo.epochs * ppo.minibatches
    return [
        Check(
            steps == 1,
            "ppo.epochs * ppo.minibatches",
            "1 with ppo.estimator online_dpo, whose gradient holds for one optimizer step a batch",
            f"{ppo.epochs} * {ppo.minibatches} = {steps}",
            "ppo.epochs=1 ppo.minibatches=1, and more ppo.updates of fewer rollouts",
        ),
        Check(
            ppo.kl.place in (None, "none"),
            "ppo.kl.place",
            "null or none with ppo.estimator online_dpo, whose loss holds the reference already (ppo.dpo_beta)",
            ppo.kl.place,
            "ppo.kl.place=null, and ppo.dpo_beta for a stronger or weaker hold",
        ),
        Check(
            ppo.aggregation in (None, "sequence_sums"),
            "ppo.aggregation",
            "null or sequence_sums with ppo.estimator online_dpo: the margin is one of whole completions",
            ppo.aggregation,
            "ppo.aggregation=null",
        ),
        Check(
            ppo.off_policy.correction in (None, "none"),
            "ppo.off_policy.correction",
            "null or none with ppo.estimator online_dpo: a pair may come from any policy, and importance weights would "
            "change its gradient",
            ppo.off_policy.correction,
            "ppo.off_policy.correction=null",
        ),
    ]


ESTIMATOR = Estimator(
    title="Online DPO",
    of_rollouts=coefficients,
    needs_groups=True,
    kl="none",
    aggregation="sequence_sums",
    loss="likelihood",
    is_expectation=False,
    metrics=(
        Metric("online_dpo/pairs", "pairs", "Groups whose best and worst rollout differ in score.", "up"),
        Metric("online_dpo/loss", "nats a pair", "-log sigmoid of the margin, before the update.", "down"),
        Metric(
            "online_dpo/margin_mean",
            "nats x dpo_beta",
            "log p - log p_ref of the best rollout of a pair less that of the worst, before the update.",
            "up",
            title="DPO margin",
        ),
        Metric(
            "online_dpo/accuracy",
            "share of pairs",
            "Pairs whose best rollout the policy prefers, against its reference, before the update.",
            "up",
            title="DPO accuracy",
        ),
    ),
    checks=checks,
)
