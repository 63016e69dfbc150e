"""The checks of what an update of PPO is made of: how many rollouts, and who judges them."""

from contracts.checks.check import Check
from contracts.config import TandemConfig
from contracts.estimators import known_estimator
from contracts.methods import runs
from contracts.scorer_roles import has_gold, scoring_models


def rollout_checks(config: TandemConfig) -> list[Check]:
    ppo, rollouts, ranks = config.ppo, config.ppo.rollouts_per_update, config.cluster.num_learner_ranks
    samples, least = max(1, ppo.samples_per_prompt), ranks * ppo.minibatches
    lost = _lost(config)
    return [
        Check(
            rollouts % samples == 0,
            "ppo.rollouts_per_update",
            f"a multiple of ppo.samples_per_prompt ({ppo.samples_per_prompt})",
            rollouts,
            f"{max(1, round(rollouts / samples)) * samples}",
        ),
        Check(
            rollouts >= least,
            "ppo.rollouts_per_update",
            f"at least cluster.num_learner_ranks * ppo.minibatches ({ranks} * {ppo.minibatches} = {least}), "
            "a rollout for each rank in each minibatch",
            rollouts,
            f"{least} or more, or fewer minibatches",
        ),
        Check(
            rollouts < least or rollouts - lost >= least,
            "ppo.rollouts_per_update",
            f"so many that cluster.num_learner_ranks * ppo.minibatches ({least}) are left where {lost} have no score or no "
            f"scored sibling, which ppo.max_failed_scores ({ppo.max_failed_scores:g}) allows",
            rollouts,
            "more of them, fewer ppo.minibatches, or a smaller ppo.max_failed_scores",
        ),
        Check(
            ppo.gold_rollouts <= rollouts,
            "ppo.gold_rollouts",
            f"at most ppo.rollouts_per_update ({rollouts})",
            ppo.gold_rollouts,
            f"{rollouts} or less",
        ),
        Check(
            not runs(config, "ppo") or ppo.gold_rollouts <= 0 or has_gold(config),
            "ppo.gold_rollouts",
            "0 without a gold judge (data.gold and gold_model are null)",
            ppo.gold_rollouts,
            "ppo.gold_rollouts=0, or set data.gold or gold_model",
        ),
        Check(
            config.data.gold is not None or config.gold_model is not None or "gold" not in scoring_models(config),
            "data.gold or gold_model",
            "set where reward_service.scorers.gold has the part gold_model",
            None,
            "gold_model=CHECKPOINT, data.gold={path: FILE}, or other parts",
        ),
    ]


def _lost(config: TandemConfig) -> int:
    """How many of an update's rollouts may leave it without ending the run (controller/loop/unscored.py): those without a
    score, but never all; of an estimator that compares them also the one that is left of a group."""
    ppo, estimator = config.ppo, known_estimator(config.ppo.estimator)
    rollouts, samples = ppo.rollouts_per_update, ppo.samples_per_prompt
    if not 0 <= ppo.max_failed_scores <= 1 or rollouts < 1:  # for the checks of single keys to say
        return 0
    failed = min(int(ppo.max_failed_scores * rollouts), rollouts - 1)
    if estimator is None or not estimator.needs_groups or samples < 2:
        return failed
    return min(failed + failed // (samples - 1), rollouts)  # the fewest failures that leave a group with one
