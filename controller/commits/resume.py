"""What a run finds in its directory: whose it is, what is left of an earlier attempt, and where to go on.

One driver works in a run directory at a time; a lock says so, which ends with its process whatever happens. An attempt is
one start of a driver there. A resumed run is the same run: where anything that decides the result differs, it is refused.
"""

import fcntl
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import psutil
import ray
import yaml

from common.files.durable import replace_text
from contracts.checks.overrides import override_key, quoted
from contracts.checks.validation import ConfigError
from contracts.config import TandemConfig
from contracts.estimators import chosen_estimator
from controller.commits import commit_store
from controller.commits.commit_store import CheckpointError, Commit
from controller.record import scale_file
from controller.record.redaction import redacted, redacted_override
from controller.record.run_log import LOGS, RunLog

LOCK, SESSION, CONFIG = "driver.lock", "ray_session", "config.yaml"
SESSION_NAME = re.compile(r"session_\d[\w-]*")  # as Ray calls them: session_2026-11-28_16-02-11_123456_4711
ORPHANS_END_S = 10.0
# Of a scorer, what bounds its work: its version has none of it, and a limit that was too tight may be widened.
BOUNDS = re.compile(
    r"scorers\.[^.]+\.((judge\.)?timeout_s|processes|batch_size|memory_gib|judge\.(concurrency|engine\.kv_cache_gib))"
)
SHOWN = 12  # characters of a fingerprint, for people


class RunDirectory:
    """A run directory, held by this driver until the process ends.

    Raises:
        ConfigError: another driver works there.
    """

    def __init__(self, path: Path, say: Callable[[str], None]):
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)  # prompts, completions and whatever an error message quotes
        self.path, self._say = path, say
        self._lock: IO[str] = (path / LOCK).open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"run_dir={path}: another driver is working there; write another run_dir") from None
        self._lock.seek(0)
        earlier = self._lock.read()
        self.attempt = int(earlier) + 1 if earlier.isdecimal() else 1
        self._lock.truncate(0)
        self._lock.write(str(self.attempt))
        self._lock.flush()
        self._earlier_config: str | None = None
        self.has_begun = False  # this start has changed something of what an earlier attempt has left
        scale_file.forget(path)
        session = path / SESSION
        if session.exists():
            self._end_orphans(session.read_text(errors="replace"))
            session.unlink()

    def _end_orphans(self, session: str) -> None:
        if not is_ray_session(session):
            found = f"ignored ({session[:80]!r})"
            self._say(f"{self.path / SESSION} names no Ray session of this user that is there: {found}")
        elif ended := end_orphans(session):
            self._say(f"{ended} processes of an earlier attempt were still there and have been ended")

    def started_ray(self, session: str | None) -> None:
        """Remember the session directory of an embedded Ray, for whoever comes after this driver; None: it is not ours."""
        if session:
            replace_text(self.path / SESSION, session)

    def write_config(self, plain: dict[str, Any]) -> None:
        """The resolved configuration, for people and reports."""
        file = self.path / CONFIG
        self._earlier_config = file.read_text() if file.exists() else None
        replace_text(file, yaml.safe_dump(plain, sort_keys=False))

    def refused(self) -> None:
        """This start changes nothing: what is in the directory is still of the earlier attempt's configuration."""
        if self._earlier_config is not None:
            replace_text(self.path / CONFIG, self._earlier_config)

    def find(
        self, resume: str, identity: dict[str, Any], is_stale: Callable[[Commit], bool] = lambda commit: False
    ) -> Commit | None:
        """The commit to go on from; None for a fresh start.

        Args:
            is_stale: whether a commit is the end of what is to be made anew: nothing would train, and its policy be taken
                for the new one.

        Raises:
            CheckpointError: there are commits, and none is valid.
            ConfigError: the commits are of another run.
        """
        commit_store.sweep(self.path)
        if resume == "never":
            self.set_aside("checkpoint.resume=never")
            return None
        commit = commit_store.newest_valid(self.path, self._say)
        if commit is None:
            return None
        _require_same(commit.path, commit.run.identity, identity)
        if is_stale(commit):
            self.set_aside(f"{commit.path} is the end of a run by other code, or reuse_stages=false asks for a new one")
            return None
        return commit

    def check(self, identity: Mapping[str, Any], unknown: Collection[str]) -> None:
        """What `find` would refuse, before everything is known. The newest commit whose manifest can be read speaks for all:
        those of one directory are of one run.

        Args:
            unknown: keys of the identity that nobody knows yet.

        Raises:
            ConfigError: the commits are of another run.
        """
        for step in reversed(commit_store.steps(self.path)):
            try:
                commit = commit_store.read_commit(commit_store.step_path(self.path, step))
            except (commit_store.CheckpointError, OSError):  # `find` says so
                continue
            known = {key: value for key, value in commit.run.identity.items() if key not in unknown}
            return _require_same(commit.path, known, identity)

    def set_aside(self, why: str) -> None:
        """Start afresh, and keep what is there: commits and logs."""
        folder = self.path / commit_store.FOLDER
        if commit_store.steps(self.path):
            self.has_begun = True
            aside = self.path / f"{commit_store.FOLDER}.before-attempt-{self.attempt}"
            folder.rename(aside)
            for log in LOGS:  # the stage begins again, and takes its lines back
                if (self.path / log).exists():
                    shutil.copy2(self.path / log, aside / log)
            self._say(f"{why}: starting afresh; the earlier commits and logs are in {aside}")


def open_run(config: TandemConfig, directory: RunDirectory) -> RunLog:
    """Write the resolved configuration into the run directory, open the log."""
    plain = redacted(asdict(config))
    directory.write_config(plain)
    estimators = [chosen_estimator(config.ppo)]
    return RunLog(directory.path, plain, config.logger, config.stage, attempt=directory.attempt, estimators=estimators)


def _require_same(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    if found := differences(_without_bounds(theirs), _without_bounds(ours)):
        told = f"{path} is of another run than this configuration describes:"
        instead = (
            "write the values of the commit, another run_dir, or checkpoint.resume=never to start afresh; where "
            "checkpoints alone differ, other code has made their stages anew: reuse_stages=true takes the old"
        )
        raise ConfigError("\n  - ".join([told, *found, instead]))


def _without_bounds(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in identity.items() if not BOUNDS.fullmatch(key)}


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What decides the result and is not the same, one line each."""

    def shown(side: Mapping[str, Any], key: str) -> str:
        value = side.get(key, "nothing")
        return f"{value[:SHOWN]}…" if isinstance(value, str) and len(value) == 64 else json.dumps(value)

    keys = [key for key in sorted({*theirs, *ours}) if theirs.get(key, ...) != ours.get(key, ...)]
    return [f"{key}: the commit has {shown(theirs, key)}, this configuration {shown(ours, key)}" for key in keys]


def other_versions(commit: Commit, packages: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Warn where other packages computed the commit: then nothing is promised bit for bit."""
    theirs = commit.run.packages
    names = [name for name in sorted({*theirs, *packages}) if theirs.get(name) != packages.get(name)]
    if names:
        changed = ", ".join(f"{n} {theirs.get(n, 'none')} -> {packages.get(n, 'none')}" for n in names)
        say(f"WARNING: the commit was made with other packages ({changed}): the run goes on, not bit for bit")


def require_scorers(commit: Commit, scorers: Mapping[str, str | None]) -> None:
    """Raises CheckpointError where other reward models or rules would score than before."""
    if found := differences(commit.run.scorers, scorers):
        told = f"{commit.path} was scored by other versions than are served now:"
        raise CheckpointError("\n  - ".join([told, *found]))


def resume_command(overrides: list[str], run_dir: str, origin: Sequence[str] = ()) -> str:
    """What a user types to go on; secrets of the command line are for the user to fill in.

    Args:
        origin: words that say where the configuration lies (common/composing.py).
    """
    kept = [redacted_override(o) for o in overrides if override_key(o) not in ("run_dir", "checkpoint.resume")]
    return shlex.join(["python", "train.py", *origin, *kept, f"run_dir={quoted(run_dir)}"])


def is_ray_session(session: str) -> bool:
    """Whether this is the directory of a Ray session of this user. What a full disk has left empty, a relative path or `/`
    would match processes of anybody."""
    path = Path(session)
    try:
        is_one = path.is_absolute() and SESSION_NAME.fullmatch(path.name) is not None
        return is_one and path.stat().st_uid == os.getuid()
    except (OSError, ValueError):  # it is gone, and so is who wrote there; or no path at all
        return False


def end_orphans(session: str) -> int:
    """End what an earlier driver has left: Ray's programs and this Python's processes that write into its Ray session, as
    all of them do their logs; who only reads there, or with another program, is somebody else. Never this process or one
    that it descends from. Embedded Ray's workers die with the driver, its agents within a minute; an engine's own children
    may stay. (A mark in the environment would not do: Ray's workers overwrite theirs with their title.)

    Args:
        session: a directory for which `is_ray_session` holds.
    """
    if not is_ray_session(session):
        raise ValueError(f"{session!r} is no Ray session of this user")
    python, programs = os.path.realpath(sys.executable), f"{os.path.realpath(os.path.dirname(ray.__file__))}/"
    own = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    left = []
    for process in psutil.process_iter():
        if process.pid in own:
            continue
        try:
            files = [file for file in process.open_files() if file.path.startswith(f"{session}/") and file.mode != "r"]
            if files and (process.exe() == python or process.exe().startswith(programs)):
                process.kill()
                left.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # ended meanwhile, or of another user
            continue
    psutil.wait_procs(left, timeout=ORPHANS_END_S)
    return len(left)
