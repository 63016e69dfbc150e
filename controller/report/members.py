"""The runs that a page compares: state, numbers, and the keys whose values differ."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.flatten import flat
from controller.record.evaluation import against_sft, judged_model
from controller.record.reader import RUN_FILES, ReportError, Run, read, runs_in
from controller.record.status_file import read_status

# Where a run lies and what it is called does not make it another run.
SAME = ("run_dir", "name", "logger", "cache_dir")


@dataclass
class Member:
    run: Run
    state: str
    error: str = ""
    objective: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # the keys that differ between the members

    @property
    def label(self) -> str:
        return self.run.path.name

    @property
    def name(self) -> str:
        """The label without the number that a sweep puts before it: readers know a member by its place in the table."""
        return re.sub(r"^\d+-(?=.)", "", self.label)

    @property
    def command(self) -> list[str]:
        """Runs this member alone again."""
        words = [*self.run.origin, *(self.run.overrides or [])] or [f"{k}={v}" for k, v in self.settings.items()]
        return ["python", "train.py", *words]

    def comparison(self, name: str) -> Any:
        return against_sft(self.run.evaluation).get(name)

    def evaluated(self, name: str) -> Any:
        return judged_model(self.run.evaluation).get(name)


def members_of(paths: Sequence[str | Path]) -> list[Member]:
    """The runs among `paths`, and those directly below a path that is no run itself; the best first.

    Raises:
        ReportError: there is no run.
    """
    runs = [run for path in paths for run in runs_in(Path(path))]
    if not runs:
        raise ReportError(
            f"no run directory in {', '.join(map(str, paths))}: none has {', '.join(RUN_FILES)}; write run directories, or "
            "that of a sweep"
        )
    members = [_member(read(path)) for path in runs]
    configs = [flat(member.run.config) for member in members]
    keys = sorted({key for row in configs for key in row})
    known = [row for row in configs if row]
    varied = [key for key in keys if not key.startswith(SAME) and len({str(row.get(key)) for row in known}) > 1]
    for member, row in zip(members, configs, strict=True):
        member.settings = {key: row[key] for key in varied if key in row}
    return sorted(members, key=lambda m: (m.objective is None, -(m.objective or 0.0), m.run.path.name))


def settings_that_differ(members: Iterable[Member]) -> list[str]:
    return sorted({key for member in members for key in member.settings})


def _member(run: Run) -> Member:
    status = read_status(run.path)
    state = status.state or ("done" if run.evaluation else "unknown" if run.metrics else "not started")
    return Member(run, state, str(status.facts.get("error") or ""), run.objective)


def best_of(members: Sequence[Member]) -> Member | None:
    """The finished member with the largest objective; None where none was measured."""
    measured = [member for member in members if member.objective is not None and member.state in ("done", "unknown")]
    return max(measured, key=lambda member: member.objective or 0.0, default=None)
