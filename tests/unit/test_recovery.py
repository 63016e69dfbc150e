"""When a lost learner is started again, and what is left of it."""

import io
from pathlib import Path
from typing import Any

import pytest

from controller.fleet import LearnerLostError
from controller.progress import Progress
from controller.recovery import Recovery


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
        recovery = Recovery(learner, tmp_path, 2, progress)
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
