"""Errors in one line, also those without any text."""

import subprocess
from pathlib import Path

import pytest
from ray.exceptions import RayActorError

from common.error_text import error_lines, last_line, told_by_others, typed_line, whole_characters
from controller.loop.recovery import once_more
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("error", "lines", "typed"),
    [
        (TimeoutError(), ["TimeoutError"], "TimeoutError"),
        (ValueError("  \n\n "), ["ValueError"], "ValueError"),
        (ValueError("\none\n\n two\n"), ["one", " two"], "ValueError: one"),
        (KeyError("x"), ["'x'"], "KeyError: 'x'"),
        (
            ValueError("1 validation error for M\n  Value error, no [type=x]\n    For more see"),
            ["1 validation error for M", "  Value error, no [type=x]", "    For more see"],
            "ValueError: 1 validation error for M Value error, no",
        ),
    ],
)
def test_an_error_in_one_line(error: Exception, lines: list[str], typed: str) -> None:
    assert error_lines(error) == lines
    assert typed_line(error) == typed


def test_half_a_character_is_told_as_a_question_mark() -> None:
    error = ValueError("one \udc00\ntwo \ud83d")
    assert (typed_line(error), last_line(error)) == ("ValueError: one ?", "ValueError: two ?")
    assert told_by_others(error) == "ValueError: one ?\ntwo ?"
    assert whole_characters("\U0001f600 é") == "\U0001f600 é"


def test_what_others_tell_is_bounded() -> None:
    assert told_by_others(ValueError("é" * 501)) == "ValueError: " + "é" * 500
    assert told_by_others(SystemExit(2)) == "SystemExit: 2"
    assert told_by_others(TimeoutError()) == "TimeoutError"


def test_a_lost_process_without_a_message_is_told(tmp_path: Path) -> None:
    class Silent(RayActorError):
        def __str__(self) -> str:
            return ""

    class Log:
        def cut(self, stage: str, sizes: dict[str, int]) -> None: ...

    said: list[str] = []
    errors = [Silent()]

    def work() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert once_more(work, "sft", Log(), said.append) == "done"  # type: ignore[arg-type]
    assert said == ["sft has lost a process and begins again (Silent)"]


def test_nobody_takes_the_first_line_of_an_error_that_may_have_none() -> None:
    """`"".splitlines()[0]` raises IndexError in place of the error that it was to show."""
    folders = ["actors", "contracts", "controller", "learner", "reward_service", "submission", "hydra_plugins"]
    command = ["grep", "-rnE", r"splitlines\(\)\[", "--include=*.py", *folders, "train.py", "submit.py"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert [line for line in found.stdout.splitlines() if "__doc__" not in line] == []
