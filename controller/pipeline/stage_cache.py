"""Finished stages: a directory each, named by what went in and by the code that made it, reused while neither has changed.

cache_dir/stages/<name>-<hash of the inputs>-<hash of the code>/     made again: the same with .2, .3, ...
    model/          the checkpoint
    stage.json      metrics, seconds, what the hashes stand for, and the checkpoint's fingerprint
    log/            the stage's lines of metrics.jsonl, samples.jsonl and phases.jsonl

A directory is believed when it is what its stage.json says. What is not (torn by a crash or a full disk, changed since,
copied from elsewhere) is named and made anew.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.error_text import typed_line
from common.files.code_digest import changed_code, stage_code
from common.files.fingerprints import MEMORY, checkpoint_fingerprint, json_digest
from common.strict_json import json_text
from contracts.checks.validation import ConfigError
from contracts.config import TandemConfig
from contracts.plugins import import_path, source_file
from contracts.records import StageResult
from contracts.stages import find_stage
from controller.record.run_log import LOGS, RunLog

SHOWN = 4  # changed files that are named
DAMAGES = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # not what another moment would mend
code_at_start = lru_cache(stage_code)  # a process goes on with the code that it began with


def code_of(config: TandemConfig, result: str) -> dict[str, str]:
    """What code a result depends on, with what the configuration chooses by a name."""
    return code_at_start(result, named=_named(config, result))


def edited_code(config: TandemConfig, result: str) -> dict[str, str]:
    """What of it has changed since this process took it for its own, by names that no other code has. The driver goes on
    with what it has imported; a process that starts later imports what is there then."""
    start, now = code_of(config, result), stage_code(result, named=_named(config, result))
    return {f"{name} (edited while it ran)": now.get(name, "gone") for name in changed_code(start, now)}


def _named(config: TandemConfig, result: str) -> tuple[str, ...]:
    stage = find_stage(result)
    return tuple(source_file(*plugin) or import_path(*plugin) for plugin in stage.plugins(config)) if stage else ()


@dataclass
class StageStore:
    """Where stages leave their results; the run's log gets the lines of every stage that is taken from here."""

    cache_dir: Path
    log: RunLog
    reuse: Any  # as the key reuse_stages
    say: Callable[[str], None]
    code: Callable[[str], dict[str, str]]  # of a stage: `code_of`
    edited: Callable[[str], dict[str, str]] = lambda name: {}  # of a stage: `edited_code`
    _said: set[str] = field(default_factory=set)

    def directory(self, name: str, inputs: dict[str, Any], code: dict[str, str] | None = None) -> Path:
        """Of what this code makes; None: today's."""
        prefix = self._prefix(name, inputs)
        return prefix.with_name(f"{prefix.name}-{json_digest(code or self.code(name))[:8]}")

    def _prefix(self, name: str, inputs: dict[str, Any]) -> Path:
        return self.cache_dir / "stages" / f"{file_name(name)}-{json_digest(_plain(inputs))[:12]}"

    @contextmanager
    def alone(
        self, name: str, inputs: dict[str, Any], wait: Callable[[], AbstractContextManager[None]]
    ) -> Iterator[None]:
        """Runs side by side make a stage once: the others wait here, within `wait()`, and then find it. The lock ends with
        its process, however that ends.

        Raises:
            ConfigError: nothing can be made in the cache.
        """
        directory = self.directory(name, inputs)
        with ExitStack() as kept:
            try:
                file = _open_lock(directory.with_name(f"{directory.name}.lock"))
                kept.callback(os.close, file)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    with wait():
                        fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                raise ConfigError(
                    f"cache_dir must be a directory in which {name} can be made; found {self.cache_dir} ({error}); write "
                    "another one, or let its owner give you the right to write there"
                ) from error
            yield

    def find(self, name: str, inputs: dict[str, Any]) -> StageResult | None:
        """As `look`, and its log lines are then the run's."""
        found = self.look(name, inputs)
        if found:
            logs = {log: Path(found.path).parent / "log" / log for log in LOGS}
            self.log.take(name, {log: file.read_text(encoding="utf-8") for log, file in logs.items() if file.exists()})
        return found

    def look(self, name: str, inputs: dict[str, Any]) -> StageResult | None:
        """The finished stage with exactly these inputs, made by today's code where `reuse` is auto. Says why one that is
        there is not taken."""
        if self.reuse is False:
            return None
        code = self.code(name)
        for directory in self._made(name, inputs):
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
            return StageResult(name, str(directory / "model"), cached=True, metrics=content["metrics"])
        return None

    def _made(self, name: str, inputs: dict[str, Any]) -> list[Path]:
        """Directories of these inputs: those of today's code first, then those of other code, each from the newest on."""
        prefix, ours = self._prefix(name, inputs), self.directory(name, inputs)
        form = re.compile(re.escape(prefix.name) + r"-[0-9a-f]{8}(\.\d+)?")
        found = [path for path in prefix.parent.glob(f"{prefix.name}-*") if form.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: (path.name.startswith(ours.name), path.stat().st_mtime_ns), reverse=True)

    def _free(self, name: str, inputs: dict[str, Any], code: dict[str, str]) -> Path:
        """The directory for a result: in the place of one that cannot be believed, beside those that other runs may be
        reading."""
        directory = first = self.directory(name, inputs, code)
        number = 1
        while directory.exists() and self._may_be_whole(directory, name, inputs):
            number += 1
            directory = first.with_name(f"{first.name}.{number}")
        return directory

    def _may_be_whole(self, directory: Path, name: str, inputs: dict[str, Any]) -> bool:
        try:
            return self._read(directory, name, inputs)[1] is None
        except ConfigError:
            return True

    def _read(self, directory: Path, name: str, inputs: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        """(what stage.json says, why the directory cannot be believed or None). Raises ConfigError where it cannot be read
        now: that is no reason to train again."""
        try:
            content = json.loads((directory / "stage.json").read_text())
            if (content["name"], content["inputs"]) != (name, _plain(inputs)):
                return {}, "stage.json is of another stage"
            if not isinstance(content["metrics"], dict) or not isinstance(content["code"], dict):
                return {}, "stage.json is damaged"
            if not (directory / "model").is_dir():
                return {}, "it has no model"
            if content["fingerprint"] != checkpoint_fingerprint(str(directory / "model"), memory=self.memory):
                return {}, "the files of its model are not those that were written"
            if problem := _unreadable(directory / "log"):
                return {}, problem
        except (*DAMAGES, ValueError, KeyError, TypeError, RecursionError) as error:
            return {}, f"{type(error).__name__}: {error}"
        except OSError as error:
            raise ConfigError(
                f"{directory} cannot be read now and may be whole ({typed_line(error)}): start again when the disk answers, "
                f"have its owner let you read it, or write reuse_stages=false to make {name} anew"
            ) from error
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
        partial = directory.with_name(f"{directory.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        began = time.time()
        metrics = work(partial / "model")
        (partial / "log").mkdir()
        for log, text in self.log.lines_of(name).items():
            (partial / "log" / log).write_text(text, encoding="utf-8")
        content = {"name": name, "seconds": time.time() - began, "metrics": metrics, "inputs": _plain(inputs)}
        edited = self.edited(name)
        content["code"] = self.code(name) | edited
        if edited:
            self.say(f"WARNING: {name} counts as made by code of its own: {_some(list(edited))}")
        content["fingerprint"] = checkpoint_fingerprint(str(partial / "model"), memory=self.memory)
        (partial / "stage.json").write_text(json_text(content, indent=1, default=str) + "\n")
        directory = self._free(name, inputs, content["code"])
        replaced = directory.with_name(f"{directory.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if directory.exists():  # renamed first, since what is another user's can be renamed and not removed
            directory.rename(replaced)
            shutil.rmtree(replaced, ignore_errors=True)
        partial.rename(directory)
        return StageResult(name, str(directory / "model"), cached=False, metrics=metrics)


def _open_lock(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another user's; a local file system locks it all the same
        return os.open(path, os.O_RDONLY)


def file_name(name: str) -> str:
    """Of a stage: reward_model/proxy has a slash, an import path a colon."""
    return re.sub(r"[/:]", "-", name)


def _unreadable(folder: Path) -> str | None:
    """Why the lines of a stage's log cannot be those of a run, or None."""
    for name in LOGS:
        lines = (folder / name).read_text(encoding="utf-8").split("\n") if (folder / name).exists() else []
        if not all(isinstance(json.loads(line), dict) for line in lines if line):
            return f"log/{name} has a line that is no row"
    return None


def _plain(inputs: dict[str, Any]) -> Any:
    """As stage.json has them."""
    values = {key: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for key, v in inputs.items()}
    return json.loads(json.dumps(values, sort_keys=True, default=str))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
