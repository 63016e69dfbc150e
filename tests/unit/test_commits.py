"""Commits on disk: what is torn, missing or changed is found; the newest valid one counts; the best one stays."""

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.files import durable
from common.files.fingerprints import json_digest
from controller.commits import commit_store
from controller.commits.commit_store import MANIFEST, CheckpointError, Commit, RunFacts
from controller.ledger.ledger import Ledger

ARRAYS = {"int32": np.arange(5, dtype=np.int32), "float32": np.array([0.5, -1.0], dtype=np.float32)}


def commit(
    run_dir: Path, step: int, quality: float | None = None, config: dict[str, Any] | None = None, **facts: Any
) -> Commit:
    """A commit as `controller.commits.committer` makes it."""
    path = commit_store.step_path(run_dir, step)
    partial = path.with_name(path.name + ".partial")
    (partial / "policy").mkdir(parents=True)
    named = quality and ("reward/x", quality)
    about = RunFacts(**{"identity": {"seed": 1}, "config": config or {}, "packages": {"torch": "2"}} | facts)
    new = Commit(path, step, step - 1, about, 1, named, {})
    new.records["rank_0.safetensors"] = durable.write_chunks(partial / "rank_0.safetensors", [b"weights"])
    new.records["policy/config.json"] = durable.write_json(partial / "policy/config.json", {"layers": 2})
    new.records.update(commit_store.write_driver_state(partial, ({"updates": step}, ARRAYS)))
    commit_store.publish(partial, new)
    return new


def test_what_was_committed_is_read(tmp_path: Path) -> None:
    commit(tmp_path, 3, quality=0.25)
    said: list[str] = []
    found = commit_store.newest_valid(tmp_path, said.append)
    assert found is not None
    assert (found.step, found.version, found.run.identity, found.quality) == (3, 2, {"seed": 1}, ("reward/x", 0.25))
    state, arrays = found.driver_state()
    assert state == {"updates": 3}
    assert {name: array.tolist() for name, array in arrays.items()} == {"int32": [0, 1, 2, 3, 4], "float32": [0.5, -1]}
    assert said == []


def test_the_ledger_survives_the_files(tmp_path: Path) -> None:
    """An empty ledger has no arrays at all, which a file must hold too."""
    partial = tmp_path / "state"
    partial.mkdir()
    ledger = Ledger(4, 1)
    commit_store.write_driver_state(partial, ledger.state_dict())
    found = Commit(partial, 0, 0, RunFacts({}, {}), 1, None, {}).driver_state()
    Ledger(4, 1).load_state_dict(*found, tmp_path / "ledger.jsonl")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def lie(path: Path) -> None:
    """A manifest that was changed to fit."""
    manifest = json.loads(path.read_text())
    manifest["content"]["step"] = 99
    path.write_text(json.dumps(manifest))


def rewrite(**changes: Any) -> Any:
    """A manifest with other content, and the SHA-256 of that."""

    def change(path: Path) -> None:
        content = json.loads(path.read_text())["content"]
        content.update({key: value(content[key]) if callable(value) else value for key, value in changes.items()})
        path.write_text(json.dumps({"sha256": json_digest(content), "content": content}))

    return change


def to_link(path: Path) -> None:
    outside = Path(tempfile.mkdtemp(dir=path.parents[4])) / path.name
    path.rename(outside)
    path.symlink_to(outside)


def more(path: Path) -> None:
    path.write_bytes(b"")


def without(name: str) -> Any:
    return lambda files: {key: value for key, value in files.items() if key != name}


@pytest.mark.parametrize(
    ("harm", "file", "reason"),
    [
        (truncate, "rank_0.safetensors", "rank_0.safetensors has 6 bytes instead of 7"),
        (flip, "rank_0.safetensors", "rank_0.safetensors has SHA-256 "),
        (flip, "driver.safetensors", "driver.safetensors has SHA-256 "),
        (Path.unlink, "policy/config.json", "config.json is missing"),
        (truncate, MANIFEST, "MANIFEST.json cannot be read: JSONDecodeError"),
        (lie, MANIFEST, "MANIFEST.json does not have the SHA-256 that it names"),
        (Path.unlink, MANIFEST, "MANIFEST.json is missing"),
        (
            rewrite(files={}),
            MANIFEST,
            "MANIFEST.json names no driver.json, driver.safetensors, rank_0",
        ),
        (rewrite(files=without("driver.json")), MANIFEST, "MANIFEST.json names no driver.json"),
        (rewrite(world_size=2), MANIFEST, "MANIFEST.json names no rank_1.safetensors"),
        (rewrite(step=7), MANIFEST, "MANIFEST.json is of step 7"),
        (rewrite(files=lambda f: f | {"../x": [0, ""]}), MANIFEST, "names '../x', which is no file of the commit"),
        (rewrite(files=lambda f: f | {"policy/../x": [0, ""]}), MANIFEST, "names 'policy/../x', which is no file"),
        (rewrite(files=lambda f: f | {"/etc/hosts": [0, ""]}), MANIFEST, "names '/etc/hosts', which is no file"),
        (rewrite(files=lambda f: f | {"": [0, ""]}), MANIFEST, "names '', which is no file of the commit"),
        (rewrite(files=["driver.json"]), MANIFEST, "MANIFEST.json cannot be read"),
        (to_link, "rank_0.safetensors", "rank_0.safetensors is a link, and a commit holds its files itself"),
        (to_link, "policy/config.json", "policy/config.json is a link, and a commit holds its files itself"),
        (to_link, "policy", "policy/config.json is a link, and a commit holds its files itself"),
        (
            more,
            "policy/model-00002-of-00002.safetensors",
            "policy/model-00002-of-00002.safetensors is not in MANIFEST.json",
        ),
    ],
)
def test_a_damaged_commit_is_passed_over_loudly(harm: Any, file: str, reason: str, tmp_path: Path) -> None:
    for step in (2, 4):
        commit(tmp_path, step)
    harm(commit_store.step_path(tmp_path, 4) / file)
    said: list[str] = []
    found = commit_store.newest_valid(tmp_path, said.append)
    assert found is not None
    assert found.step == 2
    [line] = said
    assert line.startswith("WARNING: the commit ")
    assert reason in line

    harm(commit_store.step_path(tmp_path, 2) / file)
    with pytest.raises(CheckpointError, match="has commits and none is valid") as error:
        commit_store.newest_valid(tmp_path, said.append)
    assert "step_2" in str(error.value)
    assert "step_4" in str(error.value)


@pytest.mark.parametrize("file", [MANIFEST, "rank_0.safetensors"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_commit_that_cannot_be_read_now_is_not_passed_over(
    file: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be whole: a run that went on from an earlier one would leave its line, and find it again another time."""
    for step in (2, 4):
        commit(tmp_path, step)
    opened, newest = Path.open, commit_store.step_path(tmp_path, 4)

    def fails(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == newest / file:
            raise OSError(number, os.strerror(number))
        return opened(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", fails)
        with pytest.raises(CheckpointError, match=r"step_4 cannot be read now and may be whole \(\w*Error: "):
            commit_store.newest_valid(tmp_path, print)
    found = commit_store.newest_valid(tmp_path, print)
    assert found is not None
    assert found.step == 4


def test_what_was_passed_over_does_not_come_back(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        commit(tmp_path, step)
    commit_store.set_aside_newer(tmp_path, 2)
    assert commit_store.steps(tmp_path) == [2]
    aside = [path for path in (tmp_path / "checkpoints").iterdir() if path.name != "step_2"]
    assert sorted(path.name.rpartition("_")[0] for path in aside) == ["invalid_step_4", "invalid_step_6"]
    assert all((path / MANIFEST).exists() for path in aside)


def test_whose_a_commit_is_goes_by_what_the_file_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network storage may know this user by another number: of root under NFS, of everybody behind an access point."""
    commit(tmp_path, 2)
    monkeypatch.setattr(os, "getuid", lambda: 65533)
    assert commit_store.verified(tmp_path, 2).step == 2
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(commit_store, "_owner_of_what_is_written_in", lambda folder: owner + 1)
    with pytest.raises(CheckpointError, match="belongs to another user"):
        commit_store.verified(tmp_path, 2)


def test_without_commits_there_is_none(tmp_path: Path) -> None:
    assert commit_store.newest_valid(tmp_path, print) is None
    (tmp_path / "checkpoints/step_2.partial").mkdir(parents=True)
    assert commit_store.newest_valid(tmp_path, print) is None  # half of one is none
    commit_store.sweep(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_commit_is_never_replaced(tmp_path: Path) -> None:
    commit(tmp_path, 2)
    with pytest.raises(FileExistsError):
        commit(tmp_path, 2)


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    for step, quality in ((1, 0.1), (2, 0.9), (3, 0.3), (4, 0.2), (5, 0.4)):
        commit(tmp_path, step, quality)
        commit_store.prune(tmp_path, keep=2)
    assert commit_store.steps(tmp_path) == [2, 4, 5]
    best = commit_store.best(tmp_path)
    assert best is not None
    assert best.step == 2


def test_of_equals_the_newer_is_the_best(tmp_path: Path) -> None:
    for step in (1, 2):
        commit(tmp_path, step, 0.5)
    best = commit_store.best(tmp_path)
    assert best is not None
    assert best.step == 2


def test_what_cannot_be_read_is_not_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        commit(tmp_path, step)
    (commit_store.step_path(tmp_path, 1) / MANIFEST).unlink()
    commit_store.prune(tmp_path, keep=2)
    assert commit_store.steps(tmp_path) == [1, 3, 4]
