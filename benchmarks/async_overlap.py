"""What it brings that actors and learner work at the same time: the same updates, asynchronous against synchronous.

    python benchmarks/async_overlap.py            # SmolLM2-135M-Instruct, 16 rollouts an update, 2 rounds

Three schedules on two cores, each in a process of its own, in turn:

    asynchronous      max_staleness 1, one thread for each process
    one thread each   max_staleness 0, one thread for each process: the same threads, taking turns
    all cores         max_staleness 0, two threads for each process: the best synchronous schedule here

The ceiling comes from the second: generation and scoring on one core, and training and publishing on the other, cannot end
before the slower of the two does alone. What is reported of it is the share that the asynchronous schedule reaches.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import machine, said
from ppo_step import HERE, PACKAGES, PPO, ROOT, BlockError, block, run
from rich.console import Console
from rich.table import Table

from common.models.precision import cpu_dtype
from common.processes.process_env import driver_env

SCHEDULES = {
    "asynchronous": {"max_staleness": 1, "threads": 1},
    "one thread each": {"max_staleness": 0, "threads": 1},
    "all cores": {"max_staleness": 0, "threads": 2},
}
DROPPED = 2  # updates at the start: memory is cold, and the asynchronous pipeline fills


def median(result: dict[str, Any], *names: str) -> float:
    """Seconds of an update: the sum of its phases `names`, median over the updates that count."""
    return statistics.median(sum(row[f"perf/{name}"] for name in names) for row in result["updates"][DROPPED:])


def mean_step(result: dict[str, Any]) -> float:
    """Asynchronous updates borrow from each other, so their mean counts, not their median."""
    return statistics.mean(row["perf/step_s"] for row in result["updates"][DROPPED:])


def measure(args: argparse.Namespace, work: Path) -> list[dict[str, dict[str, Any]]]:
    job = {
        "model": str(args.model.resolve()),
        "texts": str(args.texts.resolve()),
        "reward_model": str(work / "reward_model"),
        "rollouts": args.rollouts,
        "completion_tokens": args.completion_tokens,
        "updates": args.updates + DROPPED,
        "dtype": cpu_dtype(),
        "threads": 1,
        "seed": 1,
        "estimator": PPO.estimator,
        "samples": PPO.samples,
        "kl_coef": PPO.kl_coef,
        "held_tokens": 6000,
        "microbatch_tokens": 4096,
    }
    path = work / "job.json"
    rounds: list[dict[str, Any]] = []
    path.write_text(json.dumps(job))
    run([sys.executable, str(HERE / "workload.py"), str(path)], os.environ | driver_env())
    job = json.loads(path.read_text())
    for number in range(args.rounds):
        rounds.append({})
        for name, options in SCHEDULES.items():
            path.write_text(json.dumps(job | options))
            command = [sys.executable, str(HERE / "tandem_ppo_step.py"), str(path)]
            rounds[-1][name] = block(command, work / "out.json", driver_env())
            print(f"round {number + 1}: {name} {mean_step(rounds[-1][name]):.2f} s an update", flush=True)
    return rounds


def summarize(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, float]:
    """Seconds of an update, and ratios, each the median over the rounds."""

    def over_rounds(function: Any) -> float:
        return statistics.median(function(r) for r in rounds)

    def ceiling(r: dict[str, dict[str, Any]]) -> float:
        alone = r["one thread each"]
        return max(median(alone, "generate_s", "score_s"), median(alone, "train_s", "sync_s"))

    result = {name: over_rounds(lambda r, name=name: mean_step(r[name])) for name in SCHEDULES}
    result["generation and scoring alone"] = over_rounds(
        lambda r: median(r["one thread each"], "generate_s", "score_s")
    )
    result["training and publishing alone"] = over_rounds(lambda r: median(r["one thread each"], "train_s", "sync_s"))
    result["ceiling reached"] = over_rounds(lambda r: ceiling(r) / mean_step(r["asynchronous"]))
    for name in ("one thread each", "all cores"):
        result[f"against {name}"] = over_rounds(lambda r, name=name: mean_step(r[name]) / mean_step(r["asynchronous"]))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/models/smollm2-135m-instruct")
    parser.add_argument("--texts", type=Path, default=ROOT / ".cache/data/vader/sft.jsonl")
    parser.add_argument("--rollouts", type=int, default=16, help="of one update")
    parser.add_argument("--completion-tokens", type=int, default=48)
    parser.add_argument("--updates", type=int, default=4, help=f"of a block, after {DROPPED} that do not count")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, default=HERE / "results/async_overlap.json")
    args = parser.parse_args()
    where = machine(*PACKAGES)
    print(said(where), flush=True)
    with tempfile.TemporaryDirectory(prefix="async-overlap-") as work:
        try:
            rounds = measure(args, Path(work))
        except BlockError as error:
            print(f"the benchmark failed: {error}", file=sys.stderr)
            return 1
    summary = summarize(rounds)
    table = Table("", "seconds an update", "asynchronous is faster by")
    for name in SCHEDULES:
        ratio = summary.get(f"against {name}")
        table.add_row(name, f"{summary[name]:.2f}", f"{ratio:.2f} x" if ratio else "")
    for name in ("generation and scoring alone", "training and publishing alone"):
        table.add_row(f"{name}, one core", f"{summary[name]:.2f}", "")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(f"share of the ceiling that the asynchronous schedule reaches: {summary['ceiling reached']:.0%}")
    options = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": where, "options": options, "summary": summary, "rounds": rounds}
    args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
