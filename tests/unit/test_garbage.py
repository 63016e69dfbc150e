"""When Python looks for unreachable cycles among old objects."""

import gc
import weakref

from common.processes.garbage import full_collections_on_request


class Node:
    """In a cycle with itself."""

    def __init__(self) -> None:
        self.me = self


def old_cycle() -> "weakref.ref[Node]":
    """Of the oldest generation, and unreachable."""
    node = Node()
    gc.collect(1)
    gc.collect(1)
    return weakref.ref(node)


def test_old_cycles_go_on_request_and_otherwise_stay() -> None:
    before, objects = gc.get_threshold(), gc.get_freeze_count()
    with full_collections_on_request():
        cycle = old_cycle()
        kept = [[] for _ in range(200_000)]  # many times what else begins a full search
        assert cycle() is not None
        gc.collect()
        assert cycle() is None
        del kept
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, objects)


def test_after_it_everything_is_as_before_and_old_garbage_goes() -> None:
    cycle = old_cycle()
    with full_collections_on_request():
        gc.collect()
        assert cycle() is not None  # it was there before, and is not searched
    gc.collect()
    assert cycle() is None
