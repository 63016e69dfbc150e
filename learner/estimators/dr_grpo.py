"""Dr. GRPO: GRPO without the divisions by the group's deviation and by the length of a completion."""

from contracts.config import PPOConfig
from contracts.estimators import Estimator, Found, Rollouts


def advantages(rollouts: Rollouts, ppo: PPOConfig) -> Found:
    """R_i - mean of the group.

    Source: Liu et al. 2025 (arXiv 2503.20783): the std favours prompts that are nearly solved or hopeless.
    """
    from learner.outcomes import centred, group_moments

    return centred(rollouts, group_moments(rollouts)), {}


ESTIMATOR = Estimator(
    title="Dr. GRPO", of_rollouts=advantages, needs_groups=True, reads_log_ratios=False, kl="k3", aggregation="budget"
)
