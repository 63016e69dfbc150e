"""What the controller costs: rollouts a second through controller, dispatcher, ledger and batcher, on engines that answer
at once.

    python benchmarks/control_plane.py [--seconds 10]

The controller is the real one, and every call to an actor is a real Ray call: but one process plays all actors, with
completions of 48 made-up tokens, and the learner answers an update without computing. The time of that process is not the
controller's, so two numbers are given: rollouts a second as they pass, and rollouts a second of CPU time of the driver, all
its threads together. Twice: with the same work for each actor, as a cluster grows; and with the same update for all.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from contracts.config import LoggerConfig, PPOConfig, TandemConfig
from contracts.records import Assignment, Completion, Delivery, Prompt, Rollout, Score
from contracts.weights import LoadReport, PublishReport
from controller.data.prompts import PromptStream
from controller.loop.controller import PPOController
from controller.loop.fleet import Fleet
from controller.record.run_log import RunLog
from controller.record.terminal import Progress

HERE = Path(__file__).resolve().parent
ACTORS = (1, 10, 100, 1000)
PER_ACTOR = 16  # rollouts of an update, where each actor has the same work
FIXED = 2048  # rollouts of an update, where the update is the same
TOKENS = 48


@ray.remote(num_cpus=0, max_concurrency=4096)  # a call of `collect` waits for each actor
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

    async def collect(self, actor: int) -> Delivery:
        await self._changed[actor].wait()
        self._changed[actor].clear()
        finished, self._finished[actor] = self._finished[actor], []
        return Delivery(finished, 0.001, 0.001)


class Method:
    def __init__(self, remote: Any):
        self.remote = remote


class StandIn:
    """The handle of one of them."""

    def __init__(self, process: Any, number: int):
        self.assign = Method(lambda work, sampling: process.assign.remote(number, work))
        self.pulse = Method(lambda: process.pulse.remote(number))
        self.collect = Method(lambda score_batch, patience_s: process.collect.remote(number))


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


def measure(actors: int, rollouts: int, seconds: float, run_dir: Path) -> dict[str, float]:
    """Rollouts a second, by the clock and by the driver's CPU time, over at least three updates."""
    config = TandemConfig(stage="ppo", run_dir=str(run_dir))
    config.ppo = PPOConfig(rollouts_per_update=rollouts, max_staleness=1, gold_rollouts=0, value_warmup_updates=0)
    config.logger = LoggerConfig(wandb="disabled", samples_per_update=4)
    prompts = [Prompt(i, "a prompt of forty tokens", tuple(range(40))) for i in range(10_000)]
    process = StandIns.remote(actors)
    with Progress(0, stream=open(os.devnull, "w")) as progress, RunLog(run_dir, {}, config.logger, "ppo") as log:
        stream = PromptStream(prompts, samples_per_prompt=1, seed=1)
        handles = [StandIn(process, i) for i in range(actors)]
        config.ppo.updates = 2
        learner: Any = Learner(process, actors)
        fleet = Fleet(handles, learner, "", lambda *_: False, 0, progress.line)
        controller = PPOController(config, stream, fleet, learner, log, progress, has_gold=False)
        controller.run()
        start, cpu, updates = time.perf_counter(), time.process_time(), 0
        while updates < 3 or time.perf_counter() - start < seconds:
            controller.dispatcher.admit_rollouts(1_000_000)
            controller._update(train_policy=True)
            controller.ledger.committed(run_dir / "ledger.jsonl")
            updates += 1
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    ray.kill(process)
    return {"rollouts_per_s": updates * rollouts / wall, "rollouts_per_cpu_s": updates * rollouts / cpu}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--json", type=Path, default=HERE / "results/control_plane.json")
    args = parser.parse_args()
    results: dict[str, dict[int, dict[str, float]]] = {"same work for each actor": {}, "same update": {}}
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        for actors in ACTORS:
            for name, rollouts in zip(results, (PER_ACTOR * actors, FIXED), strict=True):
                with tempfile.TemporaryDirectory() as folder:
                    results[name][actors] = measure(actors, max(rollouts, 64), args.seconds, Path(folder))
    finally:
        ray.shutdown()
    table = Table("actors", *[f"{name}: {what}" for name in results for what in ("rollouts/s", "a CPU second")])
    for actors in ACTORS:
        cells = [
            f"{results[name][actors][key]:,.0f}" for name in results for key in ("rollouts_per_s", "rollouts_per_cpu_s")
        ]
        table.add_row(str(actors), *cells)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for name, rows in results.items():
        growth = rows[10]["rollouts_per_cpu_s"] / rows[1000]["rollouts_per_cpu_s"]
        print(f"{name}: CPU time of a rollout with 1,000 actors is {growth:.2f} x that with 10")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2), "ray": ray.__version__}
    args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
