"""Training on a machine that is not ours alone: SFT's tokens/s beside other busy processes and on one core.

    python benchmarks/busy.py --before OTHER_CLONE      # paired with the code of another directory

Each round trains the demo's SFT stage for some steps, in every situation and with every build, as a user would. A competitor
is a process that only counts. `slower` is the median over the rounds of what the same build did alone in that round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from machine import machine, said  # beside this file

ROOT = Path(__file__).resolve().parent.parent
STEP_ROWS = 32  # the demo's batch
WARM_UP_STEPS = 2
GOAL = 2.2  # times slower beside one competitor, or on one core


@contextmanager
def competitor() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def train(root: Path, steps: int, competitors: int, one_core: bool) -> float:
    """Tokens/s of a step, the median."""
    with tempfile.TemporaryDirectory(prefix="busy-") as folder, ExitStack() as stack:
        for _ in range(competitors):
            stack.enter_context(competitor())
        overrides = [
            f"run_dir={folder}/run",
            f"cache_dir={folder}/cache",
            f"data.sft.max_rows={STEP_ROWS * steps}",
            "sft.epochs=1",
        ]
        # What the configuration takes from the cache is there already.
        for name in ("models", "data"):
            (Path(folder) / "cache").mkdir(exist_ok=True)
            (Path(folder) / "cache" / name).symlink_to(ROOT / ".cache" / name)
        command = [sys.executable, "train.py", "stage=sft", "logger.wandb=disabled", *overrides]
        if one_core:
            command = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0))), *command]
        done = subprocess.run(
            command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
        rows = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    speeds = [row["perf/train_tokens_per_s"] for row in rows if "perf/train_tokens_per_s" in row]
    return statistics.median(speeds[WARM_UP_STEPS:])


SITUATIONS: dict[str, dict[str, Any]] = {
    "alone": {"competitors": 0, "one_core": False},
    "1 competitor": {"competitors": 1, "one_core": False},
    "2 competitors": {"competitors": 2, "one_core": False},
    "one core": {"competitors": 0, "one_core": True},
}


def show(results: dict[str, dict[str, dict[str, float]]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("situation", "build", "tokens/s", "slower"):
        table.add_column(column, justify="right")
    for situation in SITUATIONS:
        for build, found in results.items():
            row = found[situation]
            table.add_row(situation, build, f"{row['tokens_per_s']:,.0f}", f"{row['slower']:.2f} x")
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="another clone, measured in the same rounds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help=f"of SFT; the first {WARM_UP_STEPS} are left out")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/busy.json")
    args = parser.parse_args()
    where = machine("torch", "transformers", "ray", "uvicorn")
    builds = ({"before": args.before.resolve()} if args.before else {}) | {"this": ROOT}
    rounds = [
        {
            name: {title: train(root, args.steps, **how) for title, how in SITUATIONS.items()}
            for name, root in builds.items()
        }
        for _ in range(args.rounds)
    ]
    results = {
        name: {
            title: {
                "tokens_per_s": statistics.median(one[name][title] for one in rounds),
                "slower": statistics.median(one[name]["alone"] / one[name][title] for one in rounds),
            }
            for title in SITUATIONS
        }
        for name in builds
    }
    show(results, f"{said(where)}; {args.rounds} rounds")
    args.json.write_text(json.dumps({"machine": where, "medians": results, "rounds": rounds}, indent=1) + "\n")
    print(f"written: {args.json.name}")
    return 0 if max(results["this"][name]["slower"] for name in ("1 competitor", "one core")) <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
