"""The record of a run: three append-only JSONL files that are the truth, and trackers as more places to look at them.

    driver -> RunLog -> RUN/metrics.jsonl   one line per (stage, step)
                     -> RUN/samples.jsonl   prompts and completions with their scores
                     -> RUN/phases.jsonl    who was busy from when to when
                     -> trackers            metrics only, each from a thread of its own (controller.record.tracker_thread)

Only the driver writes. Actors and learner ranks hand their numbers to it, so that no file ever has two writers.

Every line belongs to a stage, which it names. A stage that begins again takes its lines back, one that goes on from a commit
those that came after it; the lines of other stages stay where they are.
"""

import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from common.error_text import typed_line
from common.files.durable import replace_text
from common.strict_json import known
from contracts.catalogue import catalogue
from contracts.config import LoggerConfig
from contracts.metrics import declared
from controller.record.status_file import end_state
from controller.record.tracker_thread import start_trackers

LOGS = ("metrics.jsonl", "samples.jsonl", "phases.jsonl")
TIMES = ("wall_s", "start_s", "end_s")  # of the run that wrote the line
TRACKER_FAULTS = "faults"  # the stage of the lines that count them: {"fault/NAME": since the attempt began}


def names_in_logs(stage: str) -> tuple[str, ...]:
    """What the lines of a stage call it: those of ppo that only fit the value model have a name of their own."""
    return ("ppo", "value_warmup") if stage == "ppo" else (stage,)


class RunLog:
    """Appends to the files of one run. `wall_s` in every line counts from the creation of this object.

    A resumed run appends to the same files; its `wall_s` starts at zero again, which tells readers where it resumed.
    """

    is_strict = False  # whether a metric without a declaration is an error: so in Tandem's own tests

    def __init__(
        self,
        run_dir: str | Path,
        config: dict[str, Any],
        logger: LoggerConfig,
        job_type: str,
        *,
        attempt: int = 1,
        clock: Callable[[], float] = time.monotonic,
        estimators: Iterable[Any] = (),
    ) -> None:
        """`attempt` counts the starts of one run; each is a run of its own for the trackers, grouped by the run.
        `estimators` are those of others than Tandem, whose metrics are declared beside themselves."""
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.tracker_faults = Counter[str]()
        self._declared, self._undeclared = catalogue(*estimators), set[str]()
        self._clock, self._created = clock, clock()
        self._files = {name: _open(self.run_dir / name) for name in LOGS}
        self._counts = {name: Counter(map(_stage_of, self._lines(name))) for name in LOGS}  # lines by stage
        self._observers: list[Callable[[dict[str, Any]], None]] = []
        self._trackers = start_trackers(self.run_dir, config, logger, job_type, attempt=attempt)
        self.wandb_id = next((tracker.run.id for tracker in self._trackers if tracker.name == "wandb"), None)

    def log(self, stage: str, step: int, metrics: Mapping[str, float | None]) -> None:
        """Append one line. What is not finite is written as null: the line stays JSON and the gap stays visible."""
        self._check_names(metrics)
        values = {name: _finite(value) for name, value in metrics.items()}
        row = {"stage": stage, "step": step, "wall_s": self._wall_s(), **values}
        self._write("metrics.jsonl", row)
        for tracker in self._trackers:
            tracker.log(row)
        for observe in self._observers:
            observe(row)
        self._flush_faults()

    def _check_names(self, names: Iterable[str]) -> None:
        """A metric that nobody has declared is said once: that a plugin forgot it must not end a run."""
        new = [name for name in names if name not in self._undeclared and not declared(name, self._declared)]
        if new and self.is_strict:
            raise ValueError(f"metrics without a declaration: {', '.join(new)}; see contracts/metrics.py")
        if new:
            self._undeclared.update(new)
            print(f"WARNING: metrics without a declaration: {', '.join(new)}; see docs/metrics.md", file=sys.stderr)

    def observe(self, observer: Callable[[dict[str, Any]], None]) -> None:
        """Let `observer` see each line of metrics.jsonl from now on."""
        self._observers.append(observer)

    def alert(self, title: str, text: str) -> None:
        """Tell whoever looks at a tracker."""
        for tracker in self._trackers:
            tracker.alert(title, text)

    def samples(self, rows: list[dict[str, Any]]) -> None:
        """Append prompts and completions with their scores. The text reaches trackers only with `logger.wandb_text`."""
        for row in rows:
            self._write("samples.jsonl", known(row))
        for tracker in self._trackers:
            tracker.samples(rows)

    def artifact(self, name: str, kind: str, path: str) -> None:
        """Tell trackers where a result lies. They get a reference, never the files."""
        for tracker in self._trackers:
            tracker.artifact(name, kind, path)

    def mark(self, stage: str) -> dict[str, int]:
        """How many lines a stage has in each file, which are durable: what a commit says of the logs."""
        for file in self._files.values():
            os.fsync(file.fileno())
        return {name: sum(self._counts[name][own] for own in names_in_logs(stage)) for name in LOGS}

    def cut(self, stage: str, counts: Mapping[str, int]) -> None:
        """Take a stage's lines in the files that `counts` names back to a `mark`: what came later is written again."""
        for name, count in counts.items():
            own, kept = 0, list[str]()
            for line in self._lines(name):
                is_own = _stage_of(line) in names_in_logs(stage)
                own += is_own
                if not is_own or own <= count:
                    kept.append(line)
            if own > count:
                self._files[name].close()
                replace_text(self.run_dir / name, "".join(kept))
                self._files[name] = _open(self.run_dir / name)
                self._counts[name] = Counter(map(_stage_of, kept))

    def forget(self, stage: str) -> None:
        """A stage begins anew: an earlier attempt may have gone further, or had other settings."""
        self.cut(stage, dict.fromkeys(LOGS, 0))

    def lines_of(self, stage: str) -> dict[str, str]:
        """The lines of a stage, by file."""
        own = names_in_logs(stage)
        return {name: "".join(line for line in self._lines(name) if _stage_of(line) in own) for name in LOGS}

    def take(self, stage: str, texts: Mapping[str, str]) -> None:
        """Let the lines of a stage be those of the run that made it, as `lines_of` gave them. Of another run they have no
        times: nothing of this one's went there."""
        made = {name: texts.get(name, "") for name in LOGS}
        taken = {name: "".join(map(_without_times, _lines_in(text))) for name, text in made.items()}
        if self.lines_of(stage) not in (made, taken):
            self.forget(stage)
            for name, text in taken.items():
                for line in _lines_in(text):
                    self._append(name, line, _stage_of(line))

    def _lines(self, name: str) -> list[str]:
        with (self.run_dir / name).open(encoding="utf-8", newline="\n") as file:
            return list(file)

    def _write(self, name: str, row: dict[str, Any]) -> None:
        self._append(name, _line(row), str(row.get("stage", "")))

    def _append(self, name: str, line: str, stage: str) -> None:
        self._files[name].write(line)
        self._files[name].flush()
        self._counts[name][stage] += 1

    @contextmanager
    def phase(self, stage: str, phase: str) -> Iterator[None]:
        """Record from when to when the block ran, also where it raised."""
        start_s = self._wall_s()
        try:
            yield
        finally:
            self._write("phases.jsonl", {"stage": stage, "phase": phase, "start_s": start_s, "end_s": self._wall_s()})

    def close(self, state: str = "done") -> None:
        """End the trackers' runs in this state, all at the same time, and close the files. Closing twice does nothing."""
        if not self._files["metrics.jsonl"].closed:
            for tracker in self._trackers:
                tracker.ask_to_end(state)
            for tracker in self._trackers:
                tracker.join()
            self._flush_faults()
            for file in self._files.values():
                file.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(end_state(kind))

    def _wall_s(self) -> float:
        return round(self._clock() - self._created, 3)

    def _flush_faults(self) -> None:
        """What the threads of trackers met is written here, so that metrics.jsonl keeps one writer."""
        for name, action, error in [(t.name, *fault) for t in self._trackers for fault in t.new_faults()]:
            self.tracker_faults[name] += 1
            row = {"stage": TRACKER_FAULTS, "step": self.tracker_faults.total(), "wall_s": self._wall_s()}
            self._write("metrics.jsonl", row | {f"fault/{name}": self.tracker_faults[name]})
            if self.tracker_faults[name] == 1:
                print(
                    f"{name} {action} failed ({typed_line(error)[:200]}); the run goes on and "
                    f"{self.run_dir}/metrics.jsonl has everything",
                    file=sys.stderr,
                )


def _open(path: Path) -> IO[str]:
    """Open for appending; a line that a killed process left half-written is ended first."""
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    file = path.open("a", encoding="utf-8", errors="replace")  # half a character shall not end a run
    if torn:
        file.write("\n")
    return file


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _lines_in(text: str) -> Iterator[str]:
    """A text may hold other line ends than the one that ends a line here."""
    return iter(io.StringIO(text, newline="\n"))


def _without_times(line: str) -> str:
    row = json.loads(line)
    return line if row.keys().isdisjoint(TIMES) else _line({name: row[name] for name in row if name not in TIMES})


def _stage_of(line: str) -> str:
    """Empty for what is no line of ours, as one that a killed process left half-written."""
    try:
        return str(json.loads(line)["stage"])
    except (ValueError, KeyError, TypeError):
        return ""


def _finite(value: float | None) -> float | None:
    """A plain Python number (also from numpy and torch scalars), or None."""
    return value if value is None or isinstance(value, int) else known(float(value))
