"""Scored rollouts -> the training batch of every rank."""

import numpy as np

from contracts.batching import cut_microbatches
from contracts.records import Microbatch, Rollout, TrainingBatch


def make_batches(
    rollouts: list[Rollout],
    scores: list[float],
    ranks: int,
    minibatches: int,
    token_budget: int,
    rng: np.random.Generator,
) -> list[TrainingBatch]:
    """One training batch a rank, of the same shape in minibatches and microbatches.

    Args:
        scores: what each rollout's completion is worth after shaping, in the order of `rollouts`.
        token_budget: padded tokens of a microbatch.

    Raises:
        ValueError: with fewer rollouts than ranks x minibatches.
    """
    if len(rollouts) < ranks * minibatches:
        raise ValueError(f"{len(rollouts)} scored rollouts cannot fill {minibatches} minibatches on {ranks} ranks")
    batches = [TrainingBatch([], [], len(rollouts)) for _ in range(ranks)]
    for rows in np.array_split(rng.permutation(len(rollouts)), minibatches):
        cut = cut_microbatches([rollouts[r].num_tokens for r in rows], token_budget, ranks)
        tokens = sum(len(rollouts[r].completion.token_ids) for r in rows)
        for batch, parts in zip(batches, cut, strict=True):
            batch.minibatches.append([_microbatch(rollouts, scores, [int(rows[i]) for i in part]) for part in parts])
            batch.global_loss_tokens.append(tokens)
    return batches


def _microbatch(rollouts: list[Rollout], scores: list[float], rows: list[int]) -> Microbatch:
    chosen = [rollouts[r] for r in rows]
    width = max(r.num_tokens for r in chosen)
    longest = max(1, *(len(r.completion.token_ids) for r in chosen))
    input_ids = np.zeros((len(chosen), width), dtype=np.int64)
    behavior_logprobs = np.zeros((len(chosen), longest), dtype=np.float32)
    loss_mask = np.zeros((len(chosen), longest), dtype=bool)
    for i, rollout in enumerate(chosen):
        prompt, completion = rollout.prompt.token_ids, rollout.completion
        input_ids[i, : len(prompt)] = prompt
        input_ids[i, len(prompt) : rollout.num_tokens] = completion.token_ids
        behavior_logprobs[i, : len(completion.token_ids)] = completion.behavior_logprobs
        loss_mask[i, : len(completion.token_ids)] = True
    return Microbatch(
        input_ids=input_ids,
        prompt_lens=np.array([len(r.prompt.token_ids) for r in chosen]),
        completion_lens=np.array([len(r.completion.token_ids) for r in chosen]),
        behavior_logprobs=behavior_logprobs,
        scores=np.array([scores[r] for r in rows], dtype=np.float32),
        loss_mask=loss_mask,
        rows=np.array(rows),
    )


def useful_token_fraction(batches: list[TrainingBatch]) -> float:
    """Real tokens / computed tokens: what padding leaves."""
    microbatches = [mb for batch in batches for minibatch in batch.minibatches for mb in minibatch]
    return sum(mb.num_tokens for mb in microbatches) / sum(mb.num_computed_tokens for mb in microbatches)
