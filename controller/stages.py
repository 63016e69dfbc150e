"""Finished stages: a directory each, named by what went in, reused while that has not changed.

cache_dir/stages/<name>-<hash>/
    model/          the checkpoint
    stage.json      metrics, seconds, and the inputs that the hash stands for
    log/            the stage's lines of metrics.jsonl, samples.jsonl and phases.jsonl
"""

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from contracts.config import TandemConfig
from contracts.records import StageResult
from contracts.validation import ConfigError
from reward_service.versions import function_version

UNSEEN = ("scoring", "hidden")  # the keys of `unseen`
LOGS = ("metrics.jsonl", "samples.jsonl", "phases.jsonl")


def checkpoint_fingerprint(path: str, revision: str | None = None) -> str:
    """Hash of a checkpoint directory's files (large ones by size and ends), or of a hub id with its revision."""
    digest = hashlib.sha256(str(revision).encode())
    root = Path(path)
    if not root.is_dir():
        digest.update(path.encode())
        return digest.hexdigest()
    for file in sorted(p for p in root.rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(root)).encode())
        with file.open("rb") as content:
            size = file.stat().st_size
            digest.update(size.to_bytes(8, "big"))
            digest.update(content.read(1 << 20))
            if size > 2 << 20:
                content.seek(-(1 << 20), 2)
                digest.update(content.read())
    return digest.hexdigest()


def unseen(config: TandemConfig) -> dict[str, Any]:
    """What decides a reward and what the configuration without secrets does not show: how and with what each configured
    scorer scores, and a hash of the values that `redacted` may have blanked.

    Raises:
        ConfigError: a function's source is not there.
    """
    service, contents = config.reward_service, dict[str, str]()
    for name, scorer in service.scorers.items():
        try:
            if scorer.function:
                contents[name] = function_version(scorer.function)
            elif scorer.path:
                contents[name] = checkpoint_fingerprint(scorer.path)
        except (ValueError, OSError) as error:
            raise ConfigError(f"reward_service.scorers.{name}: {error}") from None
    values = [asdict(config.environment), {name: asdict(scorer) for name, scorer in service.scorers.items()}]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
    return {"scoring": [service.dtype, service.max_tokens, contents], "hidden": digest}


@dataclass
class StageStore:
    """Where stages leave their results; `run_dir` gets a copy of the log lines of every stage it uses."""

    cache_dir: Path
    run_dir: Path
    reuse: bool
    # Where in the run's logs the lines of the stage begin that is being run, in bytes; a resumed stage began earlier.
    starts: dict[str, int] = field(default_factory=dict)

    def directory(self, name: str, inputs: dict[str, Any]) -> Path:
        plain = {key: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for key, v in inputs.items()}
        digest = hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()
        return self.cache_dir / "stages" / f"{name.replace('/', '-')}-{digest[:12]}"

    @contextmanager
    def alone(
        self, name: str, inputs: dict[str, Any], wait: Callable[[], AbstractContextManager[None]]
    ) -> Iterator[None]:
        """Runs side by side make a stage once: the others wait here, within `wait()`, and then find it. The lock ends with
        its process, however that ends."""
        lock = self.directory(name, inputs).with_suffix(".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with wait():
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def find(self, name: str, inputs: dict[str, Any]) -> StageResult | None:
        """The finished stage with exactly these inputs, its log lines copied to the run."""
        directory = self.directory(name, inputs)
        if not self.reuse or not (directory / "stage.json").exists():
            return None
        content = json.loads((directory / "stage.json").read_text())
        texts = {log: file.read_text() for log in LOGS if (file := directory / "log" / log).exists()}
        if not self._is_logged(texts.get("metrics.jsonl", "")):
            for log, text in texts.items():
                with (self.run_dir / log).open("a") as target:
                    target.write(text)
        return StageResult(name, str(directory / "model"), cached=True, metrics=content["metrics"])

    def run(self, name: str, inputs: dict[str, Any], work: Callable[[Path], dict[str, Any]]) -> StageResult:
        """Do the work in a temporary directory that becomes the stage's only when all of it is there.

        Args:
            work: writes a checkpoint to the path that it is given and returns the stage's metrics.
        """
        directory = self.directory(name, inputs)
        partial = directory.with_name(directory.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        self.starts = {log: self._size(log) for log in LOGS}
        began = time.time()
        metrics = work(partial / "model")
        (partial / "log").mkdir()
        for log, start in self.starts.items():
            with (self.run_dir / log).open("rb") as source:
                source.seek(start)
                (partial / "log" / log).write_bytes(source.read())
        content = {"name": name, "seconds": time.time() - began, "metrics": metrics, "inputs": inputs}
        (partial / "stage.json").write_text(json.dumps(content, indent=1, default=_plain) + "\n")
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
        return StageResult(name, str(directory / "model"), cached=False, metrics=metrics)

    def _is_logged(self, metrics: str) -> bool:
        """Whether this run has these lines already: from an earlier attempt, or because it ran the stage itself."""
        log, first = self.run_dir / "metrics.jsonl", metrics.partition("\n")[0]
        return bool(first) and log.exists() and first in log.read_text().split("\n")

    def _size(self, log: str) -> int:
        path = self.run_dir / log
        return path.stat().st_size if path.exists() else 0


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)
