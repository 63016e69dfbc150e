"""From ratings of several people, and from stored pairs, to soft preferences between the texts of a batch; and the loss of a
policy that ranks them by its own likelihoods."""

import math

import torch
from torch import Tensor

from contracts.preference_losses import find_preference_loss
from learner.losses import soft_pairwise_loss


def preference_matrix(ratings: list[list[float]]) -> Tensor:
    """P(i beats j) = mean over rater pairs of 1[r_i > r_j] + 1/2 1[r_i = r_j].

    The probability of superiority of Mann and Whitney (1947), with every rater of text i against every rater of text
    j. Texts may have different numbers of raters, and one is enough: the preference is then 0, 1/2 or 1.

    Args:
        ratings: N lists of at least one finite rating each.

    Returns:
        float32 [N, N]; P + P^T = 1 and the diagonal is 1/2.

    Raises:
        ValueError: if a text has no rating, or one that is not finite.
    """
    counts = torch.tensor([len(row) for row in ratings], dtype=torch.float64)
    flat = torch.tensor([rating for row in ratings for rating in row], dtype=torch.float64)
    if (counts == 0).any() or not flat.isfinite().all():
        raise ValueError("every text needs at least one rating, and every rating must be finite")
    # No comparison with NaN is true, so the padding of the shorter lists counts nothing.
    padded = torch.full((len(ratings), int(counts.max()) if ratings else 0), torch.nan, dtype=torch.float64)
    for i, row in enumerate(ratings):
        padded[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    wins = torch.empty(len(ratings), len(ratings), dtype=torch.float64)
    for i in range(len(ratings)):  # one text at a time: N x R x R comparisons at once, not N x N x R x R
        own = padded[i, :, None, None]
        wins[i] = (own > padded).sum(dim=(0, 2)) + 0.5 * (own == padded).sum(dim=(0, 2))
    return (wins / (counts[:, None] * counts[None, :])).float()


def pair_preferences(preferences: list[float]) -> tuple[Tensor, Tensor]:
    """P(i beats j) and the entries that are known, for texts that lie as pairs: 2 i is the first text of pair i, 2 i + 1 the
    second.

    Args:
        preferences: of N pairs, P(first beats second).

    Returns:
        float32 [2N, 2N], and bool [2N, 2N] with N true entries, all above the diagonal.
    """
    count = 2 * len(preferences)
    matrix, known = torch.full((count, count), 0.5), torch.zeros(count, count, dtype=torch.bool)
    first = torch.arange(0, count, 2)
    matrix[first, first + 1] = torch.tensor(preferences)
    known[first, first + 1] = True
    return matrix, known


def preference_loss(
    logprobs: Tensor,
    reference: Tensor,
    tokens: Tensor,
    preferences: Tensor,
    known: Tensor,
    loss: str,
    beta: float,
    nll_coef: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over the known pairs of the cross-entropy of sigmoid(s_i - s_j) against P(i beats j), where s are the scores that
    the loss declares (learner/preference_losses). With P = 1 it is -log sigmoid(s_w - s_l); with P = 1 - epsilon it is
    conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences").

    With `nll_coef` that much of the preferred text's -log pi(y|x) / |y| is added to each pair, in expectation over who
    prefers which: P of the first text's and 1 - P of the second's. Of stored pairs it is the loss of Pang et al. 2024 (arXiv
    2404.19733); RRHF has such a term of the best of several texts alone.

    Args:
        preferences, known: [N, N], read above the diagonal.

    Returns:
        The loss (scalar), the scores [N], and d loss / d logprobs [N]: all without gradient.
    """
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        scores = find_preference_loss(loss).scores(leaf, reference, tokens, beta)
        total, pairs = soft_pairwise_loss(scores, preferences, known)
        if nll_coef:
            counted = torch.where(known.triu(1), preferences, 0.0)
            wins = counted.sum(1) + (known.triu(1).sum(0) - counted.sum(0))  # of each text, over its pairs
            total = total + nll_coef * (wins * -leaf / tokens).sum()
        mean = total / pairs.clamp(min=1)
        [coefficients] = torch.autograd.grad(mean, leaf)
    return mean.detach(), scores.detach(), coefficients


@torch.no_grad()
def pair_metrics(scores: Tensor, preferences: Tensor, known: Tensor) -> tuple[float, float]:
    """Over the known pairs that are no tie: share whose preferred text has the higher score (equal scores half), and the
    mean of its score less the other's; NaN where all are ties."""
    counted = known.triu(1) & (preferences != 0.5)
    if not counted.any():
        return math.nan, math.nan
    margins = ((scores[:, None] - scores[None, :]) * (preferences - 0.5).sign())[counted]
    return ((margins > 0).float() + 0.5 * (margins == 0).float()).mean().item(), margins.mean().item()
