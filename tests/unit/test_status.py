"""status.json of a run, and what `python -m controller.status` says of it."""

import json
import os
import socket
import time
from pathlib import Path

import pytest

from controller.record.status_file import SILENT_S, StatusFile, read_status
from controller.report.status import lines_of, main
from tests.unit.test_report import jsonl


def waiting() -> tuple[str, float]:
    return "rollouts of update 3", 12.0


def test_a_running_job_beats_and_ends_once(tmp_path: Path) -> None:
    with StatusFile(tmp_path, waiting, beat_s=0.05) as status:
        first = json.loads((tmp_path / "status.json").read_text())
        assert (first["state"], first["pid"], first["waiting_for"]) == ("running", os.getpid(), "rollouts of update 3")
        end = time.monotonic() + 5
        while json.loads((tmp_path / "status.json").read_text())["beat"] == first["beat"] and time.monotonic() < end:
            time.sleep(0.02)
        assert json.loads((tmp_path / "status.json").read_text())["beat"] > first["beat"]
        assert read_status(tmp_path).state == "running"
        status.end("refused", error="no such key")
        status.end("failed")  # the first word counts
    found = read_status(tmp_path)
    assert (found.state, found.facts["error"]) == ("refused", "no such key")
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    ("error", "state"),
    [(ValueError("no"), "failed"), (KeyboardInterrupt(), "interrupted"), (SystemExit(15), "interrupted")],
)
def test_what_ends_a_run_is_kept(error: BaseException, state: str, tmp_path: Path) -> None:
    with pytest.raises(type(error)), StatusFile(tmp_path, waiting):
        raise error
    assert read_status(tmp_path).state == state
    assert type(error).__name__ in read_status(tmp_path).facts["error"]


def running(tmp_path: Path, pid: int, beat_age_s: float, host: str | None = None) -> str:
    facts = {"state": "running", "pid": pid, "host": host or socket.gethostname(), "started": time.time() - 600}
    facts |= {"beat": time.time() - beat_age_s, "waiting_for": "vLLM", "waiting_s": 3.0}
    (tmp_path / "status.json").write_text(json.dumps(facts))
    return read_status(tmp_path).state


def test_a_job_that_is_gone_or_silent_is_lost(tmp_path: Path) -> None:
    assert running(tmp_path, os.getpid(), 1.0) == "running"
    assert running(tmp_path, 2**22 - 3, 1.0) == "lost"  # no such process here
    assert running(tmp_path, 2**22 - 3, 1.0, host="elsewhere") == "running"  # its processes are not seen from here
    assert running(tmp_path, os.getpid(), SILENT_S + 5) == "lost"


def test_the_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running(tmp_path, os.getpid(), 2.0)
    (tmp_path / "config.yaml").write_text("name: demo\nppo: {updates: 32}\n")
    rows = [
        {"stage": "ppo", "step": v, "wall_s": 10.0 * v, "progress/version": v, "progress/eta_s": 10.0 * (32 - v)}
        | {"reward/score_mean": 0.25, "kl/ref_seq": 1.5, "policy/clipfrac": 0.4, "perf/step_s": 10.0}
        for v in range(1, 5)
    ]
    jsonl(tmp_path / "metrics.jsonl", rows)
    assert main([str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"demo ({tmp_path}): running for 10 min; waiting for: vLLM (3.0 s); last heartbeat 2.")
    assert said[1] == "version 4 of 32 | 10.0 s | score 0.25 | KL 1.5 | ETA 5 min"
    assert said[2].startswith("ALARM: Much of every batch is clipped. policy/clipfrac above 0.3 in 4 of 4 versions")
    old = time.time() - 31
    os.utime(tmp_path / "metrics.jsonl", (old, old))
    assert "ALARM: No new version for 31 s" in "\n".join(lines_of(tmp_path))
    (tmp_path / "config.yaml").write_text("name: demo\nppo: {updates: 4}\n")  # the last version: evaluation comes next
    assert "No new version" not in "\n".join(lines_of(tmp_path))
    (tmp_path / "config.yaml").write_text("name: demo\nppo: {updates: 32}\n")
    # A run that was resumed a moment ago has not been silent for as long as it did not run.
    facts = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps(facts | {"started": time.time() - 20}))
    assert "No new version" not in "\n".join(lines_of(tmp_path))


def test_a_run_that_is_not_in_the_loop_says_nothing_of_the_loop_of_an_earlier_attempt(tmp_path: Path) -> None:
    running(tmp_path, os.getpid(), 2.0)
    earlier = [{"stage": "ppo", "step": v, "progress/version": v, "policy/clipfrac": 0.4} for v in range(3)]
    jsonl(tmp_path / "metrics.jsonl", [*earlier, {"stage": "sft", "step": 7}])
    assert lines_of(tmp_path)[1:] == ["stage sft, step 7"]
    # What comes after the loop, and what a tracker meets, is no earlier stage.
    for later in ("value_warmup", "evaluate", "faults"):
        jsonl(tmp_path / "metrics.jsonl", [*earlier, {"stage": later, "step": 7}])
        assert "ALARM: Much of every batch is clipped" in "\n".join(lines_of(tmp_path))


def test_text_of_a_run_is_nothing_that_a_terminal_obeys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"state": "failed", "error": "no \x1b]0;title\x07\x9b2J\rdone\nsecond line"}
    (tmp_path / "status.json").write_text(json.dumps(facts))
    (tmp_path / "config.yaml").write_text('name: "demo \\e[31m"\n')
    jsonl(tmp_path / "metrics.jsonl", [{"stage": "sft\x1b[2J", "step": 1}])
    assert main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert [c for c in said if ord(c) < 32 or 127 <= ord(c) < 160] == ["\n"] * 3
    assert said.startswith("demo \ufffd[31m (")
    assert "no \ufffd]0;title\ufffd\ufffd2J\ufffddone\nsecond line" in said


def test_a_directory_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "status: " in capsys.readouterr().err
    running(tmp_path, os.getpid(), 0.0)
    assert lines_of(tmp_path)[1] == "no metrics yet"
