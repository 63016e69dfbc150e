"""GRPO: a rollout against the mean and deviation of its group."""

from contracts.config import PPOConfig
from contracts.estimators import Estimator, Found, Rollouts


def advantages(rollouts: Rollouts, ppo: PPOConfig) -> Found:
    """(R_i - mean) / (std + 1e-6) of the group, with the unbiased std; 0 where it is rounding, and for a rollout alone.

    Source: Shao et al. 2024 (arXiv 2402.03300), outcome supervision. Outcomes are not discounted.
    """
    import torch

    from learner.advantages import variance
    from learner.outcomes import centred, group_moments

    moments = group_moments(rollouts)
    spread = variance(moments).sqrt()
    return torch.where(spread > 0, centred(rollouts, moments) / (spread + 1e-6), 0.0), {}


ESTIMATOR = Estimator(
    title="GRPO", of_rollouts=advantages, needs_groups=True, reads_log_ratios=False, kl="k3", aggregation="sequences"
)
