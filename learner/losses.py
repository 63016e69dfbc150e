"""The losses, each a *sum* over the tokens or pairs of its mask.

The caller divides by the count of the global minibatch, which makes one gradient of any partition into microbatches or
ranks. Masks are bool, and what lies outside a mask is replaced before any arithmetic, not multiplied by zero after it:
the gradient of 0 * inf is NaN.

The entropy bonus (`ppo.entropy_coef`) is off by default: InstructGPT has none, as the KL penalty keeps the policy broad.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from learner.kl import kl_k2, kl_k3


def policy_loss(
    policy_logprobs: Tensor,
    proximal_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    dual_clip: float | None,
    weights: Tensor | None = None,
    *,
    clip_high: float | None = None,
    of_sequences: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate of PPO, with the dual clip.

    rho = exp(clamp(log pi - log pi_prox, -20, 20))
    L   = max(-A rho, -A clip(rho, 1 - clip, 1 + clip_high)), and min(L, -A dual_clip) where A < 0; times the weight

    Without the dual clip the loss of a bad token that has become likely is unbounded. With `off_policy_weights` as weights
    it is the decoupled PPO of AReaL: the trust region is around the proximal policy, whoever sampled.

    Sources: Schulman et al. 2017 (arXiv 1707.06347), equation 7; Ye et al. 2020 (arXiv 1912.09729), dual-clip PPO;
    Fu et al. 2025 (arXiv 2505.24298), decoupled PPO.

    Args:
        policy_logprobs: [B, C], under the policy being trained; carries the gradient.
        proximal_logprobs: [B, C], before this batch's updates.
        advantages: [B, C], whitened.
        mask: bool [B, C], tokens that train.
        clip: half-width of the trust region of rho; with `clip_high` its part below 1.
        dual_clip: greater than 1, or None for none.
        weights: [B, C], 0 or more, without gradient; None for 1.
        clip_high: the part of the trust region above 1; None for `clip`.
        of_sequences: rho is the geometric mean over a row, with the gradient of the token alone (`learner.objectives.gspo`).

    Returns:
        The weighted sum over the mask (float32 scalar) and detached scalars without weights. Sums over the mask: `clipped`
        (tokens where a clip decides, so that they have no gradient), `approx_kl` (k3 of proximal against policy: rho - 1 -
        log rho, nats), `ratio` (rho).
        A maximum: `ratio_max`, 0 where the mask is empty.
    """
    advantages = torch.where(mask, advantages.detach().float(), 0.0)
    log_ratio, ratio = ratios(policy_logprobs, proximal_logprobs, mask)
    rho = _mean_ratio(log_ratio, mask) if of_sequences else ratio
    unclipped = -advantages * rho
    clipped = -advantages * rho.clamp(1.0 - clip, 1.0 + (clip if clip_high is None else clip_high))
    losses, decided = torch.maximum(unclipped, clipped), clipped > unclipped
    if dual_clip is not None:
        most = torch.where(advantages < 0, -advantages * dual_clip, torch.inf)
        losses, decided = torch.minimum(losses, most), decided | (losses > most)
    if weights is not None:
        losses = losses * torch.where(mask, weights.detach().float(), 0.0)
    stats = _ratio_statistics(log_ratio, ratio, mask)
    return losses.sum(), stats | {"clipped": decided.sum().float()}


def likelihood_loss(
    policy_logprobs: Tensor, proximal_logprobs: Tensor, coefficients: Tensor, mask: Tensor, weights: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """-sum_t c_t w_t log pi(t): weighted negative log-likelihood, of coefficients that may be negative.

    Args:
        policy_logprobs: [B, C], under the policy being trained; carries the gradient.
        proximal_logprobs: [B, C], before this batch's updates; for the statistics alone.
        coefficients: [B, C], without gradient.
        mask: bool [B, C], tokens that train.
        weights: [B, C], 0 or more, without gradient.

    Returns:
        The sum over the mask (float32 scalar) and the statistics of `policy_loss`, of which `clipped` is 0.
    """
    logprobs = torch.where(mask, policy_logprobs.float(), 0.0)
    scale = torch.where(mask, coefficients.detach().float() * weights.detach().float(), 0.0)
    return -(scale * logprobs).sum(), _ratio_statistics(
        *ratios(policy_logprobs.detach(), proximal_logprobs, mask), mask
    )


def ratios(policy_logprobs: Tensor, proximal_logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """log rho, clamped to +-20, and rho; 0 and 1 outside the mask."""
    difference = torch.where(mask, policy_logprobs.float() - proximal_logprobs.detach().float(), 0.0)
    log_ratio = difference.clamp(-20.0, 20.0)
    return log_ratio, log_ratio.exp()


def _mean_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """exp of the mean of log rho over the mask of each row, [B, C], with the gradient of its own token's log rho alone."""
    mean = log_ratio.detach().sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return (mean + (log_ratio - log_ratio.detach())).exp()


@torch.no_grad()
def _ratio_statistics(log_ratio: Tensor, ratio: Tensor, mask: Tensor) -> dict[str, Tensor]:
    masked_ratio = torch.where(mask, ratio, 0.0)
    return {
        "clipped": ratio.new_zeros(()),
        "approx_kl": (torch.expm1(log_ratio) - log_ratio).sum(),
        "ratio": masked_ratio.sum(),
        "ratio_max": masked_ratio.max() if masked_ratio.numel() else masked_ratio.new_zeros(()),
    }


def kl_loss(policy_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: str, weights: Tensor) -> Tensor:
    """KL penalty as a loss term, with gradient: k2 or k3 of policy against reference, times the weight, summed.

    On tokens of the policy itself the expected gradient of k2 is that of KL(policy || reference); that of k3, GRPO's
    choice (arXiv 2402.03300, equation 4), is the gradient of KL(reference || policy). Both are 0 where the two agree.

    Args:
        policy_logprobs: [B, C], under the policy being trained; carries the gradient.
        ref_logprobs: [B, C], under the frozen reference.
        mask: bool [B, C], tokens that train.
        estimator: k2 or k3.
        weights: [B, C], without gradient: the expectation is over the same samples as that of `policy_loss`.

    Returns:
        float32 scalar, nats.

    Raises:
        ValueError: for another estimator.
    """
    if estimator not in ("k2", "k3"):
        raise ValueError(f"the KL in the loss must be k2 or k3, found {estimator!r}")
    policy, reference, weights = (torch.where(mask, x, 0.0) for x in (policy_logprobs, ref_logprobs, weights))
    kl = kl_k2(policy, reference) if estimator == "k2" else kl_k3(policy, reference)
    return (kl * weights.detach()).sum()


@torch.no_grad()
def off_policy_weights(
    proximal_logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor,
    correction: str,
    cap: float,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """Importance weight of each token that another policy sampled: w = pi_prox / pi_behavior, bounded.

    none:      1
    truncated: min(w, cap); Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"
               (TIS): little bias for a bounded variance
    masked:    w, and 0 outside [low, high]; Ring team 2025 (arXiv 2510.18855, IcePop): what two policies disagree on that
               much teaches nothing

    w is taken token by token: the product over a sequence would be exact, with a variance that grows exponentially in its
    length. Left out with it: that the states of an older policy's rollouts are not those that the new one would visit.

    Args:
        proximal_logprobs: [B, C], learner, before this batch's updates.
        behavior_logprobs: [B, C], recorded at sampling.
        mask: bool [B, C], tokens that train.

    Returns:
        weights, float32 [B, C], 0 outside the mask; how many tokens the bounds have changed (int64 scalar).

    Raises:
        ValueError: for an unknown correction.
    """
    log_ratio = torch.where(mask, proximal_logprobs.float() - behavior_logprobs.float(), 0.0)
    ratio = log_ratio.clamp(-20.0, 20.0).exp()
    if correction == "none":
        weights, changed = torch.ones_like(ratio), torch.zeros_like(mask)
    elif correction == "truncated":
        weights, changed = ratio.clamp(max=cap), ratio > cap
    elif correction == "masked":
        changed = (ratio < low) | (ratio > high)
        weights = torch.where(changed, 0.0, ratio)
    else:
        raise ValueError(f"the correction must be none, truncated or masked, found {correction!r}")
    return torch.where(mask, weights, 0.0), (changed & mask).sum()


def aggregation_weights(mask: Tensor, aggregation: str, tokens: int, sequences: int, budget: int) -> Tensor:
    """Weights that turn `sum over tokens / tokens` into another mean over the N sequences of a global minibatch:

    tokens:        1/tokens sum_i sum_t           every token counts alike
    sequences:     1/N sum_i 1/|o_i| sum_t        every sequence counts alike; GRPO
    sequence_sums: 1/N sum_i sum_t                the gradient of log p of whole sequences; REINFORCE, RLOO
    budget:        1/N sum_i 1/budget sum_t       the same over a constant; Dr. GRPO, as 1/|o_i| makes wrong answers long

    |o_i| is the number of tokens of sequence i that train.

    Args:
        mask: bool [B, C], tokens that train.
        tokens: tokens that train in the global minibatch.
        sequences: N, in the global minibatch.
        budget: the most tokens that a completion may have.

    Returns:
        float32 [B, 1].

    Raises:
        ValueError: for an unknown aggregation.
    """
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1).float()
    if aggregation == "tokens":
        return torch.ones_like(lengths)
    if aggregation == "sequences":
        return tokens / sequences / lengths
    if aggregation == "sequence_sums":
        return torch.full_like(lengths, tokens / sequences)
    if aggregation == "budget":
        return torch.full_like(lengths, tokens / sequences / budget)
    raise ValueError(f"the aggregation must be tokens, sequences, sequence_sums or budget, found {aggregation!r}")


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped squared error: 1/2 max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2).

    Source: "The N implementation details of RLHF with PPO"; the unclipped half squared error where `clip` is None.

    Args:
        values: [B, C], V(s_t) now; carries the gradient.
        old_values: [B, C], V(s_t) before this batch's updates.
        returns: [B, C], A + V_old before whitening.
        mask: bool [B, C], tokens that train.
        clip: in units of the value, or None.

    Returns:
        The sum over the mask (float32 scalar) and `clipped`, the detached number of tokens where the clip decides.
    """
    values = torch.where(mask, values.float(), 0.0)
    old_values = torch.where(mask, old_values.detach().float(), 0.0)
    returns = torch.where(mask, returns.detach().float(), 0.0)
    unclipped = (values - returns).square()
    if clip is None:
        return 0.5 * unclipped.sum(), {"clipped": unclipped.new_zeros(())}
    near_old = old_values + (values - old_values).clamp(-clip, clip)
    clipped = (near_old - returns).square()
    # Inside the clip the two errors are equal but for the rounding of old + (V - old), which must not be counted.
    decides = (clipped > unclipped) & ((values - old_values).abs() > clip)
    stats = {"clipped": decides.sum().float()}
    return 0.5 * torch.maximum(unclipped, clipped).sum(), stats


def token_nll_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood, summed over the mask: the loss of SFT and of PPO-ptx.

    Args:
        logprobs: any shape, log p of the target tokens; carries the gradient.
        mask: bool, same shape.

    Returns:
        float32 scalar, nats.
    """
    return -torch.where(mask, logprobs.float(), 0.0).sum()


def soft_pairwise_loss(scores: Tensor, preferences: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of sigmoid(s_i - s_j) against P(i beats j), over the pairs i < j of a batch.

    With P in {0, 1} it is -log sigmoid(s_winner - s_loser), the loss of Stiennon et al. 2020 (arXiv 2009.01325); P
    between them is the share of rater pairs that agree (`learner.pair_losses`).

    Args:
        scores: [N], carries the gradient.
        preferences: [N, N], P(i beats j); read above the diagonal only.
        mask: bool [N, N], pairs that count; read above the diagonal only.

    Returns:
        The sum over the pairs (float32 scalar, nats) and their number (int64 scalar).
    """
    pairs = mask.triu(diagonal=1)
    scores = scores.float()
    margins = torch.where(pairs, scores[:, None] - scores[None, :], 0.0)
    losses = F.binary_cross_entropy_with_logits(margins, preferences.float(), reduction="none")
    return torch.where(pairs, losses, 0.0).sum(), pairs.sum()
