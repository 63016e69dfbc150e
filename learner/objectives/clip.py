"""PPO's clipped surrogate, with bounds of their own below and above."""

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
    """max(-A rho, -A clip(rho, 1 - low, 1 + high)) a token, with the dual clip: `learner.losses.policy_loss`.

    A higher bound above than below leaves unlikely tokens room to become likelier, and the entropy up ("clip-higher").

    Sources: Schulman et al. 2017 (arXiv 1707.06347), equation 7; Yu et al. 2025 (arXiv 2503.14476, DAPO), equation 8.
    """
    from learner.losses import policy_loss

    return policy_loss(
        policy_logprobs, proximal_logprobs, advantages, mask, clip.low, clip.dual, weights, clip_high=clip.high
    )


OBJECTIVE = Objective(title="PPO's clip", loss=loss)
