import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from learner.advantages import explained_variance, token_rewards, whiten, whitening_moments
from learner.estimators.gae import gae

NAN, INF = math.nan, math.inf
quick = settings(max_examples=40, deadline=None)
numbers = st.floats(-5, 5, width=32)


@st.composite
def masked_rows(draw, num_tensors: int):
    """`num_tensors` float [B, C] and one bool [B, C]; rows without a valid token included."""
    num_rows, num_columns = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    cells = num_rows * num_columns
    tensors = [
        torch.tensor(draw(st.lists(numbers, min_size=cells, max_size=cells))).view(num_rows, num_columns)
        for _ in range(num_tensors)
    ]
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=cells, max_size=cells))).view(num_rows, num_columns)
    return *tensors, mask


def gae_by_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum_l (gamma lam)^l delta_{t+l} of one row without masks, in float64, by the sum and not the recursion."""
    num_tokens = len(rewards)
    next_values = [*values, 0.0][1:]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, next_values, values, strict=True)]
    return [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, num_tokens)) for t in range(num_tokens)]


def test_rewards_by_hand():
    # d = log pi - log ref = [0.5, -0.25, 1.0], beta 0.1, score 2 on the last of three tokens; one column of padding
    # r = [-0.05, 0.025, -0.1 + 2 = 1.9, 0]
    rewards = token_rewards(
        scores=torch.tensor([[0.0, 0.0, 2.0, 0.0]]),
        policy_logprobs=torch.tensor([[-1.0, -2.0, -1.0, 0.0]]),
        ref_logprobs=torch.tensor([[-1.5, -1.75, -2.0, 0.0]]),
        mask=torch.tensor([[True, True, True, False]]),
        kl_coef=0.1,
    )
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.025, 1.9, 0.0]]))


def test_a_score_is_paid_where_it_stands():
    scores = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [0.5, 0, 2, 0], [0, 0, 0, 3]])
    mask = torch.arange(4) < torch.tensor([0, 1, 3, 4])[:, None]
    rewards = token_rewards(scores, torch.zeros(4, 4), torch.zeros(4, 4), mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, scores, rtol=0, atol=0)


def test_a_score_at_the_last_token_gives_bitwise_what_one_score_a_sequence_gave():
    """The single-turn formula that `token_rewards` had: where(is_last, score) added to where(trains, penalty)."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([0, 1, 5, 9, 12])
    mask = torch.arange(12) < lengths[:, None]
    policy_logprobs, ref_logprobs = torch.randn(2, 5, 12, generator=generator)
    scores = torch.randn(5, generator=generator)
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    for kl_coef in (0.0, 0.05):
        penalty = -kl_coef * (policy_logprobs - ref_logprobs)
        former = torch.where(mask, penalty, 0.0) + torch.where(is_last, scores[:, None], 0.0)
        placed = torch.where(is_last, scores[:, None], 0.0)
        assert torch.equal(token_rewards(placed, policy_logprobs, ref_logprobs, mask, kl_coef), former)


def test_observation_tokens_pay_no_kl():
    # d = 1 everywhere, beta 0.5; tokens 2 and 3 are observations
    rewards = token_rewards(
        torch.tensor([[0.0, 1.0, 0.0, 0.0, 4.0]]),
        torch.zeros(1, 5),
        torch.full((1, 5), -1.0),
        torch.tensor([[True, True, False, False, True]]),
        kl_coef=0.5,
    )
    torch.testing.assert_close(rewards, torch.tensor([[-0.5, 0.5, 0.0, 0.0, 3.5]]), rtol=0, atol=0)


def test_batch_of_empty_completions():
    rewards = token_rewards(
        torch.zeros(2, 0),
        torch.zeros(2, 0),
        torch.zeros(2, 0),
        torch.zeros(2, 0, dtype=torch.bool),
        kl_coef=0.1,
    )
    assert rewards.shape == (2, 0)
    advantages, returns = gae(rewards, torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), 1.0, 0.95)
    assert advantages.shape == returns.shape == (2, 0)


@pytest.mark.parametrize("garbage", [1e30, NAN, INF, -INF])
def test_garbage_on_padding_changes_nothing(garbage):
    mask = torch.tensor([[True, False, True, False], [False, False, False, False]])

    def pipeline(fill: float) -> list[torch.Tensor]:
        def padded(row: list[float]) -> torch.Tensor:
            return torch.where(mask, torch.tensor([row, row]), fill)

        policy_logprobs, ref_logprobs = padded([-1.0, 0, -2, 0]), padded([-1.5, 0, -1, 0])
        rewards = token_rewards(padded([0.0, 0, 1, 0]), policy_logprobs, ref_logprobs, mask, 0.1)
        values = padded([0.3, 0, 0.2, 0])
        advantages, returns = gae(torch.where(mask, rewards, fill), values, mask, 0.9, 0.95)
        dirty = torch.where(mask, advantages, fill)
        whitened = whiten(dirty, mask, whitening_moments(dirty, mask))
        return [rewards, advantages, returns, whitened]

    for found, expected in zip(pipeline(garbage), pipeline(0.0), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert found.isfinite().all()


def test_gae_by_hand():
    # gamma 0.9, lambda 0.5, so gamma * lambda = 0.45
    # delta = [0.9*0.6 - 0.5 = 0.04, 0.9*0.7 - 0.6 = 0.03, 1 - 0.7 = 0.3]
    # A_2 = 0.3; A_1 = 0.03 + 0.45*0.3 = 0.165; A_0 = 0.04 + 0.45*0.165 = 0.11425; R = A + V
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7]]), mask, 0.9, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.11425, 0.165, 0.3]]))
    torch.testing.assert_close(returns, torch.tensor([[0.61425, 0.765, 1.0]]))


def test_gae_looks_through_an_interior_mask():
    # The numbers of test_gae_by_hand with an observation (reward 50, value 90) between tokens 1 and 2.
    mask = torch.tensor([[True, True, False, True]])
    rewards, values = torch.tensor([[0.0, 0.0, 50.0, 1.0]]), torch.tensor([[0.5, 0.6, 90.0, 0.7]])
    advantages, returns = gae(rewards, values, mask, 0.9, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.11425, 0.165, 0.0, 0.3]]))
    torch.testing.assert_close(returns, torch.tensor([[0.61425, 0.765, 0.0, 1.0]]))


def test_the_end_is_terminal_for_a_full_row_too():
    # A row cut by the length limit gets no bootstrap: A = 0 - 5 at its last token, whatever stands in the other row.
    mask = torch.tensor([[True, True], [True, False]])
    advantages, _ = gae(torch.zeros(2, 2), torch.full((2, 2), 5.0), mask, 1.0, 1.0)
    torch.testing.assert_close(advantages, torch.tensor([[-5.0, -5.0], [-5.0, 0.0]]))


@quick
@given(batch=masked_rows(2), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_deleting_masked_columns_changes_nothing(batch, gamma, lam):
    rewards, values, mask = batch
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()
    for row in range(mask.shape[0]):
        keep = mask[row]
        kept_values = values[row, keep].double().tolist()
        expected = gae_by_definition(rewards[row, keep].double().tolist(), kept_values, gamma, lam)
        expected_returns = [a + v for a, v in zip(expected, kept_values, strict=True)]
        assert advantages[row, keep].tolist() == pytest.approx(expected, abs=1e-4)
        assert returns[row, keep].tolist() == pytest.approx(expected_returns, abs=1e-4)


def test_gae_of_a_long_row_with_observations():
    generator = torch.Generator().manual_seed(5)
    rewards, values = torch.randn(2, 1, 700, generator=generator)
    mask = torch.rand(1, 700, generator=generator) < 0.8
    advantages, _ = gae(rewards, values, mask, 1.0, 0.97)
    kept = [row[mask].double().tolist() for row in (rewards, values)]
    torch.testing.assert_close(
        advantages[mask].double(), torch.tensor(gae_by_definition(*kept, 1.0, 0.97)).double(), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("columns", [1, 2, 3, 7, 31])
def test_padding_behind_a_row_changes_no_bit(columns):
    """A microbatch is as wide as its longest completion, which is another one after another cut."""
    generator = torch.Generator().manual_seed(columns)
    rewards, values = torch.randn(2, 3, columns, generator=generator)
    mask = torch.rand(3, columns, generator=generator) < 0.8
    narrow = gae(rewards, values, mask, 0.99, 0.95)
    wide = gae(*(torch.nn.functional.pad(x, (0, 9)) for x in (rewards, values, mask)), 0.99, 0.95)
    for a, b in zip(narrow, wide, strict=True):
        torch.testing.assert_close(b[:, :columns], a, rtol=0, atol=0)
        assert (b[:, columns:] == 0).all()


def test_no_gradient_reaches_the_value_model_through_the_targets():
    values = torch.ones(1, 3, requires_grad=True)
    advantages, returns = gae(torch.ones(1, 3), values, torch.ones(1, 3, dtype=torch.bool), 1.0, 0.95)
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_whitening_by_hand():
    # valid 1, 2, 6: mean 3, unbiased variance (4 + 1 + 9) / 2 = 7; the masked 100 takes no part
    advantages = torch.tensor([[1.0, 100.0], [2.0, 6.0]])
    mask = torch.tensor([[True, False], [True, True]])
    moments = whitening_moments(advantages, mask)
    assert moments.dtype == torch.float64
    assert moments.tolist() == [3.0, 9.0, 41.0]
    expected = torch.tensor([[-2.0, 0.0], [-1.0, 3.0]]) / math.sqrt(7)
    torch.testing.assert_close(whiten(advantages, mask, moments), expected)


@quick
@given(first=masked_rows(1), second=masked_rows(1))
def test_whitening_across_two_ranks_is_that_of_the_concatenation(first, second):
    moments = whitening_moments(*first) + whitening_moments(*second)
    found = torch.cat([whiten(advantages, mask, moments)[mask] for advantages, mask in (first, second)])
    valid = torch.cat([advantages[mask] for advantages, mask in (first, second)]).double()
    if valid.numel() < 2:
        expected = torch.zeros_like(valid)
    else:
        mean = sum(valid.tolist()) / valid.numel()
        variance = sum((x - mean) ** 2 for x in valid.tolist()) / (valid.numel() - 1)
        rms = math.sqrt(sum(x * x for x in valid.tolist()) / valid.numel())
        assume(not 0.99e-5 * rms < math.sqrt(variance) < 1.01e-5 * rms)
        is_rounding = math.sqrt(variance) <= 1e-5 * rms
        expected = torch.zeros_like(valid) if is_rounding else (valid - mean) / math.sqrt(variance + 1e-8)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_whitening_per_rank_would_differ():
    ranks = [torch.tensor([[0.0, 2.0]]), torch.tensor([[10.0, 14.0]])]
    mask = torch.ones(1, 2, dtype=torch.bool)
    moments = sum((whitening_moments(rank, mask) for rank in ranks), torch.zeros(3, dtype=torch.float64))
    assert not torch.allclose(
        whiten(ranks[0], mask, moments), whiten(ranks[0], mask, whitening_moments(ranks[0], mask)), atol=0.1
    )


def test_whitening_survives_a_large_mean():
    # mean 1e4 + 2/3, deviations from it -2/3, 1/3, 1/3: unbiased variance (4 + 1 + 1) / 9 / 2 = 1/3
    advantages = torch.tensor([[1e4, 1e4 + 1, 1e4 + 1]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    expected = torch.tensor([[-2.0, 1.0, 1.0]]) / 3 * math.sqrt(3)
    torch.testing.assert_close(whiten(advantages, mask, whitening_moments(advantages, mask)), expected)


@pytest.mark.parametrize("num_valid", [0, 1])
def test_whitening_without_a_variance_subtracts_the_mean_only(num_valid):
    advantages = torch.tensor([[4.0, 9.0]])
    mask = torch.arange(2)[None] < num_valid
    whitened = whiten(advantages, mask, whitening_moments(advantages, mask))
    torch.testing.assert_close(whitened, torch.zeros(1, 2), rtol=0, atol=0)
    # One token of this rank with moments (1, 3, 9) from elsewhere: 4 - 3 and 9 - 3, not scaled.
    moments = torch.tensor([1.0, 3.0, 9.0], dtype=torch.float64)
    torch.testing.assert_close(whiten(advantages, mask, moments), torch.where(mask, advantages - 3.0, 0.0))


def test_whitening_of_equal_advantages_is_zero():
    advantages = torch.full((1, 3), 1e4)
    mask = torch.ones(1, 3, dtype=torch.bool)
    moments = whitening_moments(advantages, mask)
    # An all-reduce rounds: the sum of squares may come out a little under count * mean^2, the variance negative.
    for rounding in (0.0, -1e-6):
        rounded = moments + torch.tensor([0.0, 0.0, rounding], dtype=torch.float64)
        torch.testing.assert_close(whiten(advantages, mask, rounded), torch.zeros(1, 3), rtol=0, atol=0)


@pytest.mark.parametrize("level", [0.3, -0.7, 5.0, 1e4, 1e8])
def test_whitening_of_advantages_that_differ_by_rounding_is_zero(level):
    """Two units in the last place of float32: divided by their own deviation they would be +-1."""
    step = torch.finfo(torch.float32).eps * abs(level)
    advantages = torch.tensor([[level, level + step, level - step, level]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(whiten(advantages, mask, whitening_moments(advantages, mask)), torch.zeros(1, 4))


def explained(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    return explained_variance(whitening_moments(returns, mask), whitening_moments(returns - values, mask))


def test_explained_variance_by_hand():
    # R = 1, 2, 3 (variance 1); R - V = 0, 0.5, 1 (variance 0.25): 1 - 0.25 = 0.75
    mask = torch.tensor([[True, True, True, False]])
    values, returns = torch.tensor([[1.0, 1.5, 2.0, 99.0]]), torch.tensor([[1.0, 2.0, 3.0, -99.0]])
    assert explained(values, returns, mask) == pytest.approx(0.75)
    assert explained(torch.zeros(1, 4), returns, mask) == pytest.approx(0.0)
    # V = -R: R - V = 2R, variance 4, so 1 - 4 = -3
    assert explained(-returns, returns, mask) == pytest.approx(-3.0)


def test_explained_variance_is_nan_where_undefined():
    one, constant = torch.tensor([[True, False]]), torch.tensor([[True, True]])
    assert math.isnan(explained(torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]), one))
    assert math.isnan(explained(torch.tensor([[1.0, 2.0]]), torch.ones(1, 2), constant))
    nearly = torch.tensor([[1.0, 1.0 + torch.finfo(torch.float32).eps]])
    assert math.isnan(explained(torch.tensor([[1.0, 2.0]]), nearly, constant))
