"""The record of a run: three append-only JSONL files that are the truth, and wandb as one more place to look at them.

    driver -> RunLog -> RUN/metrics.jsonl   one line per (stage, step)
                     -> RUN/samples.jsonl   prompts and completions with their scores
                     -> RUN/phases.jsonl    who was busy from when to when
                     -> wandb               metrics only; offline unless the configuration says otherwise

Only the driver writes. Actors and learner ranks hand their numbers to it, so that no file ever has two writers.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from contracts.config import LoggerConfig

REDACTED = "[redacted]"
SECRET_WORDS = frozenset({"key", "apikey", "token", "secret", "password", "passwd", "credential", "credentials"})
SECRET_PART = re.compile("key|token|secret|password", re.IGNORECASE)
URL_LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")


def redacted(config: Any, hide: bool = False) -> Any:
    """A copy of a configuration without its secrets, as plain dicts and lists.

    A field with a word like `key` or `token` in its name loses its value, and so does a text under a name that merely
    contains one (`hfToken`, `tokens`). Numbers under such names stay: `max_tokens` is no secret. The login in a URL
    goes whatever the field is called.
    """
    if isinstance(config, Mapping):
        return {str(name): redacted(value, hide or _is_secret(str(name), value)) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [redacted(value, hide) for value in config]
    if hide and config is not None:
        return REDACTED
    return URL_LOGIN.sub(REDACTED, config) if isinstance(config, str) else config


def _is_secret(name: str, value: Any) -> bool:
    words = re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return not SECRET_WORDS.isdisjoint(words) or (isinstance(value, str) and SECRET_PART.search(name) is not None)


def redacted_override(override: str) -> str:
    """`key=value` without what is a secret of it."""
    name, _, value = override.partition("=")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:  # Hydra's own grammar has more forms
        parsed = value
    hidden = redacted({name: parsed})[name]
    if hidden == parsed:
        return override
    shown = yaml.safe_dump(hidden, default_flow_style=True).strip() if isinstance(hidden, dict | list) else hidden
    return f"{name}={shown}"


def redact_hydra(folder: Path) -> None:
    """Hydra has written configuration and command line as they came. The command line is kept, for the report."""
    overrides = folder / "overrides.yaml"
    if overrides.exists():
        kept = [redacted_override(str(item)) for item in yaml.safe_load(overrides.read_text()) or []]
        overrides.write_text(yaml.safe_dump(kept))
    for name in ("config.yaml", "hydra.yaml"):
        (folder / name).unlink(missing_ok=True)


class RunLog:
    """Appends to the files of one run. `wall_s` in every line counts from the creation of this object.

    A resumed run appends to the same files; its `wall_s` starts at zero again, which tells readers where it resumed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: dict[str, Any],
        logger: LoggerConfig,
        job_type: str,
        *,
        attempt: int = 1,
        wandb_text: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`attempt` counts the starts of one run; each is a wandb run of its own, grouped by the run.

        `wandb_text` also sends prompts and completions to wandb. They may be confidential, so it is off."""
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.wandb_faults = 0
        self.wandb_id: str | None = None
        self._attempt = attempt
        self._clock, self._created = clock, clock()
        self._metrics = _open(self.run_dir / "metrics.jsonl")
        self._samples = _open(self.run_dir / "samples.jsonl")
        self._phases = _open(self.run_dir / "phases.jsonl")
        self._wandb_text = wandb_text
        self._axes: dict[str, str] = {}  # wandb metric -> the counter it is drawn over
        self._wandb: Any = None
        if logger.wandb != "disabled":
            self._start_wandb(redacted(config), logger, job_type)

    def log(self, stage: str, step: int, metrics: Mapping[str, float | None]) -> None:
        """Append one line. What is not finite is written as null: the line stays JSON and the gap stays visible."""
        values = {name: _finite(value) for name, value in metrics.items()}
        _write(self._metrics, {"stage": stage, "step": step, "wall_s": self._wall_s(), **values})
        self._tolerate("log", lambda run: self._send(run, stage, step, values))

    def samples(self, rows: list[dict[str, Any]]) -> None:
        """Append prompts and completions with their scores. The text reaches wandb only where `wandb_text` is set."""
        for row in rows:
            _write(self._samples, {k: _finite(v) if isinstance(v, float) else v for k, v in row.items()})
        if self._wandb_text and rows:
            self._tolerate("table", lambda run: self._send_table(run, rows))

    def mark(self) -> dict[str, int]:
        """Sizes of the files in bytes, durable: what a commit says of the logs."""
        for file in self._files.values():
            os.fsync(file.fileno())
        return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}

    def cut(self, sizes: Mapping[str, int]) -> None:
        """Take the files that `sizes` names back to a `mark`: what came later is written again."""
        for name, size in sizes.items():
            file = self._files[name]
            os.truncate(file.fileno(), min(size, os.fstat(file.fileno()).st_size))

    @property
    def _files(self) -> dict[str, IO[str]]:
        return {"metrics.jsonl": self._metrics, "samples.jsonl": self._samples, "phases.jsonl": self._phases}

    @contextmanager
    def phase(self, stage: str, phase: str) -> Iterator[None]:
        """Record from when to when the block ran, also where it raised."""
        start_s = self._wall_s()
        try:
            yield
        finally:
            _write(self._phases, {"stage": stage, "phase": phase, "start_s": start_s, "end_s": self._wall_s()})

    def close(self) -> None:
        """End the wandb run and close the files. Closing twice does nothing."""
        if not self._metrics.closed:
            self._tolerate("finish", lambda run: run.finish())
            self._wandb = None
            for file in self._files.values():
                file.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _wall_s(self) -> float:
        return round(self._clock() - self._created, 3)

    def _start_wandb(self, config: dict[str, Any], logger: LoggerConfig, job_type: str) -> None:
        try:
            self._wandb = self._init_wandb(logger.wandb, config, logger, job_type)
        except Exception as error:
            self._fault("init", error)
            if logger.wandb == "online":
                # No key, no network or a slow server. Without the teardown the service refuses the second attempt.
                try:
                    import wandb

                    wandb.teardown()
                    self._wandb = self._init_wandb("offline", config, logger, job_type)
                except Exception as second:
                    self._fault("init", second)

    def _init_wandb(self, mode: str, config: dict[str, Any], logger: LoggerConfig, job_type: str) -> Any:
        import wandb

        name = str(config.get("name") or self.run_dir.name)
        run = re.sub(r"[^\w.-]", "-", f"{name}-{self.run_dir.resolve().name}")
        self.wandb_id = f"{run}-a{self._attempt}"
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            disable_job_creation=True,
            # The metadata hold the command line, and with it every override; machine and package lists are no metrics.
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            x_disable_stats=True,
            init_timeout=10.0,
            login_timeout=10.0,
            finish_timeout=60.0 if mode == "online" else 15.0,
        )
        return wandb.init(
            mode=mode,  # type: ignore[arg-type]
            dir=os.fspath(self.run_dir),
            project=logger.project,
            id=self.wandb_id,
            name=name,
            group=run,
            job_type=job_type,
            config=config,
            force=mode == "online",  # a missing key is an error, never a question on the terminal
            settings=settings,
        )

    def _send(self, run: Any, stage: str, step: int, values: dict[str, float | None]) -> None:
        # Never wandb's own `_step`: an offline run that resumes starts it at zero again.
        axis = f"{stage}/step"
        sent: dict[str, float] = {axis: step}
        for name, value in values.items():
            if value is None:
                continue
            # Both reward models log `reward_model/loss`; wandb has one name space, so the stage tells them apart.
            first, _, rest = name.partition("/")
            shown = f"{stage}/{rest}" if first == stage.partition("/")[0] else name
            sent[shown] = value
            if self._axes.get(shown) != axis:
                if axis not in self._axes:
                    run.define_metric(axis, hidden=True)
                    self._axes[axis] = axis
                run.define_metric(shown, step_metric=axis)
                self._axes[shown] = axis
        run.log(sent)

    def _send_table(self, run: Any, rows: list[dict[str, Any]]) -> None:
        import wandb

        columns = sorted({name for row in rows for name in row})
        data = [[row.get(name) for name in columns] for row in rows]
        # A small new table each time; wandb's incremental tables write all of their rows again on every change.
        run.log({"samples/table": wandb.Table(columns=list(columns), data=data)})

    def _tolerate(self, action: str, call: Callable[[Any], None]) -> None:
        """wandb is a sink: a fault of it, of whatever kind, costs its copy of the run and never the run."""
        if self._wandb is None:
            return
        try:
            call(self._wandb)
        except Exception as error:
            self._wandb = None
            self._fault(action, error)

    def _fault(self, action: str, error: Exception) -> None:
        self.wandb_faults += 1
        row = {"stage": "faults", "step": self.wandb_faults, "wall_s": self._wall_s(), "fault/wandb": self.wandb_faults}
        _write(self._metrics, row)
        if self.wandb_faults == 1:
            reason = str(error).strip().splitlines() or [""]
            print(
                f"wandb {action} failed ({type(error).__name__}: {reason[0][:200]}); the run goes on and "
                f"{self.run_dir}/metrics.jsonl has everything",
                file=sys.stderr,
            )


def _open(path: Path) -> IO[str]:
    """Open for appending; a line that a killed process left half-written is ended first."""
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    file = path.open("a", encoding="utf-8")
    if torn:
        file.write("\n")
    return file


def _write(file: IO[str], row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    file.flush()


def _finite(value: float | None) -> float | None:
    """A plain Python number (also from numpy and torch scalars), or None."""
    if value is None or isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
