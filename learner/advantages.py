"""From scores to advantages: per-token rewards, generalised advantage estimation, whitening over the global batch.

B is the number of sequences and C the longest completion. Masks are bool, and what lies outside a mask is never
multiplied by zero but replaced, so that not even a NaN on padding can leak. Nothing here carries a gradient.
"""

import torch
from torch import Tensor

from learner.kl import kl_k1


@torch.no_grad()
def token_rewards(
    scores: Tensor,
    policy_logprobs: Tensor,
    ref_logprobs: Tensor,
    lengths: Tensor,
    mask: Tensor,
    kl_coef: float,
) -> Tensor:
    """Reward of each token: r_t = -kl_coef * k1_t + 1[t = T] * score.

    T is the last token that trains. That is token `lengths - 1`, unless the completion ends in tokens that do not
    train: a score on one of those would be lost, because `gae` looks through them.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), equation 2, with the KL taken token by token.

    Args:
        scores: [B], shaped score of the completion.
        policy_logprobs: [B, C], under the policy that is penalised, before this batch's updates.
        ref_logprobs: [B, C], under the frozen reference, from the same engine.
        lengths: int [B], tokens of the completion.
        mask: bool [B, C], tokens that train; false inside a completion marks an observation, which pays no KL.
        kl_coef: beta, score units a nat.

    Returns:
        float32 [B, C], 0 where no token trains. A row without such a token gets nothing, not even its score.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    trains = mask & (positions < lengths[:, None])
    # Counted from the right, the last token that trains is the first; no index is formed that an empty row could break.
    is_last = trains & (trains.flip(1).cumsum(1).flip(1) == 1)
    penalty = -kl_coef * kl_k1(policy_logprobs, ref_logprobs)
    zero = penalty.new_zeros(())
    return torch.where(trains, penalty, zero) + torch.where(is_last, scores.float()[:, None], zero)


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
def whitening_moments(advantages: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares of the advantages under `mask`, for `whiten`.

    Moments of microbatches or ranks add up to those of the whole, so one all-reduce by addition gives the statistics
    of the global batch. Raw second moments cancel when |mean| >> std; in float64 that costs the variance its digits
    only beyond |mean| / std of about 1e6, far from any advantage.

    Args:
        advantages: any shape.
        mask: bool, same shape.

    Returns:
        float64 [3].
    """
    valid = torch.where(mask, advantages.double(), 0.0)
    return torch.stack([mask.sum().double(), valid.sum(), valid.square().sum()])


@torch.no_grad()
def whiten(advantages: Tensor, mask: Tensor, moments: Tensor, eps: float = 1e-8) -> Tensor:
    """(A - mean) / sqrt(var + eps) with the mean and the unbiased variance that `moments` describe.

    With fewer than two tokens there is no variance, and the mean alone is subtracted: a lone token gets 0.

    Args:
        advantages: any shape.
        mask: bool, same shape.
        moments: float64 [3], `whitening_moments` summed over the global batch.

    Returns:
        float32, same shape, 0 on masked tokens.
    """
    count, total, total_of_squares = moments.double().unbind()
    mean = total / count.clamp(min=1)
    # Rounding can push the variance of equal advantages just below zero.
    variance = ((total_of_squares - total * mean) / (count - 1).clamp(min=1)).clamp(min=0)
    scale = torch.where(count >= 2, (variance + eps).rsqrt(), 1.0)
    return torch.where(mask, (advantages.double() - mean) * scale, 0.0).float()


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) under the mask: 1 is a perfect critic, 0 a constant one, negative worse than constant.

    Args:
        values: any shape, V(s_t).
        returns: same shape, regression targets.
        mask: bool, same shape.

    Returns:
        float64 scalar; NaN where it is undefined (fewer than two tokens, or all returns equal).
    """
    targets = returns[mask].double()
    residuals = targets - values[mask].double()
    if targets.numel() < 2:
        return targets.new_full((), torch.nan)
    variance = targets.var()
    return torch.where(variance > 0, 1 - residuals.var() / variance, torch.nan)
