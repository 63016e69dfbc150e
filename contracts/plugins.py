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


BY_PATH = Kind("class or function", "", "")  # that an import path alone leads to, or the path of its file


def closest(name: str, options: Iterable[str]) -> str | None:
    """The option most like `name`, or None where none is alike."""
    matches = difflib.get_close_matches(name, list(options), n=1)
    return matches[0] if matches else None


@cache
def names(kind: Kind) -> tuple[str, ...]:
    """Of ours, in alphabetical order."""
    modules = pkgutil.iter_modules(importlib.import_module(kind.package).__path__)
    return tuple(sorted(module.name for module in modules if not module.name.startswith("_")))


def import_path(kind: Kind, name: str) -> str:
    """Where the declaration behind a name is, as package.module:NAME."""
    return name if ":" in name else f"{kind.package}.{name}:{kind.attribute}"


def source_file(kind: Kind, name: str) -> str | None:
    """Where the module of one of ours is, from the root of the sources; None for an import path."""
    return None if ":" in name else module_file(import_path(kind, name))


def module_file(path: str) -> str:
    """The file of an import path's module, from the root of the sources, if the module is there."""
    return f"{path.partition(':')[0].replace('.', '/')}.py"


def find(kind: Kind, name: str) -> Any:
    """The declaration behind a name.

    Raises:
        UnknownPlugin: neither one of ours nor an import path that leads somewhere, with what to write instead.
    """
    if ":" not in name and name not in names(kind):
        instead = closest(name, names(kind)) or ", ".join(names(kind))
        raise UnknownPlugin(f"{name!r} is no {kind.title}; write {instead}, or package.module:NAME")
    module, _, attribute = import_path(kind, name).partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # whatever somebody's module raises where it is imported
        raise UnknownPlugin(
            f"{kind.title} {name}: {type(error).__name__}: {error}; write package.module:NAME of one that imports"
        ) from error
