"""What a pattern finds in the completion is the answer: its last match, and of that the group `answer`, the first group, or
all of it."""

import re
from collections import deque

from reward_service.verifier import Option, Options, Row, Verified, Verifier
from reward_service.verifiers import exact
from reward_service.verifiers._answers import NORMALISE, normalised, verdict


def compiles(pattern: object) -> bool:
    try:
        re.compile(pattern)  # type: ignore[call-overload]
    except (re.error, TypeError, RecursionError, OverflowError):
        return False
    return isinstance(pattern, str) and pattern != ""


def read(row: Row, options: Options) -> set[str]:
    return exact.read(row, options)


def verify(completion: str, right: set[str], options: Options) -> Verified:
    pattern = re.compile(options["pattern"])  # which re remembers
    last = next(iter(deque(pattern.finditer(completion), maxlen=1)), None)
    if last is None:
        return verdict(False, False)
    group = "answer" if "answer" in pattern.groupindex else min(1, pattern.groups)
    found = last.group(group)
    return verdict(found is not None and normalised(found, options) in right, found is not None)


def checks(options: Options) -> list[tuple[bool, str, str, str]]:
    rule = "set: a pattern of Python's re, whose group is the answer"
    return [(options["pattern"] is not None, "pattern", rule, r"for example 'Answer: (\w+)'")]


PATTERN = Option(
    None, "a pattern of Python's re", lambda value: value is None or compiles(value), r"for example 'Answer: (\w+)'"
)
VERIFIER = Verifier(read=read, verify=verify, options={"pattern": PATTERN, "normalise": NORMALISE}, checks=checks)
