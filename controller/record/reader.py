"""Read a run directory, whole or half finished, into one record that the sections of the report draw from."""

import json
import math
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import yaml

from common.error_text import error_lines
from contracts.methods import method_title
from controller.record.evaluation import objective
from controller.record.number_text import count, number
from controller.record.redaction import redacted, redacted_override

RUN_FILES = ("status.json", "config.yaml", "metrics.jsonl", "hydra/overrides.yaml")
ORIGIN = "origin.yaml"  # beside Hydra's overrides.yaml, where the configuration did not lie in conf/ alone
CURVE_FILES = ("metrics.jsonl", "stages.json", "evaluation.json")


class ReportError(ValueError):
    """The directory holds nothing that a report could be made of."""


Curve = list[tuple[float, float | None]]  # (step, value); None where the run logged null


@dataclass
class Run:
    """What the files of a run directory say. A file that is missing leaves its field empty and its name in `missing`."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] | None = None  # of the command line; None where Hydra kept no record of them
    origin: list[str] = field(default_factory=list)  # words before them, for where the configuration lay
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    phases: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    wall_s: float | None = None  # of all attempts, those that were killed among them, by the times in the logs

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.path.name)

    @property
    def command(self) -> list[str] | None:
        """Does the same again; None where Hydra kept no record of it."""
        return None if self.overrides is None else ["python", "train.py", *self.origin, *self.overrides]

    def setting(self, dotted: str) -> Any:
        """A value of the configuration by its path, or None."""
        value: Any = self.config
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def loop_title(self) -> str:
        """What its rollouts train by: PPO, GRPO, RAFT, ..."""
        return method_title("ppo", self.setting("ppo.estimator"))

    @property
    def objective(self) -> float | None:
        """What a sweep maximises, where it was measured."""
        return objective(self.evaluation, number(self.setting("evaluate.max_kl")) or math.inf)

    def curve(self, stage: str, metric: str) -> Curve:
        """(step, value) in order of step, (version, value) for PPO. A resumed run may log a step twice: the later counts.

        PPO counts its steps from the updates that only fit the value model, so its rows also say their version.
        """
        by_step: dict[float, float | None] = {}
        for row in self.metrics:
            step = number(row.get("step"))
            if stage == "ppo":
                version = number(row.get("progress/version"))
                step = step if version is None else version
            if row.get("stage") == stage and metric in row and step is not None:
                by_step[step] = number(row[metric])
        return sorted(by_step.items())

    def stages_of(self, prefix: str) -> list[str]:
        """Names of the stages that logged metrics and start with `prefix`, in order of appearance."""
        names = [str(row.get("stage")) for row in self.metrics]
        return [name for name in dict.fromkeys(names) if name.startswith(prefix)]

    def stage(self, name: str) -> dict[str, Any]:
        """What stages.json says of one stage, or an empty dict."""
        return next((stage for stage in self.stages if stage.get("name") == name), {})


def is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in RUN_FILES)


def runs_in(path: Path) -> list[Path]:
    """A run directory itself, or the members of a sweep, directly below its own."""
    if is_run(path) or not path.is_dir():
        return [path] if is_run(path) else []
    return sorted(child for child in path.iterdir() if is_run(child))


def load(run_dir: str | Path) -> Run:
    """Read the directory.

    Raises:
        ReportError: it does not exist, or has none of the files that a report is about.
    """
    run = read(run_dir)
    if not (run.metrics or run.stages or run.evaluation):
        raise ReportError(
            f"{run_dir} has none of {', '.join(CURVE_FILES)} with content: nothing to report. "
            "Is it a run directory, and has its first stage finished a step?"
        )
    return run


def read(run_dir: str | Path) -> Run:
    """As `load`, also where a run has left nothing but its directory."""
    path = Path(run_dir)
    if not path.is_dir():
        raise ReportError(f"{path} is not a directory; write the run directory that `train.py` printed")
    run = Run(path.resolve())
    run.metrics = _jsonl(run, "metrics.jsonl")
    run.samples = _jsonl(run, "samples.jsonl")
    phases = _jsonl(run, "phases.jsonl")
    run.phases, run.wall_s = _laid_end_to_end(phases), _wall_s(run.metrics, phases)
    stages = _json(run, "stages.json")
    run.stages = [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    evaluation = _json(run, "evaluation.json")
    run.evaluation = evaluation if isinstance(evaluation, dict) else {}
    run.config = _yaml(run)
    return run


def _jsonl(run: Run, name: str) -> list[dict[str, Any]]:
    path = run.path / name
    if not path.exists():
        run.missing.append(name)
        return []
    rows, broken = [], 0
    # Not `splitlines`: JSON may hold U+2028 and other ends of lines as they are.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken += 1  # a process that was killed leaves half a line
    if broken:
        run.problems.append(f"{name}: {count(broken, 'line')} could not be read and count for nothing")
    return rows


def _json(run: Run, name: str) -> Any:
    path = run.path / name
    if not path.exists():
        run.missing.append(name)
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        run.problems.append(f"{name} is not valid JSON ({error})")
        return None


def _yaml(run: Run) -> dict[str, Any]:
    path = run.path / "config.yaml"
    overrides = run.path / "hydra/overrides.yaml"
    try:
        if overrides.exists():
            kept = yaml.safe_load(overrides.read_text(encoding="utf-8"))
            run.overrides = [redacted_override(str(item)) for item in kept] if isinstance(kept, list) else None
            origin = overrides.with_name(ORIGIN)
            kept = yaml.safe_load(origin.read_text(encoding="utf-8")) if origin.exists() else None
            run.origin = [str(word) for word in kept] if isinstance(kept, list) else []
        if not path.exists():
            run.missing.append("config.yaml")
            return {}
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # no date, no Unicode, too deep
        # Not shown as it is: what cannot be parsed cannot be cleared of secrets either.
        run.problems.append(f"config.yaml or hydra/overrides.yaml is not valid YAML ({error_lines(error)[0]})")
        return {}
    return redacted(config) if isinstance(config, dict) else {}


def _laid_end_to_end(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Phases with usable times. A resumed run starts its clock at zero: its phases move behind those before it.

    Lines are written when a phase ends, so within one attempt their ends never decrease.
    """
    kept: list[dict[str, Any]] = []
    offset_s = last_s = 0.0
    for row in rows:
        start_s, end_s = number(row.get("start_s")), number(row.get("end_s"))
        if start_s is None or end_s is None or end_s < start_s:
            continue
        if end_s + offset_s < last_s:
            offset_s = last_s
        last_s = end_s + offset_s
        kept.append(row | {"start_s": start_s + offset_s, "end_s": last_s})
    return kept


def _attempts(rows: list[dict[str, Any]], time: str) -> list[float]:
    """The last moment of each attempt. Lines are written in order, and their times begin at zero with each attempt."""
    times = [seconds for row in rows if (seconds := number(row.get(time))) is not None]
    return [now for now, later in pairwise([*times, -math.inf]) if later < now]


def _wall_s(metrics: list[dict[str, Any]], phases: list[dict[str, Any]]) -> float | None:
    """The sum over attempts of the last moment that each has written down; None where there is none.

    An attempt may have left no lines of metrics, as one that failed while it started, or its metrics may go on after its
    last phase, as of one that was killed. Neither file says which attempts of the other are its own, so they are paired in
    order, or stand alone, such that the sum is the least.
    """
    ends = _attempts(phases, "end_s")
    least = list(accumulate(ends, initial=0.0))  # by how many attempts of the phases are counted
    for last in _attempts(metrics, "wall_s"):
        before, least = least, [least[0] + last]
        for i, end in enumerate(ends):
            least.append(min(before[i] + max(last, end), before[i + 1] + last, least[i] + end))
    return least[-1] or None
