"""What the controller costs: rollouts a second through controller, dispatcher, ledger and batcher, on engines that answer
at once, and the driver's memory along the run.

    python benchmarks/control_plane.py                                           # about seven minutes
    python benchmarks/control_plane.py --actors 10 100 1000 --rollouts 50000     # one

The controller is the real one, and every call to an actor is a real Ray call: but one process plays all actors, with
completions of 48 made-up tokens, and the learner answers an update without computing. The time of that process is not the
controller's, so two numbers are given: rollouts a second as they pass, and rollouts a second of CPU time of the driver, all
its threads together. Twice: with the same work for each actor, as a cluster grows; and with the same update for all, that of
the largest. An actor delivers at most `ppo.score_batch` rollouts at once, as the real ones do.
"""

import argparse
import json
import logging
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from machine import machine
from rich.console import Console
from rich.table import Table

from contracts.config import LoggerConfig, PPOConfig, TandemConfig
from contracts.records import Assignment, Completion, Delivery, Prompt, Rollout, Score
from contracts.weights import LoadReport, PublishReport
from controller.data.prompts import PromptStream
from controller.ledger.audit import audit
from controller.ledger.log import NAME
from controller.loop.controller import PPOController
from controller.loop.fleet import Fleet
from controller.record.run_log import RunLog
from controller.record.terminal import Progress

HERE = Path(__file__).resolve().parent
ACTORS = (10, 10_000)
PER_ACTOR = 16  # rollouts of an update for each actor
TOKENS = 48


@ray.remote(num_cpus=0)
class StandIns:
    """All actors: what is assigned is finished."""

    def __init__(self, actors: int):
        import asyncio

        self._finished: list[list[tuple[int, Rollout]]] = [[] for _ in range(actors)]
        self._changed = [asyncio.Event() for _ in range(actors)]
        rng = np.random.default_rng(0)
        self._tokens = rng.integers(0, 49152, TOKENS).astype(np.int32)
        self._logprobs = rng.normal(-2, 1, TOKENS).astype(np.float32)
        self._version = self._pulses = 0

    async def set_version(self, version: int) -> None:
        self._version = version

    async def pulse(self, actor: int) -> int:
        self._pulses += 1
        return self._pulses

    async def assign(self, actor: int, work: list[Assignment]) -> None:
        versions = np.full(TOKENS, self._version, dtype=np.int32)
        for a in work:
            completion = Completion(self._tokens, self._logprobs, versions, "stop", "forty-eight words " * 16)
            scores = {name: Score(float(a.lease % 7)) for name in a.scorers}
            self._finished[actor].append((a.lease, Rollout(a.request.key, a.request.prompt, completion, scores)))
        self._changed[actor].set()

    async def collect(self, actor: int, most: int) -> Delivery:
        await self._changed[actor].wait()
        finished = self._finished[actor]
        delivered, self._finished[actor] = finished[:most], finished[most:]
        if not self._finished[actor]:
            self._changed[actor].clear()
        return Delivery(delivered, 0.001, 0.001)


class Method:
    def __init__(self, remote: Any):
        self.remote = remote


class StandIn:
    """The handle of one of them."""

    def __init__(self, process: Any, number: int):
        self.assign = Method(lambda work, sampling: process.assign.remote(number, work))
        self.pulse = Method(lambda: process.pulse.remote(number))
        self.collect = Method(lambda score_batch, patience_s: process.collect.remote(number, score_batch))


class Learner:
    """Answers at once."""

    def __init__(self, process: Any, actors: int):
        self._process = process
        self._loaded = {i: LoadReport(0) for i in range(actors)}

    def start_each(self, method: str, batches: list[Any], *arguments: Any) -> list[Any]:
        return [ray.put({"kl/ref_seq": 1.0})]

    def pulse(self, rank: int) -> Any:
        return ray.put(time.monotonic_ns())

    def start(self, method: str, version: int) -> list[Any]:
        ray.get(self._process.set_version.remote(version))
        return [ray.put(PublishReport(version, 0.0, 0.0, 0, 0, self._loaded, {}))]


@dataclass
class Mark:
    """After an update: of this process."""

    wall_s: float
    cpu_s: float
    memory: int  # bytes of its own: resident, without what it shares with Ray's object store


class Measured(PPOController):
    """With a mark after each update."""

    def __init__(self, *arguments: Any, **keywords: Any):
        self.marks: list[Mark] = []
        super().__init__(*arguments, **keywords)

    def _next_update(self, total: int) -> None:
        super()._next_update(total)
        memory = psutil.Process().memory_info()
        self.marks.append(Mark(time.perf_counter(), time.process_time(), memory.rss - memory.shared))


def measure(actors: int, rollouts_per_update: int, rollouts: int, run_dir: Path) -> list[Mark]:
    """After each update but the last, of a run with at least so many rollouts and four updates."""
    config = TandemConfig(stage="ppo", run_dir=str(run_dir))
    config.ppo = PPOConfig(
        rollouts_per_update=rollouts_per_update, max_staleness=1, gold_rollouts=0, value_warmup_updates=0
    )
    config.ppo.updates = max(4, math.ceil(rollouts / rollouts_per_update))
    config.checkpoint.every = 0
    config.cluster.actor_silence_s = 3600.0  # one process plays all, and an update of the largest takes it minutes
    config.logger = LoggerConfig(wandb="disabled", samples_per_update=4)
    prompts = [Prompt(i, "a prompt of forty tokens", tuple(range(40))) for i in range(10_000)]
    # A call of `collect` waits for each actor, and others come.
    remote: Any = StandIns
    process = remote.options(max_concurrency=2 * actors + 100).remote(actors)
    with Progress(0, stream=open(os.devnull, "w")) as progress, RunLog(run_dir, {}, config.logger, "ppo") as log:
        stream = PromptStream(prompts, samples_per_prompt=1, seed=1)
        handles = [StandIn(process, i) for i in range(actors)]
        learner: Any = Learner(process, actors)
        fleet = Fleet(handles, learner, "", lambda *_: False, 0, progress.line)
        controller = Measured(config, stream, fleet, learner, log, progress, has_gold=False)
        controller.run()
    ray.kill(process)
    found = audit(run_dir / NAME)
    assert (found.faults, found.trained, found.open) == ([], config.ppo.updates * rollouts_per_update, 0)
    return controller.marks[:-1]  # the last update admits nothing


def rates(marks: list[Mark], rollouts_per_update: int) -> dict[str, float]:
    """Rollouts a second since the first update, by the clock and by the driver's CPU time."""
    first, last, rollouts = marks[0], marks[-1], (len(marks) - 1) * rollouts_per_update
    return {
        "rollouts_per_s": rollouts / (last.wall_s - first.wall_s),
        "rollouts_per_cpu_s": rollouts / (last.cpu_s - first.cpu_s),
    }


def memory(marks: list[Mark], rollouts_per_update: int) -> dict[str, float]:
    """Of the driver: MiB after the first update and the last, the most after any, and what 100,000 rollouts add in the
    second half, by the slope of a straight line (least squares)."""
    mib = np.array([mark.memory / 2**20 for mark in marks])
    rollouts = rollouts_per_update * np.arange(1, len(marks) + 1)
    half = len(marks) // 2
    slope = float(np.polyfit(rollouts[half:] / 100_000, mib[half:], 1)[0])
    return {
        "first_mib": float(mib[0]),
        "last_mib": float(mib[-1]),
        "most_mib": float(mib.max()),
        "slope_mib": slope,
        "rollouts": float(rollouts[-1]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--actors", type=int, nargs="+", default=ACTORS)
    parser.add_argument(
        "--rollouts", type=int, default=1_000_000, help="of the largest; of the others a tenth at least"
    )
    parser.add_argument("--json", type=Path, default=HERE / "results/control_plane.json")
    args = parser.parse_args()
    most = max(args.actors)
    results: dict[str, dict[int, dict[str, float]]] = {"same work for each actor": {}, "same update": {}}
    where = machine("ray")
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        for actors in sorted(args.actors):
            for name, rollouts_per_update in zip(results, (PER_ACTOR * actors, PER_ACTOR * most), strict=True):
                if actors == most and name == "same update":
                    results[name][most] = results["same work for each actor"][most]
                    continue
                rollouts = args.rollouts if actors == most else max(args.rollouts // 10, 20_000)
                with tempfile.TemporaryDirectory() as folder:
                    marks = measure(actors, rollouts_per_update, rollouts, Path(folder))
                results[name][actors] = rates(marks, rollouts_per_update) | memory(marks, rollouts_per_update)
                print(f"{actors:>6} actors, {rollouts_per_update:>7} rollouts an update: ", end="")
                print(", ".join(f"{key} {value:,.1f}" for key, value in results[name][actors].items()), flush=True)
    finally:
        ray.shutdown()
    table = Table("actors", *[f"{name}: {what}" for name in results for what in ("rollouts/s", "a CPU second")])
    for actors in sorted(args.actors):
        cells = [
            f"{results[name][actors][key]:,.0f}" for name in results for key in ("rollouts_per_s", "rollouts_per_cpu_s")
        ]
        table.add_row(str(actors), *cells)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    least = min(args.actors)
    for name, rows in results.items():
        growth = rows[least]["rollouts_per_cpu_s"] / rows[most]["rollouts_per_cpu_s"]
        print(f"{name}: CPU time of a rollout with {most:,} actors is {growth:.2f} x that with {least:,}")
    of = results["same update"][most]
    print(
        f"the driver's own memory with {most:,} actors: {of['first_mib']:,.0f} MiB after {PER_ACTOR * most:,} rollouts, "
        f"{of['last_mib']:,.0f} MiB after {of['rollouts']:,.0f}; in the second half {of['slope_mib']:+.1f} MiB with 100,000"
    )
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"machine": where, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
