"""From scores to advantages: per-token rewards, generalised advantage estimation, comparison within the group of a prompt,
whitening over the global batch.

REINFORCE++ (Hu et al. 2025, arXiv 2501.03262) needs nothing of its own: its advantage is the reward-to-go, which is `gae`
with V = 0 and lambda = 1, whitened.

B is the number of sequences and C the longest completion. Masks are bool, and what lies outside a mask is never
multiplied by zero but replaced, so that not even a NaN on padding can leak. Nothing here carries a gradient.
"""

import math

import torch
from torch import Tensor

from common.statistics import ROUNDING
from learner.kl import kl_k1


@torch.no_grad()
def token_rewards(
    scores: Tensor,
    policy_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    kl_coef: float,
) -> Tensor:
    """Reward of each token that trains: r_t = -kl_coef * k1_t + score_t.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), equation 2, with the KL taken token by token.

    Args:
        scores: [B, C], shaped scores, each at the last token of what it is for.
        policy_logprobs: [B, C], under the policy that is penalised, before this batch's updates.
        ref_logprobs: [B, C], under the frozen reference, from the same engine.
        mask: bool [B, C], tokens that train; false inside a completion marks an observation, which pays no KL.
        kl_coef: beta, score units a nat.

    Returns:
        float32 [B, C], 0 where no token trains: a score there is lost (the batcher places none).
    """
    rewards = -kl_coef * kl_k1(policy_logprobs, ref_logprobs) + scores.float()
    return torch.where(mask, rewards, 0.0)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
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
    rewards = rewards.float()
    values = torch.where(mask, values.float(), 0.0)
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


@torch.no_grad()
def group_moments(rewards: Tensor, mask: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Count, sum and sum of squares of the outcomes of each rollout group, for `group_advantages`.

    The outcome of a rollout is the sum of its rewards. Rows without a token that trains do not count. Moments of
    microbatches or ranks add up, so that a group may lie on any of them.

    Args:
        rewards: [B, C], from `token_rewards`.
        mask: bool [B, C], tokens that train.
        groups: int64 [B], in [0, num_groups).

    Returns:
        float64 [num_groups, 3].
    """
    trains = mask.any(dim=1)
    outcomes = torch.where(trains, torch.where(mask, rewards.double(), 0.0).sum(dim=1), 0.0)
    rows = torch.stack([trains.double(), outcomes, outcomes.square()], dim=1)
    return rows.new_zeros(num_groups, 3).index_add_(0, groups, rows)


@torch.no_grad()
def group_advantages(
    estimator: str, rewards: Tensor, mask: Tensor, groups: Tensor, moments: Tensor, eps: float = 1e-6
) -> Tensor:
    """One advantage for all tokens of a rollout: its outcome R_i against the n rollouts of its group.

    grpo:    (R_i - mean) / (std + eps), unbiased std; Shao et al. 2024 (arXiv 2402.03300), outcome supervision
    dr_grpo: R_i - mean; Liu et al. 2025 (arXiv 2503.20783): the std favours prompts that are nearly solved or hopeless
    rloo:    R_i - mean of the others = (R_i - mean) n / (n - 1); Ahmadian et al. 2024 (arXiv 2402.14740)

    A rollout that is alone in its group gets 0, and by grpo each of a group whose outcomes are equal but for rounding.
    Rewards are not discounted: an outcome belongs to the whole rollout.

    Args:
        rewards: [B, C], from `token_rewards`.
        mask: bool [B, C], tokens that train.
        groups: int64 [B], the rows of `moments`.
        moments: float64 [num_groups, 3], `group_moments` summed over the global batch.

    Returns:
        float32 [B, C], 0 on masked tokens.

    Raises:
        ValueError: for an unknown estimator.
    """
    mine = moments[groups]
    count, total, _ = mine.unbind(dim=1)
    advantages = torch.where(mask, rewards.double(), 0.0).sum(dim=1) - total / count.clamp(min=1)
    if estimator == "grpo":
        spread = variance(mine).sqrt()
        advantages = torch.where(spread > 0, advantages / (spread + eps), 0.0)
    elif estimator == "rloo":
        advantages = advantages * count / (count - 1).clamp(min=1)
    elif estimator != "dr_grpo":
        raise ValueError(f"the estimator of a group must be grpo, dr_grpo or rloo, found {estimator!r}")
    return torch.where(mask, advantages[:, None], 0.0).float()


@torch.no_grad()
def whitening_moments(advantages: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares of the advantages under `mask`, for `whiten`.

    Moments of microbatches or ranks add up to those of the whole, so one all-reduce by addition gives the statistics
    of the global batch. Raw second moments cancel when |mean| >> std; in float64 that costs the variance its digits
    only beyond |mean| / std of about 1e6, where `variance` takes it for rounding.

    Args:
        advantages: any shape.
        mask: bool, same shape.

    Returns:
        float64 [3].
    """
    valid = torch.where(mask, advantages.double(), 0.0)
    return torch.stack([mask.sum().double(), valid.sum(), valid.square().sum()])


def variance(moments: Tensor) -> Tensor:
    """Unbiased variance of what `moments` [..., 3] (count, sum, sum of squares) describe: float64 [...], 0 for fewer
    than two, and where it is rounding (`common.statistics`), of the values or of the difference here."""
    count, total, total_of_squares = moments.double().unbind(-1)
    mean = total / count.clamp(min=1)
    found = (total_of_squares - total * mean) / (count - 1).clamp(min=1)
    return torch.where(found > ROUNDING**2 * total_of_squares / count.clamp(min=1), found, 0.0)


@torch.no_grad()
def whiten(advantages: Tensor, mask: Tensor, moments: Tensor, eps: float = 1e-8) -> Tensor:
    """(A - mean) / sqrt(var + eps) with the mean and the unbiased variance that `moments` describe.

    With fewer than two tokens there is no variance, and the mean alone is subtracted: a lone token gets 0. So does every
    token where all advantages are equal but for rounding, which the division would make a signal of.

    Args:
        advantages: any shape.
        mask: bool, same shape.
        moments: float64 [3], `whitening_moments` summed over the global batch.

    Returns:
        float32, same shape, 0 on masked tokens.
    """
    count, total, _ = moments.double().unbind()
    mean = total / count.clamp(min=1)
    spread = variance(moments)
    scale = torch.where(spread > 0, (spread + eps).rsqrt(), (count < 2).double())
    return torch.where(mask, (advantages.double() - mean) * scale, 0.0).float()


def explained_variance(returns: Tensor, residuals: Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 is a perfect critic, 0 a constant one, negative worse than constant.

    Args:
        returns: float64 [3], `whitening_moments` of the returns R, summed over the global batch.
        residuals: float64 [3], those of R - V.

    Returns:
        NaN where it is undefined (fewer than two tokens, or all returns equal).
    """
    spread = variance(returns).item()
    return 1 - variance(residuals).item() / spread if spread > 0 else math.nan
