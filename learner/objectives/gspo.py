"""GSPO: the clipped surrogate of the ratio of whole sequences."""

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
    """PPO's surrogate with s_i = exp(mean over the tokens t of sequence i that train of log pi(t) - log pi_prox(t)).

    In the form of GSPO-token, s_i,t = sg[s_i] pi(t) / sg[pi(t)]: value and clip are those of s_i for every token, and where
    a sequence has one advantage the gradient is that of s_i, too; advantages token by token (gae) are allowed. The mean over
    sequences, 1/N sum_i 1/|o_i| sum_t, is `ppo.aggregation` sequences, the default of grpo.

    Source: Zheng et al. 2025 (arXiv 2507.18071), equations 5, 7 and 13, and the bounds 3e-4 and 4e-4 of its experiments.
    """
    from learner.losses import policy_loss

    return policy_loss(
        policy_logprobs,
        proximal_logprobs,
        advantages,
        mask,
        clip.low,
        clip.dual,
        weights,
        clip_high=clip.high,
        of_sequences=True,
    )


OBJECTIVE = Objective(title="GSPO", loss=loss, clip_low=3e-4, clip_high=4e-4)
