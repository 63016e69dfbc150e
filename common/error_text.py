"""Errors in one line, for people. Many have several lines, and some have no text at all. Half a character (a lone
surrogate), which no file of UTF-8 takes, becomes a question mark."""

import re
from typing import Any

COUNT = re.compile(r"\d+ validation errors? for .+")
MOST = 500  # characters of what others tell at a length of their own


def whole_characters(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def told_by_others(error: BaseException) -> str:
    """Type and text of an error of code that is not ours, as short as a line of a file shall be."""
    name, text = type(error).__name__, _text(error)
    return whole_characters(f"{name}: {text[:MOST]}" if text else name)


def _text(error: Any) -> str:
    try:
        return str(error)
    except Exception:  # of its own `__str__`: the error is told, not this one
        return ""


def error_lines(error: BaseException) -> list[str]:
    """The lines of its text; its type alone where it has none."""
    text = whole_characters(_text(error)).strip()
    return [line for line in text.splitlines() if line.strip()] or [type(error).__name__]


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
    text = (whole_characters(_text(error)).strip().splitlines() or [""])[-1]
    return f"{type(error).__name__}: {text}" if isinstance(error, BaseException) else text
