"""Where a run stands: `python -m controller.status RUN`, from the files of its directory alone.

The driver keeps RUN/status.json: state, what it waits for, and a heartbeat. Reading it takes no connection to the job, so it
works beside a running one, after a crash, and on any machine that sees the directory.

    state       running | done | failed | refused | interrupted; a running one without a heartbeat is reported as "lost"
"""

import argparse
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from common.files.code_digest import code_digest
from common.files.durable import replace_text
from controller.alarms.rules import evaluate
from controller.record.reader import ReportError, Run, load, number, runs_in
from controller.record.terminal import format_update, spoken

NAME = "status.json"
BEAT_S = 5.0
OVERDUE = 3  # median steps without a new version before it is an alarm
SILENT_S = 12 * BEAT_S  # without a heartbeat a running job counts as lost

Waiting = tuple[str, float]  # what for, and for how many seconds


class StatusFile:
    """Writes RUN/status.json: at once when the state changes, and every `BEAT_S` from a thread of its own."""

    def __init__(self, run_dir: str | Path, waiting: Callable[[], Waiting], beat_s: float = BEAT_S) -> None:
        self._path = Path(run_dir) / NAME
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._waiting, self._beat_s = waiting, beat_s
        self._ended = threading.Event()
        self._facts: dict[str, Any] = {"state": "running", "pid": os.getpid(), "host": socket.gethostname()}
        self._facts |= {"started": time.time(), "code": code_digest()}
        self._write()
        self._thread = threading.Thread(target=self._beat, name="status-heartbeat", daemon=True)
        self._thread.start()

    def end(self, state: str, **facts: Any) -> None:
        """Write the last state. Only the first call counts, so that a handler further out cannot overwrite the cause."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        self._facts |= {"state": state, "ended": time.time(), **facts}
        self._write()

    def __enter__(self) -> "StatusFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is not None:
            interrupted = not issubclass(kind, Exception)  # SIGINT, or the SystemExit that Ray makes of SIGTERM
            self.end("interrupted" if interrupted else "failed", error=f"{kind.__name__}: {error}")
        self.end("done")

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            self._write()

    def _write(self) -> None:
        what, seconds = self._waiting()
        row = self._facts | {"beat": time.time(), "waiting_for": what, "waiting_s": round(seconds, 1)}
        replace_text(self._path, json.dumps(row) + "\n")


@dataclass(frozen=True)
class Status:
    """What status.json says; an empty state means that there is none."""

    state: str
    facts: dict[str, Any]


def read_status(run_dir: str | Path) -> Status:
    """The status of a run directory. A job that says "running" but is gone, or silent for long, is "lost"."""
    try:
        facts = json.loads((Path(run_dir) / NAME).read_text())
    except (FileNotFoundError, ValueError):
        facts = {}
    if not isinstance(facts, dict):
        return Status("", {})
    state = str(facts.get("state", ""))
    if state == "running":
        here = facts.get("host") == socket.gethostname()
        gone = here and not psutil.pid_exists(int(facts.get("pid", 0)))
        if gone or time.time() - float(facts.get("beat", 0.0)) > SILENT_S:
            state = "lost"
    return Status(state, facts)


def lines_of(run_dir: Path) -> list[str]:
    """What a person wants to know of a run: state, place, progress, alarms.

    Raises:
        ReportError: there is nothing in the directory to speak about.
    """
    status = read_status(run_dir)
    state = _state_in_words(status)
    try:
        run = load(run_dir)
    except ReportError:
        if not state:
            raise
        return [f"{run_dir}: {state}", "no metrics yet"]
    out = [f"{run.name} ({run_dir}): {state or 'no status.json'}"]
    if run.phases and status.state in ("running", "lost"):
        done = run.phases[-1]
        out.append(f"finished last: {done.get('stage')}: {done.get('phase')}")
    out += _progress(run, status)
    if run.objective is not None:
        out.append(f"objective {run.objective:+.3f} (gold gain at bounded KL)")
    found, _, _ = evaluate(run)
    out += [f"{'ALARM' if a.severity == 'alarm' else 'note'}: {a.title}. {a.finding} Try: {a.advice}" for a in found]
    return out


def _state_in_words(status: Status) -> str:
    facts = status.facts
    if not facts:
        return ""
    words = [status.state]
    if status.state == "running":
        words = [f"running for {spoken(time.time() - facts['started'])}"]
        if facts.get("waiting_for"):
            words.append(f"waiting for: {facts['waiting_for']} ({spoken(facts['waiting_s'])})")
    if status.state in ("running", "lost"):
        words.append(f"last heartbeat {spoken(max(0.0, time.time() - facts['beat']))} ago (pid {facts.get('pid')})")
    return "; ".join([*words, *([str(facts["error"])] if facts.get("error") else [])])


def _progress(run: Run, status: Status) -> list[str]:
    """The last line of the log in words, and whether the next one is overdue."""
    ppo = [row for row in run.metrics if row.get("stage") in ("ppo", "value_warmup")]
    if not ppo:
        return [f"stage {run.metrics[-1].get('stage')}, step {run.metrics[-1].get('step')}"] if run.metrics else []
    planned = number(run.setting("ppo.updates"))
    running = status.state == "running"
    line = format_update(ppo[-1], number(ppo[-1].get("progress/eta_s")) if running else None)
    if planned is not None:
        line = line.replace(" |", f" of {planned:.0f} |", 1)
    out = [line]
    steps = [value for row in ppo if (value := number(row.get("perf/step_s"))) is not None]
    silent_s = time.time() - (run.path / "metrics.jsonl").stat().st_mtime
    if running and run.metrics[-1] is ppo[-1] and steps and silent_s > OVERDUE * median(steps):
        out.append(
            f"ALARM: No new version for {spoken(silent_s)}, over {OVERDUE} times the median step ({spoken(median(steps))}). "
            "Try: see what it waits for above; cluster.step_timeout_s ends it if it hangs."
        )
    return out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m controller.status", description="Where a run stands.")
    parser.add_argument(
        "run", type=Path, nargs="+", metavar="RUN", help="run directory, running or not, or that of a sweep"
    )
    code = 0
    for path in parser.parse_args(arguments).run:
        for run in runs_in(path) or [path]:
            try:
                print("\n".join(lines_of(run)))
            except ReportError as error:
                print(f"status: {error}", file=sys.stderr)
                code = 2
    return code
