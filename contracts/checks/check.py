"""One rule on a configuration and what it says where it does not hold; the rules of every key by itself."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, get_args, get_type_hints

from contracts.checks.overrides import closest
from contracts.config import TandemConfig
from contracts.keys import Allowed, Rule
from contracts.stages import find_stage


def shown(value: Any) -> str:
    return "null" if value is None else str(value)


class Check(NamedTuple):
    """One rule applied to the values found, and what to write where it does not hold."""

    holds: bool
    key: str
    rule: str
    found: Any
    instead: str

    @property
    def message(self) -> str:
        return f"{self.key} must be {self.rule}; found {shown(self.found)}; write {self.instead}"


class Leaf(NamedTuple):
    """A key that is no section, with what the schema declares of it: `contracts.keys`."""

    key: str
    value: Any
    annotation: Any
    instead: str  # what to write where the value is wrong
    rule: Rule | None
    options: tuple[Any, ...]  # null among them
    free: str


def leaves(section: Any, prefix: str = "", narrower: Mapping[str, Allowed] | None = None) -> Iterator[Leaf]:
    """Every dotted key below a section; what users name (scorers, options of an environment) included."""
    if isinstance(section, dict):
        for name, value in section.items():
            if is_dataclass(value) or isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield Leaf(f"{prefix}{name}", value, Any, "a number, however large", None, (), "as its owner says")
        return
    defaults, hints = type(section)(), get_type_hints(type(section))
    for field in fields(section):
        key, value, annotation = prefix + field.name, getattr(section, field.name), hints[field.name]
        if is_dataclass(value) or isinstance(value, dict):
            yield from leaves(value, f"{key}.", field.metadata.get("narrower"))
            continue
        rule, choices, free = (narrower or {}).get(field.name) or field.metadata.get("allowed", Allowed())
        options = choices() if callable(choices) else choices
        if type(None) in get_args(annotation):
            rule, options = rule and _or_null(rule), options and (None, *options)
        instead = f"for example {shown(getattr(defaults, field.name))} (the default)"
        yield Leaf(key, value, annotation, instead, rule, options, free)


def _or_null(rule: Rule) -> Rule:
    return Rule(f"null or {rule.text}", lambda value: value is None or rule.holds(value))


def _is_finite(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def key_checks(config: TandemConfig) -> list[Check]:
    """Choices; that every number is finite, as JSON has no others for the records of a run; and its range."""
    choices, numbers = list[Check](), list[Check]()
    for key, value, _, instead, rule, options, _ in leaves(config):
        if options:
            names = [shown(option) for option in options]
            near = closest(str(value), names) or f"for example {names[0]}"
            is_elsewhere = key in ("stage", "method") and ":" in value and find_stage(value) is not None
            is_one = any(type(option) is type(value) and option == value for option in options)  # 0 is not False
            choices.append(Check(is_one or is_elsewhere, key, f"one of {', '.join(names)}", value, near))
        if not _is_finite(value):
            numbers.append(Check(False, key, "finite, as the records of a run hold no other number", value, instead))
        elif rule:
            numbers.append(Check(rule.holds(value), key, rule.text, value, instead))
    return choices + numbers
