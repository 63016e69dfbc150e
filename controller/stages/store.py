"""Finished stages: a directory each, named by what went in and by the code that made it, reused while neither has changed.

cache_dir/stages/<name>-<hash of the inputs>-<hash of the code>/
    model/          the checkpoint
    stage.json      metrics, seconds, what the hashes stand for, and the checkpoint's fingerprint
    log/            the stage's lines of metrics.jsonl, samples.jsonl and phases.jsonl

A directory is believed when it is what its stage.json says. What is not (torn by a crash or a full disk, changed since,
copied from elsewhere) is named and made anew.
"""

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import Any

from common.files.code_digest import changed_code, code_digest, stage_code
from common.files.fingerprints import checkpoint_fingerprint, file_hashes
from common.files.source_code import source_digest
from contracts.checks.validation import ConfigError
from contracts.config import TandemConfig
from contracts.environments import is_import_path
from contracts.methods import GIVEN, sources_read, stages_to_run
from contracts.records import StageResult
from controller.record.run_log import LOGS, RunLog
from reward_service.resolve import content_of

UNSEEN = ("scoring", "hidden")  # the keys of `unseen`
MEMORY = "fingerprints.json"  # in cache_dir
SHOWN = 4  # changed files that are named
code_at_start = lru_cache(stage_code)  # a process goes on with the code that it began with


def unseen(config: TandemConfig) -> dict[str, Any]:
    """What decides a reward and what the configuration without secrets does not show: how and with what each configured
    scorer scores, and a hash of the values that `redacted` may have blanked.

    Raises:
        ConfigError: a function's source or a checkpoint is not there.
    """
    service, memory, contents = config.reward_service, Path(config.cache_dir) / MEMORY, dict[str, str]()
    for name, scorer in service.scorers.items():
        try:
            if content := content_of(scorer, memory):
                contents[name] = content
        except (ValueError, OSError) as error:
            raise ConfigError(f"reward_service.scorers.{name}: {error}") from None
    values = [asdict(config.environment), {name: asdict(scorer) for name, scorer in service.scorers.items()}]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
    return {"scoring": [service.dtype, service.max_tokens, contents], "hidden": digest}


def environment_source(config: TandemConfig) -> str | None:
    """A digest of an environment's own source; None for those of Tandem. Raises ConfigError where it is not there."""
    name = config.environment.name
    try:
        return source_digest(name) if is_import_path(name) else None
    except ValueError as error:
        raise ConfigError(f"environment.name: {error}") from None


def made_of(config: TandemConfig) -> str:
    """SHA-256 (hex) over the content of what a run reads (data, checkpoints, functions) and over Tandem's code.

    Raises:
        OSError, ValueError: something is not there.
    """
    memory = Path(config.cache_dir) / MEMORY
    files = [file for name in sorted(sources_read(config)) for file in _files(getattr(config.data, name).path)]
    # A given checkpoint may be of a stage that this run has no part of, and not be there.
    given = [path for key in GIVEN.values() if (path := getattr(config, key)) and Path(path).is_dir()]
    checkpoints = [checkpoint_fingerprint(path, memory=memory) for path in given]
    checkpoints.append(checkpoint_fingerprint(config.model.path, config.model.revision, memory))
    samples = not {"ppo", "evaluate"}.isdisjoint(stages_to_run(config))
    scoring = [unseen(config), environment_source(config)] if samples else []
    return _hash([code_digest(), file_hashes(files, memory), checkpoints, scoring])


@dataclass
class StageStore:
    """Where stages leave their results; the run's log gets the lines of every stage that is taken from here."""

    cache_dir: Path
    log: RunLog
    reuse: Any  # as the key reuse_stages
    say: Callable[[str], None]
    code: Callable[[str], dict[str, str]] = code_at_start  # of a stage
    _said: set[str] = field(default_factory=set)

    def directory(self, name: str, inputs: dict[str, Any]) -> Path:
        return self._prefix(name, inputs).with_name(f"{self._prefix(name, inputs).name}-{_hash(self.code(name))[:8]}")

    def _prefix(self, name: str, inputs: dict[str, Any]) -> Path:
        return self.cache_dir / "stages" / f"{name.replace('/', '-')}-{_hash(_plain(inputs))[:12]}"

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
        """The finished stage with exactly these inputs, made by today's code where `reuse` is auto; its log lines are then
        the run's. Says why one that is there is not taken."""
        if self.reuse is False:
            return None
        ours, code = self.directory(name, inputs), self.code(name)
        others = sorted(self._others(name, inputs), key=lambda path: path.stat().st_mtime, reverse=True)
        for directory in [ours, *others]:
            if not directory.exists():
                continue
            content, problem = self._read(directory, name, inputs)
            if problem:
                self._say_once(f"WARNING: {directory} cannot be used ({problem}): {name} has to be made anew")
                continue
            changed = changed_code(code, content["code"])
            if changed and self.reuse == "auto":
                self._say_once(
                    f"{directory} was made by other code ({_some(changed)}): {name} has to be made anew, "
                    "or reuse_stages=true takes it"
                )
                return None
            if changed:
                self._say_once(f"WARNING: reuse_stages=true: {directory} was made by other code ({_some(changed)})")
            texts = {
                log: file.read_text(encoding="utf-8") for log in LOGS if (file := directory / "log" / log).exists()
            }
            self.log.take(name, texts)
            return StageResult(name, str(directory / "model"), cached=True, metrics=content["metrics"])
        return None

    def _others(self, name: str, inputs: dict[str, Any]) -> list[Path]:
        """Directories of the same inputs that other code has made."""
        prefix, ours = self._prefix(name, inputs), self.directory(name, inputs)
        found = prefix.parent.glob(f"{prefix.name}-{'[0-9a-f]' * 8}")
        return [path for path in found if path != ours and path.is_dir()]

    def _read(self, directory: Path, name: str, inputs: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        """(what stage.json says, why the directory cannot be believed or None)."""
        try:
            content = json.loads((directory / "stage.json").read_text())
            if (content["name"], content["inputs"]) != (name, _plain(inputs)):
                return {}, "stage.json is of another stage"
            if not isinstance(content["metrics"], dict) or not isinstance(content["code"], dict):
                return {}, "stage.json is damaged"
            if content["fingerprint"] != checkpoint_fingerprint(str(directory / "model"), memory=self.memory):
                return {}, "the files of its model are not those that were written"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return {}, f"{type(error).__name__}: {error}"
        return content, None

    @property
    def memory(self) -> Path:
        return self.cache_dir / MEMORY

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def run(self, name: str, inputs: dict[str, Any], work: Callable[[Path], dict[str, Any]]) -> StageResult:
        """Do the work in a temporary directory that becomes the stage's only when all of it is there.

        Args:
            work: writes a checkpoint to the path that it is given and returns the stage's metrics.
        """
        directory = self.directory(name, inputs)
        partial, replaced = (directory.with_name(f"{directory.name}.{end}") for end in ("partial", "replaced"))
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        began = time.time()
        metrics = work(partial / "model")
        (partial / "log").mkdir()
        for log, text in self.log.lines_of(name).items():
            (partial / "log" / log).write_text(text, encoding="utf-8")
        content = {"name": name, "seconds": time.time() - began, "metrics": metrics, "inputs": _plain(inputs)}
        content["code"] = self.code(name)
        content["fingerprint"] = checkpoint_fingerprint(str(partial / "model"), memory=self.memory)
        (partial / "stage.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
        shutil.rmtree(replaced, ignore_errors=True)
        if directory.exists():  # renamed first, since what is another user's can be renamed and not removed
            directory.rename(replaced)
            shutil.rmtree(replaced, ignore_errors=True)
        partial.rename(directory)
        return StageResult(name, str(directory / "model"), cached=False, metrics=metrics)


def _files(source: str) -> list[Path]:
    """Of a file, a directory or a pattern; none of a hub id."""
    path = Path(source)
    found = [path] if path.is_file() else path.rglob("*") if path.is_dir() else map(Path, glob(source, recursive=True))
    return sorted(file for file in found if file.is_file())


def _plain(inputs: dict[str, Any]) -> Any:
    """As stage.json has them."""
    values = {key: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for key, v in inputs.items()}
    return json.loads(json.dumps(values, sort_keys=True, default=str))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
