"""PPO as it is known: generalised advantage estimation with a value model."""

from typing import TYPE_CHECKING

from contracts.config import PPOConfig
from contracts.estimators import Estimator

if TYPE_CHECKING:
    from torch import Tensor


def gae(rewards: "Tensor", values: "Tensor", mask: "Tensor", gamma: float, lam: float) -> tuple["Tensor", "Tensor"]:
    """Generalised advantage estimation over the tokens that train.

    delta_t = r_t + gamma * V_next(t) - V_t
    A_t     = delta_t + gamma * lam * A_next(t)
    R_t     = A_t + V_t

    next(t) is the next token of the row *that trains*: V and A are carried over masked tokens, so deleting masked
    columns changes nothing. After the last one both are 0: the end of a completion is terminal, truncated or not.

    Source: Schulman et al. 2016 (arXiv 1506.02438), equations 11 and 16.

    Args:
        rewards: [B, C], from `token_rewards`.
        values: [B, C], V(s_t) before token t is sampled.
        mask: bool [B, C], tokens that train.

    Returns:
        advantages (not whitened) and returns, float32 [B, C], both 0 on masked tokens.
    """
    import torch

    rewards = rewards.detach().float()
    values = torch.where(mask, values.detach().float(), 0.0)
    advantages = torch.zeros_like(values)
    next_value = values.new_zeros(values.shape[0])
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(values.shape[1])):
        trains = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(trains, advantage, 0.0)
        next_value = torch.where(trains, values[:, t], next_value)
        next_advantage = torch.where(trains, advantage, next_advantage)
    return advantages, advantages + values


def advantages(rewards: "Tensor", values: "Tensor", mask: "Tensor", ppo: PPOConfig) -> tuple["Tensor", "Tensor"]:
    return gae(rewards, values, mask, ppo.gamma, ppo.lam)


ESTIMATOR = Estimator(
    title="PPO", of_tokens=advantages, has_value_model=True, kl="reward", whiten=True, aggregation="tokens"
)
