"""When Python looks for unreachable cycles among old objects."""

import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest

from common.processes.garbage import full_collections_on_request
from contracts.config import LoggerConfig, PPOConfig, TandemConfig
from contracts.records import Assignment, Delivery, Prompt, Score
from controller.data.prompts import PromptStream
from controller.loop import controller as loop
from controller.loop.controller import PPOController
from controller.loop.fleet import Fleet
from controller.record.run_log import RunLog
from controller.record.terminal import Progress
from tests.unit import test_dispatch as dispatch


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


class Actor(dispatch.Actor):
    """Finishes at once what it is given."""

    learner: "Learner"

    def _assign(self, work: list[Assignment], sampling: Any) -> None:
        super()._assign(work, sampling)
        self.deliver()

    def _collect(self, score_batch: int, patience_s: float) -> dispatch.Call:
        call = super()._collect(score_batch, patience_s)
        self.deliver()
        return call

    def deliver(self) -> None:
        if self.work and self.asked:
            done, self.work = self.work, []
            rollouts = [(a.lease, dispatch.sampled(a, (self.learner.version,))) for a in done]
            for lease, rollout in rollouts:
                rollout.scores["proxy"] = Score(float(lease % 3))
            self.asked.pop()[0].set_result(Delivery(rollouts, 0.0, 0.0))


class Learner(dispatch.Learner):
    version = 0

    def start(self, method: str, *arguments: Any) -> list[dispatch.Call]:
        self.version = arguments[-1]
        return super().start(method, *arguments)

    def start_each(self, method: str, batches: list[Any], *arguments: Any) -> list[dispatch.Call]:
        answer = dispatch.Future[Any]()
        answer.set_result({"kl/ref_seq": 1.0})
        return [dispatch.Call(answer)]


def test_a_run_looks_at_all_that_is_open_once_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rollouts there are: Python alone would look again and again."""
    monkeypatch.setattr(loop.ray, "put", lambda value: value)
    config = TandemConfig(stage="ppo", run_dir=str(tmp_path))
    config.ppo = PPOConfig(
        updates=4, rollouts_per_update=4000, max_staleness=1, gold_rollouts=0, value_warmup_updates=0
    )
    config.checkpoint.every, config.logger = 0, LoggerConfig(wandb="disabled")
    actors: list[Any] = [Actor() for _ in range(20)]
    learner: Any = Learner(actors)
    for actor in actors:
        actor.learner = learner
    searches: list[int] = []

    def count(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            searches.append(controller.version)

    with Progress(0, stream=open(os.devnull, "w")) as progress, RunLog(tmp_path, {}, config.logger, "ppo") as log:
        fleet = Fleet(actors, learner, "", lambda *_: False, 0, print)
        stream = PromptStream([Prompt(i, "", (1, 2, i)) for i in range(1000)], 1, seed=1)
        controller = PPOController(config, stream, fleet, learner, log, progress, has_gold=False)
        gc.callbacks.append(count)
        try:
            controller.run()
        finally:
            gc.callbacks.remove(count)
    assert searches == [0, 1, 2, 3]
    assert controller.ledger.counts["trained"] == 16_000
