"""Per-token estimators of KL(policy || reference)."""

import torch
from torch import Tensor


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k1 = d with d = log pi - log ref: unbiased, may be negative. The estimator of the reward.

    Never clamped: a clamp would cap the penalty exactly where the policy has run away. As a *loss* it is useless, for
    the expectation of its gradient is zero (E[grad log pi] = 0).

    Source: J. Schulman, "Approximating KL divergence" (2020).

    Args:
        logprobs: any shape, log p of the sampled tokens under the policy that sampled them.
        ref_logprobs: same shape, under the frozen reference, from the same engine.

    Returns:
        float32, same shape, nats.
    """
    return logprobs.float() - ref_logprobs.float()


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k2 = d^2 / 2: biased, but as a loss on on-policy samples its expected gradient is that of the KL.

    grad E = E[d * grad log pi] = grad KL. Shapes and source as `kl_k1`.
    """
    return 0.5 * kl_k1(logprobs, ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 = exp(-d) - 1 + d: unbiased and never negative. The estimator of the logs.

    Shapes and source as `kl_k1`.
    """
    d = kl_k1(logprobs, ref_logprobs)
    # expm1 keeps the digits that exp(-d) - 1 loses where the two policies are close, which is the usual case.
    return torch.expm1(-d) + d
