"""The plan of time: schedules worked out by hand."""

from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch

from common.models.packed_attention import Packed
from contracts.config import LearnerConfig
from contracts.records import Assignment, Completion, Prompt, Rollout, RolloutRequest
from controller.data.prompts import PromptStream
from controller.loop.training_batches import make_batches
from controller.plan.schedule.calibration import (
    EngineSpeed,
    LearnerSpeed,
)
from controller.plan.schedule.completion_lengths import long_tailed
from controller.plan.schedule.simulation import simulate, update_seconds
from controller.plan.schedule.spans import ACTOR, LEARNER, REWARD, Lane, Spans
from controller.plan.schedule.stand_in_actor import EngineLimits, StandInActor
from controller.plan.schedule.virtual_time import Cores, VirtualTime
from tests.schedules import PROMPTS, configured, planned, speeds


def test_in_turns_an_update_takes_the_sum_of_its_parts() -> None:
    """20 tokens of 1 s, 3 s of scoring, 10 s of training, then packing 0.5, loading 0.25, the rest 0.25."""
    found = planned(configured(), speeds())
    assert found.steps == pytest.approx([20 + 3 + 10 + 1.0] * 6)
    assert found.staleness == [(0.0, 0.0)] * 6
    assert found.busy(ACTOR) == pytest.approx((20 + 0.25) / 34)
    assert found.busy(LEARNER) == pytest.approx((10 + 0.5) / 34)
    assert found.busy(REWARD) == pytest.approx(3 / 34)
    assert found.spans.lanes[Lane(ACTOR, 0)][:2] == [
        ("generate", 0.0, pytest.approx(20.0)),
        ("load weights", pytest.approx(33.5), pytest.approx(33.75)),
    ]


def test_prompts_steps_that_grow_and_training_by_tokens() -> None:
    """4 prompts of 5 tokens and 19 more steps of 4 requests: 20 x 0.1 + 20 x (1 + 3 x 0.5); 100 tokens train."""
    found = planned(configured(), speeds(decode=((1, 1.0), (3, 2.0)), prefill_s=0.1, token_s=0.02))
    assert found.steps == pytest.approx([20 * 0.1 + 20 * 2.5 + 3 + 10 + 100 * 0.02 + 1.0] * 6)


def test_of_a_group_the_engine_computes_the_blocks_of_a_prompt_once() -> None:
    """Of 5 tokens a sibling computes the last one alone, with blocks of 2: 5 + 1, and the same of the other group."""
    found = planned(configured(samples_per_prompt=2), speeds(prefill_s=0.1, block_tokens=2))
    assert found.steps == pytest.approx([12 * 0.1 + 20 + 3 + 10 + 1.0] * 6)


def test_what_an_engine_has_no_place_for_waits() -> None:
    config = configured()
    config.engine.max_num_seqs = 2
    assert planned(config, speeds()).steps == pytest.approx([2 * 20 + 3 + 10 + 1.0] * 6)


def test_two_actors_share_an_update_and_two_ranks_its_tokens() -> None:
    """Each actor has two rollouts; the one replica scores one actor's after the other's; each rank trains 50 tokens."""
    calibration = speeds(decode=((1, 1.0), (2, 2.0)), token_s=0.1)
    found = planned(configured(actors=2, ranks=2), calibration)
    assert found.steps == pytest.approx([20 * 2.0 + 2 * 3 + 10 + 50 * 0.1 + 1.0] * 6)


ALIKE, BY_NUMBER = ((1, 1.0), (64, 1.0)), ((1, 0.25), (64, 16.0))


@pytest.mark.parametrize(
    ("decode", "length", "train_s", "expected", "busiest"),
    [
        (ALIKE, 4, 100.0, 100.0, LEARNER),  # the learner never waits
        (BY_NUMBER, 40, 7.0, 4 * 40 * 0.25, ACTOR),  # a token costs 0.25 s, beside whatever it is sampled
        # A place is free again when its rollout has trained: two updates take 60 s of sampling and 7 of training.
        (ALIKE, 60, 7.0, (60 + 7) / 2, ACTOR),
    ],
)
def test_at_the_same_time_an_update_takes_as_long_as_the_slower_side(
    decode: Any, length: int, train_s: float, expected: float, busiest: str
) -> None:
    calibration = speeds(decode, train_s=train_s, score_s=0.0, publish=(0.0, 0.0, 0.0))
    found = planned(configured(staleness=1), calibration, length, updates=24)
    assert fmean(found.steps[4:]) == pytest.approx(expected, rel=0.03)  # rollouts begin with a step
    assert found.busy(busiest) > 0.95
    assert {most for _, most in found.staleness[1:]} == {1.0}


def test_who_has_nothing_to_do_counts_too() -> None:
    """Two rollouts for three actors: the third one only loads weights, 0.25 s of 37."""
    found = planned(configured(rollouts=2, actors=3), speeds())
    assert found.busy(ACTOR) == pytest.approx((2 * 20 + 3 * 0.25) / (3 * (20 + 2 * 3 + 10 + 1)))


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("weight_update", ["in_flight", "drain"])
def test_no_rollout_is_older_than_the_bound_and_the_ledger_balances(staleness: int, weight_update: str) -> None:
    config = configured(staleness, rollouts=8, actors=3, samples_per_prompt=2, weight_update=weight_update)
    found = simulate(config, speeds(score_s=0.2), PROMPTS, long_tailed(30, 100, 400), updates=12)
    assert found.faults == []
    assert found.most_stale <= staleness
    assert len(found.steps) == 12


def test_a_drain_waits_for_what_is_being_sampled() -> None:
    """8 rollouts begin at 0 and are there at 20; trained at 30.  Four more begin at 31, and the next publish is drained."""
    calibration = speeds(score_s=0.0)
    drained = planned(configured(staleness=1, weight_update="drain"), calibration)
    at_once = planned(configured(staleness=1), calibration)
    assert drained.steps[:1] == pytest.approx([20 + 10 + 1.0])
    assert drained.steps[1] == pytest.approx(20 + 1.0)  # trains for 10 s, and the drain ends 20 s after its begin
    assert at_once.steps[1] == pytest.approx(10 + 1 + 0.5)  # loaded between two steps: half a second later


def test_a_seed_decides_everything() -> None:
    def found(seed: int) -> list[float]:
        config = configured(staleness=1, rollouts=8, actors=2)
        return simulate(config, speeds(), PROMPTS, long_tailed(30, 100, 400), updates=8, seed=seed).steps

    assert found(1) == found(1)
    assert found(1) != found(2)


def test_who_shares_cores_is_slower_while_the_other_computes() -> None:
    """Two threads on one core: 4 s of work beside 10 take 8, and the 6 that are left of the other go alone."""
    time, ends = VirtualTime(), dict[str, float]()
    cores = Cores(time, 1)
    for name, seconds in (("long", 10.0), ("short", 4.0)):
        cores.start(seconds, 1, lambda name=name: ends.__setitem__(name, time.now_s))  # type: ignore[misc]
    time.spend(100)
    assert ends == {"short": pytest.approx(8.0), "long": pytest.approx(14.0)}


def test_on_two_cores_two_actors_generate_at_full_speed_and_three_do_not() -> None:
    """Of three threads on two cores each has two thirds."""
    for actors, expected in ((2, 20.0), (3, 30.0)):
        calibration = speeds(score_s=0.0, publish=(0.5, 0.0, 0.5), cores=2.0)
        found = planned(configured(rollouts=actors, actors=actors), calibration)
        assert found.steps[-1] == pytest.approx(expected + 10 + 1.0)


def test_the_controller_takes_time_to_hear_of_a_rollout() -> None:
    assert planned(configured(), speeds(driver=(0.5, 2.0))).steps == pytest.approx(
        [20 + 3 + 4 * 0.5 + 2 + 10 + 1.0] * 6
    )


def test_what_is_not_held_from_the_first_pass_is_computed_twice() -> None:
    """Four sequences of 25 tokens, in microbatches of two; one of these is held. Forward: 100 + 100 - 50 tokens of the
    policy, 100 of the value model; and of a policy that trains at once, which needs no value model."""
    calibration = speeds(score_s=0.0, publish=(0.0, 0.0, 0.0))
    phases = {"policy_forward": (0.0, 1.0, 0.0), "policy_backward": (0.0, 0.0, 1.0), "value_forward": (0.0, 2.0, 0.0)}
    config = configured()
    config.learner = LearnerConfig(microbatch_tokens=50, held_tokens=60)
    for estimator, seconds in (("gae", 150 + 2 * 100), ("reinforce_plus_plus", 150), ("raft", 100)):
        config.ppo.estimator = estimator
        found = planned(config, replace(calibration, learner={"any": LearnerSpeed(phases)}))
        assert found.steps == pytest.approx([20 + seconds + 4 * 20] * 6)


def test_a_wait_that_is_too_long_ends_the_simulation_as_the_run() -> None:
    config = configured()
    config.cluster.step_timeout_s = 15.0
    with pytest.raises(TimeoutError, match=r"waited 15 s \(cluster.step_timeout_s\) for 4 rollouts"):
        planned(config, speeds())


# ---- the engine, alone


def token_by_token(lengths: list[int], places: int, step_s: Any, prompt_s: float) -> float:
    """Seconds until all are there, one step after another."""
    waiting, running, seconds = [*lengths], list[int](), 0.0
    while waiting or running:
        begun = waiting[: places - len(running)]
        waiting = waiting[len(begun) :]
        running += begun
        seconds += step_s(len(running)) + prompt_s * len(begun)
        running = [left - 1 for left in running if left > 1]
    return seconds


@pytest.mark.parametrize("places", [1, 3, 7, 64])
@pytest.mark.parametrize("seed", range(5))
def test_steps_that_are_one_event_take_what_they_take_one_by_one(places: int, seed: int) -> None:
    calibration = speeds(((1, 0.3), (5, 0.8), (20, 4.0)), prefill_s=0.07, publish=(0.0, 0.0, 0.0))
    config, lengths = configured(rollouts=24), long_tailed(20, 60, 200)
    config.engine.max_num_seqs = places
    requests = PromptStream([Prompt(i, "", (0,) * 5) for i in range(40)], 1, seed).next_requests(24)
    expected = token_by_token(
        [lengths(r.seed / 2**31) for r in requests], places, calibration.actor["any"].step_s, 5 * 0.07
    )
    found = simulate(config, calibration, PROMPTS, lengths, updates=3, seed=seed)
    assert found.steps[0] == pytest.approx(expected + 3 + 10)


def test_a_token_has_the_version_that_sampled_it() -> None:
    """Weights come in the fifth of ten steps of 1 s, and take 0.5 s after it; those of version 2 come in the last one."""
    time, spans = VirtualTime(), Spans()
    actor = StandInActor(
        0, time, Cores(time, 1), EngineSpeed(0.0, 0.0, ((1, 1.0), (2, 1.0))), EngineLimits(8, 4096, 1),
        lambda request: 10, lambda rollouts, done: done(), spans,
    )  # fmt: skip
    answer = actor.collect.remote(1, 100.0).future()
    actor.assign.remote([Assignment(7, RolloutRequest(0, 0, Prompt(1, "", (1, 2)), 5), ("proxy",))], None)
    time.after(4.5, lambda: actor.load(1, 0.5, lambda: None))
    time.after(10.0, lambda: actor.load(2, 0.5, lambda: None))
    time.spend(50)
    [(lease, rollout)] = answer.result().rollouts
    assert (lease, rollout.completion.policy_versions.tolist()) == (7, [0] * 5 + [1] * 5)
    assert answer.result().generate_s == pytest.approx(10.5)
    kinds = [(kind, pytest.approx(start), pytest.approx(end)) for kind, start, end in spans.lanes[Lane(ACTOR, 0)]]
    assert kinds == [
        ("generate", 0.0, 5.0), ("load weights", 5.0, 5.5), ("generate", 5.5, 10.5), ("load weights", 10.5, 11.0),
    ]  # fmt: skip


@pytest.mark.parametrize(("gpus", "minibatches"), [(0, 1), (0, 3), (1, 1)])
def test_an_update_is_planned_of_the_rows_that_the_learner_makes(gpus: int, minibatches: int) -> None:
    """A second a token that is in a row: of a group's prompt once, but on GPUs."""
    drawn = np.random.default_rng(0)
    prompts = [Prompt(i, "", tuple(drawn.integers(3, 99, 3 + 5 * i).tolist())) for i in range(4)]
    rollouts = []
    for prompt in prompts:
        for sample in range(3):
            count = int(drawn.integers(1, 9))
            zeros = np.zeros(count, dtype=np.int32)
            completion = Completion(zeros + 5, zeros.astype(np.float32), zeros, "stop", "")
            rollouts.append(Rollout((0, prompt.prompt_id, sample), prompt, completion))
    config = configured()
    config.cluster.num_learner_ranks, config.cluster.gpus_per_learner_rank = 1, gpus
    config.ppo.minibatches, config.learner.microbatch_tokens, config.learner.held_tokens = minibatches, 60, 0
    speed = LearnerSpeed({"reference": (0.0, 1.0, 0.0)})
    [planned_s] = update_seconds(config, speed, rollouts, np.random.default_rng(7))
    scores = [0.0] * len(rollouts)
    batch = make_batches(rollouts, scores, 1, minibatches, 60, np.random.default_rng(7))[0]
    rows = [
        Packed.of(mb.sequences, torch.device("cpu"), None if gpus else mb.prompt_lens)
        for microbatches in batch.minibatches
        for mb in microbatches
    ]
    assert planned_s == sum(row.input_ids.shape[1] for row in rows)
    total = sum(r.num_tokens for r in rollouts)
    assert planned_s == total if gpus else planned_s < total
