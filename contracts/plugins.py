"""What is found by its name: one module each, of ours in a package for its kind, of others wherever Python finds it.

    grpo                    ESTIMATOR of learner/estimators/grpo.py
    my_package.mine:MINE    the attribute of a module of yours

So adding one takes one file, and whoever asks imports nothing above itself until a configuration names it. A module is
imported where the configuration is checked, too: it imports heavy libraries inside its functions. docs/extending.md has an
example of each kind.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any


class UnknownPlugin(ValueError):
    """There is nothing of that name."""


@dataclass(frozen=True)
class Kind:
    title: str  # in errors
    package: str  # whose modules are ours, but for those that begin with an underscore
    attribute: str  # of such a module: the declaration


def closest(name: str, options: Iterable[str]) -> str | None:
    """The option most like `name`, or None where none is alike."""
    matches = difflib.get_close_matches(name, list(options), n=1)
    return matches[0] if matches else None


@cache
def names(kind: Kind) -> tuple[str, ...]:
    """Of ours, in alphabetical order."""
    modules = pkgutil.iter_modules(importlib.import_module(kind.package).__path__)
    return tuple(sorted(module.name for module in modules if not module.name.startswith("_")))


def source_file(kind: Kind, name: str) -> str | None:
    """Where the module of one of ours is, from the root of the sources; None for an import path."""
    return None if ":" in name else f"{kind.package.replace('.', '/')}/{name}.py"


def find(kind: Kind, name: str) -> Any:
    """The declaration behind a name.

    Raises:
        UnknownPlugin: neither one of ours nor an import path that leads somewhere, with what to write instead.
    """
    path, colon, attribute = name.partition(":")
    if not colon:
        if name not in names(kind):
            instead = closest(name, names(kind)) or ", ".join(names(kind))
            raise UnknownPlugin(f"{name!r} is no {kind.title}; write {instead}, or package.module:NAME")
        path, attribute = f"{kind.package}.{name}", kind.attribute
    try:
        return getattr(importlib.import_module(path), attribute)
    except Exception as error:  # whatever somebody's module raises where it is imported
        raise UnknownPlugin(
            f"{kind.title} {name}: {type(error).__name__}: {error}; write package.module:NAME of one that imports"
        ) from error
