"""Per-token estimators of KL(policy || reference) and the controller of its coefficient."""

import math

import torch
from torch import Tensor

from contracts.config import KLConfig


def _log_ratio(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return logprobs.float() - ref_logprobs.float()


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
    return _log_ratio(logprobs, ref_logprobs)


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k2 = d^2 / 2: biased, but as a loss on on-policy samples its expected gradient is that of the KL.

    grad E = E[d * grad log pi] = grad KL. Shapes and source as `kl_k1`.
    """
    return 0.5 * _log_ratio(logprobs, ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 = exp(-d) - 1 + d: unbiased and never negative. The estimator of the logs.

    Shapes and source as `kl_k1`.
    """
    d = _log_ratio(logprobs, ref_logprobs)
    # expm1 keeps the digits that exp(-d) - 1 loses where the two policies are close, which is the usual case.
    return torch.expm1(-d) + d


class AdaptiveKLController:
    """Proportional control of the KL coefficient: Ziegler et al. 2019 (arXiv 1909.08593), bounded.

        coef *= 1 + K clip(KL / target - 1, -0.2, 0.2),   K = min(1, episodes / horizon)

    The paper has K = 0.1, its code (openai/lm-human-preferences, train_policy.py) K = episodes / horizon. The KL is
    measured once an update, so an update of more than a horizon corrects no more than one of a whole horizon: a fifth.
    Unbounded, K above 5 makes the factor negative, and a bonus for KL of the penalty. The coefficient is state: it belongs
    in the checkpoint.
    """

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        """`target` in nats a sequence, `horizon` in episodes."""
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl_per_sequence: float, episodes: int) -> None:
        """Take in the mean KL (nats a *sequence*: the sum over its tokens) of `episodes` rollouts.

        Raises:
            ValueError: if the KL is not finite. The clip would make an ordinary step of it.
        """
        if not math.isfinite(kl_per_sequence):
            raise ValueError(f"the KL of a sequence must be finite, found {kl_per_sequence}")
        error = min(max(kl_per_sequence / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * min(1.0, episodes / self.horizon)

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


class FixedKLController:
    """The same interface with a coefficient that never moves: the configuration sets it, not a checkpoint."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl_per_sequence: float, episodes: int) -> None:
        """Leave the coefficient as it is."""

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Keep the configured coefficient: a resumed run with an edited configuration follows the configuration."""


KLController = AdaptiveKLController | FixedKLController


def make_kl_controller(config: KLConfig) -> KLController:
    """Build the controller that `config.controller` names; ValueError for an unknown name."""
    if config.controller == "adaptive":
        return AdaptiveKLController(config.coef, config.target, config.horizon)
    if config.controller == "fixed":
        return FixedKLController(config.coef)
    raise ValueError(f"kl.controller must be fixed or adaptive, found {config.controller!r}")
