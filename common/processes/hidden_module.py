"""Imports without what they import by the way."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hidden_module(name: str) -> Iterator[None]:
    """Within it `import name` raises ImportError, as where it is not installed; unless it has been imported before."""
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]
    is_there = name in modules
    modules.setdefault(name, None)
    try:
        yield
    finally:
        if not is_there:
            del modules[name]
