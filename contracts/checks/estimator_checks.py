"""The checks of what PPO optimises: the estimator with what it excludes, and the combined loss."""

from dataclasses import replace

from contracts.checks.check import Check
from contracts.checks.objective_checks import objective_checks
from contracts.checks.overrides import closest
from contracts.config import PPOConfig
from contracts.estimators import ESTIMATORS, Estimator, find_estimator
from contracts.plugins import UnknownPlugin, names


def estimator_checks(ppo: PPOConfig) -> list[Check]:
    """Relations between the keys of `ppo` that follow from its estimator, and those of its combined loss."""
    try:
        estimator = find_estimator(ppo.estimator)
    except UnknownPlugin as error:
        found = f"{ppo.estimator} ({error.__cause__})" if error.__cause__ else ppo.estimator
        rule = f"one of {', '.join(names(ESTIMATORS))}, or the import path package.module:NAME of your own"
        instead = closest(ppo.estimator, names(ESTIMATORS)) or f"for example {PPOConfig().estimator}"
        return [Check(False, "ppo.estimator", rule, found, instead), *combined_checks(ppo)]
    rewarded = replace(ppo, kl=replace(ppo.kl, place="reward"))
    takes_penalty = all(check.holds for check in estimator.checks(rewarded) if check.key == "ppo.kl.place")
    return [
        Check(
            not estimator.needs_groups or ppo.samples_per_prompt >= 2,
            "ppo.samples_per_prompt",
            f"at least 2 with ppo.estimator {ppo.estimator}, which compares the rollouts of a prompt",
            ppo.samples_per_prompt,
            f"ppo.samples_per_prompt=4 or ppo.estimator={_without_groups(estimator)}",
        ),
        Check(
            estimator.has_value_model or ppo.init_value_from != "policy",
            "ppo.init_value_from",
            f"null or reward_model with ppo.estimator {ppo.estimator}, which has no value model to start",
            ppo.init_value_from,
            f"ppo.init_value_from=null or ppo.estimator={PPOConfig().estimator}",
        ),
        Check(
            not (estimator.loss == "likelihood" and ppo.whiten_advantages),
            "ppo.whiten_advantages",
            f"null or False with ppo.estimator {ppo.estimator}: whitened, the coefficients of its likelihoods would be "
            "other numbers than the method's",
            ppo.whiten_advantages,
            "ppo.whiten_advantages=null",
        ),
        Check(
            ppo.kl.controller != "adaptive" or (ppo.kl.place or estimator.kl) != "none",
            "ppo.kl.controller",
            f"fixed where there is no KL penalty (ppo.estimator {ppo.estimator}, ppo.kl.place "
            f"{ppo.kl.place or 'null'}): it would steer nothing",
            ppo.kl.controller,
            "ppo.kl.controller=fixed" + (" or ppo.kl.place=reward" if takes_penalty else ""),
        ),
        Check(
            ppo.kl.controller != "adaptive" or ppo.kl.coef > 0,
            "ppo.kl.coef",
            "above 0 with ppo.kl.controller adaptive, which multiplies it",
            ppo.kl.coef,
            f"for example {PPOConfig().kl.coef} (the default), or ppo.kl.controller=fixed",
        ),
        *objective_checks(ppo, estimator),
        *estimator.checks(ppo),
        *combined_checks(ppo),
    ]


def _without_groups(estimator: Estimator) -> str:
    """The estimator of ours that is most like one, but compares nothing."""

    def likeness(name: str) -> tuple[bool, bool]:
        other = find_estimator(name)
        return other.loss == estimator.loss, other.has_value_model == estimator.has_value_model

    return max((name for name in names(ESTIMATORS) if not find_estimator(name).needs_groups), key=likeness)


def combined_checks(ppo: PPOConfig) -> list[Check]:
    combined = ppo.combined
    return [
        Check(
            combined.target is None or ppo.ptx_coef > 0,
            "ppo.ptx_coef",
            f"above 0 with ppo.combined.target ({combined.target}): the text loss is what the constraint is put on",
            ppo.ptx_coef,
            "ppo.ptx_coef=1 or ppo.combined.target=null",
        ),
        Check(
            combined.initial <= combined.max,
            "ppo.combined.initial",
            f"at most ppo.combined.max ({combined.max:g})",
            combined.initial,
            f"{combined.max:g} or less, or a larger ppo.combined.max",
        ),
    ]
