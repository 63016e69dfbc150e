"""What a key of the configuration may hold, declared on the key: `learning_rate: float = key(1e-5, above=0)`.

The checks and their messages (`contracts.checks.check`) read it there, and a test wants it of every number and every text.
That a number is finite and that null is allowed need no word: the one holds for all, the other is in the annotation.
"""

import importlib
from collections.abc import Callable
from dataclasses import field
from typing import Any, NamedTuple, TypeVar

from contracts.plugins import Kind, names

T = TypeVar("T")
Choices = tuple[Any, ...]


class Rule(NamedTuple):
    text: str  # goes on from "KEY must be"
    holds: Callable[[Any], bool]


class Allowed(NamedTuple):
    """Of one key: a rule, or choices, or the reason why there are neither."""

    rule: Rule | None = None
    choices: Choices | Callable[[], Choices] = ()
    free: str = ""


def within(least: float | None, above: float | None, most: float | None, below: float | None, why: str) -> Rule | None:
    """A number between bounds, of which `above` and `below` are outside."""
    low, high = above if least is None else least, below if most is None else most
    if low is None:
        return None
    if high is not None:
        text = f"in {'(' if least is None else '['}{low}, {high}{')' if most is None else ']'}"
    elif least is None:
        text = f"above {low}"
    else:
        text = "0 or more" if least == 0 else f"at least {low}"

    def holds(value: float) -> bool:
        is_above = value > low if least is None else value >= low
        return is_above and (high is None or (value < high if most is None else value <= high))

    return Rule(f"{text}, {why}" if why else text, holds)


def key(
    default: T,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    why: str = "",
    rule: Rule | None = None,
    choices: Choices | Callable[[], Choices] = (),
    free: str = "",
) -> T:
    """A field of the schema.

    Args:
        why: of the bounds, for whoever is refused by them.
        rule: in place of bounds.
        choices: without null; a function where they are known only when a configuration is checked.
        free: what the key holds that has neither bounds nor choices, or who checks it.
    """
    metadata = {"allowed": Allowed(rule or within(least, above, most, below, why), choices, free)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)  # type: ignore[return-value]
    return field(default=default, metadata=metadata)  # type: ignore[return-value]


def section(kind: Callable[[], T], **narrower: Rule) -> T:
    """A section in whose place some keys have a rule of their own, instead of the one that its class declares."""
    allowed = {name: Allowed(rule) for name, rule in narrower.items()}
    return field(default_factory=kind, metadata={"narrower": allowed})  # type: ignore[return-value]


def names_in(module: str, name: str, *more: str) -> Callable[[], Choices]:
    """Choices that a module knows which reads the configuration itself: by a function that lists them, or the names of a
    kind of plugin."""

    def choices() -> Choices:
        known = getattr(importlib.import_module(module), name)
        return (*more, *(names(known) if isinstance(known, Kind) else known()))

    return choices
