"""The reference of all keys, from the schema: `python -m contracts.checks.reference > docs/configuration.md` writes it."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import MISSING

from contracts.checks.check import Leaf, leaves, shown
from contracts.config import (
    LoraByRoleConfig,
    LoraConfig,
    PromptSourceConfig,
    RoleLoraConfig,
    ScorerConfig,
    SourceConfig,
    TandemConfig,
)

DEMO = Path(__file__).parents[2] / "conf/config.yaml"
HEADER = """# Configuration

Every key, as `contracts/config.py` declares it. Every run begins with `conf/config.yaml`, the demo of a model with 135M
weights: where that says otherwise, its value stands behind the default, and it is what a run has that does not set the key.
`python train.py --cfg job` prints what holds. A number must also be finite. How values work together is checked when a run
starts (`contracts/checks/`). Written by `python -m contracts.checks.reference > docs/configuration.md`.
"""


def _sections(section: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    yield name, section
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from _sections(value, f"{name}.{field.name}".lstrip("."))


def _comments(section: type) -> dict[str, str]:
    """What the source says of each key: above its line, and behind it."""
    found: dict[str, str] = {}
    above = ""
    sources = [inspect.getsource(kind) for kind in reversed(section.__mro__) if is_dataclass(kind)]
    for line in "".join(sources).splitlines():
        comment = (line.split("  # ") if line.strip()[:1] != "#" else ["", line.strip(" #")])[1:]
        key = re.match(r"    (\w+):", line)
        if key:
            found[key[1]] = " ".join([above, *comment]).strip()
        above = f"{above} {comment[0]}" if comment and not key else ""
    return found


def _demo(values: dict[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of conf/config.yaml, in full, with their values."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _demo(value, f"{name}{key}.")
        elif not isinstance(value, list) and "$" not in str(value):
            yield name + key, value


def _may_be(leaf: Leaf) -> str:
    if leaf.rule:
        return leaf.rule.text
    options = leaf.options or ((True, False) if bool in (leaf.annotation, *get_args(leaf.annotation)) else ())
    return ", ".join(map(shown, options)) or leaf.free


def page() -> str:
    """docs/configuration.md: a table for each class of the schema, under the names of its sections."""
    config = TandemConfig()
    config.data.gold = SourceConfig()
    config.model.lora = LoraConfig()
    config.model.lora_by_role = LoraByRoleConfig(RoleLoraConfig(), RoleLoraConfig(), RoleLoraConfig())
    found = [*_sections(config), *_sections(ScorerConfig(), "reward_service.scorers.NAME")]
    found.append(("data.prompt_sources.NAME", PromptSourceConfig()))
    demo = dict(_demo(yaml.safe_load(DEMO.read_text())))
    everywhere, parts = {leaf.key: leaf for leaf in leaves(config)}, [HEADER]
    for kind in dict.fromkeys(type(section) for _, section in found):
        names = [name for name, section in found if type(section) is kind]
        title = ", ".join(f"`{name}`" if name else "At the top" for name in names)
        parts.append(f"\n## {title}\n\n| key | default | may be | |\n|---|---|---|---|\n")
        comments = _comments(kind)
        free = [field.name for field in fields(kind) if get_type_hints(kind)[field.name] == dict[str, Any]]
        parts += [f"| `{name}` | {{}} | names of its own | {comments[name].replace('|', '/')} |\n" for name in free]
        for leaf in leaves(kind()):
            if "." in leaf.key:
                continue
            may_be = _may_be(leaf)
            for here in [everywhere[key] for name in names if (key := f"{name}.{leaf.key}") in everywhere]:
                may_be += f"; `{here.key}`: {_may_be(here)}" if _may_be(here) != _may_be(leaf) else ""
            default = "to be given" if leaf.value == MISSING else shown(leaf.value)
            for name in names:
                key = f"{name}.{leaf.key}".lstrip(".")
                if key in demo and shown(demo[key]) != shown(everywhere[key].value):
                    default += f"; `{key}={shown(demo[key])}`"
            parts.append(f"| `{leaf.key}` | {default} | {may_be} | {comments[leaf.key].replace('|', '/')} |\n")
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
