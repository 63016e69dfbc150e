"""RUN/status.json: state, what a run waits for, and a heartbeat. Reading it takes no connection to the job, so it works
beside a running one, after a crash, and on any machine that sees the directory.

    state       running | done | failed | refused | interrupted; a running one without a heartbeat is reported as "lost"
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from common.files.code_digest import code_digest
from common.files.durable import replace_text
from controller.record.number_text import number

NAME = "status.json"
BEAT_S = 5.0
TIMES = ("started", "beat", "waiting_s", "ended")  # in seconds
SILENT_S = 12 * BEAT_S  # without a heartbeat a running job counts as lost

Waiting = tuple[str, float]  # what for, and for how many seconds


def end_state(kind: type[BaseException] | None) -> str:
    """How a run has ended that left with this kind of error, or with none."""
    if kind is None:
        return "done"
    # What is no Exception is SIGINT, or the SystemExit that Ray makes of SIGTERM.
    return "failed" if issubclass(kind, Exception) else "interrupted"


class StatusFile:
    """Writes RUN/status.json: at once when the state changes, and every `BEAT_S` from a thread of its own."""

    def __init__(self, run_dir: str | Path, waiting: Callable[[], Waiting], beat_s: float = BEAT_S) -> None:
        self._path = Path(run_dir) / NAME
        self._before = read_status(run_dir)
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

    def refuse(self, error: str, has_begun: bool) -> None:
        """Of a start that has changed nothing the status is that of the attempt before, if there was one."""
        if has_begun or self._before.state in ("", "refused"):
            self.end("refused", error=error)
        elif not self._ended.is_set():
            self._ended.set()
            self._thread.join()
            replace_text(self._path, json.dumps(self._before.facts) + "\n")

    def __enter__(self) -> "StatusFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.end(end_state(kind), **({"error": f"{kind.__name__}: {error}"} if kind is not None else {}))

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
    """The status of a run directory. A job that says "running" but is gone, or silent for long, is "lost". Times that are no
    numbers are none; a file that cannot be read, or that others have written over, says nothing."""
    try:
        facts = json.loads((Path(run_dir) / NAME).read_text())
    except (OSError, ValueError, RecursionError):
        facts = {}
    if not isinstance(facts, dict):
        return Status("", {})
    facts = {name: number(value) if name in TIMES else value for name, value in facts.items()}
    state, pid, beat = str(facts.get("state", "")), facts.get("pid"), facts.get("beat")
    if state == "running":
        here = facts.get("host") == socket.gethostname()
        known = isinstance(pid, int) and 0 < pid < 2**31
        gone = here and not (known and psutil.pid_exists(pid))
        if gone or beat is None or time.time() - beat > SILENT_S:
            state = "lost"
    return Status(state, facts)
