"""Coefficients of the log-likelihood and the multiplier of the combined loss, by hand and against autograd in float64.
Whole updates with them: test_estimators.py."""

import json
import math

import pytest
import torch

from contracts.config import CombinedConfig, PPOConfig
from contracts.estimators import chosen_correction, chosen_estimator
from learner.coefficients import Multiplier
from learner.estimators.online_dpo import pair_metrics, preference_pairs
from learner.estimators.raft import best_of_groups
from learner.estimators.rwr import effective_share, reward_weights
from learner.losses import likelihood_loss
from learner.outcomes import normalised

EVERY = torch.ones(5, dtype=torch.bool)
GROUPS = torch.tensor([0, 1, 0, 0, 1])


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- RAFT


def test_the_best_of_each_group_is_kept() -> None:
    # Group 0 has 1, 2 and 6, group 1 has 5 and 3.
    outcomes = vector(1, 5, 2, 6, 3)
    assert best_of_groups(outcomes, GROUPS, EVERY).tolist() == [0, 1, 0, 1, 0]
    # Row 3 has no token that trains; of two equals the first is kept, however many groups there are.
    trains = torch.tensor([True, True, True, False, True])
    assert best_of_groups(vector(2, 4, 2, 6, 4), GROUPS, trains).tolist() == [1, 1, 0, 0, 0]
    assert not best_of_groups(outcomes, GROUPS, ~EVERY).any()


def test_the_loss_is_a_mean_over_what_is_kept() -> None:
    """Rollouts 1 and 3 of five, with 2 and 6 of 15 tokens."""
    kept, lengths = vector(0, 1, 0, 1, 0), vector(3, 2, 3, 6, 1)
    assert normalised(kept, lengths).tolist() == [0, 15 / 8, 0, 15 / 8, 0]  # 1/15 sum = 1/8 over the kept ones' tokens
    assert normalised(kept, torch.ones_like(kept)).tolist() == [0, 2.5, 0, 2.5, 0]
    assert normalised(vector(0, 0), vector(1, 1)).tolist() == [0, 0]


# ---- reward-weighted regression


def test_reward_weights_by_hand() -> None:
    outcomes = vector(0, math.log(2), math.log(4), math.inf)
    trains = torch.tensor([True, True, True, False])
    weights = reward_weights(outcomes, trains, 1.0)
    torch.testing.assert_close(weights, vector(1 / 4, 1 / 2, 1, 0))
    # At half the temperature the weights are squared.
    torch.testing.assert_close(reward_weights(outcomes, trains, 0.5), vector(1 / 16, 1 / 4, 1, 0))
    # (7/4)^2 / (3 * (1 + 4 + 16) / 16) = (49/16) / (63/16)
    assert effective_share(weights[trains]) == pytest.approx(7 / 9)
    # Tokens 2, 1, 1: 1/4 * 2 + 1/2 + 1 = 2 stands for 4.
    torch.testing.assert_close(normalised(weights, vector(2, 1, 1, 0)), vector(1 / 2, 1, 2, 0))
    assert reward_weights(outcomes, torch.zeros(4, dtype=torch.bool), 1.0).tolist() == [0, 0, 0, 0]
    assert effective_share(vector(0, 0)) == 0.0


def test_reward_weights_do_not_overflow() -> None:
    weights = reward_weights(vector(-4000, 1000, 999.5), torch.ones(3, dtype=torch.bool), 0.5)
    torch.testing.assert_close(weights, vector(0, 1, math.exp(-1)))


def test_regression_ends_at_the_tilted_policy() -> None:
    """Over all actions of a small policy: the weighted likelihood is highest at pi exp(R / temperature) / Z."""
    torch.manual_seed(0)
    sampled_from, outcomes, temperature = torch.randn(6).double().softmax(0), torch.randn(6).double(), 0.7
    weights = reward_weights(outcomes, torch.ones(6, dtype=torch.bool), temperature)
    logits = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = -(sampled_from * normalised(weights, sampled_from) * logits.log_softmax(0)).sum()
        value.backward()
        return value

    optimizer.step(loss)
    tilted = sampled_from * (outcomes / temperature).exp()
    torch.testing.assert_close(logits.softmax(0).detach(), tilted / tilted.sum(), rtol=1e-5, atol=1e-6)


# ---- online DPO


def test_pairs_by_hand() -> None:
    # Group 0: best 3, worst 0; group 1: best 1, worst 4. At beta 0.5 the margins are (3 - 1)/2 and (0 - 4)/2.
    pairs = preference_pairs(vector(1, 5, 2, 6, 3), vector(1, 0, 9, 3, 4), GROUPS, EVERY, 0.5)
    assert pairs.margins.tolist() == [1, -2]
    first, second = (0.5 * 5 / 2 / (1 + math.exp(m)) for m in (1, -2))  # beta N / P sigmoid(-m)
    torch.testing.assert_close(pairs.coefficients, vector(-first, second, 0, first, -second))
    assert pair_metrics(pairs.margins) == pytest.approx(
        {
            "online_dpo/pairs": 2,
            "online_dpo/loss": (math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2,
            "online_dpo/margin_mean": -0.5,
            "online_dpo/accuracy": 0.5,
        }
    )


def test_without_a_difference_there_is_no_pair() -> None:
    # Group 0: among equals the first counts. Group 1: equal, as rollout 4 does not train.
    trains = torch.tensor([True, True, True, True, False])
    pairs = preference_pairs(vector(2, 5, 1, 2, 3), vector(0, 0, 0, 9, 0), GROUPS, trains, 0.1)
    assert pairs.coefficients.nonzero().squeeze(1).tolist() == [0, 2]
    nothing = preference_pairs(vector(1, 2, 1, 1, 2), vector(0, 1, 2, 3, 4), GROUPS, EVERY, 0.1)
    assert not nothing.coefficients.any()
    assert pair_metrics(nothing.margins) == {"online_dpo/pairs": 0}
    # The rewards of two turns in either order: 0.1 + 0.2 and 0.3 as float32 sums.
    rounded = vector(0.3, 2, 0.30000001192092896, 0.29999998211860657, 2)
    assert not preference_pairs(rounded, vector(0, 1, 2, 3, 4), GROUPS, EVERY, 0.1).coefficients.any()


def test_the_coefficients_give_the_gradient_of_dpo() -> None:
    torch.manual_seed(1)
    policy, reference = torch.randn(5).double().requires_grad_(), torch.randn(5).double()
    pairs = preference_pairs(vector(1, 5, 2, 6, 3), (policy - reference).detach(), GROUPS, EVERY, 0.3)
    ours = torch.autograd.grad(-(pairs.coefficients * policy).sum() / 5, policy)[0]
    ratio = policy - reference
    losses = [-torch.log(torch.sigmoid(0.3 * (ratio[b] - ratio[w]))) for b, w in ((3, 0), (1, 4))]
    torch.testing.assert_close(ours, torch.autograd.grad(sum(losses) / 2, policy)[0])


# ---- the loss


def test_likelihood_loss_by_hand() -> None:
    mask = torch.tensor([[True, True, False], [False, True, False]])
    logprobs = torch.tensor([[-1.0, -2.0, math.nan], [-math.inf, -3.0, 0.0]], requires_grad=True)
    proximal = torch.tensor([[-1.0, -2.0 - math.log(2), math.inf], [0.0, -3.0, math.nan]])
    coefficients = torch.tensor([[2.0, 2.0, math.nan], [math.inf, -1.0, 1.0]])
    weights = torch.tensor([[1.0, 0.5, math.nan], [math.nan, 3.0, 1.0]])
    loss, stats = likelihood_loss(logprobs, proximal, coefficients, mask, weights)
    assert loss.item() == pytest.approx(2 * 1 + 1 * 2 - 3 * 3)
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-2, -1, 0], [0, 3, 0]]
    found = {name: value.item() for name, value in stats.items()}
    expected = {"clipped": 0, "approx_kl": 2 - 1 - math.log(2), "ratio": 4, "ratio_max": 2}
    assert found == pytest.approx(expected, abs=1e-6)


def test_what_goes_with_an_estimator_by_likelihood() -> None:
    for name in ("raft", "rwr", "online_dpo"):
        estimator = chosen_estimator(PPOConfig(estimator=name))
        assert (estimator.has_value_model, estimator.kl, estimator.whiten) == (False, "none", False)
        assert estimator.needs_groups == (name != "rwr")
        # DPO's loss may have its pairs from anywhere.
        stale = chosen_correction(PPOConfig(estimator=name, max_staleness=1))
        assert stale.correction == ("none" if name == "online_dpo" else "truncated")


# ---- the combined loss


def test_dual_ascent_by_hand() -> None:
    multiplier = Multiplier(CombinedConfig(target=1.0, learning_rate=0.5, initial=1.0, max=2.0))
    found = []
    for score in (0.0, -3.0, 1.0, 2.0, 9.0):  # below, far below, on, above, far above the target
        multiplier.update(score)
        found.append(multiplier.value)
    assert found == [1.5, 2.0, 2.0, 1.5, 0.0]
    with pytest.raises(ValueError, match="finite, found nan"):
        multiplier.update(math.nan)


def test_the_multiplier_survives_a_commit_exactly() -> None:
    config = CombinedConfig(target=0.3, learning_rate=0.1)
    one, other = Multiplier(config), Multiplier(config)
    one.update(1 / 3)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for multiplier in (one, other):
        multiplier.update(0.1)
    assert one.value == other.value == 1 + 0.1 * (0.3 - 1 / 3) + 0.1 * (0.3 - 0.1)


def test_without_a_target_it_is_the_sum_of_ptx() -> None:
    multiplier = Multiplier(CombinedConfig(initial=5.0))
    multiplier.update(math.nan)
    assert multiplier.value == 1.0


def test_dual_ascent_finds_the_constrained_optimum() -> None:
    """Minimise x^2 subject to x >= 3: there 2 x = lambda, so lambda is 6."""
    multiplier, x = Multiplier(CombinedConfig(target=3.0, learning_rate=0.1)), 0.0
    for _ in range(400):
        x -= 0.1 * (2 * x - multiplier.value)
        multiplier.update(x)
    assert (x, multiplier.value) == (pytest.approx(3, abs=1e-6), pytest.approx(6, abs=1e-6))
