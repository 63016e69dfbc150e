"""Values of overrides beside the types of the schema: what is of a wrong type, and texts that are read as something else."""

import re
from dataclasses import field, fields, make_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, ValidationError

from contracts.checks.check import shown
from contracts.checks.overrides import override_key, schema_section, unknown_overrides
from contracts.config import TandemConfig

TYPES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list[float]: "a list of numbers",
}


def schema_place(key: str, schema: Any = TandemConfig) -> tuple[Any, Any]:
    """The section of the schema that a dotted key lies in, None where a user has named the key; and the key's annotation,
    None where the schema does not have it."""
    section, annotation = None, schema
    for name in key.split("."):
        if get_origin(annotation) is dict:
            section, annotation = None, get_args(annotation)[-1]
        else:
            section = schema_section(annotation)
            annotation = get_type_hints(section).get(name) if section else None
    return section, annotation


def value_problems(key: str, annotation: Any, value: Any, written: str, section: Any = None) -> list[str]:
    """What is wrong with a value or with those inside it.

    Args:
        written: the text that it has been read from, as a whole.
        section: that the key lies in; None where a user has named it.
    """
    inner = schema_section(annotation)
    if inner and isinstance(value, dict):
        is_named = get_origin(annotation) is dict
        hints = dict.fromkeys(value, inner) if is_named else get_type_hints(inner)
        unknown = unknown_overrides([f"{key}.{name}=" for name in value if name not in hints])
        return unknown + [
            text
            for name, part in value.items()
            if name in hints
            for text in value_problems(f"{key}.{name}", hints[name], part, written, None if is_named else inner)
        ]
    if texts := misread_texts(key, annotation, value, written):
        return texts
    name = override_key(key).rpartition(".")[2]
    example = f"; write {_example(section, name)}" if section else ""
    if bool in (annotation, *get_args(annotation)) and type(value) is int and value not in (0, 1):
        return [f"{key} must be {_kind(annotation)}; found {value}{example}"]
    if section is None:
        return [f"{key} must be {_kind(annotation)}; found {shown(value)}"] if inner else []
    try:
        OmegaConf.merge(OmegaConf.structured(_alone(section, name, annotation)), {name: value})
    except (ConfigKeyError, ValidationError):
        return [f"{key} must be {_kind(annotation)}; found {value}{example}"]
    return []


def misread_overrides(words: list[str], prefix: str, schema: Any) -> list[str]:
    """As `misread_texts`, of `PREFIX.key=value`, whose keys are those of another schema."""
    found = []
    for word in words:
        key, (written, _, setting) = override_key(word), word.partition("=")
        _, annotation = schema_place(key.removeprefix(prefix), schema)
        if key.startswith(prefix) and annotation is not None and "=" in word:
            value = OverridesParser.create().parse_override(word).value()
            found += misread_texts(written, annotation, value, setting)
    return found


def misread_texts(key: str, annotation: Any, value: Any, written: str) -> list[str]:
    """Texts that Hydra's grammar has read as something else: 12e4567, a revision, is infinity, and the tag 1.10 is 1.1.

    Args:
        annotation: of the schema; texts may be in a list or be values of a dict.
        written: what `value` has been read from.
    """
    if get_origin(annotation) in (list, dict):
        inner = get_args(annotation)[-1]
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [text for name, part in parts for text in misread_texts(f"{key}.{name}", inner, part, written)]
    if str not in (annotation, *get_args(annotation)) or not isinstance(value, bool | int | float):
        return []
    if str(value) == written:
        return []
    # Of a list or a dict it is not known which part of what is written it was.
    if written[:1] in "[{":
        if re.search(rf"(?<![\w.+-]){re.escape(str(value))}(?![\w.])", written):
            return []
        return [f"{key} must be a text; found one that is read as {value}; write it in quotes within {written}"]
    return [f"{key} must be a text; found {written}, which is read as {value}; write {key}='\"{written}\"'"]


def _alone(section: Any, name: str, annotation: Any) -> Any:
    """A schema with one key of a section, where it holds no keys of its own: OmegaConf would make and copy all that
    the section has."""
    if schema_section(annotation):
        return section
    (found,) = (entry for entry in fields(section) if entry.name == name)
    same: Any = field()
    same.default, same.default_factory = found.default, found.default_factory
    return make_dataclass(section.__name__, [(name, annotation, same)])


def _kind(annotation: Any) -> str:
    if schema_section(annotation):
        return "a section with keys of its own"
    kinds = get_args(annotation)
    if type(None) not in kinds:
        return TYPES.get(annotation, str(annotation))
    return f"{TYPES.get(next(kind for kind in kinds if kind is not type(None)), str(annotation))} or null"


def _example(section: Any, name: str) -> str:
    default = OmegaConf.select(OmegaConf.structured(section), name, throw_on_missing=False)
    return f"for example {shown(default)} (the default)"
