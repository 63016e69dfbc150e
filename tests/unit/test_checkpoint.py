"""The commit protocol on ranks that write real files: all of them or no commit, and no commit is not the end of the run."""

import errno
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from common.files import durable
from common.files.durable import RawTensor
from contracts.config import CheckpointConfig
from contracts.interfaces import CollectiveError, LearnerLostError
from controller.commits import commit_store
from controller.commits.commit_store import CheckpointError, RunFacts
from controller.commits.committer import Committer, load_learner
from tests.conftest import ROOT
from tests.unit.test_dispatch import Actor, Call, start

STATE: commit_store.State = ({"updates": 1}, {})
DATA = b"x" * 4096


class Learner:
    """Two ranks that write a file each, in a thread, until one is told to fail."""

    def __init__(self) -> None:
        self.actors = [0, 1]
        self.failing: BaseException | None = None
        self.votes_to_load: list[Any] = [None, None]
        self.loaded: list[str] = []
        self._threads = ThreadPoolExecutor(2)
        self._directory = Path()

    def start(self, method: str, *arguments: str) -> list[Call]:
        if method == "begin_commit":
            self._directory = Path(*arguments)
            return [self._done(None), self._done(None)]
        assert method == "state.result"
        return [Call(self._threads.submit(self._write, rank)) for rank in self.actors]

    def _done(self, value: Any) -> Call:
        done: Future[Any] = Future()
        done.set_result(value)
        return Call(done)

    def _write(self, rank: int) -> dict[str, durable.FileRecord]:
        if rank == 1 and self.failing:
            raise self.failing
        name = f"rank_{rank}.safetensors"
        return {
            name: durable.write_tensors(self._directory / name, {"w": RawTensor("U8", (4096,), memoryview(DATA))}, {})
        }

    def call(self, method: str, *arguments: Any) -> list[Any]:
        if method == "load_commit":
            self.loaded.append(arguments[0])
            return [None, None]
        assert method == "state.num_bytes"
        return [4096, 4096]

    def votes(self, method: str, *arguments: Any) -> list[Any]:
        return self.votes_to_load


class Fixture:
    def __init__(self, run_dir: Path, **options: Any):
        self.learner, self.said, self.committed = Learner(), [], 0
        dispatcher, _ = start([Actor()])
        config = CheckpointConfig(**options)
        facts = RunFacts({"seed": 1}, {"name": "x"}, {"proxy": "v1"})
        learner: Any = self.learner
        self.committer = Committer(run_dir, config, facts, learner, dispatcher.answers, self._count, self.said.append)

    def _count(self, state: Any) -> None:
        assert state is STATE
        self.committed += 1

    def commit(self, step: int) -> None:
        self.committer.begin(step, step, STATE, ("reward/x", 0.5))
        self.committer.wait_until_decided()


def test_all_ranks_and_the_driver_or_nothing(tmp_path: Path) -> None:
    run = Fixture(tmp_path)
    run.commit(1)
    found = commit_store.verified(tmp_path, 1)
    assert set(found.records) == {"rank_0.safetensors", "rank_1.safetensors", "driver.json", "driver.safetensors"}
    assert (found.world_size, found.run.scorers, found.driver_state()[0]) == (2, {"proxy": "v1"}, {"updates": 1})
    assert (run.committed, run.committer.newest) == (1, 1)
    assert found.path.stat().st_mode & 0o777 == 0o700

    run.learner.failing = OSError(errno.ENOSPC, "No space left on device")
    run.commit(2)
    assert commit_store.steps(tmp_path) == [1]
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    assert run.committed == 1  # the ledger's rows wait for the next commit
    assert run.said == [
        "WARNING: no commit of update 2: OSError: [Errno 28] No space left on device (1 in a row, 3 end the run)"
    ]
    assert run.committer.metrics()["fault/commits_failed"] == 1

    run.learner.failing = None
    run.commit(3)
    assert commit_store.steps(tmp_path) == [1, 3]
    assert run.committed == 2


def test_failures_in_a_row_end_the_run(tmp_path: Path) -> None:
    run = Fixture(tmp_path, max_failures=2)
    for step, failing in ((1, True), (2, False), (3, True)):
        run.learner.failing = RuntimeError("unexpected pos 64 vs 0") if failing else None
        run.commit(step)
    with pytest.raises(CheckpointError, match=r"2 commits in a row have failed .*unexpected pos"):
        run.commit(4)


@pytest.mark.parametrize(
    "failing",
    [
        RayActorError(),
        OutOfMemoryError("Ray's monitor of memory has ended it"),
        RayTaskError("call", "traceback", CollectiveError("rank 1: gloo")),
    ],
)
def test_a_rank_that_is_gone_is_no_failed_commit(failing: BaseException, tmp_path: Path) -> None:
    """Nothing trains on without it: the run goes back, however few commits may fail."""
    run = Fixture(tmp_path, max_failures=1)
    run.commit(1)
    run.learner.failing = failing
    with pytest.raises(LearnerLostError, match="a learner rank is lost: "):
        run.commit(2)
    assert commit_store.steps(tmp_path) == [1]
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    assert run.said == []
    assert run.committer.metrics()["fault/commits_failed"] == 0
    run.committer.wait_until_decided()  # none is under way
    run.learner.failing = None
    run.committer.resume_at(commit_store.verified(tmp_path, 1))
    run.commit(2)
    assert commit_store.steps(tmp_path) == [1, 2]


def test_without_room_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Fixture(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=9000))  # 1.2 x 8192 = 9830
    run.commit(1)
    assert "0 MiB are free, a commit needs 0" in run.said[0]
    assert commit_store.steps(tmp_path) == []


def test_a_disk_that_fills_while_the_driver_writes(tmp_path: Path) -> None:
    """A real limit of the file size, in a process of its own: RLIMIT_FSIZE makes write() fail as a full disk does."""
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.unit import test_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = test_checkpoint.Fixture(Path({str(tmp_path)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
run.commit(1)
print(run.said)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
run.commit(2)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no commit of update 1: OSError: [Errno 27] File too large" in done.stdout
    assert commit_store.steps(tmp_path) == [2]
    assert commit_store.verified(tmp_path, 2).step == 2


def test_old_commits_go(tmp_path: Path) -> None:
    run = Fixture(tmp_path, keep=2)
    for step in range(1, 5):
        run.commit(step)
    assert commit_store.steps(tmp_path) == [3, 4]  # of equals the newer is the best


def test_what_is_no_commit_any_more_is_not_in_the_way_of_one(tmp_path: Path) -> None:
    run = Fixture(tmp_path)
    run.commit(1)
    run.commit(2)
    (tmp_path / "checkpoints" / "step_2" / "driver.json").write_text("{}")
    found = commit_store.newest_valid(tmp_path, run.said.append)
    assert found is not None
    run.committer.resume_at(found)
    run.commit(2)
    assert commit_store.verified(tmp_path, 2).step == 2
    assert run.committer.metrics()["fault/commits_failed"] == 0
    (kept,) = (tmp_path / "checkpoints").glob("invalid_step_2_*")
    assert (kept / "driver.json").read_text() == "{}"
    assert commit_store.steps(tmp_path) == [1, 2]


def test_a_commit_that_was_passed_over_takes_no_place_of_those_that_are_kept(tmp_path: Path) -> None:
    run = Fixture(tmp_path, keep=2)
    for step in (1, 2, 3):
        run.commit(step)
    damaged = tmp_path / "checkpoints/step_3/driver.json"
    whole = damaged.read_text()
    damaged.write_text("{}")
    run.committer.resume_at(commit_store.newest_valid(tmp_path, run.said.append))
    assert commit_store.steps(tmp_path) == [2]
    (kept,) = (tmp_path / "checkpoints").glob("invalid_step_3_*")
    (kept / "driver.json").write_text(whole)  # it is repaired when the run is on another line
    found = commit_store.newest_valid(tmp_path, run.said.append)
    assert found is not None
    assert found.step == 2


def test_one_rank_that_refuses_keeps_all_untouched(tmp_path: Path) -> None:
    run = Fixture(tmp_path)
    run.commit(1)
    found, learner = commit_store.verified(tmp_path, 1), run.learner
    group: Any = learner
    learner.votes_to_load = [None, "rank_1.safetensors is missing"]
    with pytest.raises(CheckpointError, match=r"rank 1: rank_1.safetensors is missing"):
        load_learner(group, found)
    learner.votes_to_load = [RuntimeError("the actor died"), None]
    with pytest.raises(CheckpointError, match=r"rank 0: RuntimeError: the actor died"):
        load_learner(group, found)
    learner.votes_to_load = [None, RayActorError()]
    with pytest.raises(LearnerLostError, match=r"lost before it took .*step_1: rank 1"):
        load_learner(group, found)
    assert learner.loaded == []
    learner.votes_to_load = [None, None]
    load_learner(group, found)
    assert learner.loaded == [str(found.path)]


def test_votes_of_a_line_that_was_left_do_not_count(tmp_path: Path) -> None:
    """A learner was lost in the middle of a commit; the run went back, and begins the next one before the votes come."""
    run = Fixture(tmp_path)
    run.commit(1)
    late: list[Future[Any]] = [Future() for _ in range(2)]
    run.learner._write = lambda rank: late[rank].result(10)  # type: ignore[method-assign]
    run.committer.begin(2, 2, STATE, None)
    run.committer.request_votes()
    run.committer.resume_at(commit_store.verified(tmp_path, 1))
    del run.learner._write
    run.learner._threads = ThreadPoolExecutor(2)
    run.committer.begin(3, 3, STATE, None)
    for answer in late:
        answer.set_result({"left.safetensors": durable.FileRecord(1, "0")})
    run.committer.wait_until_decided()
    assert commit_store.steps(tmp_path) == [1, 3]
    assert "left.safetensors" not in commit_store.verified(tmp_path, 3).records
