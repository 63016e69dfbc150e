"""The checks of what stands around an estimator's advantages: the objective, and which rollouts train."""

from contracts.checks.check import Check, shown
from contracts.config import PPOConfig
from contracts.estimators import Estimator


def objective_checks(ppo: PPOConfig, estimator: Estimator) -> list[Check]:
    """Relations between the keys of `ppo` that choose the loss."""
    return [*_likelihood_checks(ppo, estimator), *_sampling_checks(ppo, estimator)]


def _sampling_checks(ppo: PPOConfig, estimator: Estimator) -> list[Check]:
    rounds = ppo.dynamic_sampling.max_batches
    if rounds is None:
        return []
    off = "ppo.dynamic_sampling.max_batches=null"
    return [
        Check(
            estimator.needs_groups,
            "ppo.dynamic_sampling.max_batches",
            f"null with ppo.estimator {ppo.estimator}, which compares no groups: equal scores teach it something, too",
            rounds,
            f"{off}, or an estimator that compares the rollouts of a prompt",
        ),
        Check(
            ppo.combined.target is None,
            "ppo.combined.target",
            "null with ppo.dynamic_sampling.max_batches: the mean score that it steers by would be one of chosen groups",
            ppo.combined.target,
            f"ppo.combined.target=null or {off}",
        ),
    ]


def _likelihood_checks(ppo: PPOConfig, estimator: Estimator) -> list[Check]:
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
