"""DPO: by how much a text has become more likely than under the reference."""

from typing import TYPE_CHECKING

from contracts.preference_losses import PreferenceLoss

if TYPE_CHECKING:
    from torch import Tensor


def scores(logprobs: "Tensor", reference: "Tensor", tokens: "Tensor", beta: float) -> "Tensor":
    """beta * (log pi(y|x) - log pi_ref(y|x)), summed over tokens: Rafailov et al. 2023 (arXiv 2305.18290), equation 5,
    without the term of the prompt, which is the same on both sides of a pair that shares it."""
    return beta * (logprobs - reference)


PREFERENCE_LOSS = PreferenceLoss(title="DPO", scores=scores, has_reference=True, beta=0.1, nll_coef=0.0)
