"""Log-probabilities of given tokens and the entropy of their distributions, from logits that are never all in float32."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows whose logits are in float32 at once: 64 x 49,152 (SmolLM2) are 13 MB. More rows are not faster on a CPU.
ROWS_PER_CHUNK = 64


class SelectedLogprobs(torch.autograd.Function):
    """log_softmax(logits / T) at the targets, without a float32 copy of the logits.

    Row chunks go to float32 and are dropped; the backward pass recomputes them and writes
    d loss / d logits = (onehot(target) - softmax(logits / T)) * g / T into one buffer of the logits' dtype; and where the
    entropy H has a gradient h, -p (log p + H) * h / T with p = softmax(logits / T).
    Autograd's own log_softmax of bfloat16 logits in float32 would hold three times the memory at least.
    """

    @staticmethod
    def _scaled(
        logits: Tensor, temperature: float, banned_tokens: tuple[int, ...] | None, banned_mask: Tensor | None
    ) -> Tensor:
        """A chunk [n, V] of logits / temperature in float32 (float64 stays), banned tokens at -inf."""
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True).div_(temperature)
        if banned_tokens is not None and banned_mask is not None:
            for token in banned_tokens:
                scaled[:, token].masked_fill_(banned_mask, -torch.inf)
        return scaled

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        banned_tokens: tuple[int, ...] | None,
        banned_mask: Tensor | None,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        compute_dtype = torch.promote_types(logits.dtype, torch.float32)
        num_rows = logits.shape[0]
        logprobs = torch.empty(num_rows, dtype=compute_dtype, device=logits.device)
        log_normalizers = torch.empty_like(logprobs)
        entropy = torch.empty_like(logprobs)
        for start in range(0, num_rows, ROWS_PER_CHUNK):
            rows = slice(start, start + ROWS_PER_CHUNK)
            banned_rows = None if banned_mask is None else banned_mask[rows]
            scaled = SelectedLogprobs._scaled(logits[rows], temperature, banned_tokens, banned_rows)
            log_normalizer = scaled.logsumexp(dim=-1)
            log_normalizers[rows] = log_normalizer
            logprobs[rows] = scaled.gather(1, targets[rows, None]).squeeze(1) - log_normalizer
            all_logprobs = scaled.sub_(log_normalizer[:, None])
            probabilities = all_logprobs.exp()
            # A banned token has p = 0 and log p = -inf, whose product must be 0.
            entropy[rows] = -torch.linalg.vecdot(probabilities, all_logprobs.clamp_(min=-1e4))
        ctx.save_for_backward(logits, targets, log_normalizers, banned_mask, entropy if entropy_gradient else None)
        ctx.temperature = temperature
        ctx.banned_tokens = banned_tokens
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        logits, targets, log_normalizers, banned_mask, entropy = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for start in range(0, logits.shape[0], ROWS_PER_CHUNK):
            rows = slice(start, start + ROWS_PER_CHUNK)
            banned_rows = None if banned_mask is None else banned_mask[rows]
            scaled = SelectedLogprobs._scaled(logits[rows], ctx.temperature, ctx.banned_tokens, banned_rows)
            weights = (grad_logprobs[rows] / ctx.temperature)[:, None]
            all_logprobs = scaled.sub_(log_normalizers[rows, None])
            scale, idle = -weights, weights == 0
            if entropy is not None:
                spreading = (grad_entropy[rows] / ctx.temperature)[:, None]
                # A banned token has p = 0 and log p = -inf, whose product must be 0.
                scale = scale - spreading * (all_logprobs.clamp(min=-1e4) + entropy[rows, None])
                idle = idle & (spreading == 0)
            grad = all_logprobs.exp_().mul_(scale).scatter_add_(1, targets[rows, None], weights)
            # A row outside the loss has weight 0, and 0 * NaN from garbage logits must not reach the model.
            grad_logits[rows] = grad.masked_fill_(idle, 0.0)
        return grad_logits, None, None, None, None, None


def selected_logprobs(
    logits: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    banned_tokens: tuple[int, ...] | None = None,
    banned_mask: Tensor | None = None,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """log p of the target tokens at the sampling temperature, and the entropy of their distributions.

    log p = log_softmax(float32(logits) / temperature)[target]. The temperature divides logits, not log p.

    Args:
        logits: [N, V], bfloat16 or float32 (float64 is computed in float64); carries the gradient.
        targets: int64 [N], in [0, V) on every row, padding included.
        temperature: greater than 0.
        banned_tokens: what some rows could not sample (what ends a turn, before `min_completion_tokens` or
            `min_turn_tokens`).
        banned_mask: bool [N], the rows where `banned_tokens` have logit -inf; given together with them or not at all.
        entropy_gradient: whether the entropy carries a gradient, too, for which the backward pass takes longer.

    Returns:
        logprobs, float32 [N], -inf where the target is banned; entropy, float32 [N], nats.

    Raises:
        ValueError: if only one of `banned_tokens` and `banned_mask` is given.
    """
    if (banned_tokens is None) != (banned_mask is None):
        raise ValueError("banned_tokens and banned_mask go together: give both, or neither")
    logprobs, entropy = SelectedLogprobs.apply(
        logits, targets, temperature, banned_tokens, banned_mask, entropy_gradient
    )
    return logprobs, entropy
