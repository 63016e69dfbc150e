"""Weights of tokens in the policy's losses: importance weights of stale rollouts, aggregation, and the KL as a loss term."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.losses import aggregation_weights, kl_loss, off_policy_weights, policy_loss

NAN, INF = math.nan, math.inf
quick = settings(max_examples=40, deadline=None)
BOUNDS = {"cap": 2.0, "low": 0.5, "high": 5.0}


def logs(*ratios: float) -> torch.Tensor:
    return torch.tensor([[math.log(ratio) for ratio in ratios]])


# ---- importance weights

RATIOS = (0.25, 0.8, 1.0, 3.0, 6.0)
MASK = torch.tensor([[True, True, True, True, True]])


@pytest.mark.parametrize(
    ("correction", "weights", "changed"),
    [
        ("none", [1, 1, 1, 1, 1], 0),
        ("truncated", [0.25, 0.8, 1, 2, 2], 2),  # 3 and 6 are cut to 2
        ("masked", [0, 0.8, 1, 3, 0], 2),  # 0.25 < 0.5 and 6 > 5 teach nothing
    ],
)
def test_weights_by_hand(correction: str, weights: list[float], changed: int) -> None:
    # w = pi_prox / pi_behavior: proximal log(ratio) - 1 against behavior -1
    found, count = off_policy_weights(logs(*RATIOS) - 1, torch.full((1, 5), -1.0), MASK, correction, **BOUNDS)
    torch.testing.assert_close(found, torch.tensor([weights], dtype=torch.float32))
    assert count.item() == changed


def test_bounds_are_inside() -> None:
    ratios = logs(0.5, 5.0)
    mask = torch.ones_like(ratios, dtype=torch.bool)
    # Rounding may push log(0.5) or log(5) past its own bound: the nearest ratios on either side decide.
    found, count = off_policy_weights(ratios, torch.zeros(1, 2), mask, "masked", cap=2.0, low=0.5 - 1e-6, high=5 + 1e-5)
    torch.testing.assert_close(found, torch.tensor([[0.5, 5.0]]))
    assert count.item() == 0
    found, count = off_policy_weights(ratios, torch.zeros(1, 2), mask, "masked", cap=2.0, low=0.5 + 1e-6, high=5 - 1e-5)
    assert found.tolist() == [[0.0, 0.0]]
    assert count.item() == 2


@pytest.mark.parametrize("correction", ["none", "truncated", "masked"])
@pytest.mark.parametrize("garbage", [0.0, 1e30, NAN, INF, -INF])
def test_weights_outside_the_mask_are_zero(correction: str, garbage: float) -> None:
    mask = torch.tensor([[True, False, True, False]])  # an observation inside, padding outside
    proximal, behavior = torch.tensor([[-1.0, garbage, -2.0, garbage]]), torch.tensor([[-1.5, -3.0, -2.0, garbage]])
    weights, changed = off_policy_weights(proximal, behavior, mask, correction, **BOUNDS)
    # exp(0.5) = 1.648721 is within all bounds
    expected = [1.0, 0.0, 1.0, 0.0] if correction == "none" else [1.648721, 0.0, 1.0, 0.0]
    torch.testing.assert_close(weights, torch.tensor([expected]))
    assert changed.item() == 0


def test_weights_carry_no_gradient_and_unknown_names_are_refused() -> None:
    proximal = torch.tensor([[-1.0]], requires_grad=True)
    assert not off_policy_weights(proximal, proximal, MASK[:, :1], "truncated", **BOUNDS)[0].requires_grad
    with pytest.raises(ValueError, match="truncate"):
        off_policy_weights(proximal, proximal, MASK[:, :1], "truncate", **BOUNDS)


# ---- the weighted losses


def test_weighted_policy_loss_by_hand() -> None:
    # The tokens of test_losses.py with weights: 2 * -2.4 + 0.5 * -0.5 + 0 * 1.1 + 1 * 1.6 + 2 * 3 = 2.55
    ratios, advantages = (1.5, 0.5, 1.1, 0.5, 4.0), torch.tensor([[2.0, 1.0, -1.0, -2.0, -1.0]])
    weights = torch.tensor([[2.0, 0.5, 0.0, 1.0, 2.0]], requires_grad=True)
    policy = logs(*ratios).requires_grad_()
    loss, stats = policy_loss(policy, torch.zeros(1, 5), advantages, MASK, 0.2, 3.0, weights)
    loss.backward()
    assert loss.item() == pytest.approx(2.55, abs=1e-5)
    # -A rho w where neither clip decides: -1 * 0.5 * 0.5, and 0 for the weight 0
    torch.testing.assert_close(policy.grad, torch.tensor([[0.0, -0.25, 0.0, 0.0, 0.0]]))
    assert weights.grad is None
    assert stats["ratio"].item() == pytest.approx(7.6, abs=1e-5)  # of all tokens: they are measured, not trained on
    assert stats["clipped"].item() == 3


numbers = st.floats(-3, 3)
token = st.tuples(numbers, numbers, numbers, numbers, numbers, st.booleans())


@quick
@given(
    rows=st.lists(st.lists(token, min_size=4, max_size=4), min_size=1, max_size=4),
    correction=st.sampled_from(["none", "truncated", "masked"]),
    aggregation=st.sampled_from(["tokens", "sequences", "sequence_sums", "budget"]),
    estimator=st.sampled_from(["k2", "k3"]),
    cut=st.integers(0, 4),
)
def test_loss_and_gradient_against_float64_loops(rows, correction, aggregation, estimator, cut) -> None:
    """Surrogate and KL with all weights, masks with holes, cut into two microbatches."""
    columns = torch.tensor([[t[:5] for t in row] for row in rows], dtype=torch.float64)
    mask = torch.tensor([[t[5] for t in row] for row in rows])
    tokens, sequences, budget, beta = max(int(mask.sum()), 1), len(rows), 6, 0.3
    expected = 0.0
    gradient = torch.zeros(columns.shape[:2], dtype=torch.float64)
    for i, j in itertools.product(range(len(rows)), range(4)):
        if not mask[i, j]:
            continue
        policy, proximal, behavior, reference, advantage = columns[i, j].tolist()
        w = math.exp(proximal - behavior)
        if correction == "none":
            w = 1.0
        elif correction == "truncated":
            w = min(w, 2.0)
        elif not 0.5 <= w <= 5.0:
            w = 0.0
        length = int(mask[i].sum())
        scale = {"tokens": 1 / tokens, "sequences": 1 / sequences / length}
        scale |= {"sequence_sums": 1 / sequences, "budget": 1 / sequences / budget}
        rho, d = math.exp(policy - proximal), policy - reference
        surrogate, slope = -advantage * rho, -advantage * rho
        limit = 1.2 if advantage > 0 else 0.8
        if (advantage > 0 and rho > limit) or (advantage < 0 and rho < limit):
            surrogate, slope = -advantage * limit, 0.0
        if advantage < 0 and rho > 3:
            surrogate, slope = -advantage * 3, 0.0
        kl, kl_slope = (d * d / 2, d) if estimator == "k2" else (math.exp(-d) - 1 + d, 1 - math.exp(-d))
        expected += scale[aggregation] * w * (surrogate + beta * kl)
        gradient[i, j] = scale[aggregation] * w * (slope + beta * kl_slope)

    policy = columns[..., 0].float().requires_grad_()
    total = torch.zeros(())
    for part in (slice(0, cut), slice(cut, None)):
        proximal, behavior, reference, advantage = (columns[part, :, c].float() for c in range(1, 5))
        weights, _ = off_policy_weights(proximal, behavior, mask[part], correction, **BOUNDS)
        weights = weights * aggregation_weights(mask[part], aggregation, tokens, sequences, budget)
        surrogate, _ = policy_loss(policy[part], proximal, advantage, mask[part], 0.2, 3.0, weights)
        kl = kl_loss(policy[part], reference, mask[part], estimator, weights)
        total = total + (surrogate + beta * kl) / tokens
    total.backward()
    assert total.item() == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert policy.grad is not None
    # Where a ratio lies within rounding of a clip, either side is right.
    ratios = (columns[..., 0] - columns[..., 1]).exp()
    certain = torch.stack([(ratios - edge).abs() > 1e-4 for edge in (0.8, 1.2, 3.0)]).all(0)
    torch.testing.assert_close(policy.grad.double()[certain], gradient[certain], rtol=1e-3, atol=1e-3)


def test_garbage_outside_the_mask_reaches_no_gradient() -> None:
    mask = torch.tensor([[True, False, True]])
    for garbage in (1e30, NAN, INF, -INF):
        policy = torch.tensor([[-1.0, garbage, -2.0]], requires_grad=True)
        other = torch.tensor([[-1.2, garbage, -1.0]])
        kl_loss(policy, other, mask, "k3", torch.full((1, 3), garbage).where(~mask, 1.0)).backward()
        policy_loss(policy, other, other, mask, 0.2, 3.0, torch.full((1, 3), garbage).where(~mask, 1.0))[0].backward()
        assert policy.grad is not None
        assert policy.grad.isfinite().all()
        assert policy.grad[0, 1] == 0


def test_expected_gradients_of_the_kl_terms() -> None:
    """By enumeration over a softmax: k2 pulls along KL(policy || reference), k3 along KL(reference || policy)."""
    logits = torch.tensor([0.3, -1.0, 1.5, 0.2], requires_grad=True)
    reference = torch.tensor([1.0, 0.1, -0.4, 0.0]).log_softmax(0)

    def gradient_of(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    logprobs = logits.log_softmax(0)
    p = logprobs.exp()
    exact = {
        "k2": gradient_of((p * (logprobs - reference)).sum()),
        "k3": gradient_of((reference.exp() * (reference - logprobs)).sum()),
    }
    everything = torch.ones(1, 4, dtype=torch.bool)
    for estimator, expected in exact.items():
        found = kl_loss(logprobs[None], reference[None], everything, estimator, p.detach()[None])
        torch.testing.assert_close(gradient_of(found), expected, rtol=1e-4, atol=1e-6)
    assert (exact["k2"] - exact["k3"]).abs().max() > 0.05
    with pytest.raises(ValueError, match="k1"):
        kl_loss(logprobs[None], reference[None], everything, "k1", p[None])


def test_aggregation_by_hand() -> None:
    # 4 + 1 + 0 tokens in N = 3 sequences, a budget of 8; sum / 5 is turned into the other means.
    mask = torch.tensor([[True, True, False, True, True], [False, True, False, False, False], [False] * 5])
    losses = torch.where(mask, torch.tensor([[1.0], [10.0], [NAN]]), 0.0)
    means = {"tokens": 14 / 5, "sequences": (1 + 10 + 0) / 3, "sequence_sums": 14 / 3, "budget": 14 / 3 / 8}
    for aggregation, expected in means.items():
        weights = aggregation_weights(mask, aggregation, 5, 3, 8)
        assert ((losses * weights).sum() / 5).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="mean"):
        aggregation_weights(mask, "mean", 5, 3, 8)


# ---- learning from stale rollouts

ACTIONS = torch.arange(21.0)
BEST, WIDTH = 15.0, 2.0
VALUE = -(ACTIONS - BEST).abs()  # reward of each action


def log_policy(place: torch.Tensor) -> torch.Tensor:
    """One parameter a seed: a bell over 21 actions around `place` [S]. Returns [S, 21]."""
    return (-(ACTIONS - place[:, None]).square() / (2 * WIDTH**2)).log_softmax(1)


def trained(correction: str, staleness: int, seeds: int = 50, samples: int = 64, updates: int = 80) -> torch.Tensor:
    """Expected reward of each policy version [updates, seeds] under Adam, from rollouts that are `staleness` updates old."""
    generator = torch.Generator().manual_seed(0)
    place = torch.full((seeds,), 4.0, requires_grad=True)
    adam = torch.optim.Adam([place], lr=0.6, betas=(0.9, 0.95), eps=1e-5)
    versions, curve = [], []
    mask = torch.ones(seeds, samples, dtype=torch.bool)
    for version in range(updates):
        versions.append(place.detach().clone())
        behavior = log_policy(versions[max(0, version - staleness)])
        actions = torch.multinomial(behavior.exp(), samples, replacement=True, generator=generator)
        rewards = VALUE[actions] + torch.randn(seeds, samples, generator=generator)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
        proximal = log_policy(versions[-1]).gather(1, actions)
        weights, _ = off_policy_weights(proximal, behavior.gather(1, actions), mask, correction, **BOUNDS)
        policy = log_policy(place).gather(1, actions)
        loss, _ = policy_loss(policy, proximal, advantages, mask, 0.2, 3.0, weights)
        adam.zero_grad()
        (loss / samples).backward()
        adam.step()
        curve.append((log_policy(place.detach()).exp() * VALUE).sum(1))
    return torch.stack(curve)


def test_corrected_stale_rollouts_teach_what_fresh_ones_do() -> None:
    """Rollouts four versions old. Without weights the gradient is that of four versions ago, so the policy runs past the
    optimum and back; with them it settles there as a synchronous run does. Same random numbers for all: paired by seed.

    This is not so for every problem. On a bandit with a free logit for each action the stationary points do not depend on
    who sampled, and 200 seeds showed no harm in leaving the weights out.
    """
    second_half = slice(40, None)
    fresh = trained("none", 0)[second_half].mean(0)
    stale = trained("none", 4)[second_half].mean(0)
    assert fresh.mean() > -1.65  # the best place gives -1.55, the first one about -11
    for correction in ("truncated", "masked"):
        corrected = trained(correction, 4)[second_half].mean(0)
        assert (corrected - fresh).mean().abs() < 0.05
        assert (corrected - stale).min() > 0.3  # in every single seed
        assert (corrected - stale).mean() > 0.6
