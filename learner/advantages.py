"""From scores to per-token rewards, and moments: whitening over the global batch, the explained variance of a value model.
What lies between them is an estimator's (learner/estimators).

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
        moments: float64 [..., 3], `whitening_moments` summed over what is whitened together: broadcast to the advantages.

    Returns:
        float32, same shape, 0 on masked tokens.
    """
    count, total, _ = moments.double().unbind(-1)
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
