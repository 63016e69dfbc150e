"""Where a run stands: `python -m controller.status RUN`, from the files of its directory alone.

The driver keeps RUN/status.json: state, what it waits for, and a heartbeat. Reading it takes no connection to the job, so it
works beside a running one, after a crash, and on any machine that sees the directory.

    state       running | done | failed | refused | interrupted; a running one without a heartbeat is reported as "lost"
    objective   what a sweep maximises (controller.objective), where it was measured
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
from typing import Any

import psutil

NAME = "status.json"
BEAT_S = 5.0
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
        self._facts["started"] = time.time()
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
            interrupted = issubclass(kind, KeyboardInterrupt)
            self.end("interrupted" if interrupted else "failed", error=f"{kind.__name__}: {error}")
        self.end("done")

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            self._write()

    def _write(self) -> None:
        what, seconds = self._waiting()
        row = self._facts | {"beat": time.time(), "waiting_for": what, "waiting_s": round(seconds, 1)}
        partial = self._path.with_name(f".{NAME}.{os.getpid()}")
        partial.write_text(json.dumps(row) + "\n")
        os.replace(partial, self._path)


@dataclass(frozen=True)
class Status:
    """What status.json says; an empty state means that there is none."""

    state: str
    facts: dict[str, Any]

    @property
    def beat_age_s(self) -> float | None:
        return time.time() - self.facts["beat"] if "beat" in self.facts else None


def read_status(run_dir: str | Path) -> Status:
    """The status of a run directory. A job that says "running" but is gone, or silent for long, is "lost"."""
    try:
        facts = json.loads((Path(run_dir) / NAME).read_text())
    except (FileNotFoundError, ValueError):
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
    from controller.progress import format_update, spoken
    from controller.report.alarms import evaluate
    from controller.report.data import ReportError, load, number

    status = read_status(run_dir)
    facts, words = status.facts, []
    if facts:
        took = (facts.get("ended") or time.time()) - facts["started"]
        words.append(f"{status.state} for {spoken(took)}" if status.state == "running" else status.state)
        if status.state == "running" and facts.get("waiting_for"):
            words.append(f"waiting for: {facts['waiting_for']} ({spoken(facts['waiting_s'])})")
        if status.state in ("running", "lost"):
            words.append(f"last heartbeat {spoken(max(0.0, status.beat_age_s or 0.0))} ago (pid {facts.get('pid')})")
        if facts.get("error"):
            words.append(str(facts["error"]))
    try:
        run = load(run_dir)
    except ReportError:
        if not facts:
            raise
        return [f"{run_dir}: {'; '.join(words)}", "no metrics yet"]
    out = [f"{run.name} ({run_dir}): {'; '.join(words) or 'no status.json: an older run'}"]
    if run.phases and status.state in ("running", "lost"):
        done = run.phases[-1]
        out.append(f"finished last: {done.get('stage')}: {done.get('phase')}")
    last = run.metrics[-1] if run.metrics else {}
    ppo = [row for row in run.metrics if row.get("stage") in ("ppo", "value_warmup")]
    if ppo:
        last = ppo[-1]
        planned = number(run.setting("ppo.updates"))
        of = f" of {planned:.0f}" if planned is not None else ""
        eta = number(last.get("progress/eta_s")) if status.state == "running" else None
        out.append(f"version {last.get('progress/version', 0):.0f}{of}: {format_update(last, eta)}")
    elif last:
        out.append(f"stage {last.get('stage')}, step {last.get('step')}")
    if facts.get("objective") is not None:
        out.append(f"objective {facts['objective']:+.3f} (gold gain at bounded KL)")
    return out + _alarm_lines(run, evaluate)


def _alarm_lines(run: Any, evaluate: Callable[[Any], Any]) -> list[str]:
    found, _, _ = evaluate(run)
    return [f"{'ALARM' if a.severity == 'alarm' else 'note'}: {a.title}. {a.finding} Try: {a.advice}" for a in found]


def main(arguments: list[str] | None = None) -> int:
    from controller.report.data import ReportError

    parser = argparse.ArgumentParser(prog="python -m controller.status", description="Where a run stands.")
    parser.add_argument("run", type=Path, nargs="+", metavar="RUN", help="run directory, running or not")
    try:
        for run in parser.parse_args(arguments).run:
            print("\n".join(lines_of(run)))
    except ReportError as error:
        print(f"status: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
