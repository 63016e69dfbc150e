"""The checks of what PPO optimises: the estimator with what it excludes, and the combined loss."""

from contracts.checks.check import Check
from contracts.config import PPOConfig
from contracts.estimators import ESTIMATORS, Estimator, chosen_estimator


def estimator_checks(ppo: PPOConfig) -> list[Check]:
    """Relations between the keys of `ppo` that follow from its estimator, and those of its combined loss."""
    estimator = ESTIMATORS.get(ppo.estimator)
    if estimator is None:  # the table of choices says so
        return combined_checks(ppo)
    by_likelihood, steps = estimator.loss == "likelihood", ppo.epochs * ppo.minibatches
    return [
        Check(
            not estimator.needs_groups or ppo.samples_per_prompt >= 2,
            "ppo.samples_per_prompt",
            f"at least 2 with ppo.estimator {ppo.estimator}, which compares the rollouts of a prompt",
            ppo.samples_per_prompt,
            f"ppo.samples_per_prompt=4 or ppo.estimator={'rwr' if by_likelihood else 'reinforce_plus_plus'}",
        ),
        Check(
            estimator.has_value_model or ppo.init_value_from != "policy",
            "ppo.init_value_from",
            f"null or reward_model with ppo.estimator {ppo.estimator}, which has no value model to start",
            ppo.init_value_from,
            "ppo.init_value_from=null or ppo.estimator=gae",
        ),
        Check(
            not (by_likelihood and ppo.whiten_advantages),
            "ppo.whiten_advantages",
            f"null or False with ppo.estimator {ppo.estimator}: whitened, the coefficients of its likelihoods would be "
            "other numbers than the method's",
            ppo.whiten_advantages,
            "ppo.whiten_advantages=null",
        ),
        Check(
            ppo.kl.controller != "adaptive" or chosen_estimator(ppo).kl != "none",
            "ppo.kl.controller",
            f"fixed where there is no KL penalty (ppo.estimator {ppo.estimator}, ppo.kl.place "
            f"{ppo.kl.place or 'null'}): it would steer nothing",
            ppo.kl.controller,
            "ppo.kl.controller=fixed" + ("" if ppo.estimator == "online_dpo" else " or ppo.kl.place=reward"),
        ),
        Check(
            ppo.kl.controller != "adaptive" or ppo.kl.coef > 0,
            "ppo.kl.coef",
            "above 0 with ppo.kl.controller adaptive, which multiplies it",
            ppo.kl.coef,
            f"for example {PPOConfig().kl.coef} (the default), or ppo.kl.controller=fixed",
        ),
        *(_pair_checks(ppo, estimator, steps) if ppo.estimator == "online_dpo" else []),
        *combined_checks(ppo),
    ]


def _pair_checks(ppo: PPOConfig, estimator: Estimator, steps: int) -> list[Check]:
    """What would make another gradient than DPO's of the coefficients that are fixed before the first step."""
    return [
        Check(
            steps == 1,
            "ppo.epochs * ppo.minibatches",
            "1 with ppo.estimator online_dpo, whose gradient holds for one optimizer step a batch",
            f"{ppo.epochs} * {ppo.minibatches} = {steps}",
            "ppo.epochs=1 ppo.minibatches=1, and more ppo.updates of fewer rollouts",
        ),
        Check(
            ppo.kl.place in (None, "none"),
            "ppo.kl.place",
            "null or none with ppo.estimator online_dpo, whose loss holds the reference already (ppo.dpo_beta)",
            ppo.kl.place,
            "ppo.kl.place=null, and ppo.dpo_beta for a stronger or weaker hold",
        ),
        Check(
            ppo.aggregation in (None, estimator.aggregation),
            "ppo.aggregation",
            f"null or {estimator.aggregation} with ppo.estimator online_dpo: the margin is one of whole completions",
            ppo.aggregation,
            "ppo.aggregation=null",
        ),
        Check(
            ppo.off_policy.correction in (None, "none"),
            "ppo.off_policy.correction",
            "null or none with ppo.estimator online_dpo: a pair may come from any policy, and importance weights would "
            "change its gradient",
            ppo.off_policy.correction,
            "ppo.off_policy.correction=null",
        ),
    ]


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
