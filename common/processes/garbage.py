"""Python's search for unreachable cycles, in a process that holds many objects."""

import contextlib
import gc
from collections.abc import Iterator

NEVER = 2**31 - 1


@contextlib.contextmanager
def full_collections_on_request() -> Iterator[None]:
    """Within it cycles are looked for among young objects, as always, but among old ones only where `gc.collect` is called.

    A full search looks at everything that is alive, and Python makes one whenever a quarter of that is new: with every
    rollout that is open a rollout costs more then, and everything waits for the search meanwhile. What is there at the
    beginning, which libraries have made, is not searched at all until the end.
    """
    young, middle, old = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(young, middle, NEVER)
    try:
        yield
    finally:
        gc.set_threshold(young, middle, old)
        gc.unfreeze()
