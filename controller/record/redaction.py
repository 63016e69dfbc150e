"""Configurations without their secrets, for files that people pass on."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from common.files.durable import replace_text

REDACTED = "[redacted]"
SECRET_WORDS = frozenset({"key", "apikey", "token", "secret", "password", "passwd", "credential", "credentials"})
SECRET_PART = re.compile("key|token|secret|password", re.IGNORECASE)
# In a text of Hydra's grammar.
PAIR = re.compile(r"""(?P<name>[\w.'"-]+)\s*:\s*(?P<value>'[^']*'|"[^"]*"|[^\s,:{}\[\]'"]+)""")
URL_LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")


def redacted(config: Any, hide: bool = False) -> Any:
    """A copy of a configuration without its secrets, as plain dicts and lists.

    A field with a word like `key` or `token` in its name loses its value, and so does a text under a name that merely
    contains one (`hfToken`, `tokens`). Numbers under such names stay: `max_tokens` is no secret. The login in a URL
    goes whatever the field is called.
    """
    if isinstance(config, Mapping):
        return {str(name): redacted(value, hide or _is_secret(str(name), value)) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [redacted(value, hide) for value in config]
    if hide and config is not None:
        return REDACTED
    return URL_LOGIN.sub(REDACTED, config) if isinstance(config, str) else config


def _is_secret(name: str, value: Any) -> bool:
    words = re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return not SECRET_WORDS.isdisjoint(words) or (isinstance(value, str) and SECRET_PART.search(name) is not None)


def redacted_override(override: str) -> str:
    """`key=value` without what is a secret of it."""
    name, _, value = override.partition("=")
    try:
        parsed = OverridesParser.create().parse_override(override).value()
        yaml.safe_dump(parsed)  # a sweep's is no plain value
    except (HydraException, yaml.YAMLError):
        parsed = value
    hidden = redacted({name: parsed})[name]
    if isinstance(hidden, str) and "{" in hidden:  # of several values, or of a form that is not Hydra's
        hidden = PAIR.sub(_redacted_pair, hidden)
    if hidden == parsed:
        return override
    shown = yaml.safe_dump(hidden, default_flow_style=True).strip() if isinstance(hidden, dict | list) else hidden
    return f"{name}={shown}"


def _redacted_pair(pair: re.Match[str]) -> str:
    name, value = pair["name"].strip("'\""), yaml.safe_load(pair["value"])
    return f"{pair['name']}:{REDACTED}" if _is_secret(name, value) else pair[0]


def redact_hydra(folder: Path) -> None:
    """Hydra has written configuration and command line of a run as they came, also of one that is refused or done already.
    The command line is kept, for the report."""
    overrides = folder / "overrides.yaml"
    if overrides.exists():
        _write_overrides(overrides, yaml.safe_load(overrides.read_text()) or [])
    for name in ("config.yaml", "hydra.yaml"):
        (folder / name).unlink(missing_ok=True)


def redact_sweep(folder: Path) -> None:
    """As `redact_hydra`, of a sweep: multirun.yaml then holds its command line alone. The first member to come does it."""
    file = folder / "multirun.yaml"
    content = yaml.safe_load(file.read_text()) if file.exists() else None
    if isinstance(content, Mapping):
        _write_overrides(file, content["hydra"]["overrides"]["task"])


def _write_overrides(file: Path, overrides: list[Any]) -> None:
    replace_text(file, yaml.safe_dump([redacted_override(str(item)) for item in overrides]))
