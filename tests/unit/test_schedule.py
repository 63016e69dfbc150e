"""The plan of time: schedules worked out by hand, and the files and options that it refuses."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from contracts.catalogue import catalogue
from contracts.config import ClusterConfig, LearnerConfig, PPOConfig, SamplingConfig, TandemConfig
from contracts.records import Assignment, Prompt, RolloutRequest
from controller.data.prompts import PromptStream
from controller.plan import show
from controller.plan.schedule.calibration import (
    PHASES,
    Calibration,
    CalibrationError,
    DriverSpeed,
    EngineSpeed,
    LearnerSpeed,
    PublishSpeed,
    RewardSpeed,
    model_shape,
    read_calibration,
    settings,
)
from controller.plan.schedule.completion_lengths import empirical, fixed, long_tailed, read_lengths
from controller.plan.schedule.drawing import timeline, write_page
from controller.plan.schedule.recommendation import divisions, recommend
from controller.plan.schedule.simulation import Forecast, simulate
from controller.plan.schedule.spans import ACTOR, LEARNER, REWARD, Lane, Spans
from controller.plan.schedule.stand_in_actor import EngineLimits, StandInActor
from controller.plan.schedule.virtual_time import Cores, VirtualTime

PROMPTS = [5] * 40


def speeds(
    decode: tuple[tuple[int, float], ...] = ((1, 1.0), (64, 1.0)),
    prefill_s: float = 0.0,
    train_s: float = 10.0,
    token_s: float = 0.0,
    score_s: float = 3.0,
    publish: tuple[float, float, float] = (0.5, 0.25, 0.25),
    driver: tuple[float, float] = (0.0, 0.0),
    cores: float | None = None,
    block_tokens: int = 0,
) -> Calibration:
    return Calibration(
        source="stated",
        machine="",
        shape={},
        settings={},
        cores=cores,
        beside=1.0,
        actor={"any": EngineSpeed(0.0, prefill_s, decode, block_tokens)},
        learner={"any": LearnerSpeed({"rest": (train_s, token_s, 0.0)})},
        reward={"any": RewardSpeed(score_s, 0.0)},
        publish={"any": PublishSpeed(*publish)},
        driver=DriverSpeed(*driver),
    )


def configured(staleness: int = 0, rollouts: int = 4, actors: int = 1, ranks: int = 1, **ppo: Any) -> TandemConfig:
    config = TandemConfig(stage="ppo")
    config.ppo = PPOConfig(
        updates=50, rollouts_per_update=rollouts, max_staleness=staleness, gold_rollouts=0, score_batch=rollouts, **ppo
    )
    config.cluster = ClusterConfig(
        num_actors=actors, num_learner_ranks=ranks, threads_per_actor=1, threads_per_learner_rank=1,
        threads_per_reward_replica=1,
    )  # fmt: skip
    config.engine.max_num_seqs = 64
    return config


def planned(config: TandemConfig, calibration: Calibration, length: int = 20, updates: int = 6) -> Forecast:
    found = simulate(config, calibration, PROMPTS, fixed(length, 512), updates=updates)
    assert found.faults == [], "the audit of its ledger"
    return found


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
    """Four sequences of 25 tokens, in microbatches of two; one of these is held. Forward: 100 + 100 - 50 tokens."""
    calibration = speeds(score_s=0.0, publish=(0.0, 0.0, 0.0))
    learner = {"any": LearnerSpeed({"policy_forward": (0.0, 1.0, 0.0), "policy_backward": (0.0, 0.0, 1.0)})}
    config = configured()
    config.learner = LearnerConfig(microbatch_tokens=50, held_tokens=60)
    found = planned(config, replace(calibration, learner=learner))
    assert found.steps == pytest.approx([20 + 150 + 4 * 20] * 6)


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


# ---- lengths


def test_a_long_tail_has_the_mean_and_the_percentile_that_were_asked_for() -> None:
    quantile = long_tailed(100, 250, 10_000)
    drawn = [quantile((i + 0.5) / 20_000) for i in range(20_000)]
    assert fmean(drawn) == pytest.approx(100, rel=0.01)
    assert np.quantile(drawn, 0.95) == pytest.approx(250, rel=0.01)
    assert max(long_tailed(100, 250, 300)(share) for share in (0.5, 0.99, 0.99999)) == 300


def test_lengths_of_a_run_are_those_of_its_samples(tmp_path: Path) -> None:
    rows = [{"stage": "ppo", "tokens": n} for n in range(1, 41)] + [{"stage": "sft", "tokens": 999}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quantile = read_lengths(str(tmp_path), 30)
    assert [quantile(share) for share in (0.0, 0.5, 0.999)] == [1, 21, 30]
    assert empirical([3], 30)(0.7) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere", "there is no such run; write a number of tokens"),
        ("40,30", "95th percentile lies between 40 and"),
        ("40,4000", "lies between 40 and 155"),
        ("0", "write a number of tokens"),
        ("1,2,3", "write a number of tokens"),
    ],
)
def test_lengths_that_say_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_lengths(text, 100)


def test_a_run_with_few_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"samples.jsonl does not exist"):
        read_lengths(str(tmp_path), 10)
    (tmp_path / "samples.jsonl").write_text('{"stage": "ppo", "tokens": 4}\n')
    with pytest.raises(CalibrationError, match=r"1 samples of its PPO are there, 20 are needed"):
        read_lengths(str(tmp_path), 10)


# ---- the calibration's file

TINY = ["model.path=.cache/models/smollm2-135m-instruct", "stage=ppo", "sft_model=x", "proxy_model=y"]
ONE_THREAD = [f"cluster.threads_per_{side}=1" for side in ("actor", "learner_rank", "reward_replica")]
GOOD: dict[str, Any] = {
    "source": "stated",
    "shape": {},
    "cores": 2,
    "actor": {"1": {"call_s": 0, "prefill_s": 0.001, "decode_s": [[1, 0.02], [16, 0.05]]}},
    "learner": {"1": {"phases": {"rest": [1, 0, 0]}}},
    "reward": {"1": {"call_s": 0, "token_s": 0.001}},
    "publish": {"1": {"pack_s": 0, "pause_s": 0.1, "rest_s": 0}},
    "driver": {"rollout_s": 0, "update_s": 0},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    found = json.loads(json.dumps(GOOD))
    *parts, last = path.split("/")
    row = found
    for part in parts:
        row = row[part]
    row[last] = value
    return found


def run_command(capsys: Any, monkeypatch: Any, file: Path, *arguments: str) -> tuple[int, str, str]:
    command = ["plan", "--time", str(file), "--prompt-tokens", "40", *TINY, *ONE_THREAD, *arguments]
    monkeypatch.setattr(sys, "argv", command)
    code = show.main()
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("speed", 1, "speed is not known here; there are source, machine"),
        ("source", "guessed", 'source is "guessed"; write measured or stated'),
        ("source", "measured", "shape.model_type is missing"),
        ("cores", 0, "cores is 0; write a number above 0"),
        ("beside", -1, "beside is -1; write a number above 0"),
        ("actor", {}, "actor is {}; write speeds by threads"),
        ("actor/two", {}, "actor.two: speeds stand by threads"),
        ("actor/1/decode_s", [[1, 0.1]], r"actor.1.decode_s is \[\[1, 0.1\]\]; write at least two points"),
        ("actor/1/decode_s", [[4, 0.1], [1, 0.2]], "actor.1.decode_s: the numbers of requests must grow"),
        ("actor/1/prefill_s", "fast", 'actor.1.prefill_s is "fast"; write a number from 0'),
        ("learner/1/phases", {"thinking": [1, 0, 0]}, "learner.1.phases.thinking is not known here"),
        ("learner/1/phases", {"rest": [1]}, r"learner.1.phases.rest is \[1\]; write three times"),
        ("publish/1", {"pack_s": 0}, "publish.1.pause_s is missing"),
        ("driver", None, "driver is null; write an object of rollout_s, update_s"),
    ],
)
def test_a_file_that_says_nothing_clear_is_refused(path: str, value: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "speeds.json"
    file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(CalibrationError, match=f"speeds.json: {message}"):
        read_calibration(file)


def test_steps_lie_on_lines_between_the_measured_points() -> None:
    speed = EngineSpeed(0.0, 0.5, ((2, 1.0), (4, 2.0), (8, 3.0)))
    assert [speed.step_s(n) for n in (1, 2, 3, 4, 6, 8, 12)] == [1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0]
    assert speed.step_s(2, 3) == 2.5


def test_every_phase_that_is_planned_is_one_that_the_learner_times() -> None:
    assert {f"perf/{phase}_s" for phase in PHASES if phase != "rest"} <= catalogue().keys()


def test_the_command_predicts_and_says_what_it_rests_on(capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """64 rollouts of 40 and 64 tokens: 2560 x 0.001 and 64 steps of 0.146; 1 s; scoring 64 x 105 tokens; loading 0.1."""
    file, page = tmp_path / "speeds.json", tmp_path / "plan.html"
    file.write_text(json.dumps(GOOD))
    code, out, _ = run_command(capsys, monkeypatch, file, "ppo.gold_rollouts=0", "--html", str(page))
    assert code == 0
    assert f"{2.56 + 64 * (0.02 + 63 * 0.002) + 6.72 + 1 + 0.1:.2f} s" in out
    assert "These speeds are stated, not measured" in out
    assert "learner rank 0" in out
    assert page.read_text().count('<h4 class="stage">') == 3
    code, out, _ = run_command(
        capsys,
        monkeypatch,
        file,
        "--json",
        "--lengths",
        "10",
        "--devices",
        "2",
        "ppo.rollouts_per_update=8",
        "ppo.gold_rollouts=8",
    )
    result = json.loads(out)
    assert (code, result["source"], result["staleness_max"]) == (0, "stated", 0.0)
    assert result["recommended"].startswith("cluster.num_actors=")


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (None, [], "does not exist. python benchmarks/calibrate.py"),
        ("{", [], "is no JSON"),
        (changed("shape", {"hidden_size": 64}), [], "of another model: hidden_size is 64, .* has 576"),
        (changed("settings", {"ppo.trainable_layers": 4}), [], "ppo.trainable_layers was 4 and is 10"),
        (GOOD, ["cluster.threads_per_actor=2"], "threads_per_actor=2 has not been measured, 1 has"),
        (GOOD, ["environment=two_turn"], "environment=two_turn: the time of conversations is not planned"),
        (GOOD, ["--updates", "2"], "2 updates: the first 2 do not count"),
        (GOOD, ["--lengths", "x"], "there is no such run"),
        (GOOD, ["cluster.step_timeout_s=3", "cluster.publish_timeout_s=2"], "such a run would end: waited 3 s"),
        (GOOD, ["--devices", "0"], "--devices 0: write a number from 1"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(
    rows: Any, arguments: list[str], message: str, capsys: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    file = tmp_path / "speeds.json"
    if rows is not None:
        file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    code, _, err = run_command(capsys, monkeypatch, file, *arguments)
    assert code == 2
    assert re.search(message, err), err


def test_an_option_of_time_alone_is_refused(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", "--devices", "8"])
    with pytest.raises(SystemExit):
        show.main()
    assert "--devices is of a plan of time: give --time CALIBRATION, too" in capsys.readouterr().err


# ---- recommendation and drawing


def test_the_least_stale_of_what_is_as_fast_is_recommended() -> None:
    """A learner of 100 s never waits for 20 s of sampling, if it need not wait for those in turns: staleness 1 is enough,
    and of batches whose cost is by tokens the smallest is as fast."""
    calibration = replace(speeds(score_s=0.0, train_s=0.0, token_s=1.0, publish=(0.0, 0.0, 0.0)))
    config = configured(rollouts=8)
    config.engine.tensor_parallel_size = 1
    best, tried = recommend(config, calibration, 2, lambda c, k: planned(c, k, updates=8))
    assert (best.actors, best.ranks, best.max_staleness, best.rollouts_per_update) == (1, 1, 1, 4)
    rates = [choice.forecast.rollouts_per_s for choice in tried]
    assert rates == sorted(rates, reverse=True)
    assert best.forecast.rollouts_per_s >= 0.97 * rates[0]


def test_devices_are_divided_whole() -> None:
    config = configured()
    config.engine.tensor_parallel_size, config.cluster.gpus_per_reward_replica = 2, 0.5
    assert [*divisions(config, speeds(), 8)] == [(1, 5), (2, 3), (3, 1)]  # one is the scorer's
    many = [*divisions(config, speeds(), 1000)]
    assert len(many) == 8
    assert all(2 * actors + ranks == 999 and ranks > 0 for actors, ranks in many)
    with pytest.raises(CalibrationError, match="3 devices are too few for an actor"):
        next(divisions(config, speeds(), 3))
    config.cluster.threads_per_actor = 2
    assert [*divisions(config, speeds(cores=2.0), 2)] == [(1, 1), (1, 2)]


def test_the_timeline_shows_who_worked() -> None:
    lines = [str(line) for line in timeline(planned(configured(), speeds()))]
    assert lines[0].startswith("actor 0")
    # Of three updates of 34 s on 84 columns: 20 s generate, 10 s train, 3 s score.
    assert lines[0].count("▆") == pytest.approx(84 * 20 / 34, abs=3)
    assert lines[1].count("█") == pytest.approx(84 * 10 / 34, abs=3)
    assert lines[2].count("▒") == pytest.approx(84 * 3 / 34, abs=3)
    assert lines[3].count("|") == 3


def test_the_page_can_be_written_for_many_actors(tmp_path: Path) -> None:
    found = planned(configured(rollouts=32, actors=16), speeds())
    write_page(found, speeds(), tmp_path / "plan.html")
    assert "actor 3" in (page := (tmp_path / "plan.html").read_text())
    assert "actor 4" not in page


def test_shape_and_settings_are_those_of_the_configuration() -> None:
    config = show.read_config([*TINY, "ppo.trainable_layers=7"])
    assert model_shape(config)["hidden_size"] == 576
    assert settings(config)["ppo.trainable_layers"] == 7
    config.ppo.sampling = SamplingConfig(max_completion_tokens=9)
    assert settings(config)["model.lora"] is None
