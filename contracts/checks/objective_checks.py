"""The checks of what stands around an estimator's advantages: the objective, and which rollouts train."""

from contracts.checks.check import Check, shown
from contracts.config import PPOConfig
from contracts.estimators import Estimator


def objective_checks(ppo: PPOConfig, estimator: Estimator) -> list[Check]:
    """Relations between the keys of `ppo` that choose the loss."""
    if estimator.loss != "likelihood":
        return []
    default = PPOConfig()
    return [
        Check(
            getattr(ppo, name) == getattr(default, name),
            f"ppo.{name}",
            f"{shown(getattr(default, name))} (the default) with ppo.estimator {ppo.estimator}, whose likelihoods have "
            "neither a ratio nor a clip",
            getattr(ppo, name),
            f"ppo.{name}={shown(getattr(default, name))}, or another ppo.estimator",
        )
        for name in ("objective", "clip_low", "clip_high")
    ]
