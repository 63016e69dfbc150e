"""What each token is paid, worked out by hand; single turns get bitwise what they got as one number a rollout."""

import math
from dataclasses import replace

import numpy as np
import pytest

from contracts.config import EnvironmentConfig, PPOConfig
from contracts.records import Completion, Prompt, Rollout, Score, Turn
from controller.loop.rewards import (
    ScoreNormalizer,
    episodes,
    overlong_metrics,
    overlong_penalty,
    paid_metrics,
    service_scores,
    shaped,
    turn_metrics,
    turns_of,
)

EOS = 2
PPO = PPOConfig(missing_eos_penalty=0.25)
CUMULATIVE, PER_TURN = EnvironmentConfig(), EnvironmentConfig(reward="per_turn")
SEPARATE = EnvironmentConfig(reward="separate")
NORMALIZER = ScoreNormalizer(mean=1.0, std=2.0, is_fitted=True)


def single(value: float | None, finish_reason: str = "stop", tokens: int = 4) -> Rollout:
    ids, logprobs = np.full(tokens, EOS, dtype=np.int32), np.zeros(tokens, dtype=np.float32)
    completion = Completion(ids, logprobs, np.zeros(tokens, dtype=np.int32), finish_reason, "")
    return Rollout((0, 0, 0), Prompt(0, "", (5,)), completion, {"proxy": Score(value)})


def conversation(first: Turn, second: Turn) -> Rollout:
    """Three sampled tokens, two observed, two sampled."""
    rollout = single(0.0, second.finish_reason, tokens=7)
    mask = np.array([True, True, True, False, False, True, True])
    return replace(rollout, completion=replace(rollout.completion, loss_mask=mask), turns=[first, second])


# The environment pays 0.5 for the first turn, which the limit cut off; the service gives the second 4.
MIXED = conversation(Turn(3, "length", 0.5), Turn(7, "stop", None, Score(4.0)))


def test_per_turn_by_hand() -> None:
    # u_1 = 0.5 - 0.25 (no EOS) = 0.25 at token 2; u_2 = (4 - 1) / 2 = 1.5 at token 6
    assert shaped(MIXED, NORMALIZER, PPO, PER_TURN).tolist() == [0, 0, 0.25, 0, 0, 0, 1.5]


def test_cumulative_by_hand() -> None:
    # the same worth, 0.25 + 1.5, at the last token
    assert shaped(MIXED, NORMALIZER, PPO, CUMULATIVE).tolist() == [0, 0, 0, 0, 0, 0, 1.75]


def test_the_service_scores_every_turn_that_the_environment_leaves_open() -> None:
    # u_1 = (2 - 1) / 2 = 0.5; u_2 = (-3 - 1) / 2 - 0.25 = -2.25
    rollout = conversation(Turn(3, "stop", None, Score(2.0)), Turn(7, "length", None, Score(-3.0)))
    assert shaped(rollout, NORMALIZER, PPO, PER_TURN).tolist() == [0, 0, 0.5, 0, 0, 0, -2.25]
    assert shaped(rollout, NORMALIZER, PPO, CUMULATIVE).tolist() == [0, 0, 0, 0, 0, 0, -1.75]


def test_both_placings_pay_a_conversation_the_same() -> None:
    """What an estimator sees that compares whole conversations."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        rewards = [None if rng.random() < 0.5 else float(rng.normal()) for _ in range(2)]
        ends = ["stop" if rng.random() < 0.5 else "length" for _ in range(2)]
        turns = [Turn(e, f, r, Score(float(rng.normal()))) for e, f, r in zip((3, 7), ends, rewards, strict=True)]
        rows = [shaped(conversation(*turns), NORMALIZER, PPO, c) for c in (PER_TURN, CUMULATIVE)]
        assert rows[0].sum() == pytest.approx(rows[1].sum(), abs=1e-6)
        worth = sum(
            ((t.score.value - 1.0) / 2.0 if t.reward is None and t.score else t.reward or 0.0) - 0.25 * (f == "length")
            for t, f in zip(turns, ends, strict=True)
        )
        assert rows[1].tolist() == pytest.approx([0] * 6 + [worth], abs=1e-6)


@pytest.mark.parametrize("config", [CUMULATIVE, PER_TURN], ids=["cumulative", "per_turn"])
def test_a_single_turn_gets_bitwise_what_one_number_gave(config: EnvironmentConfig) -> None:
    """The number was normalizer(score) - penalty * missing_eos, rounded to float32 at the last token."""
    rng = np.random.default_rng(1)
    normalizer = ScoreNormalizer()
    normalizer.fit(rng.normal(size=64).tolist())
    for value in rng.normal(size=32).tolist():
        for finish_reason in ("stop", "length"):
            rollout = single(value, finish_reason)
            former = normalizer(value) - PPO.missing_eos_penalty * (finish_reason != "stop")
            row = shaped(rollout, normalizer, PPO, config)
            assert row.dtype == np.float32
            assert np.array_equal(row, np.array([0, 0, 0, former], dtype=np.float32))


def test_the_overlong_penalty_by_hand() -> None:
    """Limit 10, buffer 4, penalty 2: nothing up to 6 tokens, then half a unit a token."""
    ppo = PPOConfig(missing_eos_penalty=0.25)
    ppo.sampling.max_completion_tokens, ppo.overlong.buffer_tokens, ppo.overlong.penalty = 10, 4, 2.0
    worth = [0.0, 0.5, 1.0, 1.5, 2.0]
    assert [overlong_penalty(tokens, ppo) for tokens in (6, 7, 8, 9, 10)] == worth
    assert overlong_penalty(1, ppo) == 0.0
    # On top of (3 - 1) / 2 = 1, and of a quarter for the missing EOS of what the limit cuts off.
    assert shaped(single(3.0, tokens=9), NORMALIZER, ppo, CUMULATIVE).tolist() == [0.0] * 8 + [1 - 1.5]
    assert shaped(single(3.0, "length", tokens=10), NORMALIZER, ppo, CUMULATIVE)[-1] == 1 - 0.25 - 2.0
    # A conversation counts as the limit counts it, observations included (7 tokens), and pays once.
    rollout = conversation(Turn(3, "stop", 0.5), Turn(7, "stop", 2.0))
    assert shaped(rollout, NORMALIZER, ppo, PER_TURN).tolist() == [0, 0, 0.5, 0, 0, 0, 1.5]
    assert shaped(rollout, NORMALIZER, ppo, CUMULATIVE).tolist() == [0, 0, 0, 0, 0, 0, 2.0]
    assert overlong_metrics([single(0.0, tokens=9), single(0.0, tokens=2)], ppo) == {"reward/overlong_mean": -0.75}
    assert shaped(single(1.0, tokens=0), NORMALIZER, ppo, CUMULATIVE).shape == (0,)
    assert overlong_metrics([single(0.0, tokens=9)], PPO) == {}


def test_an_empty_completion_is_paid_nothing() -> None:
    assert shaped(single(1.0, tokens=0), NORMALIZER, PPO, CUMULATIVE).shape == (0,)


def test_the_normalizer_is_fitted_on_what_the_service_said() -> None:
    rollouts = [single(3.0), MIXED, single(None), conversation(Turn(3, "stop", 1.0), Turn(7, "stop", 2.0))]
    assert service_scores(rollouts) == [3.0, 4.0]  # neither the environment's rewards nor a missing score
    normalizer = ScoreNormalizer()
    normalizer.fit([])
    assert not normalizer.is_fitted
    assert normalizer(2.5) == 2.5
    normalizer.fit([1.0, 5.0])
    assert (normalizer.mean, normalizer.std, normalizer.is_fitted) == (3.0, 2.0, True)


NOISE = 2.0**-23  # of float32 at 1


@pytest.mark.parametrize(
    "scores",
    [
        [-0.7] * 64,  # np.std: 1.1e-16
        [0.1 + 0.2, 0.3] * 32,
        [-0.7, -0.7 * (1 + NOISE)] * 32,
        [1e6 + 0.1] * 33,
        [-3.2e-9] * 10,
        [0.0] * 8,
        [4.0],
    ],
)
def test_equal_first_scores_leave_the_unit_of_the_scorer(scores: list[float]) -> None:
    normalizer = ScoreNormalizer()
    normalizer.fit(scores)
    assert normalizer.std == 1.0
    assert normalizer.is_fitted
    # -0.7 first and 0.3 now is one more, not 9e15.
    assert normalizer(scores[0] + 1.0) == pytest.approx(1.0, abs=1e-6)
    assert shaped(single(scores[0] + 1.0), normalizer, PPO, CUMULATIVE)[-1] == pytest.approx(1.0, abs=1e-6)


def test_small_differences_that_are_no_rounding_count() -> None:
    # Population: mean 1000, deviation 0.5; 1 of 64 answers right: mean 1/64, deviation sqrt(63)/64.
    for scores, deviation in (([999.5, 1000.5] * 4, 0.5), ([0.0] * 63 + [1.0], math.sqrt(63) / 64)):
        normalizer = ScoreNormalizer()
        normalizer.fit(scores)
        assert normalizer.std == pytest.approx(deviation, rel=1e-9)


def test_the_largest_amount_that_a_token_is_paid() -> None:
    rows = [
        np.array([0, 0.5, -2.5], dtype=np.float32),
        np.zeros(0, dtype=np.float32),
        np.array([2.0], dtype=np.float32),
    ]
    assert paid_metrics(rows) == {"reward/paid_abs_max": 2.5}
    assert paid_metrics([rows[1]]) == {"reward/paid_abs_max": 0.0}


def test_what_has_no_score_cannot_be_shaped() -> None:
    with pytest.raises(ValueError, match="without a reward or a score"):
        shaped(single(None), NORMALIZER, PPO, CUMULATIVE)


def test_metrics_are_those_of_conversations_alone() -> None:
    assert turn_metrics([single(1.0), single(2.0)]) == {}
    # 2 turns and 1; 2 of 7 + 4 tokens were observed
    assert turn_metrics([MIXED, single(1.0)]) == {"completion/turns_mean": 1.5, "completion/observation_frac": 2 / 11}
    assert [turn.end for turn in turns_of(single(1.0))] == [4]


def test_turns_apart_are_episodes_of_their_own() -> None:
    """Prompt (5,); three sampled tokens, two observed, two sampled: rows of 1 + 3 and of 6 + 2 tokens."""
    rollout = conversation(Turn(3, "stop", 0.5), Turn(7, "length", 2.0))
    rollout.completion.token_ids[:] = [10, 11, EOS, 20, 21, 12, 13]
    rollout.completion.behavior_logprobs[:] = [-1, -2, -3, 0, 0, -4, -5]
    paid = shaped(rollout, NORMALIZER, PPO, SEPARATE)
    assert paid.tolist() == [0, 0, 0.5, 0, 0, 0, 1.75]
    (first, second), (first_paid, second_paid) = episodes([rollout], [paid], SEPARATE)
    assert first.prompt.token_ids == (5,)
    assert second.prompt.token_ids == (5, 10, 11, EOS, 20, 21)
    assert first.completion.token_ids.tolist() == [10, 11, EOS]
    assert second.completion.token_ids.tolist() == [12, 13]
    assert second.completion.behavior_logprobs.tolist() == [-4, -5]
    assert (first.completion.finish_reason, second.completion.finish_reason) == ("stop", "length")
    assert first.completion.loss_mask is None
    assert second.completion.loss_mask is None
    assert (first_paid.tolist(), second_paid.tolist()) == ([0, 0, 0.5], [0, 1.75])
    assert episodes([rollout], [paid], PER_TURN) == ([rollout], [paid])
    alone = single(1.0)
    assert episodes([alone], [paid], SEPARATE)[0] == [alone]
