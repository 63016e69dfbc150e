"""Scored rollouts -> the training batch of every rank."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from common.microbatches import cut_microbatches
from contracts.records import Microbatch, Rollout, TrainingBatch


def with_siblings(rollouts: list[Rollout]) -> list[Rollout]:
    """The rollouts that share their prompt with another: alone there is nothing to compare with."""
    sizes = Counter(r.group for r in rollouts)
    return [r for r in rollouts if sizes[r.group] > 1]


def make_batches(
    rollouts: list[Rollout],
    scores: Sequence[float | np.ndarray],
    ranks: int,
    minibatches: int,
    token_budget: int,
    rng: np.random.Generator,
    policy_version: int = 0,
    mask_truncated: bool = False,
) -> list[TrainingBatch]:
    """One training batch a rank, of the same shape in minibatches and microbatches.

    Args:
        scores: what each rollout is worth after shaping, in the order of `rollouts`: a number, paid at the last token
            that was sampled, or float32 [completion tokens] with what each token is paid.
        token_budget: tokens of a microbatch.
        policy_version: of the learner that trains on them.
        mask_truncated: completions without an end of their own are in the batch, and in no loss.

    Raises:
        ValueError: with fewer rollouts than ranks x minibatches; where all are cut off and would be masked; where a token is
            paid that was not sampled.
    """
    trains = np.array([not mask_truncated or r.completion.finish_reason == "stop" for r in rollouts])
    if not trains.any():
        raise ValueError(
            f"all {len(rollouts)} completions were cut off, and ppo.mask_truncated leaves nothing to train on; write a "
            "larger ppo.sampling.max_completion_tokens, or ppo.mask_truncated=false with a ppo.missing_eos_penalty"
        )
    if len(rollouts) < ranks * minibatches:
        raise ValueError(f"{len(rollouts)} scored rollouts cannot fill {minibatches} minibatches on {ranks} ranks")
    numbers = {group: i for i, group in enumerate(sorted({r.group for r in rollouts}))}
    groups = [numbers[r.group] for r in rollouts]
    places = np.argsort(sorted(range(len(rollouts)), key=lambda row: rollouts[row].key))
    batches = [TrainingBatch([], [], [], []) for _ in range(ranks)]
    for rows in np.array_split(rng.permutation(len(rollouts)), minibatches):
        lengths, siblings = [rollouts[r].num_tokens for r in rows], [groups[r] for r in rows]
        cut = cut_microbatches(lengths, token_budget, ranks, siblings)
        tokens = sum(len(rollouts[r].completion.sampled_ids) for r in rows if trains[r])
        for batch, parts in zip(batches, cut, strict=True):
            chosen = [[int(rows[i]) for i in part] for part in parts]
            batch.minibatches.append(
                [_microbatch(rollouts, scores, groups, places, part, policy_version, trains[part]) for part in chosen]
            )
            batch.global_loss_tokens.append(tokens)
            batch.global_trained.append(int(trains[rows].sum()))
            batch.global_sequences.append(len(rows))
    return batches


def _microbatch(
    rollouts: list[Rollout],
    scores: Sequence[float | np.ndarray],
    groups: list[int],
    places: np.ndarray,
    rows: list[int],
    policy_version: int,
    trains: np.ndarray,
) -> Microbatch:
    chosen = [rollouts[r] for r in rows]
    longest = max(len(r.completion.token_ids) for r in chosen)
    behavior_logprobs, paid = np.zeros((2, len(chosen), longest), dtype=np.float32)
    staleness = np.zeros((len(chosen), longest), dtype=np.int32)
    loss_mask = np.zeros((len(chosen), longest), dtype=bool)
    for i, (row, rollout) in enumerate(zip(rows, chosen, strict=True)):
        completion, length = rollout.completion, len(rollout.completion.token_ids)
        behavior_logprobs[i, :length] = completion.behavior_logprobs
        staleness[i, :length] = policy_version - completion.policy_versions
        loss_mask[i, :length] = True if completion.loss_mask is None else completion.loss_mask
        paid[i, :length] = _paid(scores[row], loss_mask[i, :length])
    return Microbatch(
        sequences=[np.array([*r.prompt.token_ids, *r.completion.token_ids], dtype=np.int64) for r in chosen],
        prompt_lens=np.array([len(r.prompt.token_ids) for r in chosen]),
        completion_lens=np.array([len(r.completion.token_ids) for r in chosen]),
        behavior_logprobs=behavior_logprobs,
        scores=paid,
        staleness=staleness,
        loss_mask=loss_mask,
        groups=np.array([groups[r] for r in rows], dtype=np.int64),
        rows=places[rows].astype(np.int64),
        trains=trains,
    )


def _paid(score: float | np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What each completion token is paid: float32 [completion tokens], from a number at the last one that trains."""
    if isinstance(score, np.ndarray):
        if score.shape != mask.shape or np.any(score[~mask] != 0):
            raise ValueError("a score must be paid at a token that was sampled: elsewhere it would be lost")
        return score
    result = np.zeros(len(mask), dtype=np.float32)
    result[np.flatnonzero(mask)[-1:]] = score
    return result
