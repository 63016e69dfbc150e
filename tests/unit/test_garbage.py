"""When Python looks for unreachable cycles among old objects."""

import gc
import weakref
from pathlib import Path

import pytest
import ray

from common.processes.garbage import full_collections_on_request
from contracts.config import LoggerConfig, PPOConfig, TandemConfig
from tests.unit.test_loop import started


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


def test_a_run_looks_at_all_that_is_open_once_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rollouts there are: Python alone would look again and again."""
    monkeypatch.setattr(ray, "put", lambda value: value)
    config = TandemConfig(stage="ppo", run_dir=str(tmp_path))
    config.ppo = PPOConfig(
        updates=4, rollouts_per_update=4000, max_staleness=1, gold_rollouts=0, value_warmup_updates=0
    )
    config.checkpoint.every, config.logger = 0, LoggerConfig(wandb="disabled")
    searches: list[int] = []

    def count(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            searches.append(loop.version)

    with started(config, tmp_path, actors=20) as (loop, _, _):
        gc.callbacks.append(count)
        try:
            loop.run()
        finally:
            gc.callbacks.remove(count)
    assert searches == [0, 1, 2, 3]
    assert loop.ledger.counts["trained"] == 16_000
