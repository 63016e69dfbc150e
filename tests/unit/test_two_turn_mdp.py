"""What trains the language model tells three ways of paying a conversation apart, where the optimum is known."""

import pytest
import torch

from studies.five_reasons.two_turn_mdp import BEST, GREEDY, NOISE, learn, worth


def policy(first: int, second: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Certain of its actions: `first`, and in turn 2 those after a = 0 and a = 1."""
    logits = torch.full((3, 2), -50.0)
    for row, action in enumerate((first, *second)):
        logits[row, action] = 50.0
    return logits[0], logits[1:]


def test_the_optimum_and_the_greedy_policy_by_enumeration() -> None:
    every = {(a, b0, b1): worth(*policy(a, (b0, b1))) for a in (0, 1) for b0 in (0, 1) for b1 in (0, 1)}
    assert max(every.values()) == pytest.approx(BEST)
    assert every[1, 0, 1] == every[1, 1, 1] == pytest.approx(BEST)
    assert every[0, 1, 1] == pytest.approx(GREEDY)  # 1 at once, 0.2 later
    # (1 + 0) / 2 of turn 1, (0 + 0.2 + 0 + 2) / 4 of turn 2
    assert worth(torch.zeros(2), torch.zeros(2, 2)) == pytest.approx(0.5 + 0.55)


@pytest.mark.parametrize("payment", ["cumulative", "per_turn"])
def test_a_turn_that_is_credited_with_what_follows_finds_the_best(payment: str) -> None:
    found = learn(payment)
    assert found.worth > 0.97 * BEST
    assert found.first_action > 0.97


def test_a_turn_that_is_an_episode_of_its_own_stays_greedy() -> None:
    found = learn("separate")
    assert found.worth == pytest.approx(GREEDY, abs=0.05)
    assert found.first_action < 0.03


def test_paid_at_the_end_the_noise_of_the_first_turn_is_in_the_second() -> None:
    """Of 64 conversations a variance has the standard error NOISE^2 sqrt(2 / 63) = 0.18."""
    assert learn("per_turn").noise_in_second == pytest.approx(0.0, abs=1e-6)
    assert learn("cumulative").noise_in_second == pytest.approx(NOISE**2, abs=0.6)
