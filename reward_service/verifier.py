"""What a verifier declares: how the right answer is read off a row, and how a completion is compared with it.

Ours are the modules of reward_service/verifiers, each with a VERIFIER; others are found by import path (docs/verifiers.md).
They are read where a configuration is checked, too: a module imports its libraries inside its functions.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from contracts import plugins
from contracts.checks.check import Check

VERIFIERS = plugins.Kind("verifier", "reward_service.verifiers", "VERIFIER")
EXTRA = "verifiers"  # the optional dependencies of ours
Row = dict[str, Any]
Options = Mapping[str, Any]
Verified = float | dict[str, float]
SHOWN_CHARACTERS = 60


class BadRow(ValueError):
    """What a row has for an answer does not fit its verifier. The text says what it must be and what to write instead, and
    quotes nothing of the row: it travels with scores."""


@dataclass(frozen=True)
class Option:
    """One key of a verifier's `options`."""

    default: Any
    rule: str  # as in "options.pattern must be ..."
    holds: Callable[[Any], bool]
    instead: str = "the default"  # what to write where it does not hold


def one_of(default: str, *others: str) -> Option:
    values = (default, *others)
    return Option(default, f"one of {', '.join(values)}", lambda value: value in values, default)


def flag(default: bool) -> Option:
    return Option(default, "true or false", lambda value: isinstance(value, bool), str(default).lower())


def text_or_null(what: str) -> Option:
    return Option(
        None, f"null or {what}", lambda value: value is None or (isinstance(value, str) and value != ""), "null"
    )


@dataclass(frozen=True)
class Verifier:
    """A verifier.

    `read` makes of a row what `verify` compares a completion with, once for the completions of a row, and raises BadRow.
    `verify` returns the score, or named parts with `score` among them; what it raises is an error of that completion alone.
    `options["answer"]` is the name of the column with the right answer.
    """

    read: Callable[[Row, Options], Any]
    verify: Callable[[str, Any, Options], Verified]
    options: Mapping[str, Option] = field(default_factory=dict)
    answer: str = "answer"  # the column, where a configuration names none
    columns: tuple[str, ...] = ()  # others that a row must have
    needs_answer: bool = True  # else `read` says what a row must have
    requires: Mapping[str, str] = field(default_factory=dict)  # module it imports -> package that has it
    checks: Callable[[Options], list[tuple[bool, str, str, str]]] | None = (
        None  # (holds, option, rule, instead) of several
    )
    least_timeout_s: Callable[[Options], float] = lambda options: 0.0  # `timeout_s` must be above it
    # Called once in a process, before its first item: what it raises is why the service does not start.
    prepare: Callable[[Options], None] | None = None

    def chosen(self, answer: str | None, options: Options) -> dict[str, Any]:
        """Its options with their defaults, and the column of the answer."""
        return {**{name: option.default for name, option in self.options.items()}, **options,
                "answer": answer or self.answer}  # fmt: skip

    def right(self, row: Row, options: Options) -> Any:
        """What `verify` compares with. Raises BadRow.

        Args:
            options: as `chosen`.
        """
        wanted = (*([options["answer"]] if self.needs_answer else []), *self.columns)
        for name in wanted:
            if column(row, name) is None:
                raise BadRow(f"{name} must be there and not null; write the column, or the name of another one")
        return self.read(row, options)

    def row_problem(self, row: Row, options: Options) -> str | None:
        """Why completions of this row cannot be verified."""
        try:
            self.right(row, options)
        except BadRow as problem:
            return str(problem)
        return None

    def found_problem(self, row: Row, options: Options) -> str | None:
        """The same with what the row has in place of an answer, for the checks before a start."""
        problem = self.row_problem(row, options)
        if problem is None:
            return None
        found = repr(column(row, options["answer"]))
        shown = found if len(found) <= SHOWN_CHARACTERS else found[:SHOWN_CHARACTERS] + "..."
        return f"{problem}; found {options['answer']} = {shown}"

    def option_checks(self, key: str, options: Options) -> list[Check]:
        """The rules on `options` as a configuration has them; `key` leads there."""
        unknown = [name for name in options if name not in self.options]
        known = ", ".join(sorted(self.options)) or "none"
        checks = [
            Check(False, f"{key}.{name}", f"an option of this verifier ({known})", options[name],
                  plugins.closest(str(name), self.options) or "nothing")
            for name in unknown
        ]  # fmt: skip
        for name, option in self.options.items():
            if name in options:
                value = options[name]
                checks.append(Check(option.holds(value), f"{key}.{name}", option.rule, value, option.instead))
        if self.checks and all(check.holds for check in checks):
            chosen = self.chosen(None, options)
            checks += [
                Check(holds, f"{key}.{name}", rule, chosen[name], instead)
                for holds, name, rule, instead in self.checks(chosen)
            ]
        return checks

    def missing(self) -> list[str]:
        """The packages that it needs and that are not installed."""
        return sorted({package for module, package in self.requires.items() if find_spec(module) is None})


def find_verifier(name: str) -> Verifier:
    """Raises UnknownPlugin, a ValueError."""
    return plugins.find(VERIFIERS, name)


def column(row: Row, name: str) -> Any:
    """A value of a row; `a.b` is b of the object a, where the row has no `a.b`. None where there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def answer_text(row: Row, options: Options) -> str:
    """The right answer as text: a number as JSON writes it. Raises BadRow."""
    name = options["answer"]
    value = column(row, name)
    if isinstance(value, bool | list | dict) or (isinstance(value, float) and not math.isfinite(value)):
        raise BadRow(f"{name} must be a text or a number; write the answer alone")
    text = value if isinstance(value, str) else json.dumps(value)
    if not text.strip():
        raise BadRow(f"{name} must be more than white space; write the answer")
    return text
