"""Where in a completion its answer is, and in which forms two texts count as the same."""

import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from reward_service.verifier import Option, one_of

TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+.-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
FORMS: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "case": str.casefold,
    "whitespace": lambda text: " ".join(text.split()),
    "nfkc": lambda text: unicodedata.normalize("NFKC", text),
}
NORMALISE = Option(
    ["strip"],
    f"a list of {', '.join(FORMS)}",
    lambda value: isinstance(value, list) and all(form in FORMS for form in value),
    "for example [strip, case]",
)
TAKE = {
    "text": "the whole completion",
    "last_line": "its last line with anything in it",
    "tag": "its last <answer> tag",
}


def take(default: str) -> Option:
    return one_of(default, *(name for name in TAKE if name != default))


def taken(completion: str, options: Mapping[str, Any]) -> str | None:
    """The part of a completion that `options["take"]` names; None where it has none."""
    if options["take"] == "text":
        return completion
    if options["take"] == "tag":
        found = TAG.findall(completion)
        return found[-1].strip() if found else None
    lines = [line.strip() for line in completion.splitlines() if line.strip()]
    return lines[-1] if lines else None


def normalised(text: str, options: Mapping[str, Any]) -> str:
    """`text` in each form of `options["normalise"]`, NFKC first as it makes spaces and letters of others."""
    for form in sorted(options["normalise"], key=lambda form: form != "nfkc"):
        text = FORMS[form](text)
    return text


def fenced(completion: str, *languages: str) -> str | None:
    """The last fenced block in one of `languages`, or without one."""
    found = [text for language, text in FENCE.findall(completion) if language.lower() in ("", *languages)]
    return found[-1] if found else None


def verdict(is_right: bool, is_extracted: bool = True) -> dict[str, float]:
    return {"score": float(is_right), "extracted": float(is_extracted)}
