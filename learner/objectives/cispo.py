"""CISPO: the log-likelihood, weighted by the clipped ratio, so that every token keeps its gradient."""

from typing import TYPE_CHECKING

from contracts.objectives import Clip, Objective

if TYPE_CHECKING:
    from torch import Tensor


def loss(
    policy_logprobs: "Tensor",
    proximal_logprobs: "Tensor",
    advantages: "Tensor",
    mask: "Tensor",
    clip: Clip,
    weights: "Tensor",
) -> tuple["Tensor", dict[str, "Tensor"]]:
    """-sum_t w_t sg[clip(rho, 1 - low, 1 + high)] A_t log pi(t); `clipped` counts tokens whose rho the bounds changed.

    The clip is of the weight alone, never of the gradient: rare tokens, whose ratios are large after the first of several
    steps, go on teaching. There is no dual clip, as the weight is bounded.

    Source: MiniMax 2025 (arXiv 2506.13585, MiniMax-M1), equations 4 and 5. It sets no bound below (low = 1) and tunes the
    one above, whose value it does not give; here ppo.clip.
    """
    import torch

    from learner.losses import likelihood_loss, ratios

    _, ratio = ratios(policy_logprobs.detach(), proximal_logprobs, mask)
    bounded = ratio.clamp(1.0 - clip.low, 1.0 + clip.high)
    # Not after the product: what lies outside the mask may be NaN, and times 0 it would be one too.
    coefficients = torch.where(mask, advantages.detach().float(), 0.0) * bounded
    total, stats = likelihood_loss(policy_logprobs, proximal_logprobs, coefficients, mask, weights)
    return total, stats | {"clipped": ((bounded != ratio) & mask).sum().float()}


OBJECTIVE = Objective(title="CISPO", loss=loss, clip_low=1.0)
