"""The commit protocol: weights and ledger reach the disk together or not at all.

    begin    free space? ── driver's state, taken now ── every rank starts to write into step_N.partial
                the run goes on; an optimizer step waits for the writer of its rank
    votes    every rank says what it wrote, or why it could not
    decide   all wrote: driver's state, manifest, fsync, rename to step_N, fsync; then the ledger's rows, then pruning
             one did not: no commit. The temporary files go, it is counted and said, training goes on
             one is gone: no commit, and the run goes back to the last one with a new learner

One commit is under way at a time, and it is decided before the next is begun.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from common.error_text import last_line, typed_line
from common.files.durable import FileRecord
from common.processes.ray_access import process_is_gone
from contracts.config import CheckpointConfig
from contracts.interfaces import CollectiveError, LearnerLostError
from controller.commits import commit_store
from controller.commits.commit_store import CheckpointError, Commit, RunFacts, State
from learner.learner_actor import LearnerGroup

SPARE = 1.2  # free space that a commit needs, over the size of the last one


@dataclass
class _Pending:
    commit: Commit
    folder: Path  # temporary
    state: State
    begun: list[Any]  # references
    votes_requested: bool = False


class Waits(Protocol):
    """The controller's answers, which are all heard while something is waited for."""

    def on_answers(self, references: list[Any], then: Callable[[list[Any]], None]) -> None: ...

    def wait_for_learner(self, until: Callable[[], bool], what: str) -> None: ...


@dataclass
class Committer:
    """All calls come from the controller's one thread; `say` tells the user, `committed` appends the rows that a commit's
    state has for the ledger's log."""

    run_dir: Path
    config: CheckpointConfig
    run: RunFacts
    learner: LearnerGroup
    answers: Waits
    committed: Callable[[State], None]
    say: Callable[[str], None]
    newest: int = -1  # step of the last commit

    def __post_init__(self) -> None:
        self._pending: _Pending | None = None
        self._num_bytes = 0  # of the last commit
        self._in_a_row = 0
        self._num_failed = 0
        self._stall_s = 0.0
        (self.run_dir / commit_store.FOLDER).mkdir(mode=0o700, exist_ok=True)

    def resume_at(self, commit: Commit | None) -> None:
        """The run stands at `commit`; one that was under way is of a line that was left."""
        self._pending = None
        if commit is not None:
            self.newest, self._num_bytes = commit.step, commit.num_bytes
            commit_store.set_aside_newer(self.run_dir, commit.step)
        commit_store.sweep(self.run_dir)

    def begin(self, step: int, policy_version: int, state: State, quality: tuple[str, float] | None) -> None:
        """Start a commit of the weights as they are now, and of `state`.

        Raises:
            CheckpointError: the last `checkpoint.max_failures` commits have failed.
        """
        self.wait_until_decided()
        start = time.perf_counter()
        path = commit_store.step_path(self.run_dir, step)
        folder = path.with_name(path.name + ".partial")
        try:
            self._require_space()
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
        except OSError as error:  # a full disk: no commit
            self._fail(step, folder, error)
            return
        new = Commit(
            path=path,
            step=step,
            version=policy_version,
            run=self.run,
            world_size=len(self.learner.actors),
            quality=quality,
            records={},
        )
        self._pending = _Pending(new, folder, state, self.learner.start("begin_commit", str(folder)))
        self._stall_s += time.perf_counter() - start

    def request_votes(self) -> None:
        """Call for the votes. A rank answers when it has written, and does nothing else until then: ask while it has nothing
        else to do, or behind what it shall do first."""
        pending = self._pending
        if pending is not None and not pending.votes_requested:
            pending.votes_requested = True
            votes = self.learner.start("state.result")
            self.answers.on_answers([*pending.begun, *votes], partial(self._decide, pending))

    def wait_until_decided(self) -> None:
        """Return when no commit is under way. Raises as `begin`, LearnerLostError where a rank is lost, and TimeoutError."""
        if self._pending is not None:
            start, step = time.perf_counter(), self._pending.commit.step
            self.request_votes()
            self.answers.wait_for_learner(lambda: self._pending is None, f"the commit of update {step}")
            self._stall_s += time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """Failed commits so far, and for how long the loop stood still for commits since the last call."""
        stalled, self._stall_s = self._stall_s, 0.0
        return {"fault/commits_failed": float(self._num_failed), "perf/commit_s": stalled}

    def _require_space(self) -> None:
        if not self._num_bytes:
            self._num_bytes = sum(self.learner.call("state.num_bytes"))
        free = shutil.disk_usage(self.run_dir).free
        if free < SPARE * self._num_bytes:
            raise OSError(f"{free / 2**20:.0f} MiB are free, a commit needs {SPARE * self._num_bytes / 2**20:.0f}")

    def _decide(self, pending: _Pending, answers: list[Any]) -> None:
        """All ranks have been heard.

        Raises:
            LearnerLostError: one is gone: nothing trains on without it.
            CheckpointError: as `begin`.
        """
        if self._pending is not pending:  # the run went back to an earlier commit meanwhile
            return
        self._pending = None
        start, step = time.perf_counter(), pending.commit.step
        errors = [_cause(answer) for answer in answers if isinstance(answer, BaseException)]
        if lost := [error for error in errors if process_is_gone(error) or isinstance(error, CollectiveError)]:
            shutil.rmtree(pending.folder, ignore_errors=True)
            raise LearnerLostError(f"a learner rank is lost: {typed_line(lost[0])}") from lost[0]
        try:
            if errors:
                raise errors[0]
            for votes in answers[len(pending.begun) :]:
                pending.commit.records.update({name: FileRecord(*record) for name, record in votes.items()})
            pending.commit.records.update(commit_store.write_driver_state(pending.folder, pending.state))
            commit_store.publish(pending.folder, pending.commit)
        except Exception as error:  # whatever it was, DeepSpeed's and the disk's included: no commit, the run goes on
            self._fail(step, pending.folder, error)
            return
        self._in_a_row = 0
        self.newest = step
        self._num_bytes = pending.commit.num_bytes
        try:
            self.committed(pending.state)
            commit_store.prune(self.run_dir, self.config.keep)
        except OSError as error:  # the commit holds the ledger's rows too: the next one appends them
            self._num_failed += 1
            self.say(f"WARNING: update {step} is committed, but not tidied up after: {_reason(error)}")
        self._stall_s += time.perf_counter() - start

    def _fail(self, step: int, folder: Path, error: BaseException) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._num_failed += 1
        self._in_a_row += 1
        most, reason = self.config.max_failures, _reason(error)
        self.say(f"WARNING: no commit of update {step}: {reason} ({self._in_a_row} in a row, {most} end the run)")
        if self._in_a_row >= most:
            told = f"{most} commits in a row have failed (checkpoint.max_failures), the last one: {reason}"
            raise CheckpointError(told) from error


def load_learner(learner: LearnerGroup, commit: Commit) -> None:
    """Give every rank its part of a commit, after all of them have found it good.

    Raises:
        CheckpointError: a rank refuses it; nothing has been touched.
        LearnerLostError: a rank is gone.
    """
    votes = learner.votes("state.check", str(commit.path), commit.records)
    lost = [
        f"rank {rank}: {_reason(vote)}"
        for rank, vote in enumerate(votes)
        if isinstance(vote, BaseException) and process_is_gone(vote)
    ]
    if lost:
        raise LearnerLostError(f"lost before it took {commit.path}: {'; '.join(lost)}")
    refusals = [f"rank {rank}: {_reason(vote)}" for rank, vote in enumerate(votes) if vote is not None]
    if refusals:
        raise CheckpointError(f"the learner cannot take {commit.path}: {'; '.join(refusals)}")
    learner.call("load_commit", str(commit.path))


def _reason(error: Any) -> str:
    return last_line(_cause(error))


def _cause(error: Any) -> Any:
    """Ray wraps what a rank raised."""
    return getattr(error, "cause", None) or error
