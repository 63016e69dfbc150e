"""What a loss of stage preference declares. One module each in learner/preference_losses (docs/preference.md)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.plugins import Kind, find

if TYPE_CHECKING:
    from torch import Tensor

PREFERENCE_LOSSES = Kind("preference loss", "learner.preference_losses", "PREFERENCE_LOSS")


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    title: str  # of the method
    # What a policy's likelihoods say of N completions: (logprobs, reference, tokens, beta) -> scores, each [N].
    # logprobs and reference are log p of whole completions, nats; reference is 0 where there is none; tokens is the
    # length of each, at least 1. `learner.pair_losses.preference_loss` compares the scores.
    scores: Callable[["Tensor", "Tensor", "Tensor", float], "Tensor"]
    has_reference: bool  # the policy before its first step
    beta: float  # both as the paper has them, where the configuration says null
    nll_coef: float


def find_preference_loss(name: str) -> PreferenceLoss:
    """As declared. Raises UnknownPlugin where there is none of that name."""
    found: PreferenceLoss = find(PREFERENCE_LOSSES, name)
    return found
