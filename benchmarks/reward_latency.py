"""A rule function over HTTP at the default configuration: requests/s, p50 and p99 at 1, 8 and 64 clients.

    python benchmarks/reward_latency.py --before OTHER_CLONE      # paired with the code of another directory

Each round starts `python -m reward_service` of each clone, one after the other, as a user would: the service with its
default configuration, one rule function, one item a request, every text new. Clients and service share the machine.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine, said  # beside this file

from common.processes.network_interface import free_port

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = (1, 8, 64)
RULE = "def length(completions, **_): return [float(len(text)) for text in completions]\n"


class Service:
    """`python -m reward_service` of the code in `root`."""

    def __init__(self, root: Path, model: Path, folder: Path):
        (folder / "rules.py").write_text(RULE)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        scorers = f'{{length: {{kind: function, function: "{folder}/rules.py:length"}}}}'
        overrides = ["reward_service=http", f"reward_service.http.port={port}", f"model.path={model}"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "reward_service", *overrides, f"+reward_service.scorers={scorers}"],
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        if not any(line.startswith("serving ") for line in self._process.stdout):
            raise RuntimeError(f"the service of {root} does not start")

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)


async def load(url: str, clients: int, seconds: float, run: str) -> dict[str, float]:
    """What `clients` measure that ask again as soon as they are answered. Every answer is checked."""
    import aiohttp

    latencies: list[float] = []
    end = time.perf_counter() + seconds
    async with aiohttp.ClientSession() as session:

        async def client(number: int) -> None:
            count = 0
            while (start := time.perf_counter()) < end:
                text = f"{run}, client {number}, request {count}"
                async with session.post(url + "/v1/rewards", json={"items": [{"text": text}]}) as answer:
                    content = await answer.json()
                assert content["items"][0]["reward"] == len(text), content
                latencies.append(time.perf_counter() - start)
                count += 1

        await asyncio.gather(*(client(number) for number in range(clients)))
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return {"requests_per_s": len(latencies) / seconds, "p50_ms": cuts[49] * 1000, "p99_ms": cuts[98] * 1000}


def measure(root: Path, model: Path, seconds: float) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory(prefix="reward-latency-") as folder:
        service = Service(root, model, Path(folder))
        try:
            asyncio.run(load(service.url, 8, seconds / 2, "warm-up"))
            return {str(n): asyncio.run(load(service.url, n, seconds, f"{n} clients")) for n in CLIENTS}
        finally:
            service.stop()


def medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {n: {name: statistics.median(one[n][name] for one in rounds) for name in rounds[0][n]} for n in rounds[0]}


def show(results: dict[str, dict[str, dict[str, float]]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("clients", "build", "requests/s", "p50, ms", "p99, ms"):
        table.add_column(column, justify="right")
    for clients in map(str, CLIENTS):
        for build, found in results.items():
            row = found[clients]
            numbers = (f"{row['requests_per_s']:,.0f}", f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}")
            table.add_row(clients, build, *numbers)
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="another clone, measured in the same rounds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of load for each number of clients")
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/models/smollm2-135m-instruct")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/reward_latency.json")
    args = parser.parse_args()
    where = machine("torch", "transformers", "ray", "uvicorn")
    builds = ({"before": args.before.resolve()} if args.before else {}) | {"this": ROOT}
    rounds: dict[str, list[Any]] = {name: [] for name in builds}
    for _ in range(args.rounds):
        for name, root in builds.items():
            rounds[name].append(measure(root, args.model.resolve(), args.seconds))
    results = {name: medians(found) for name, found in rounds.items()}
    show(results, f"{said(where)}; {args.rounds} rounds")
    args.json.write_text(json.dumps({"machine": where, "medians": results, "rounds": rounds}, indent=1) + "\n")
    print(f"written: {args.json.name}")
    loaded = results["this"][str(CLIENTS[-1])]
    return 0 if loaded["requests_per_s"] >= 1000 and loaded["p99_ms"] <= 250 else 1


if __name__ == "__main__":
    sys.exit(main())
