"""The checks of what stands around an estimator's advantages: the objective, and which rollouts train."""

from contracts.checks.check import Check, shown
from contracts.config import PPOConfig
from contracts.estimators import Estimator


def objective_checks(ppo: PPOConfig, estimator: Estimator) -> list[Check]:
    """Relations between the keys of `ppo` that choose the loss."""
    return [
        *_likelihood_checks(ppo, estimator),
        *_sampling_checks(ppo, estimator),
        *_length_checks(ppo, estimator),
        *_whitening_checks(ppo, estimator),
    ]


def _length_checks(ppo: PPOConfig, estimator: Estimator) -> list[Check]:
    buffer, longest = ppo.overlong.buffer_tokens, ppo.sampling.max_completion_tokens
    return [
        Check(
            buffer is None or buffer < longest,
            "ppo.overlong.buffer_tokens",
            f"null or below ppo.sampling.max_completion_tokens ({longest}): the penalty is for the last tokens before it",
            buffer,
            f"for example {max(1, longest // 5)}, or null for none",
        ),
        Check(
            not (ppo.mask_truncated and estimator.loss == "likelihood"),
            "ppo.mask_truncated",
            f"false with ppo.estimator {ppo.estimator}, which chooses what trains by itself and may choose what is cut off",
            ppo.mask_truncated,
            "ppo.mask_truncated=false, and a ppo.missing_eos_penalty, by which it ranks",
        ),
    ]


def _whitening_checks(ppo: PPOConfig, estimator: Estimator) -> list[Check]:
    if ppo.whiten_over == "batch":
        return []
    whitens = estimator.whiten if ppo.whiten_advantages is None else ppo.whiten_advantages
    return [
        Check(
            whitens,
            "ppo.whiten_over",
            f"batch (the default) where advantages are not whitened (ppo.estimator {ppo.estimator}, ppo.whiten_advantages "
            f"{shown(ppo.whiten_advantages)})",
            ppo.whiten_over,
            "ppo.whiten_over=batch" + ("" if estimator.loss == "likelihood" else " or ppo.whiten_advantages=true"),
        ),
        Check(
            ppo.samples_per_prompt >= 2,
            "ppo.samples_per_prompt",
            "at least 2 with ppo.whiten_over group",
            ppo.samples_per_prompt,
            "ppo.samples_per_prompt=4 or ppo.whiten_over=batch",
        ),
    ]


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
