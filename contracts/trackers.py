"""What shows a run in a tool for experiments: wandb, another, or one of yours.

    logger.trackers: [wandb, my_package.mine:MINE]

A tracker is a subclass of `Tracker`: TRACKER of controller/record/trackers/NAME.py, or at an import path. All of it but
`is_on` and `close_s` runs in a thread of its own behind a queue (`controller.record.tracker_thread`), so it may wait for a
disk or a server, and what it raises is counted as `fault/NAME`: that costs the tool's copy, while metrics.jsonl has
everything. What it is given has no secrets, and prompts and completions only with `logger.wandb_text`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from contracts.config import LoggerConfig
from contracts.plugins import Kind

TRACKERS = Kind("tracker", "controller.record.trackers", "TRACKER")


@dataclass(frozen=True)
class TrackedRun:
    """One attempt at a run. A run that is resumed is a new one, of the same group."""

    path: Path  # its directory, which exists
    name: str  # `name` of the configuration
    id: str  # of this attempt alone; letters, digits, `_`, `.` and `-`, at most 128
    group: str  # what its attempts have in common: the run, or `logger.group`
    job_type: str  # the stage that was asked for
    config: dict[str, Any]  # resolved, without secrets
    logger: LoggerConfig
    tolerate: Callable[[str, Exception], None]  # counts a fault that the tracker gets over by itself: (action, error)


class Tracker:
    """What a tool does not have need not be overridden. No module of the tool is imported where this class is defined."""

    packages: ClassVar[Mapping[str, str]] = {}  # modules that it imports, and what pip installs each by

    @staticmethod
    def is_on(logger: LoggerConfig) -> bool:
        """Whether the configuration wants it, where it is one of `logger.trackers`."""
        return True

    @staticmethod
    def close_s(logger: LoggerConfig) -> float:
        """How long, in seconds, the end of a run waits for what is queued and for `end`."""
        return 30.0

    def __init__(self, run: TrackedRun) -> None:
        """Start. Where this raises, the tracker is off for this attempt."""

    def log(self, values: dict[str, float], *, stage: str, step: int, wall_s: float) -> None:
        """One line of metrics.jsonl.

        Args:
            values: finite numbers by name. Those of other stages than ppo bear the stage in their name.
            step: of the stage; in ppo the policy version after the update.
            wall_s: seconds since this attempt began.
        """

    def samples(self, rows: list[dict[str, Any]], *, stage: str, step: int) -> None:
        """Prompts and completions with their scores, one a row; asked for every `logger.table_every` steps, which are those
        of `log`. Of updates that only fit the value model all are step 0 of ppo."""

    def artifact(self, name: str, kind: str, path: Path) -> None:
        """Where a result lies. It is large: keep the path, copy nothing."""

    def alert(self, title: str, text: str) -> None:
        """An alarm has fired for the first time."""

    def end(self, state: str) -> None:
        """The end of the attempt, if it has started: done | failed | interrupted. Whoever overrides this calls `close`, also
        where the tool's own end comes after it; a tool that shows no such thing overrides `close` alone."""
        self.close()

    def close(self) -> None:
        """The same, however it ended: what has to be written before. Every end goes through here."""
