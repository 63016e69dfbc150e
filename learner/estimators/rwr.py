"""Reward-weighted regression: every rollout trains, by an exponential of its outcome."""

from typing import TYPE_CHECKING

from contracts.config import PPOConfig
from contracts.estimators import Estimator, Found, Rollouts
from contracts.metrics import Metric

if TYPE_CHECKING:
    from torch import Tensor


def reward_weights(outcomes: "Tensor", trains: "Tensor", temperature: float) -> "Tensor":
    """exp((R_i - max R) / temperature). The maximum cancels in `normalised`.

    Source: Peters & Schaal 2007, "Reinforcement learning by reward-weighted regression for operational space control".

    Args:
        temperature: of the outcomes' units, above 0; towards 0 the best rollout of the batch is left alone, far above the
            spread of the outcomes all count alike.

    Returns:
        float64 [N], in [0, 1].
    """
    import torch

    if not trains.any():
        return torch.zeros_like(outcomes)
    return torch.where(trains, ((outcomes - outcomes[trains].max()) / temperature).exp(), 0.0)


def effective_share(weights: "Tensor") -> float:
    """Effective sample size over n, (sum w)^2 / (n sum w^2): 1 where all weights are equal, 1/n where one carries all."""
    squares = weights.square().sum()
    return (weights.sum().square() / (len(weights) * squares)).item() if squares > 0 else 0.0


def coefficients(rollouts: Rollouts, ppo: PPOConfig) -> Found:
    """c_i = N exp(R_i / temperature) / sum_j exp(R_j / temperature): a weighted mean of negative log-likelihoods."""
    from learner.outcomes import normalised

    weights = reward_weights(rollouts.outcomes, rollouts.trains, ppo.rwr.temperature)
    found = normalised(weights, rollouts.units)
    return found, {"rwr/ess": effective_share(weights[rollouts.trains]), "rwr/weight_max": found.max().item()}


ESTIMATOR = Estimator(
    title="RWR",
    of_rollouts=coefficients,
    reads_log_ratios=False,
    kl="none",
    aggregation="sequence_sums",
    loss="likelihood",
    metrics=(
        Metric(
            "rwr/ess",
            "share of rollouts",
            "Effective sample size of RWR's weights, (sum w)^2 / (N sum w^2): 1 where all rollouts count alike, 1/n where "
            "one carries the batch.",
            "neither",
            title="Effective sample size of RWR",
        ),
        Metric(
            "rwr/weight_max", "mean weights", "The largest weight of a rollout, where the mean weight is 1.", "neither"
        ),
    ),
)
