"""REINFORCE++: the reward-to-go, whitened over the global batch."""

from typing import TYPE_CHECKING

from contracts.config import PPOConfig
from contracts.estimators import Estimator

if TYPE_CHECKING:
    from torch import Tensor


def advantages(rewards: "Tensor", values: "Tensor", mask: "Tensor", ppo: PPOConfig) -> tuple["Tensor", "Tensor"]:
    """A_t = r_t + gamma * A_next(t): generalised advantage estimation with V = 0 and lambda = 1.

    Source: Hu et al. 2025 (arXiv 2501.03262), the variant for one completion a prompt.
    """
    from learner.estimators.gae import gae

    return gae(rewards, values, mask, ppo.gamma, 1.0)


ESTIMATOR = Estimator(title="REINFORCE++", of_tokens=advantages, kl="reward", whiten=True, aggregation="tokens")
