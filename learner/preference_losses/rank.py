"""Ranking by log-likelihood, without a reference."""

from typing import TYPE_CHECKING

from contracts.preference_losses import PreferenceLoss

if TYPE_CHECKING:
    from torch import Tensor


def scores(logprobs: "Tensor", reference: "Tensor", tokens: "Tensor", beta: float) -> "Tensor":
    """beta * log pi(y|x) / |y|: Yuan et al. 2023 (arXiv 2304.05302, RRHF), equation 1; with the logistic loss it is SimPO
    without its margin (Meng et al. 2024, arXiv 2405.14734)."""
    return beta * logprobs / tokens


PREFERENCE_LOSS = PreferenceLoss(title="Rank-SL", scores=scores, has_reference=False, beta=2.0, nll_coef=1.0)
