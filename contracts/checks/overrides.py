"""Keys on the command line that the configuration does not have, each with the closest one that it has."""

import re
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from contracts.config import TandemConfig
from contracts.plugins import closest

ANY = "*"  # stands for a name that the user chooses, as in `reward_service.scorers.*.path`


def schema_section(annotation: Any) -> Any:
    """The dataclass that an annotation holds (`A` or `A | None`), or None."""
    return next((kind for kind in (annotation, *get_args(annotation)) if is_dataclass(kind)), None)


def _schema_keys(schema_class: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a schema, sections included."""
    keys = []
    for name, annotation in get_type_hints(schema_class).items():
        section, key = schema_section(annotation), prefix + name
        keys.append(key)
        if get_origin(annotation) is dict:
            key = f"{key}.{ANY}"
            keys.append(key)
        keys += _schema_keys(section, f"{key}.") if section else []
    return keys


def _generic(key: str, known: list[str]) -> str:
    """`key` with `*` in place of names that the user chooses."""
    parts = key.split(".")
    for index in range(1, len(parts)):
        if ".".join([*parts[:index], ANY]) in known:
            parts[index] = ANY
    return ".".join(parts)


# Names below these are for somebody else to say: an environment, DeepSpeed, a kind of scorer.
FREE = re.compile(r"(environment\.options|learner\.deepspeed|reward_service\.scorers\.\w+\.options)\.")


def override_key(word: str) -> str:
    """The key of an override, whether it adds (`+`, `++`), deletes (`~`) or sets."""
    return word.lstrip("+~").split("=", 1)[0]


def unknown_overrides(arguments: list[str]) -> list[str]:
    """Messages for Hydra overrides of keys that the schema does not have, all of them.

    Hydra itself stops at the first and advises to add it with a `+`, which would then be accepted and ignored.
    """
    known = _schema_keys(TandemConfig)
    messages = []
    for argument in arguments:
        if argument.startswith("-") or "=" not in argument:
            continue
        key = override_key(argument).split("@")[0]
        is_open = re.match(r"(hydra|experiment|arm|tuning)([./]|$)", key) or FREE.match(key)
        if _generic(key, known) not in known and not is_open:
            instead = closest(_generic(key, known), known)
            messages.append(f"{key} is not a key of the configuration" + (f"; write {instead}" if instead else ""))
    return messages


NOT_TEXT = re.compile(r"true|false|null|[+-]?(inf(inity)?|nan|\d[\d_.]*(e[+-]?\d+)?|\.\d+(e[+-]?\d+)?)", re.IGNORECASE)


def quoted(value: str) -> str:
    """A text for Hydra's override grammar, which has letters of ASCII alone outside quotes and reads numbers there, and in
    which a backslash is one unless a quote follows it."""
    if re.fullmatch(r"[\w./+:-]+", value, re.ASCII) and not NOT_TEXT.fullmatch(value):
        return value
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"
