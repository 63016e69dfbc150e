"""From ratings of several people, and from stored pairs, to soft preferences between the texts of a batch."""

import torch
from torch import Tensor


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
