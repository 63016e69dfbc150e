"""Groups whose scores teach nothing, and what takes their place: dynamic sampling.

Where all rollouts of a group have the same score, every advantage against the group is 0, but for what else a rollout is
paid: the penalties for a missing EOS and for length, and a KL penalty in the reward. With `ppo.dynamic_sampling` such groups
leave the batch, with a row of the ledger that says so, and groups of fresh prompts come in their place, until the batch is
full or one more round would exceed the budget. What is there then trains: the denominators count what is in the batch, so a
smaller one is a mean over fewer rollouts. Too few for every rank and minibatch is an error.

Source: Yu et al. 2025 (arXiv 2503.14476, DAPO), equation 11, which wants 0 < right answers < group size: scores that differ,
before any shaping. Left out: sampling more than is missing, which is faster where phases take turns, and what is too much
would be stale by the next update.
"""

from collections import defaultdict

from common.statistics import spread
from contracts.config import TandemConfig
from contracts.records import Rollout

EQUAL = "the scores of its group are equal"  # the reason in the ledger


class NoSpreadError(RuntimeError):
    """An update found too little to learn from within its budget."""


def with_spread(rollouts: list[Rollout]) -> list[Rollout]:
    """The rollouts of the groups whose scores differ by more than rounding; each has a score, whole conversations one."""
    scores: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    for rollout in rollouts:
        scores[rollout.group].append(_score(rollout))
    return [rollout for rollout in rollouts if spread(scores[rollout.group]) > 0]


def next_round(config: TandemConfig, kept: int, sampled: int) -> int:
    """How many rollouts the update still has to sample, whole groups: 0 where its batch is full or its budget spent.

    Args:
        kept: rollouts that would train now.
        sampled: rollouts that the update has taken so far.
    """
    ppo = config.ppo
    missing = (ppo.rollouts_per_update - kept) // ppo.samples_per_prompt * ppo.samples_per_prompt
    rounds = ppo.dynamic_sampling.max_batches or 1
    return missing if sampled == 0 or (rounds > 1 and sampled + missing <= rounds * ppo.rollouts_per_update) else 0


def require_enough(config: TandemConfig, kept: list[Rollout], sampled: list[Rollout], update: int) -> None:
    """Raises NoSpreadError where fewer are left than ranks times minibatches, with the scores that were found."""
    ppo, ranks = config.ppo, config.cluster.num_learner_ranks
    if ppo.dynamic_sampling.max_batches is None or len(kept) >= (least := ranks * ppo.minibatches):
        return
    scores = [_score(rollout) for rollout in sampled]
    raise NoSpreadError(
        f"{len(kept)} of the {len(sampled)} rollouts of update {update} are of groups whose scores differ, and "
        f"{least} are needed (cluster.num_learner_ranks * ppo.minibatches); the scores lie between {min(scores):g} and "
        f"{max(scores):g}. Give prompts that are neither solved nor hopeless, a scorer that tells their completions apart, "
        "more ppo.samples_per_prompt, or a larger ppo.dynamic_sampling.max_batches "
        f"({ppo.dynamic_sampling.max_batches}); null trains on equal groups too, whose scores teach nothing"
    )


def group_metrics(described: list[Rollout], kept: list[Rollout], rounds: int) -> dict[str, float]:
    """Of the groups that the update has sampled, of two or more scored rollouts each, and of what trains."""
    groups, differ = ({rollout.group for rollout in rollouts} for rollouts in (described, with_spread(described)))
    return {
        "reward/equal_groups_frac": 1 - len(differ) / max(len(groups), 1),
        "reward/sampling_rounds": float(rounds),
        "reward/trained_rollouts": float(len(kept)),
    }


def _score(rollout: Rollout) -> float:
    value = rollout.scores["proxy"].value
    assert value is not None
    return value
