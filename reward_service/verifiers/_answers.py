"""Where in a completion its answer is, and in which forms two texts count as the same."""

import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from reward_service.verifier import Option, one_of

TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
# Of DeepSeek-R1, Qwen3, Magistral. A template may begin the thought: then the completion has its end alone.
THOUGHT = re.compile(r"^[ \t]*(?:<think(?:ing)?>|\[THINK\])", re.MULTILINE)
THOUGHT_END = re.compile(r"</think(?:ing)?>|\[/THINK\]")
# Its second group is the label. An item of a list may begin with it.
FENCE = re.compile(
    r"^((?:[ \t]*(?:[-*+]|\d+[.)]))?[ \t]*)```[ \t]*([\w+.-]*)[^\n]*\n(.*?)^[ \t]*```[ \t\r]*$",
    re.DOTALL | re.MULTILINE,
)
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
    "text": "the whole completion, without thinking",
    "last_line": "its last line with anything in it",
    "tag": "its last <answer> tag",
}


def take(default: str) -> Option:
    return one_of(default, *(name for name in TAKE if name != default))


def answered(completion: str) -> str:
    """What stands behind the last thought that ends; one that does not end goes as far as the text, and answers nothing."""
    rest = THOUGHT_END.split(completion)[-1]
    begun = THOUGHT.search(rest)
    return rest[: begun.start()] if begun else rest


def taken(completion: str, options: Mapping[str, Any]) -> str | None:
    """The part of a completion, without its thoughts, that `options["take"]` names; None where it has none."""
    completion = answered(completion)
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
    """The last fenced block in one of `languages`, of any version, else the last without a language: what a program prints
    may stand behind it. As Markdown has it, lines begin where the fence does."""
    blocks = [
        (label.lower().rstrip(".0123456789"), len(before), text) for before, label, text in FENCE.findall(completion)
    ]
    for wanted in (languages, ("",)):
        found = [(width, text) for language, width, text in blocks if language in wanted]
        if found:
            width, text = found[-1]
            return re.sub(rf"^[ \t]{{1,{width}}}", "", text, flags=re.MULTILINE) if width else text
    return None


def verdict(is_right: bool, is_extracted: bool = True) -> dict[str, float]:
    return {"score": float(is_right), "extracted": float(is_extracted)}
