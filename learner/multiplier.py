"""The multiplier of the combined loss: how much a text loss gives way to a score that must be reached."""

import math

from contracts.config import CombinedConfig


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
        self.target, self.learning_rate, self.max = config.target, config.learning_rate, config.max
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
