"""RLOO: a rollout against the mean of the others of its group."""

from contracts.config import PPOConfig
from contracts.estimators import Estimator, Found, Rollouts


def advantages(rollouts: Rollouts, ppo: PPOConfig) -> Found:
    """R_i - mean of the others = (R_i - mean) n / (n - 1) over the n rollouts of the group; 0 for a rollout alone.

    Source: Ahmadian et al. 2024 (arXiv 2402.14740).
    """
    from learner.outcomes import centred, group_moments

    moments = group_moments(rollouts)
    count = moments[:, 0]
    return centred(rollouts, moments) * count / (count - 1).clamp(min=1), {}


ESTIMATOR = Estimator(
    title="RLOO",
    of_rollouts=advantages,
    needs_groups=True,
    reads_log_ratios=False,
    kl="reward",
    aggregation="sequence_sums",
)
