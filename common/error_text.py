"""Errors in one line, for people. Many have several lines, and some have no text at all."""

import re
from typing import Any

COUNT = re.compile(r"\d+ validation errors? for .+")


def error_lines(error: BaseException) -> list[str]:
    """The lines of its text; its type alone where it has none."""
    return [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]


def typed_line(error: BaseException) -> str:
    """Its type and the first line of its text, as far as there is one; of pydantic's, whose first line only counts, the
    first that says something too."""
    name, lines = type(error).__name__, error_lines(error)
    line = lines[0]
    if COUNT.fullmatch(line):
        line = " ".join(part.strip() for part in lines[:2]).partition(" [type=")[0][:200]
    return name if line == name else f"{name}: {line}"


def last_line(error: Any) -> str:
    """The last line of its text, where Ray puts what a process raised; of an error its type before."""
    text = (str(error).strip().splitlines() or [""])[-1]
    return f"{type(error).__name__}: {text}" if isinstance(error, BaseException) else text
