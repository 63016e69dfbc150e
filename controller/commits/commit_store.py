"""Commits on disk: a directory each, whole or not there.

    RUN/checkpoints/
        step_12/                    after 12 updates
            MANIFEST.json           size and SHA-256 of every other file; configuration; its own SHA-256
            driver.json             ledger, prompt stream, KL controller, normaliser, random state, lines in the logs
            driver.safetensors      the ledger's arrays: rollouts that are sampled but not trained
            rank_R.safetensors      what learner rank R needs to go on
            policy/                 the policy as a plain Hugging Face checkpoint
        invalid_step_8_T/           was no commit any more when the run went on from an earlier one: for who may repair it
        step_16.partial/            being written, or left by a crash: nobody reads it

No pointer file names the newest: discovery looks for the newest manifest that verifies.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from safetensors.numpy import load_file

from common.error_text import typed_line
from common.files import durable
from common.files.checkpoint_files import is_inside
from common.files.code_digest import package_versions
from common.files.durable import FileRecord, RawTensor
from common.files.fingerprints import json_digest

FOLDER, MANIFEST, FORMAT = "checkpoints", "MANIFEST.json", 2
DRIVER, ARRAYS = "driver.json", "driver.safetensors"
DTYPES = {"int32": "I32", "int64": "I64", "float32": "F32", "float64": "F64", "bool": "BOOL", "uint8": "U8"}

State = tuple[dict[str, Any], dict[str, np.ndarray]]  # plain values, and arrays


class CheckpointError(RuntimeError):
    """A commit cannot be used, or none can be made."""


@dataclass(frozen=True)
class RunFacts:
    """What a commit says of its run beside the state."""

    identity: dict[str, Any]  # what decides the result, flat
    config: dict[str, Any]  # resolved, without secrets
    scorers: dict[str, str | None] = field(default_factory=dict)  # versions that scored
    packages: dict[str, str] = field(default_factory=package_versions)
    code: str | None = None  # a digest of what made it, as that of a cached stage
    sources: list[str] | None = None  # under `data`, that the run has read; None: nobody has noted them


@dataclass(frozen=True)
class Commit:
    """A commit whose manifest has been read; `problem` says whether its files are what the manifest says."""

    path: Path
    step: int  # updates that had trained
    version: int  # of the policy
    run: RunFacts
    world_size: int
    quality: tuple[str, float] | None  # metric that `best` goes by, and its mean over the last updates
    records: dict[str, FileRecord]

    @property
    def num_bytes(self) -> int:
        return sum(record.size for record in self.records.values())

    def problem(self, content: bool = True) -> str | None:
        """Why it is no valid commit, or None. Without `content` the files' sizes alone are compared."""
        if self.path.stat().st_uid != _owner_of_what_is_written_in(self.path.parent):
            return f"{self.path} belongs to another user"
        if self.path.name != f"step_{self.step}":
            return f"{MANIFEST} is of step {self.step}"
        ranks = [f"rank_{rank}.safetensors" for rank in range(self.world_size)]
        if lacking := [name for name in (DRIVER, ARRAYS, *ranks) if name not in self.records]:
            return f"{MANIFEST} names no {', '.join(lacking)}"
        root = self.path.resolve()
        if links := [name for name in self.records if (root / name).resolve() != root / name]:
            return f"{links[0]} is a link, and a commit holds its files itself"
        policy = (file.relative_to(root).as_posix() for file in (root / "policy").rglob("*") if not file.is_dir())
        if strange := sorted({*policy} - {*self.records}):  # whoever loads the policy may take it
            return f"{strange[0]} is not in {MANIFEST}"
        found = (durable.problem(self.path / name, record, content) for name, record in self.records.items())
        return next((reason for reason in found if reason), None)

    def driver_state(self) -> State:
        return json.loads((self.path / DRIVER).read_text()), load_file(self.path / ARRAYS)


def _owner_of_what_is_written_in(folder: Path) -> int:
    """As network storage has it, which may know this user by another number (NFS for root, access points of EFS)."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:  # nothing can be written there
        return os.getuid()


def write_driver_state(partial: Path, state: State) -> dict[str, FileRecord]:
    plain, arrays = state
    raw = {
        name: RawTensor(DTYPES[a.dtype.name], a.shape, np.ascontiguousarray(a).view(np.uint8).data)
        for name, a in arrays.items()
        if a.size
    }
    records = {DRIVER: durable.write_json(partial / DRIVER, plain)}
    return records | {ARRAYS: durable.write_tensors(partial / ARRAYS, raw, {})}


def publish(partial: Path, commit: Commit) -> None:
    """Write the manifest, make everything durable and give the directory its name."""
    content = {
        "format": FORMAT,
        "step": commit.step,
        "version": commit.version,
        **asdict(commit.run),
        "world_size": commit.world_size,
        "quality": commit.quality,
        "files": commit.records,
    }
    durable.write_json(partial / MANIFEST, {"sha256": json_digest(content), "content": content})
    durable.publish(partial, commit.path)


class _Content(BaseModel):
    """What a manifest holds: JSON of others may hold anything."""

    model_config = ConfigDict(strict=True)
    step: Annotated[int, Field(ge=0)]
    version: Annotated[int, Field(ge=0)]
    world_size: Annotated[int, Field(ge=1)]
    quality: tuple[str, Annotated[float, Field(allow_inf_nan=False)]] | None
    files: dict[Annotated[str, Field(pattern=r"^[^\x00]+$")], tuple[Annotated[int, Field(ge=0)], str]]
    identity: dict[str, Any]
    config: dict[str, Any]
    scorers: dict[str, str | None]
    packages: dict[str, str]
    code: str | None = None
    sources: list[str] | None = None


def read_commit(path: Path) -> Commit:
    """Raises CheckpointError where there is no manifest that can be believed, OSError where it cannot be read now."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        content = manifest["content"]
        if manifest["sha256"] != json_digest(content):
            raise CheckpointError(f"{MANIFEST} does not have the SHA-256 that it names")
        if content["format"] != FORMAT:
            raise CheckpointError(f"{MANIFEST} has format {content['format']}, this version reads {FORMAT}")
        if strange := [name for name in content["files"] if not is_inside(name)]:
            raise CheckpointError(f"{MANIFEST} names {strange[0]!r}, which is no file of the commit")
        found = _Content.model_validate_json(json.dumps(content))  # in which arrays are tuples
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} cannot be read: {typed_line(error)}") from error
    run = RunFacts(**{fact.name: getattr(found, fact.name) for fact in fields(RunFacts)})
    records = {name: FileRecord(*record) for name, record in found.files.items()}
    return Commit(path, found.step, found.version, run, found.world_size, found.quality, records)


def steps(run_dir: Path) -> list[int]:
    """Of all directories that are named as commits, in ascending order."""
    names = [p.name.removeprefix("step_") for p in (run_dir / FOLDER).glob("step_*") if p.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def step_path(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step_{step}"


def verified(run_dir: Path, step: int) -> Commit:
    """Raises CheckpointError where the commit is not what its manifest says, OSError where it cannot be read now."""
    commit = read_commit(step_path(run_dir, step))
    if problem := commit.problem():
        raise CheckpointError(problem)
    return commit


def newest_valid(run_dir: Path, say: Callable[[str], None]) -> Commit | None:
    """The newest commit that verifies; None where there is none at all. `say` hears of each that does not.

    Raises:
        CheckpointError: there are commits, and none is valid: that is no reason to start afresh. Or one cannot be read now:
            it may be whole, and a run that went on from an earlier one would leave its line.
    """
    reasons = []
    for step in reversed(steps(run_dir)):
        try:
            return verified(run_dir, step)
        except CheckpointError as error:
            reasons.append(f"step_{step}: {error}")
            say(f"WARNING: the commit {step_path(run_dir, step)} is not valid ({error}); looking for an earlier one")
        except OSError as error:
            raise CheckpointError(
                f"the commit {step_path(run_dir, step)} cannot be read now and may be whole ({typed_line(error)}): start "
                "again when the disk answers, or move it elsewhere to go on from an earlier one"
            ) from error
    if reasons:
        raise CheckpointError(
            f"{run_dir / FOLDER} has commits and none is valid ({'; '.join(reasons)}): repair them, or start afresh with "
            "checkpoint.resume=never or another run_dir"
        )
    return None


def set_aside_newer(run_dir: Path, step: int) -> None:
    """Let those after `step`, which the run goes on from, be no commits any more: none comes back once it is repaired, and
    none takes the place of one that is kept."""
    for newer in steps(run_dir):
        if newer > step:
            path = step_path(run_dir, newer)
            path.rename(path.with_name(f"invalid_{path.name}_{time.time_ns()}"))


def best(run_dir: Path) -> Commit | None:
    """The commit with the highest quality, the newer one of two equals; None where no commit has one."""
    found = []
    for step in steps(run_dir):
        try:
            commit = read_commit(step_path(run_dir, step))
        except CheckpointError:
            continue
        if commit.quality is not None:
            found.append(commit)
    return max(found, key=lambda c: (c.quality[1] if c.quality else 0.0, c.step), default=None)


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` commits and the best one. What cannot be read is not deleted: somebody may repair
    it."""
    found = steps(run_dir)
    top = best(run_dir)
    for step in found[:-keep]:
        path = step_path(run_dir, step)
        if (top is None or top.step != step) and (path / MANIFEST).exists():
            # Under its new name it is no commit any more, so a crash in between leaves no half of one.
            doomed = path.with_name(path.name + ".partial")
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
            shutil.rmtree(doomed)


def sweep(run_dir: Path) -> None:
    """Delete what a crash left half written."""
    for path in (run_dir / FOLDER).glob("*.partial"):
        shutil.rmtree(path)
