"""Microbatches, the packed weight buffer and training batches: every row once, and every value where it belongs."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.microbatches import cut_microbatches
from common.processes.shared_memory import ALIGNMENT, Slot, layout, view
from contracts.records import Completion, Microbatch, Prompt, Rollout
from controller.loop.training_batches import make_batches, with_siblings

EOS = 2  # the pad token too


def greedy_count(lengths: list[int], budget: int) -> int:
    """How many microbatches one rank needs."""
    count, room = 0, -1
    for length in sorted(lengths):
        if length > room:
            count, room = count + 1, budget
        room -= length
    return count


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 100), st.integers(1, 6))
def test_cut_microbatches(lengths: list[int], budget: int, ranks: int) -> None:
    if len(lengths) < ranks:
        with pytest.raises(ValueError, match=f"{len(lengths)} sequences cannot feed {ranks} ranks"):
            cut_microbatches(lengths, budget, ranks)
        return
    cut = cut_microbatches(lengths, budget, ranks)
    assert len(cut) == ranks
    assert len({len(rank) for rank in cut}) == 1
    batches = [batch for rank in cut for batch in rank]
    assert all(batches)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    needed = greedy_count(lengths, budget)
    if math.ceil(needed / ranks) * ranks <= len(lengths):  # enough sequences to give every rank as many microbatches
        assert len(batches) == math.ceil(needed / ranks) * ranks
        assert all(len(batch) == 1 or sum(lengths[row] for row in batch) <= budget for batch in batches)


def test_neighbours_in_length_share_a_microbatch() -> None:
    # Sorted: 1 2 3 | 7 | 9, since 1 + 2 + 3 + 7 > 10 and 7 + 9 > 10.
    cut = cut_microbatches([9, 2, 7, 1, 3], token_budget=10, ranks=1)[0]
    assert sorted(map(sorted, cut)) == [[0], [1, 3, 4], [2]]


def test_a_full_budget_is_used() -> None:
    assert cut_microbatches([5, 5], token_budget=10, ranks=1) == [[[0, 1]]]
    assert len(cut_microbatches([5, 6], token_budget=10, ranks=1)[0]) == 2


def test_a_sequence_over_the_budget_travels_alone() -> None:
    assert sorted(cut_microbatches([3, 30, 4], token_budget=10, ranks=1)[0]) == [[0, 2], [1]]


def test_single_sequences_that_do_not_divide_leave_no_rank_without_work() -> None:
    cut = cut_microbatches([5, 6, 7], token_budget=8, ranks=2)
    assert sorted(sorted(batch) for rank in cut for batch in rank) == [[0, 1], [2]]
    cut = cut_microbatches([5, 6, 7, 8, 9, 10, 11], token_budget=8, ranks=4)
    assert [len(rank) for rank in cut] == [1, 1, 1, 1]


def test_ranks_get_about_the_same_number_of_tokens() -> None:
    # Four microbatches of 40, 30, 20, 10 tokens: 40 + 10 against 30 + 20.
    cut = cut_microbatches([10, 20, 30, 40], token_budget=1, ranks=2)
    assert sorted(sorted(row for batch in rank for row in batch) for rank in cut) == [[0, 3], [1, 2]]
    lengths = np.random.default_rng(0).integers(10, 90, size=256).tolist()
    cut = cut_microbatches(lengths, token_budget=400, ranks=4)
    tokens = [sum(lengths[row] for batch in rank for row in batch) for rank in cut]
    assert max(tokens) - min(tokens) < 0.05 * sum(tokens)


# ---- the weight buffer

PARAMETERS = [
    ("a.weight", "bfloat16", [3, 5]),
    ("a.bias", "float32", [7]),
    ("scalar", "float64", []),
    ("ids", "int64", [2, 1, 2]),
    ("byte", "uint8", [65]),
    ("last", "float16", [1]),
]


def test_layout_by_hand() -> None:
    slots, size = layout(PARAMETERS)
    assert slots == [
        Slot("a.weight", "bfloat16", (3, 5), 0, 30),
        Slot("a.bias", "float32", (7,), 64, 28),
        Slot("scalar", "float64", (), 128, 8),
        Slot("ids", "int64", (2, 1, 2), 192, 32),
        Slot("byte", "uint8", (65,), 256, 65),
        Slot("last", "float16", (1,), 384, 2),
    ]
    assert size == 448
    assert layout([]) == ([], 0)


def test_what_is_written_through_a_view_is_read_through_another() -> None:
    slots, size = layout(PARAMETERS)
    buffer = torch.full((size,), 255, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    tensors = [
        (torch.rand(shape, generator=generator) * 100).to(getattr(torch, dtype)) for _, dtype, shape in PARAMETERS
    ]
    for slot, tensor in zip(slots, tensors, strict=True):
        view(buffer, slot).copy_(tensor)
    for slot, tensor in zip(slots, tensors, strict=True):
        assert slot.offset % ALIGNMENT == 0
        found = view(buffer.clone(), slot)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    written = {byte for slot in slots for byte in range(slot.offset, slot.offset + slot.nbytes)}
    assert all(buffer[i] == 255 for i in set(range(size)) - written)


def test_a_view_shares_the_buffers_memory() -> None:
    (slot,), size = layout([("w", "float32", [2])])
    buffer = torch.zeros(size, dtype=torch.uint8)
    view(buffer, slot)[1] = 1.0
    assert buffer[4:8].view(torch.float32).item() == 1.0


# ---- training batches


def rollout(number: int, prompt: list[int], completion: list[int]) -> Rollout:
    """Behavior log-probabilities -number.1, -number.2, ... name their rollout and their place."""
    logprobs = -np.array([number + 0.1 * (t + 1) for t in range(len(completion))], dtype=np.float32)
    finish_reason = "stop" if completion[-1:] == [EOS] else "length"
    sampled = Completion(
        np.array(completion, dtype=np.int32), logprobs, np.zeros(len(completion), dtype=np.int32), finish_reason, ""
    )
    return Rollout((0, number, 0), Prompt(number, "", tuple(prompt)), sampled)


ROLLOUTS = [
    rollout(0, [5, 6], [7, EOS]),
    rollout(1, [5], [8, EOS, 9, EOS]),  # an EOS inside, as a chat template's may be
    rollout(2, [EOS, 5, 6], []),
    rollout(3, [4, 4, 4], [3, 3, 3]),
    rollout(4, [6], [EOS]),
]
TOKENS = [(*r.prompt.token_ids, *r.completion.token_ids.tolist()) for r in ROLLOUTS]
SCORES = [0.5, -1.5, 2.0, 3.0, -4.0]


def rows_of(mb: Microbatch) -> list[tuple[list[int], int, int, list[float], float]]:
    """(tokens, prompt length, completion length, behavior log-probabilities, score), checked for what padding holds."""
    rows = []
    assert len(mb.sequences) == len(mb.prompt_lens) == mb.loss_mask.shape[0]
    shape = (len(mb.sequences), mb.completion_lens.max())
    assert mb.loss_mask.shape == mb.behavior_logprobs.shape == mb.scores.shape == shape
    for i, ids in enumerate(mb.sequences):
        prompt, completion = int(mb.prompt_lens[i]), int(mb.completion_lens[i])
        assert mb.loss_mask[i].tolist() == [True] * completion + [False] * (mb.loss_mask.shape[1] - completion)
        assert not mb.behavior_logprobs[i, completion:].any()
        assert np.flatnonzero(mb.scores[i]).tolist() == ([completion - 1] if completion else [])
        logprobs = mb.behavior_logprobs[i, :completion].round(3).tolist()
        rows.append((ids.tolist(), prompt, completion, [round(p, 3) for p in logprobs], float(mb.scores[i].sum())))
    return rows


EXPECTED = sorted(
    [
        ([5, 6, 7, EOS], 2, 2, [-0.1, -0.2], 0.5),
        ([5, 8, EOS, 9, EOS], 1, 4, [-1.1, -1.2, -1.3, -1.4], -1.5),
        ([EOS, 5, 6], 3, 0, [], 0.0),  # no token that could be paid
        ([4, 4, 4, 3, 3, 3], 3, 3, [-3.1, -3.2, -3.3], 3.0),
        ([6, EOS], 1, 1, [-4.1], -4.0),
    ]
)


@pytest.mark.parametrize(("ranks", "minibatches"), [(1, 1), (1, 2), (2, 1), (2, 2), (5, 1), (1, 5)])
@pytest.mark.parametrize("budget", [1, 9, 100])
def test_every_rollout_trains_once_with_its_own_values(ranks: int, minibatches: int, budget: int) -> None:
    batches = make_batches(ROLLOUTS, SCORES, ranks, minibatches, budget, np.random.default_rng(0))
    assert len(batches) == ranks
    assert sorted(row for b in batches for mini in b.minibatches for mb in mini for row in rows_of(mb)) == EXPECTED
    for batch in batches:
        assert len(batch.minibatches) == len(batch.global_loss_tokens) == len(batch.global_sequences) == minibatches
        assert sum(batch.global_sequences) == 5
        # The denominators are those of all ranks together, and no rank has fewer microbatches than another.
        assert batch.global_loss_tokens == batches[0].global_loss_tokens
        assert batch.global_sequences == batches[0].global_sequences
        assert [len(mini) for mini in batch.minibatches] == [len(mini) for mini in batches[0].minibatches]
    for i in range(minibatches):
        masks = [mb.loss_mask for b in batches for mb in b.minibatches[i]]
        assert sum(int(mask.sum()) for mask in masks) == batches[0].global_loss_tokens[i]
        assert sum(len(mask) for mask in masks) == batches[0].global_sequences[i]
    assert sum(batches[0].global_loss_tokens) == 2 + 4 + 0 + 3 + 1


@pytest.mark.parametrize(("ranks", "minibatches"), [(1, 1), (2, 2)])
def test_what_is_cut_off_is_in_the_batch_and_in_no_denominator(ranks: int, minibatches: int) -> None:
    """Rollouts 2 and 3 do not end: of 5 sequences with 10 tokens, 3 with 2 + 4 + 1 train."""
    arguments = (ROLLOUTS, SCORES, ranks, minibatches, 9)
    batches = make_batches(*arguments, np.random.default_rng(0), mask_truncated=True)
    assert sorted(row for b in batches for mini in b.minibatches for mb in mini for row in rows_of(mb)) == EXPECTED
    every = [mb for batch in batches for minibatch in batch.minibatches for mb in minibatch]
    trains = {int(n): bool(t) for mb in every for n, t in zip(mb.rows, mb.trains, strict=True)}
    assert trains == {0: True, 1: True, 2: False, 3: False, 4: True}
    for batch in batches:
        assert sum(batch.global_loss_tokens) == 7
        assert (sum(batch.global_trained), sum(batch.global_sequences)) == (3, 5)
        assert batch.global_trained == batches[0].global_trained
    for batch in make_batches(*arguments, np.random.default_rng(0)):
        assert (sum(batch.global_loss_tokens), batch.global_trained) == (10, batch.global_sequences)
    with pytest.raises(ValueError, match=r"all 2 completions were cut off, and ppo\.mask_truncated leaves nothing"):
        make_batches(ROLLOUTS[2:4], SCORES[2:4], 1, 1, 9, np.random.default_rng(0), mask_truncated=True)


def conversation() -> Rollout:
    """Sampled 7 8 EOS, observed 30 31, sampled 9 EOS."""
    mask = np.array([True, True, True, False, False, True, True])
    whole = rollout(0, [5, 6], [7, 8, EOS, 30, 31, 9, EOS])
    whole.completion.behavior_logprobs[~mask] = 0.0
    return replace(whole, completion=replace(whole.completion, loss_mask=mask))


def test_observations_do_not_train_and_scores_lie_on_sampled_tokens() -> None:
    # u_1 = 0.5 at the end of the first turn, u_2 = -2 at the end of the second; beside it a single turn paid 3 at its end
    paid = np.array([0, 0, 0.5, 0, 0, 0, -2.0], dtype=np.float32)
    pair = [conversation(), rollout(1, [4], [3, EOS])]
    (batch,) = make_batches(pair, [paid, 3.0], 1, 1, 100, np.random.default_rng(0))
    ((mb,),) = batch.minibatches
    long = [len(ids) for ids in mb.sequences].index(9)
    assert mb.sequences[long].tolist() == [5, 6, 7, 8, EOS, 30, 31, 9, EOS]
    assert mb.loss_mask[long].tolist() == [True, True, True, False, False, True, True]
    assert mb.scores[long].tolist() == [0, 0, 0.5, 0, 0, 0, -2]
    assert mb.scores[1 - long].tolist() == [0, 3, 0, 0, 0, 0, 0]
    assert mb.loss_mask[1 - long].tolist() == [True, True, *[False] * 5]
    assert (batch.global_loss_tokens, batch.global_sequences) == (
        [5 + 2],
        [2],
    )  # the denominators: sampled tokens alone
    assert pair[0].completion.sampled_ids.tolist() == [7, 8, EOS, 9, EOS]
    assert pair[1].completion.sampled_ids.tolist() == [3, EOS]
    (batch,) = make_batches([conversation()], [1.5], 1, 1, 100, np.random.default_rng(0))
    assert batch.minibatches[0][0].scores.tolist() == [[0, 0, 0, 0, 0, 0, 1.5]]


@pytest.mark.parametrize("paid", [[0, 0, 0, 0, 1.0, 0, 0], [1.0]], ids=["on an observation", "of another length"])
def test_a_score_that_would_be_lost_is_refused(paid: list[float]) -> None:
    with pytest.raises(ValueError, match="a token that was sampled"):
        make_batches([conversation()], [np.array(paid, dtype=np.float32)], 1, 1, 100, np.random.default_rng(0))


def test_dtypes_are_those_of_the_record() -> None:
    (batch,) = make_batches(ROLLOUTS, SCORES, 1, 1, 100, np.random.default_rng(0))
    ((mb,),) = batch.minibatches
    assert all(ids.dtype == np.int64 for ids in mb.sequences)
    assert (mb.prompt_lens.dtype, mb.completion_lens.dtype) == (np.int64, np.int64)
    assert (mb.behavior_logprobs.dtype, mb.scores.dtype, mb.loss_mask.dtype) == (np.float32, np.float32, np.bool_)
    assert mb.num_tokens == 4 + 5 + 3 + 6 + 2


def test_minibatches_are_drawn_by_the_generator() -> None:
    def first_minibatch(seed: int) -> list[list[int]]:
        (batch,) = make_batches(ROLLOUTS, SCORES, 1, 2, 100, np.random.default_rng(seed))
        return sorted(ids.tolist() for mb in batch.minibatches[0] for ids in mb.sequences)

    assert first_minibatch(3) == first_minibatch(3)
    assert len({str(first_minibatch(seed)) for seed in range(8)}) > 1


def test_too_few_rollouts_are_refused() -> None:
    with pytest.raises(ValueError, match="5 scored rollouts cannot fill 3 minibatches on 2 ranks"):
        make_batches(ROLLOUTS, SCORES, 2, 3, 100, np.random.default_rng(0))


def test_siblings_carry_the_number_of_their_group() -> None:
    """A group is the rollouts of a prompt in an epoch, wherever they go."""
    keys = [(1, 7, 0), (0, 9, 1), (0, 7, 0), (0, 9, 0), (1, 7, 1)]
    family = [replace(r, key=key) for r, key in zip(ROLLOUTS, keys, strict=True)]
    for ranks, minibatches in ((1, 1), (2, 2)):
        batches = make_batches(family, SCORES, ranks, minibatches, 1, np.random.default_rng(0))
        mbs = [mb for batch in batches for mini in batch.minibatches for mb in mini]
        assert all(mb.groups.dtype == np.int64 for mb in mbs)
        assert {number for mb in mbs for number in mb.groups.tolist()} == {0, 1, 2}
        found = {
            tuple(ids.tolist()): group
            for mb in mbs
            for ids, group in zip(mb.sequences, mb.groups.tolist(), strict=True)
        }
        assert found == dict(zip(TOKENS, (2, 1, 0, 1, 2), strict=True))
    assert with_siblings(family) == [family[0], family[1], family[3], family[4]]
    assert with_siblings(ROLLOUTS) == []


def cut_step_by_step(lengths: list[int], budget: int, ranks: int) -> list[list[int]]:
    """The rule as it is told: one batch is halved, or two are joined, and all are looked at again."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        fits = batches and sum(lengths[j] for j in batches[-1]) + lengths[i] <= budget
        batches = [*batches[:-1], [*batches[-1], i]] if fits else [*batches, [i]]
    target = -(-len(batches) // ranks) * ranks
    target -= ranks if target > len(lengths) else 0
    while len(batches) < target:
        batches.sort(key=lambda b: (len(b), sum(lengths[i] for i in b)))
        largest = batches.pop()
        batches += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    while len(batches) > target:
        batches.sort(key=lambda b: sum(lengths[i] for i in b))
        batches = [batches[0] + batches[1], *batches[2:]]
    return batches


def test_microbatches_are_those_of_the_rule_whatever_the_lengths() -> None:
    rng = np.random.default_rng(1)
    for _ in range(1000):
        count = int(rng.integers(1, 50))
        ranks, most = int(rng.integers(1, count + 1)), int(rng.choice([2, 4, 60]))
        lengths = [int(n) for n in rng.integers(1, most + 1, count)]
        budget = int(rng.integers(1, 8 * most))
        cut = cut_microbatches(lengths, budget, ranks)
        expected = cut_step_by_step(lengths, budget, ranks)
        assert sorted(b for parts in cut for b in parts) == sorted(expected), (lengths, budget, ranks)


def test_many_ranks_are_fed_at_once() -> None:
    """Each halving used to look at all batches again: minutes for the ranks of a large cluster."""
    start = time.process_time()
    cut = cut_microbatches([1 + i * 7919 % 1424 for i in range(80_000)], 8192, 3001)
    assert time.process_time() - start < 10
    assert len({len(parts) for parts in cut}) == 1
