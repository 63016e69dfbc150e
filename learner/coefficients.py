"""Coefficients of the loss that the loop steers from update to update: of the KL penalty, and of the combined loss."""

import math

from contracts.config import CombinedConfig, KLConfig


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


class Multiplier:
    """Dual ascent on lambda in: minimise the text loss subject to mean score >= target.

        L(theta, lambda) = ptx_coef * NLL + lambda * (target - mean score)
        theta:  gradient steps on ptx_coef * NLL + lambda * policy loss, whose gradient is an estimate of that of -score
        lambda <- clip(lambda + learning_rate * (target - mean score), 0, max), once an update

    Below the target lambda grows, above it falls, down to 0: the text loss alone. The policy loss of most estimators is
    that of the score up to a scale (whitened advantages divide by their deviation), which lambda takes in. Without a target
    lambda is 1: the sum of PPO-ptx.

    Source: Boyd & Vandenberghe 2004, "Convex Optimization", chapter 5; as a controller of a policy's constraint, Tessler et
    al. 2018 (arXiv 1805.11074).
    """

    def __init__(self, config: CombinedConfig) -> None:
        self.target = config.target
        self.learning_rate = config.learning_rate
        self.max = config.max
        self.value = 1.0 if config.target is None else config.initial

    def update(self, mean_score: float) -> None:
        """Take in the mean score of an update's rollouts.

        Raises:
            ValueError: if it is not finite. The clip would make an ordinary step of it.
        """
        if self.target is None:
            return
        if not math.isfinite(mean_score):
            raise ValueError(f"the mean score must be finite, found {mean_score}")
        self.value = min(max(self.value + self.learning_rate * (self.target - mean_score), 0.0), self.max)

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]
