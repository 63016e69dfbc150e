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
    import torch.nn.functional as F

    rewards = torch.where(mask, rewards.detach().float(), 0.0)
    values = torch.where(mask, values.detach().float(), 0.0)
    next_values = F.pad(_from_the_end(values, (~mask).float()), (0, 1))[:, 1:]
    deltas = torch.where(mask, rewards + gamma * next_values - values, 0.0)
    advantages = torch.where(mask, _from_the_end(deltas, torch.where(mask, gamma * lam, 1.0)), 0.0)
    return advantages, advantages + values


def _from_the_end(summands: "Tensor", factors: "Tensor") -> "Tensor":
    """x_t = summand_t + factor_t x_(t + 1), float32 [B, C], 0 behind the last column.

    In log2(C) rounds, each of which lets every column look twice as far ahead: a loop over columns would be C times as many
    kernels on a GPU. A factor of 1 and a summand of 0 change no bit, so padding does not.

    Source: Hillis and Steele 1986, "Data parallel algorithms", over the pairs of Blelloch 1990, "Prefix sums", section 1.4.
    """
    import torch

    reach = 1
    while reach < summands.shape[1]:
        here, behind = summands[:, :-reach], summands[:, reach:]
        summands = torch.cat([here + factors[:, :-reach] * behind, summands[:, -reach:]], dim=1)
        factors = torch.cat([factors[:, :-reach] * factors[:, reach:], factors[:, -reach:]], dim=1)
        reach *= 2
    return summands


def advantages(rewards: "Tensor", values: "Tensor", mask: "Tensor", ppo: PPOConfig) -> tuple["Tensor", "Tensor"]:
    return gae(rewards, values, mask, ppo.gamma, ppo.lam)


ESTIMATOR = Estimator(
    title="PPO", of_tokens=advantages, has_value_model=True, kl="reward", whiten=True, aggregation="tokens"
)
