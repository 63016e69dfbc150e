"""A lost learner: new ranks, at the last commit. What it costs is the updates since then, never a rollout. Stages without
commits begin again."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ray.exceptions import RayError, RayTaskError

from common.error_text import typed_line
from common.processes.ray_access import process_is_gone
from contracts.interfaces import CollectiveError, EngineLostError, LearnerLostError
from contracts.weights import ActorsMissing
from controller.commits.commit_store import Commit, newest_valid
from controller.record.run_log import RunLog
from controller.record.terminal import Progress
from learner.learner_actor import LearnerGroup

Result = TypeVar("Result")


def once_more(work: Callable[[], Result], stage: str, log: RunLog, say: Callable[[str], None]) -> Result:
    """`work`, of a stage without commits; from its beginning, and once more where it loses a process. What it has logged
    before goes.

    Raises:
        Exception: of `work`, the loss of a second process among them.
    """
    try:
        return work()
    except (RayError, ActorsMissing) as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if not process_is_gone(cause) and not isinstance(cause, (CollectiveError, EngineLostError, ActorsMissing)):
            raise
        say(f"{stage} has lost a process and begins again ({typed_line(cause)})")
    log.cut(stage, {"metrics.jsonl": 0, "samples.jsonl": 0})  # what the driver was busy with stays true
    return work()


class Recovery:
    def __init__(self, learner: LearnerGroup, run_dir: Path, has_commits: bool, max_restarts: int, progress: Progress):
        self._learner = learner
        self._run_dir = run_dir
        self._has_commits = has_commits
        self._max_restarts, self._progress = max_restarts, progress
        self.num_restarts = 0

    @property
    def is_spent(self) -> bool:
        return self.num_restarts >= self._max_restarts

    def restart(self, error: BaseException) -> Commit | None:
        """End all ranks, for a collective cannot go on without one of them, and start them anew with the weights of their
        checkpoint. Returns the commit to restore; None where there is none yet, or where the run makes none: what lies in
        its directory is then of another.

        Raises:
            LearnerLostError: `cluster.max_learner_restarts` is reached.
            CheckpointError: there are commits, and none is valid.
        """
        if self.is_spent:
            raise LearnerLostError(
                f"{error}, after {self.num_restarts} restarts: cluster.max_learner_restarts is {self._max_restarts}"
            )
        self.num_restarts += 1
        commit = newest_valid(self._run_dir, self._progress.line) if self._has_commits else None
        stacks = self._run_dir / f"learner_stacks_{self.num_restarts}.txt"
        self._progress.line(f"{error}; all ranks start again and go back to update {commit.step if commit else 0}")
        stacks.write_text(self._learner.stacks())
        with self._progress.phase("starting the learner again"):
            self._learner.restart()
        return commit
