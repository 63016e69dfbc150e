import json
import sys
import time
from pathlib import Path

import pytest

from contracts.config import LoggerConfig
from contracts.trackers import Tracker
from controller.alarms.live import tell_alarms
from controller.record.redaction import REDACTED, redacted
from controller.record.run_log import RunLog

pytestmark = pytest.mark.usefixtures("made_up_metrics")

CANARY = "canary-3f9c1d77"


def lines(path: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


class Ticks:
    """A clock that moves one second for each look at it."""

    def __init__(self) -> None:
        self.now = 99.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def disabled() -> LoggerConfig:
    return LoggerConfig(wandb="disabled")


def test_lines_are_json_and_on_disk_at_once(tmp_path, disabled):
    log = RunLog(tmp_path, {}, disabled, "ppo", clock=Ticks())
    log.log("ppo", 3, {"kl/ref_seq": 2.5, "policy/loss": float("nan"), "value/loss": float("inf"), "policy/lr": None})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"stage": "ppo", "step": 3, "wall_s": 1.0, "kl/ref_seq": 2.5}
        | {"policy/loss": None, "value/loss": None, "policy/lr": None}
    ]
    log.samples([{"stage": "ppo", "step": 3, "prompt": "a ", "completion": "日本", "proxy": float("nan"), "eos": True}])
    assert lines(tmp_path / "samples.jsonl")[0] == {
        "stage": "ppo", "step": 3, "prompt": "a ", "completion": "日本", "proxy": None, "eos": True,
    }  # fmt: skip
    log.close()
    log.close()


def test_a_phase_is_recorded_also_where_it_fails(tmp_path, disabled):
    with RunLog(tmp_path, {}, disabled, "ppo", clock=Ticks()) as log:
        with log.phase("ppo", "generate"):
            pass
        with pytest.raises(ValueError, match="stop"), log.phase("ppo", "train"):
            raise ValueError("stop")
    assert lines(tmp_path / "phases.jsonl") == [
        {"stage": "ppo", "phase": "generate", "start_s": 1.0, "end_s": 2.0},
        {"stage": "ppo", "phase": "train", "start_s": 3.0, "end_s": 4.0},
    ]


def test_a_resumed_run_appends_behind_a_torn_line(tmp_path, disabled):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "ppo", "step": 1}\n{"stage": "pp')
    with RunLog(tmp_path, {}, disabled, "ppo") as log:
        log.log("ppo", 2, {"policy/loss": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(text) == 3
    assert json.loads(text[2])["step"] == 2


def test_redacted_hides_secrets_and_keeps_token_counts():
    config = {
        "api_key": CANARY,
        "hfToken": CANARY,
        "password": 12345,
        "nested": [{"client_secret": {"value": CANARY}}],
        "url": f"https://user:{CANARY}@host/path",
        "max_tokens": 512,
        "microbatch_tokens": 2048,
        "monkeys": None,
        "name": "demo",
    }
    assert redacted(config) == {
        "api_key": REDACTED,
        "hfToken": REDACTED,
        "password": REDACTED,
        "nested": [{"client_secret": {"value": REDACTED}}],
        "url": f"https://{REDACTED}@host/path",
        "max_tokens": 512,
        "microbatch_tokens": 2048,
        "monkeys": None,
        "name": "demo",
    }


def test_offline_wandb_run_holds_the_metrics_and_no_secret_and_no_text(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", f"extra.api_key={CANARY}"])
    config = {"name": "demo", "ppo": {"updates": 7}, "extra": {"api_key": CANARY}}
    with RunLog(tmp_path, config, LoggerConfig(), "ppo") as log:
        log.log("reward_model/proxy", 1, {"reward_model/loss": 0.693})
        log.log("reward_model/gold", 1, {"reward_model/loss": 0.512})
        log.log("ppo", 1, {"reward/score_mean": 0.25, "kl/ref_seq": float("nan")})
        log.samples([{"stage": "ppo", "step": 1, "prompt": "private-prompt-text", "completion": "x", "proxy": 0.1}])
    assert not log.tracker_faults
    files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    stored_file = next(path for path in files if path.name.endswith(".wandb"))
    # wandb's service process writes the file; on busy cores it may still be at it when `finish` returns.
    end = time.monotonic() + 20
    while b"reward_model/gold/loss" not in (stored := stored_file.read_bytes()) and time.monotonic() < end:
        time.sleep(0.2)
    for name in (b"reward_model/proxy/loss", b"reward_model/gold/loss", b"reward/score_mean", b"progress/version"):
        assert name in stored
    for path in [*files, tmp_path / "metrics.jsonl"]:
        assert CANARY.encode() not in path.read_bytes(), path
        assert b"private-prompt-text" not in path.read_bytes(), path
    assert capfd.readouterr() == ("", "")


class FailingTracker(Tracker):
    """Fails at every call, as a full disk would."""

    def log(self, values: dict[str, float], *, stage: str, step: int, wall_s: float) -> None:
        raise ConnectionError("the service is gone")


def test_a_fault_of_a_tracker_is_counted_said_once_and_never_raised(tmp_path, capsys):
    name = f"{__name__}:FailingTracker"
    with RunLog(tmp_path, {}, LoggerConfig(trackers=[name]), "ppo") as log:
        for step in (1, 2):
            log.log("ppo", step, {"policy/loss": float(step)})
    rows = lines(tmp_path / "metrics.jsonl")
    assert [row[f"fault/{name}"] for row in rows if row["stage"] == "faults"] == [1, 2]
    assert [row["policy/loss"] for row in rows if row["stage"] == "ppo"] == [1.0, 2.0]
    assert capsys.readouterr().err.count("the service is gone") == 1


def test_an_unknown_wandb_mode_does_not_stop_the_run(tmp_path, capsys):
    with RunLog(tmp_path, {}, LoggerConfig(wandb="nonsense"), "ppo") as log:
        log.log("ppo", 1, {"policy/loss": 1.0})
    assert log.tracker_faults == {"wandb": 1}
    assert lines(tmp_path / "metrics.jsonl")[0]["policy/loss"] == 1.0
    assert [row["fault/wandb"] for row in lines(tmp_path / "metrics.jsonl") if row["stage"] == "faults"] == [1]
    assert "wandb init failed" in capsys.readouterr().err


def test_back_to_a_mark(tmp_path, disabled):
    with RunLog(tmp_path, {}, disabled, "ppo") as log:
        log.log("value_warmup", 0, {"x": 0.0})
        log.log("ppo", 1, {"x": 1.0})
        log.samples([{"stage": "ppo", "text": "kept\u2028\x85 in one line"}])
        mark = log.mark("ppo")
        log.log("ppo", 2, {"x": 2.0})
        log.samples([{"stage": "ppo", "text": "gone"}])
        with log.phase("ppo", "gone"):
            pass
        log.cut("ppo", mark)
        log.log("ppo", 2, {"x": 3.0})
    assert mark == {"metrics.jsonl": 2, "samples.jsonl": 1, "phases.jsonl": 0}
    assert [row["x"] for row in lines(tmp_path / "metrics.jsonl")] == [0.0, 1.0, 3.0]
    [kept] = (tmp_path / "samples.jsonl").read_text().rstrip("\n").split("\n")
    assert json.loads(kept)["text"] == "kept\u2028\x85 in one line"
    assert (tmp_path / "phases.jsonl").read_text() == ""


def test_a_mark_holds_whatever_becomes_of_the_lines_of_other_stages(tmp_path, disabled):
    """SFT was made again with other settings after PPO's commit: its lines move behind PPO's, and none is lost."""
    with RunLog(tmp_path, {}, disabled, "ppo") as log:
        for step in (1, 2, 3):
            log.log("sft", step, {"x": 1.0})
        log.log("ppo", 1, {"x": 1.0})
        mark = log.mark("ppo")
        log.log("ppo", 2, {"x": 1.0})
        log.log("evaluate", 0, {"x": 1.0})
    with RunLog(tmp_path, {}, disabled, "ppo", attempt=2) as log:
        log.forget("sft")
        log.log("sft", 1, {"x": 2.0})
        log.cut("ppo", mark)
        assert log.mark("ppo") == mark
    rows = [(row["stage"], row["step"], row["x"]) for row in lines(tmp_path / "metrics.jsonl")]
    assert rows == [("ppo", 1, 1.0), ("evaluate", 0, 1.0), ("sft", 1, 2.0)]


def test_a_stage_that_begins_anew_has_no_lines_of_a_longer_attempt(tmp_path, disabled):
    with RunLog(tmp_path, {}, disabled, "preference") as log:
        for step in range(1, 6):
            log.log("preference", step, {"x": 1.0})
    (tmp_path / "metrics.jsonl").open("a").write('{"stage": "preference", "st')  # killed
    with RunLog(tmp_path, {}, disabled, "preference", attempt=2) as log:
        log.forget("preference")
        log.log("preference", 1, {"x": 2.0})
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2
    assert [row["x"] for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()[1:])] == [2.0]


def test_attempts_of_a_run_are_wandb_runs_of_one_group(tmp_path):
    for attempt in (1, 2):
        with RunLog(tmp_path / "a run", {"name": "demo"}, LoggerConfig(), "ppo", attempt=attempt) as log:
            assert log.wandb_id == f"demo-a-run-a{attempt}"
    names = sorted(path.name.rsplit("-", 4)[-4:] for path in (tmp_path / "a run/wandb").glob("offline-run-*"))
    assert [name[-1] for name in names] == ["a1", "a2"]


def test_an_alarm_is_told_once_when_it_first_fires(tmp_path, disabled):
    told = []
    with RunLog(tmp_path, {}, disabled, "ppo") as log:
        tell_alarms(log, {}, told.append)
        for version, clipped in enumerate([0.1, 0.4, 0.5, 0.4]):
            log.log("ppo", version, {"policy/clipfrac": clipped, "progress/version": version})
            log.log("sft", version, {"policy/clipfrac": 0.9})
    assert [alarm.title for alarm in told] == ["Much of every batch is clipped"]
    assert "first at version 1" in told[0].finding


def test_a_trend_goes_on_from_the_attempts_before(tmp_path, disabled):
    """The score has risen to 1 in the first attempt, is taken back to the commit of version 30, and falls in the second."""
    told = []
    for attempt, scores in ((1, [0.0] * 5 + [1.0] * 30), (2, [0.5] * 5)):
        with RunLog(tmp_path, {}, disabled, "ppo", attempt=attempt) as log:
            tell_alarms(log, {}, told.append)
            if attempt == 2:
                log.cut("ppo", {"metrics.jsonl": 31})
            for version, score in enumerate(scores, 0 if attempt == 1 else 30):
                if version == 0:
                    log.log("value_warmup", 0, {"reward/score_mean": 9.0, "progress/version": 0})
                log.log("ppo", version + 1, {"reward/score_mean": score, "progress/version": version})
    assert [alarm.title for alarm in told] == ["The score falls from its best"]
    assert "was 1.00 at its best" in told[0].finding


def test_a_resumed_run_tells_no_alarm_of_the_attempts_before_again(tmp_path, disabled):
    """Of those that the second attempt meets, repetition alone is new; clipping had passed by then and comes back."""
    told = []
    for attempt, rows in ((1, [(0.4, 0.0)] * 2 + [(0.1, 0.0)] * 60), (2, [(0.1, 0.0), (0.5, 0.4)])):
        with RunLog(tmp_path, {}, disabled, "ppo", attempt=attempt) as log:
            tell_alarms(log, {}, lambda alarm, attempt=attempt: told.append((attempt, alarm.title)))
            for version, (clipped, repeated) in enumerate(rows, 1 if attempt == 1 else 63):
                values = {"policy/clipfrac": clipped, "completion/repeat_frac": repeated}
                log.log("ppo", version, values | {"progress/version": version})
    assert told == [(1, "Much of every batch is clipped"), (2, "Completions repeat themselves")]
