"""Trackers in threads behind queues, so that a slow, full or broken one never holds up a run.

RunLog ── put, never waits ──> queue ──> thread: Tracker(run), log, samples, artifact, alert, end
"""

import contextlib
import json
import queue
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contracts.config import LoggerConfig
from contracts.plugins import find
from contracts.trackers import TRACKERS, TrackedRun, Tracker
from controller.record.redaction import redacted

MOST_QUEUED = 20_000  # calls that wait; beyond them a tracker's copy has gaps
MOST_ID = 110  # characters, without the attempt; wandb takes 128


class TrackerThread:
    """All methods return at once; `join` waits for what is queued."""

    def __init__(
        self,
        name: str,
        kind: type[Tracker],
        run_dir: Path,
        config: dict[str, Any],
        logger: LoggerConfig,
        job_type: str,
        *,
        attempt: int = 1,
    ) -> None:
        """`attempt` counts the starts of one run."""
        self.name = name
        plain = redacted(config)
        title = str(plain.get("name") or run_dir.name)
        group = re.sub(r"[^\w.-]+", "-", f"{title}-{run_dir.resolve().name}")[-MOST_ID:]
        self._faults: queue.SimpleQueue[tuple[str, BaseException]] = queue.SimpleQueue()
        self.run = TrackedRun(
            path=run_dir,
            name=title,
            id=f"{group}-a{attempt}",
            group=logger.group or group,
            job_type=job_type,
            config=plain,
            logger=logger,
            tolerate=lambda action, error: self._faults.put((action, error)),
        )
        self._kind = kind
        self._state = "done"
        self._end = 0.0  # until when, on the monotonic clock, `join` waits
        self._calls: queue.Queue[tuple[str, Callable[[Tracker], None]] | None] = queue.Queue(MOST_QUEUED)
        # A daemon: not even a call that hangs for ever keeps the process alive.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        stage, step, wall_s = row["stage"], row["step"], row["wall_s"]
        values = {k: v for k, v in row.items() if k not in ("stage", "step", "wall_s") and v is not None}
        if stage == "ppo":
            # `step` counts the updates that only fit the value model, too.
            step = int(values.get("progress/version", step))
        else:
            # Both reward models log `reward_model/loss`; a tool has one name space, so the stage tells them apart.
            short = f"{stage.partition('/')[0]}/"
            values = {f"{stage}/{name.removeprefix(short)}": value for name, value in values.items()}
        self._put("log", lambda tracker: tracker.log(values, stage=stage, step=step, wall_s=wall_s))

    def samples(self, rows: list[dict[str, Any]]) -> None:
        """A new table every `logger.table_every` steps. What is nested goes as JSON text: a cell of a table is a text or a
        number, and of one kind in a column."""
        logger = self.run.logger
        if logger.wandb_text and rows and (step := int(rows[0].get("step", 0))) % logger.table_every == 0:
            copies, stage = (
                [{name: _cell(value) for name, value in row.items()} for row in rows],
                str(rows[0].get("stage", "ppo")),
            )
            self._put("samples", lambda tracker: tracker.samples(copies, stage=stage, step=step))

    def artifact(self, name: str, kind: str, path: str) -> None:
        self._put("artifact", lambda tracker: tracker.artifact(name, kind, Path(path).resolve()))

    def alert(self, title: str, text: str) -> None:
        self._put("alert", lambda tracker: tracker.alert(title, text))

    def new_faults(self) -> list[tuple[str, BaseException]]:
        """What went wrong since the last call: (action, error)."""
        found = []
        while not self._faults.empty():
            found.append(self._faults.get())
        return found

    def ask_to_end(self, state: str = "done") -> None:
        """`state`: how the attempt ended, as `Tracker.end` gets it."""
        self._state = state
        self._end = time.monotonic() + self._kind.close_s(self.run.logger)
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):  # the thread hangs: what is left of the time it has
                self._calls.put(None, timeout=1.0)

    def join(self) -> None:
        """Wait for the end that was asked for, at most `Tracker.close_s` from then on."""
        self._thread.join(max(0.0, self._end - time.monotonic()))
        if self._thread.is_alive():
            self._faults.put(("finish", TimeoutError("it did not finish in time")))

    def _put(self, action: str, call: Callable[[Tracker], None]) -> None:
        if self._thread.is_alive():
            try:
                self._calls.put_nowait((action, call))
            except queue.Full:
                self._faults.put((action, queue.Full(f"{MOST_QUEUED} calls wait for {self.name}")))

    def _work(self) -> None:
        """Errors of whatever kind, SystemExit too, cost the tracker's copy, never the run."""
        try:
            tracker = self._kind(self.run)
        except BaseException as error:
            self._faults.put(("init", error))
            return
        while (item := self._calls.get()) is not None:
            action, call = item
            try:
                call(tracker)
            except BaseException as error:
                self._faults.put((action, error))
        try:
            tracker.end(self._state)
        except BaseException as error:
            self._faults.put(("finish", error))


def start_trackers(
    run_dir: Path, config: dict[str, Any], logger: LoggerConfig, job_type: str, *, attempt: int
) -> list[TrackerThread]:
    """Those of `logger.trackers` that the configuration does not turn off.

    Raises:
        UnknownPlugin: there is no tracker of that name.
    """
    kinds: dict[str, type[Tracker]] = {name: find(TRACKERS, name) for name in logger.trackers}
    return [
        TrackerThread(name, kind, run_dir, config, logger, job_type, attempt=attempt)
        for name, kind in kinds.items()
        if kind.is_on(logger)
    ]


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value
