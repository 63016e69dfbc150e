"""The plan of time: lengths, files and options that it takes or refuses, what it recommends and draws."""

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
from contracts.config import SamplingConfig, TandemConfig
from controller.plan import show
from controller.plan.schedule.calibration import (
    PHASES,
    Calibration,
    CalibrationError,
    EngineSpeed,
    model_shape,
    read_calibration,
    settings,
)
from controller.plan.schedule.completion_lengths import empirical, long_tailed, read_lengths
from controller.plan.schedule.drawing import timeline, write_page
from controller.plan.schedule.recommendation import divisions, recommend
from controller.plan.schedule.simulation import Forecast
from tests.schedules import configured, planned, speeds

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
        (GOOD, ["ppo.ptx_coef=0.5"], "ppo.ptx_coef=0.5: the texts of an optimizer step are not planned"),
        (GOOD, ["cluster.layout=colocated"], "cluster.layout=colocated"),
        (GOOD, ["--updates", "2"], "--updates=2: the first 2 do not count; write 3 or more"),
        (GOOD, ["ppo.updates=2"], "ppo.updates=2: the first 2 do not count"),
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


def test_divisions_that_would_end_a_run_are_left_out() -> None:
    config, calibration = configured(rollouts=8), speeds(score_s=0.0, train_s=0.0, token_s=1.0, publish=(0.0, 0.0, 0.0))
    config.engine.tensor_parallel_size = 1

    def simulated(config: TandemConfig, calibration: Calibration) -> Forecast:
        if config.ppo.rollouts_per_update == 16:
            raise TimeoutError("waited 3 s")
        return planned(config, calibration, updates=8)

    _, tried = recommend(config, calibration, 2, simulated)
    assert {choice.rollouts_per_update for choice in tried} == {4, 8}

    def never(config: TandemConfig, calibration: Calibration) -> Forecast:
        raise TimeoutError("waited 3 s")

    with pytest.raises(CalibrationError, match="2 devices: every run would end: waited 3 s"):
        recommend(config, calibration, 2, never)


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
    assert [*divisions(config, speeds(cores=2.0), 6)] == [(a, r) for a in (1, 2, 3) for r in (1, 2, 4, 6)]


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
