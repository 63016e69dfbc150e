import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from learner.losses import (
    policy_loss,
    soft_pairwise_loss,
    token_nll_loss,
    value_loss,
)
from learner.pair_losses import preference_matrix
from learner.selected_logprobs import ROWS_PER_CHUNK, selected_logprobs

NAN, INF = math.nan, math.inf
quick = settings(max_examples=40, deadline=None)


def logs(*ratios: float) -> torch.Tensor:
    return torch.tensor([[math.log(ratio) for ratio in ratios]])


# --- policy ---

RATIOS = (1.5, 0.5, 1.1, 0.5, 4.0)
ADVANTAGES = (2.0, 1.0, -1.0, -2.0, -1.0)


@pytest.mark.parametrize(("dual_clip", "expected", "clipped"), [(3.0, 2.8, 3), (None, 3.8, 2)])
def test_policy_loss_by_hand(dual_clip, expected, clipped):
    # rho 1.5, A  2: max(-3.0, -2.4) = -2.4, clipped
    # rho 0.5, A  1: max(-0.5, -0.8) = -0.5
    # rho 1.1, A -1: 1.1
    # rho 0.5, A -2: max(1.0, 1.6) = 1.6, clipped
    # rho 4.0, A -1: max(4.0, 1.2) = 4.0; the dual clip makes it min(4, 3) = 3, clipped
    # sum = -2.4 - 0.5 + 1.1 + 1.6 + 3 = 2.8, and 3.8 without the dual clip
    # k3 sum = sum(rho - 1) - log(product) = 2.6 - log(1.65) = 2.099225
    mask = torch.ones(1, 5, dtype=torch.bool)
    loss, stats = policy_loss(logs(*RATIOS), torch.zeros(1, 5), torch.tensor([ADVANTAGES]), mask, 0.2, dual_clip)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert stats["clipped"].item() == clipped
    assert stats["approx_kl"].item() == pytest.approx(2.099225, abs=1e-5)
    assert stats["ratio"].item() == pytest.approx(7.6, abs=1e-5)
    assert stats["ratio_max"].item() == pytest.approx(4.0, abs=1e-5)


def test_policy_loss_gradient_by_hand():
    # Clipped or dual-clipped tokens have no gradient; the others -A * rho: -1 * 0.5 and 1 * 1.1.
    policy_logprobs = logs(*RATIOS).requires_grad_()
    mask = torch.ones(1, 5, dtype=torch.bool)
    loss, stats = policy_loss(policy_logprobs, torch.zeros(1, 5), torch.tensor([ADVANTAGES]), mask, 0.2, 3.0)
    loss.backward()
    assert stats["clipped"].item() == (policy_logprobs.grad == 0).sum().item() == 3
    torch.testing.assert_close(policy_logprobs.grad, torch.tensor([[0.0, -0.5, 1.1, 0.0, 0.0]]))


def policy_loss_by_loop(policy, proximal, advantages, mask, clip, dual_clip) -> float:
    total = 0.0
    for new, old, advantage, trains in zip(policy, proximal, advantages, mask, strict=True):
        if not trains:
            continue
        ratio = math.exp(min(max(new - old, -20.0), 20.0))
        loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - clip), 1 + clip))
        if dual_clip is not None and advantage < 0:
            loss = min(loss, -advantage * dual_clip)
        total += loss
    return total


token = st.tuples(st.floats(-3, 0), st.floats(-3, 0), st.floats(-3, 3), st.booleans())


@quick
@given(tokens=st.lists(token, min_size=1, max_size=8), dual_clip=st.sampled_from([None, 1.5, 3.0]))
def test_policy_loss_against_a_loop(tokens, dual_clip):
    policy, proximal, advantages, mask = (list(column) for column in zip(*tokens, strict=True))
    tensors = [torch.tensor([column]) for column in (policy, proximal, advantages, mask)]
    loss, _ = policy_loss(*tensors, clip=0.2, dual_clip=dual_clip)
    expected = policy_loss_by_loop(policy, proximal, advantages, mask, 0.2, dual_clip)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_first_step_is_the_policy_gradient():
    policy_logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -0.1, -9.0]], requires_grad=True)
    advantages = torch.tensor([[1.5, -0.5, 2.0], [-1.0, 0.25, 7.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    loss, stats = policy_loss(policy_logprobs, policy_logprobs.detach(), advantages, mask, 0.2, 3.0)
    loss.backward()
    torch.testing.assert_close(policy_logprobs.grad, torch.where(mask, -advantages, 0.0), rtol=0, atol=0)
    assert {name: value.item() for name, value in stats.items()} == {
        "clipped": 0.0,
        "approx_kl": 0.0,
        "ratio": 5.0,
        "ratio_max": 1.0,
    }


def test_no_gradient_through_proximal_logprobs_or_advantages():
    # proximal = policy, not detached by the caller: the two gradients would cancel to zero.
    policy_logprobs = torch.tensor([[-1.0]], requires_grad=True)
    advantages = torch.tensor([[2.0]], requires_grad=True)
    policy_loss(policy_logprobs, policy_logprobs, advantages, torch.tensor([[True]]), 0.2, None)[0].backward()
    assert policy_logprobs.grad.item() == -2.0
    assert advantages.grad is None


def test_extreme_ratio_stays_finite():
    policy_logprobs = torch.tensor([[0.0]], requires_grad=True)
    mask = torch.tensor([[True]])
    loss, stats = policy_loss(policy_logprobs, torch.tensor([[-500.0]]), torch.tensor([[-1.0]]), mask, 0.2, None)
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(20), rel=1e-5)
    assert stats["approx_kl"].item() == pytest.approx(math.exp(20) - 21, rel=1e-5)
    assert policy_logprobs.grad.item() == 0.0


def test_empty_mask_gives_zero():
    for shape in ((2, 3), (2, 0)):
        zeros, mask = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        loss, stats = policy_loss(zeros, zeros, zeros, mask, 0.2, 3.0)
        assert loss.item() == 0.0
        assert all(value.item() == 0.0 for value in stats.values())
        assert value_loss(zeros, zeros, zeros, mask, 0.2)[0].item() == 0.0
        assert token_nll_loss(zeros, mask).item() == 0.0


# --- value, likelihood ---


@pytest.mark.parametrize(("clip", "expected", "num_clipped"), [(0.2, 2.395, 2), (None, 1.23, 0)])
def test_value_loss_by_hand(clip, expected, num_clipped):
    # V 2.0, old 1, R 3.0: (2 - 3)^2 = 1.00, (1.2 - 3)^2 = 3.24: 3.24, clipped
    # V 1.1, old 1, R 0.0: 1.21 both ways
    # V 0.0, old 1, R 0.5: 0.25, (0.8 - 0.5)^2 = 0.09: 0.25
    # V 0.5, old 1, R 0.5: 0.00, (0.8 - 0.5)^2 = 0.09: 0.09, clipped
    # (3.24 + 1.21 + 0.25 + 0.09) / 2 = 2.395; unclipped (1 + 1.21 + 0.25 + 0) / 2 = 1.23
    values = torch.tensor([[2.0, 1.1, 0.0, 0.5]], requires_grad=True)
    returns, mask = torch.tensor([[3.0, 0.0, 0.5, 0.5]]), torch.ones(1, 4, dtype=torch.bool)
    loss, stats = value_loss(values, torch.ones(1, 4), returns, mask, clip)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert stats["clipped"].item() == num_clipped
    # d/dV = V - R where the unclipped error decides, 0 where the clipped one does
    expected_grad = [0.0, 1.1, -0.5, 0.0] if clip else [-1.0, 1.1, -0.5, 0.0]
    torch.testing.assert_close(values.grad, torch.tensor([expected_grad]))


def test_value_clip_fraction_ignores_rounding():
    generator = torch.Generator().manual_seed(0)
    # Two values within 0.2 of each other: old + (V - old) is V, but not in the last digit.
    old_values, values = (0.2 * torch.rand(1, 1000, generator=generator) - 0.1 for _ in range(2))
    mask = torch.ones(1, 1000, dtype=torch.bool)
    assert value_loss(values, old_values, torch.zeros(1, 1000), mask, 0.2)[1]["clipped"].item() == 0


def test_token_nll_by_hand():
    # -(log 1/2 + log 1/8) = log 16
    logprobs = torch.tensor([[math.log(0.5), -7.0, math.log(0.125)]])
    assert token_nll_loss(logprobs, torch.tensor([[True, False, True]])).item() == pytest.approx(math.log(16))


# --- properties of every token loss ---


def losses_of(policy_logprobs, values, proximal_logprobs, old_values, advantages, returns, mask):
    """The sum of the three token losses, so that one gradient covers them all."""
    return (
        policy_loss(policy_logprobs, proximal_logprobs, advantages, mask, 0.2, 3.0)[0]
        + value_loss(values, old_values, returns, mask, 0.2)[0]
        + token_nll_loss(policy_logprobs, mask)
    )


def random_batch(seed: int, num_rows: int, num_columns: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(num_rows, num_columns, generator=generator) for _ in range(6)]
    lengths = torch.randint(0, num_columns + 1, (num_rows, 1), generator=generator)
    interior = torch.rand(num_rows, num_columns, generator=generator) < 0.8
    return tensors, (torch.arange(num_columns) < lengths) & interior


@quick
@given(seed=st.integers(0, 10_000), cuts=st.sets(st.integers(1, 5)))
def test_any_partition_into_microbatches_gives_the_same_gradient(seed, cuts):
    # The leading tensors play the network: log p and V are linear in one parameter each, row features differ.
    (features, other_features, *constants), mask = random_batch(seed, num_rows=6, num_columns=5)
    num_tokens = mask.sum().clamp(min=1)

    def gradient(bounds: list[int]) -> tuple[torch.Tensor, dict[str, float]]:
        weights = torch.tensor([0.7, -0.4], requires_grad=True)
        totals = dict.fromkeys(("clipped", "approx_kl", "ratio"), 0.0)
        for start, end in itertools.pairwise(bounds):
            # Each microbatch is padded to its own longest row, as in training.
            width = int(mask[start:end].any(dim=0).nonzero().max()) + 1 if mask[start:end].any() else 0
            cut = [x[start:end, :width] for x in (features, other_features, *constants, mask)]
            logprobs, values = weights[0] * cut[0], weights[1] * cut[1]
            (losses_of(logprobs, values, *cut[2:]) / num_tokens).backward()
            stats = policy_loss(logprobs, cut[2], cut[4], cut[6], 0.2, 3.0)[1]
            totals = {name: total + stats[name].item() for name, total in totals.items()}
        assert weights.grad is not None
        return weights.grad, totals

    whole, whole_stats = gradient([0, 6])
    parts, parts_stats = gradient([0, *sorted(cuts), 6])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert parts_stats == pytest.approx(whole_stats, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("garbage", [1e30, NAN, INF, -INF])
def test_garbage_on_padding_reaches_neither_loss_nor_gradient_nor_stats(garbage):
    tensors, mask = random_batch(3, num_rows=4, num_columns=6)

    def outcome(fill: float) -> list[torch.Tensor]:
        filled = [torch.where(mask, x, fill) for x in tensors]
        policy_logprobs, values = filled[0].requires_grad_(), filled[1].requires_grad_()
        loss = losses_of(*filled, mask)
        loss.backward()
        policy_stats = policy_loss(filled[0], filled[2], filled[4], mask, 0.2, 3.0)[1]
        value_stats = value_loss(filled[1], filled[3], filled[5], mask, 0.2)[1]
        assert policy_logprobs.grad is not None
        assert values.grad is not None
        return [loss, policy_logprobs.grad, values.grad, *policy_stats.values(), *value_stats.values()]

    for found, expected in zip(outcome(garbage), outcome(0.0), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert found.isfinite().all()


@quick
@given(seed=st.integers(0, 10_000))
def test_deleting_masked_columns_changes_nothing(seed):
    tensors, mask = random_batch(seed, num_rows=1, num_columns=8)
    kept = [x[:, mask[0]] for x in tensors]
    torch.testing.assert_close(losses_of(*kept, mask[:, mask[0]]), losses_of(*tensors, mask), rtol=1e-5, atol=1e-5)


# --- preferences ---


def test_preference_matrix_by_hand():
    # [1, 2] against [2]: 1 < 2 gives 0, 2 = 2 gives 1/2: (0 + 0.5) / 2 = 0.25
    # [1, 2] against [0, 2, 3]: 1 beats 0, ties none; 2 beats 0 and ties 2: (1 + 1 + 0.5) / 6 = 2.5/6
    # [2] against [0, 2, 3]: (1 + 0.5) / 3 = 0.5
    expected = torch.tensor([[0.5, 0.25, 2.5 / 6], [0.75, 0.5, 0.5], [3.5 / 6, 0.5, 0.5]])
    torch.testing.assert_close(preference_matrix([[1, 2], [2], [0, 2, 3]]), expected)


def test_preference_of_single_raters_is_hard():
    expected = torch.tensor([[0.5, 0.0, 0.5], [1.0, 0.5, 1.0], [0.5, 0.0, 0.5]])
    torch.testing.assert_close(preference_matrix([[1.0], [4.0], [1.0]]), expected, rtol=0, atol=0)


ratings_of_texts = st.lists(st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=5), min_size=1, max_size=5)


@quick
@given(ratings=ratings_of_texts)
def test_preference_matrix_against_a_loop(ratings):
    found = preference_matrix(ratings)
    for i, own in enumerate(ratings):
        for j, other in enumerate(ratings):
            wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in own for b in other]
            assert found[i, j].item() == pytest.approx(sum(wins) / len(wins), abs=1e-6)
    torch.testing.assert_close(found + found.T, torch.ones_like(found))


@pytest.mark.parametrize("ratings", [[[1.0], []], [[1.0], [NAN]]])
def test_preference_matrix_refuses_what_it_cannot_compare(ratings):
    with pytest.raises(ValueError, match="rating"):
        preference_matrix(ratings)


def test_pairwise_loss_by_hand():
    # s = (2, 0, 1). (0,1): P 1,    d  2: -log sigmoid(2) = 0.126928
    #                (0,2): P 0.25, d  1: 0.25 * 0.313262 + 0.75 * 1.313262 = 1.063262
    #                (1,2): masked
    preferences = torch.tensor([[0.5, 1.0, 0.25], [0.0, 0.5, 1.0], [0.75, 0.0, 0.5]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    scores = torch.tensor([2.0, 0.0, 1.0], requires_grad=True)
    loss, count = soft_pairwise_loss(scores, preferences, mask)
    loss.backward()
    assert loss.item() == pytest.approx(0.126928 + 1.063262, abs=1e-5)
    assert count.item() == 2
    # d/dd = sigmoid(d) - P: (0,1): 0.880797 - 1 = -0.119203; (0,2): 0.731059 - 0.25 = 0.481059
    torch.testing.assert_close(scores.grad, torch.tensor([0.361856, 0.119203, -0.481059]), rtol=0, atol=1e-5)


def test_pairwise_loss_is_stable_for_extreme_scores():
    scores = torch.tensor([-200.0, 200.0], requires_grad=True)
    loss, _ = soft_pairwise_loss(scores, torch.tensor([[0.5, 1.0], [0.0, 0.5]]), torch.ones(2, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx(400.0)
    torch.testing.assert_close(scores.grad, torch.tensor([-1.0, 1.0]))


def test_pairwise_loss_ignores_what_the_mask_excludes():
    scores = torch.tensor([1.0, 0.0, NAN], requires_grad=True)
    preferences = torch.tensor([[NAN, 0.8, NAN], [NAN, NAN, NAN], [NAN, NAN, NAN]])
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[0, 1] = True
    loss, count = soft_pairwise_loss(scores, preferences, mask)
    loss.backward()
    # 0.8 * 0.313262 + 0.2 * 1.313262 = 0.513262; gradient sigmoid(1) - 0.8 = -0.068941
    assert loss.item() == pytest.approx(0.513262, abs=1e-5)
    assert count.item() == 1
    torch.testing.assert_close(scores.grad, torch.tensor([-0.068941, 0.068941, 0.0]), rtol=0, atol=1e-5)


# --- log-probabilities ---


def random_logits(num_rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows * 1000 + vocab)
    logits = 3 * torch.randn(num_rows, vocab, generator=generator)
    return logits.to(dtype), torch.randint(0, vocab, (num_rows,), generator=generator)


NUM_ROWS = 2 * ROWS_PER_CHUNK + 5  # two full chunks and a short one


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_against_a_loop(temperature):
    logits, targets = random_logits(NUM_ROWS, 7)
    logprobs, entropy = selected_logprobs(logits, targets, temperature)
    for row in range(NUM_ROWS):
        scaled = [x / temperature for x in logits[row].tolist()]
        normalizer = math.log(sum(math.exp(x) for x in scaled))
        assert logprobs[row].item() == pytest.approx(scaled[targets[row]] - normalizer, abs=1e-5)
        expected = -sum(math.exp(x - normalizer) * (x - normalizer) for x in scaled)
        assert entropy[row].item() == pytest.approx(expected, abs=1e-5)


def test_temperature_divides_logits_not_logprobs():
    # logits (0, log 4) at T = 1/2: (0, 2 log 4), p = 16/17. log p / T would be 2 log(4/5) = log(16/25).
    logprobs, _ = selected_logprobs(torch.tensor([[0.0, math.log(4)]]), torch.tensor([1]), temperature=0.5)
    assert logprobs.item() == pytest.approx(math.log(16 / 17), abs=1e-6)


@pytest.mark.parametrize("banned", [False, True])
def test_gradcheck(banned):
    logits, targets = random_logits(NUM_ROWS, 3, torch.float64)
    targets = targets % 2
    ban = {"banned_tokens": (2,), "banned_mask": torch.arange(NUM_ROWS) % 3 == 0} if banned else {}

    def logprobs_only(x: torch.Tensor) -> torch.Tensor:
        return selected_logprobs(x, targets, 0.7, **ban)[0]

    assert torch.autograd.gradcheck(logprobs_only, (logits.requires_grad_(),))
    assert torch.autograd.gradcheck(
        lambda x: selected_logprobs(x, targets, 0.7, **ban, entropy_gradient=True), (logits,)
    )


def test_the_gradient_of_the_entropy_by_hand():
    # p = (1, 2, 5) / 8, H = 0.900256; at temperature 1/2 of logits half as large: -p (log p + H) * 2.
    logits = (torch.tensor([[1.0, 2.0, 5.0]]).log() / 2).requires_grad_()
    _, entropy = selected_logprobs(logits, torch.tensor([1]), 0.5, entropy_gradient=True)
    entropy.sum().backward()
    assert entropy.item() == pytest.approx(0.900256, abs=1e-5)
    expected = [-2 * p * (math.log(p) + 0.900256) for p in (1 / 8, 2 / 8, 5 / 8)]
    torch.testing.assert_close(logits.grad, torch.tensor([expected]), rtol=0, atol=1e-5)
    assert sum(expected) == pytest.approx(0, abs=1e-5)


def test_the_entropy_has_a_gradient_where_it_is_asked_for_alone():
    """Also of bfloat16 logits in chunks, with garbage in a row that is not in the loss."""
    logits, targets = random_logits(NUM_ROWS, 50, torch.bfloat16)
    exact = logits.double().requires_grad_()
    distribution = (exact / 0.9).log_softmax(-1)
    weights = torch.linspace(-1, 1, NUM_ROWS)
    weights[3] = 0.0
    (-(distribution.exp() * distribution).sum(-1) * weights).sum().backward()
    logits[3] = NAN
    logits.requires_grad_()
    _, entropy = selected_logprobs(logits, targets, 0.9, entropy_gradient=True)
    torch.where(weights == 0, 0.0, entropy * weights).sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2**-8, atol=1e-5)
    assert not selected_logprobs(logits, targets, 0.9)[1].requires_grad


def test_bfloat16_logits_are_computed_in_float32():
    logits, targets = random_logits(NUM_ROWS, 50, torch.bfloat16)
    weights = torch.linspace(-1, 1, NUM_ROWS)
    exact = logits.double().requires_grad_()
    expected = (exact / 0.9).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    (expected * weights).sum().backward()
    logits.requires_grad_()
    before = logits.detach().clone()
    logprobs, entropy = selected_logprobs(logits, targets, 0.9)
    (logprobs * weights).sum().backward()
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert not entropy.requires_grad
    torch.testing.assert_close(logprobs.double(), expected.detach(), rtol=0, atol=1e-5)
    assert logits.grad.dtype == torch.bfloat16
    # One rounding to bfloat16 (8 bits): relative error 2^-9, with a margin for ties.
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(logits.detach(), before, rtol=0, atol=0)


class LargestFloat32(TorchDispatchMode):
    """Records the largest float32 tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_float32_copy_of_all_logits_exists():
    logits, targets = random_logits(NUM_ROWS, 50, torch.bfloat16)
    logits.requires_grad_()
    with LargestFloat32() as largest:
        selected_logprobs(logits, targets, 0.9)[0].sum().backward()
    assert 0 < largest.numel <= ROWS_PER_CHUNK * 50


def test_banned_tokens_by_hand():
    # p = (1, 2, 5) / 8; without token 2: (1, 2) / 3, entropy log 3 - 2/3 log 2 = 0.636514
    logits = torch.tensor([1.0, 2.0, 5.0]).log().repeat(2, 1).requires_grad_()
    targets = torch.tensor([1, 1])
    logprobs, entropy = selected_logprobs(logits, targets, banned_tokens=(2,), banned_mask=torch.tensor([True, False]))
    logprobs.sum().backward()
    assert logprobs.tolist() == pytest.approx([math.log(2 / 3), math.log(2 / 8)], abs=1e-6)
    # entropy of the free row: log 8 - 2/8 log 2 - 5/8 log 5 = 0.900256
    assert entropy.tolist() == pytest.approx([0.636514, 0.900256], abs=1e-5)
    # onehot - p
    expected = torch.tensor([[-1 / 3, 1 / 3, 0.0], [-1 / 8, 6 / 8, -5 / 8]])
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-6)


def test_several_banned_tokens_by_hand():
    # p = (1, 2, 5, 8) / 16; without tokens 0 and 3: (2, 5) / 7; the gradient is onehot - p.
    logits = torch.tensor([[1.0, 2.0, 5.0, 8.0]]).log().requires_grad_()
    logprobs, entropy = selected_logprobs(
        logits, torch.tensor([2]), banned_tokens=(3, 0), banned_mask=torch.tensor([True])
    )
    logprobs.sum().backward()
    assert logprobs.item() == pytest.approx(math.log(5 / 7), abs=1e-6)
    assert entropy.item() == pytest.approx(math.log(7) - 2 / 7 * math.log(2) - 5 / 7 * math.log(5), abs=1e-5)
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, -2 / 7, 2 / 7, 0.0]]), rtol=0, atol=1e-6)


def test_sampling_a_banned_token_is_impossible_not_hidden():
    mask = torch.tensor([True])
    logprobs, entropy = selected_logprobs(torch.zeros(1, 3), torch.tensor([2]), banned_tokens=(2,), banned_mask=mask)
    assert logprobs.item() == -INF
    assert entropy.item() == pytest.approx(math.log(2))


def test_banned_tokens_and_mask_go_together():
    with pytest.raises(ValueError, match="together"):
        selected_logprobs(torch.zeros(1, 3), torch.tensor([0]), banned_tokens=(2,))
    with pytest.raises(ValueError, match="together"):
        selected_logprobs(torch.zeros(1, 3), torch.tensor([0]), banned_mask=torch.tensor([True]))


def test_garbage_logits_outside_the_mask_have_no_gradient():
    logits, targets = random_logits(3, 4)
    logits[1] = NAN
    logits.requires_grad_()
    mask = torch.tensor([True, False, True])
    token_nll_loss(selected_logprobs(logits, targets)[0], mask).backward()
    one_hot = torch.nn.functional.one_hot(targets, 4).float()
    expected = torch.where(mask[:, None], logits.detach().softmax(-1) - one_hot, 0.0)
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-6)


def test_no_rows():
    logits = torch.zeros(0, 4, requires_grad=True)
    logprobs, entropy = selected_logprobs(logits, torch.zeros(0, dtype=torch.int64))
    logprobs.sum().backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert logits.grad.shape == (0, 4)
