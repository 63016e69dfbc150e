"""When a lost learner or stage is started again, and what is left of it."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from contracts.config import LoggerConfig
from contracts.interfaces import CollectiveError, EngineLostError, LearnerLostError
from contracts.weights import ActorsMissing
from controller.loop.recovery import Recovery, once_more
from controller.record.run_log import RunLog
from controller.record.terminal import Progress
from tests.unit.test_commits import commit

pytestmark = pytest.mark.usefixtures("made_up_metrics")


class Learner:
    def __init__(self) -> None:
        self.restarts = 0

    def stacks(self) -> str:
        return "---- rank 0\n  in all_reduce"

    def restart(self) -> None:
        self.restarts += 1


@pytest.fixture
def said() -> io.StringIO:
    return io.StringIO()


def test_a_learner_is_started_again_so_many_times_only(tmp_path: Path, said: io.StringIO) -> None:
    learner: Any = Learner()
    with Progress(0, stream=said) as progress:
        recovery = Recovery(learner, tmp_path, True, 2, progress)
        for _ in range(2):
            assert not recovery.is_spent
            assert recovery.restart(LearnerLostError("a learner rank is lost: ActorDiedError")) is None  # no commit yet
        assert recovery.is_spent
        with pytest.raises(LearnerLostError, match=r"after 2 restarts: cluster\.max_learner_restarts is 2"):
            recovery.restart(LearnerLostError("a learner rank is lost: ActorDiedError"))
    assert (learner.restarts, recovery.num_restarts) == (2, 2)
    line = "a learner rank is lost: ActorDiedError; all ranks start again and go back to update 0"
    assert said.getvalue().count(line) == 2
    assert (tmp_path / "learner_stacks_2.txt").read_text() == learner.stacks()


def test_a_run_without_commits_goes_back_to_none_of_another(tmp_path: Path, said: io.StringIO) -> None:
    commit(tmp_path, 8)
    learner: Any = Learner()
    with Progress(0, stream=said) as progress:
        found = [
            Recovery(learner, tmp_path, has, 2, progress).restart(LearnerLostError("gone")) for has in (True, False)
        ]
    assert [each.step if each else None for each in found] == [8, None]


# ---- stages without commits


@pytest.fixture
def log(tmp_path: Path) -> Iterator[RunLog]:
    with RunLog(tmp_path, {}, LoggerConfig(wandb="disabled"), "sft") as log:
        log.log("earlier", 0, {"loss": 1.0})
        yield log


def stage(log: RunLog, *errors: Exception) -> Callable[[], str]:
    """A stage that logs a line and then fails as often as there are errors."""
    left = list(errors)

    def work() -> str:
        log.log("sft", 0, {"loss": 2.0})
        if left:
            raise left.pop(0)
        return "done"

    return work


@pytest.mark.parametrize(
    "error",
    [
        RayActorError(),
        OutOfMemoryError("Ray's monitor of memory has ended it"),
        RayTaskError("step", "traceback", CollectiveError("rank 0: gloo")),
        RayTaskError("rollout", "traceback", EngineLostError("the engine is dead")),
        ActorsMissing("version 1 of the weights did not reach every actor"),
    ],
)
def test_a_stage_that_loses_a_process_begins_again_without_what_it_had_logged(error: Exception, log: RunLog) -> None:
    said: list[str] = []
    assert once_more(stage(log, error), "sft", log, said.append) == "done"
    [line] = said
    assert line.startswith("sft has lost a process and begins again (")
    rows = [json.loads(row)["stage"] for row in (log.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows == ["earlier", "sft"]


def test_a_stage_begins_again_once(log: RunLog) -> None:
    with pytest.raises(RayActorError):
        once_more(stage(log, RayActorError(), RayActorError()), "sft", log, print)


@pytest.mark.parametrize("error", [ValueError("a bad row"), RayTaskError("step", "traceback", ValueError("a bad row"))])
def test_another_error_ends_the_stage(error: Exception, log: RunLog) -> None:
    said: list[str] = []
    with pytest.raises(type(error)):
        once_more(stage(log, error), "sft", log, said.append)
    assert said == []
