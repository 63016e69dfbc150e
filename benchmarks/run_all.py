"""All benchmarks, one after another, and in one line each what is better or worse than the committed results.

    python benchmarks/run_all.py                    # hours
    python benchmarks/run_all.py --quick            # those that take a few minutes
    python benchmarks/run_all.py --only ledger busy
    python benchmarks/run_all.py --compare          # runs nothing: the results that are there against the committed ones

A benchmark writes its results file anew; what it said is in runs/benchmarks. A figure is better or worse where it has moved
by more than its tolerance, which is about the spread of its rounds, and neither within it. Seconds, rates and memory are
compared only where both results come from the same kind of machine; ratios within one run and counts always. The exit code
is 1 where a benchmark failed or a figure is worse.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmarks/results")
LOGS = ROOT / "runs/benchmarks"
SAME = ("cpu", "cores", "multiplies", "device")  # of a machine, as far as both results say it


@dataclass(frozen=True)
class Figure:
    name: str
    of: Callable[[Any], float]  # the contents of the results file
    unit: str = ""
    is_higher_better: bool = False
    tolerance: float = 0.1  # share of the committed figure
    # Seconds, rates, and memory, which goes by the number format; not ratios within a run or counts.
    is_of_machine: bool = True


@dataclass(frozen=True)
class Benchmark:
    """`results`: the file that it writes. `known`: files in which it keeps what it has measured, and adds to."""

    name: str
    command: tuple[str, ...]
    minutes: int  # about, on two cores
    results: str
    figures: tuple[Figure, ...]
    known: tuple[str, ...] = ()
    needs_gpu: bool = False

    @property
    def is_quick(self) -> bool:
        return self.minutes <= QUICK_MINUTES


QUICK_MINUTES = 6


def update_figures(estimator: str) -> tuple[Figure, ...]:
    """Of `ppo_step.py` and `grpo_step.py`."""

    def share(rate: str, limit: str) -> Callable[[Any], float]:
        return lambda r: r["summary"]["limits"][rate] / r["summary"]["limits"][limit]

    return (
        Figure(f"a {estimator} update", lambda r: r["summary"]["phases"]["total"]["tandem_s"], "s"),
        Figure("against TRL", lambda r: r["summary"]["ratio"]["median"], "x", True, is_of_machine=False),
        Figure("of the best product", lambda r: r["summary"]["phases"]["total"]["peak_share"], "", True),
        Figure("generation, of bare vLLM", share("generate", "vllm_same_options"), "", True, 0.05, False),
        Figure("training, of a bare loop", share("train_policy", "bare_packed_loop"), "", True, 0.08, False),
        Figure("first update after", lambda r: r["summary"]["first_update_s"], "s", tolerance=0.15),
        Figure("learner's peak", lambda r: r["summary"]["learner_peak_gib"], "GiB", False, 0.03),
    )


def resumed(fault: str) -> Callable[[Any], float]:
    return lambda r: next(row["resumed_s"] for row in r["rows"] if row["fault"] == fault)


def transferred(kind: str, number: int, seconds: str) -> Callable[[Any], float]:
    """Of so many receivers over shared memory."""

    def found(r: Any) -> float:
        receivers = "engines" if kind == "engines" else "receivers"
        rows = (row for row in r[kind] if row["transport"] == "shared_memory" and row[receivers] == number)
        row = next(rows)
        return row["idle"][seconds] if kind == "engines" else row[seconds]

    return found


def gate(name: str) -> Callable[[Any], float]:
    return lambda r: next(row["measured"] for row in r["gates"] if row["gate"] == name)


def slower(beside: str) -> Callable[[Any], float]:
    return lambda r: r["medians"]["this"][beside]["slower"]


def job_mib(run: str) -> Callable[[Any], float]:
    return lambda r: r["runs"][run]["job"]


PYTHON = sys.executable
MEMORY = ("smollm2: ppo, 10 layers train", "smollm2: sft, 4096 tokens a microbatch", "smollm2: reward model")
FAULTS = ("actor killed", "learner rank killed", "driver killed, started again")
BENCHMARKS = (
    Benchmark("ppo_step", ("benchmarks/ppo_step.py",), 35, "ppo_step.json", update_figures("PPO")),
    Benchmark("grpo_step", ("benchmarks/grpo_step.py",), 35, "grpo_step.json", update_figures("GRPO")),
    Benchmark(
        "ledger",
        ("benchmarks/ledger.py",),
        2,
        "ledger.json",
        (
            Figure("one holder", lambda r: r["holders"]["1"]["rollouts_per_s"], "rollouts/s", True, 0.15),
            Figure("4,096 holders", lambda r: r["holders"]["4096"]["rollouts_per_s"], "rollouts/s", True, 0.15),
            Figure("with commits", lambda r: r["holders"]["4096"]["with_commits_per_s"], "rollouts/s", True, 0.15),
        ),
    ),
    Benchmark(
        "verifiers",
        ("benchmarks/verifiers.py",),
        2,
        "verifiers.json",
        (
            Figure("exact", lambda r: r["verifiers"]["exact"]["more_ms"], "ms", tolerance=0.3),
            Figure("math", lambda r: r["verifiers"]["math"]["more_ms"], "ms", tolerance=0.15),
        ),
    ),
    Benchmark(
        "reward_latency",
        ("benchmarks/reward_latency.py",),
        4,
        "reward_latency.json",
        (
            Figure("64 clients", lambda r: r["medians"]["this"]["64"]["requests_per_s"], "requests/s", True, 0.15),
            Figure("99th percentile", lambda r: r["medians"]["this"]["64"]["p99_ms"], "ms", tolerance=0.25),
            Figure("one client", lambda r: r["medians"]["this"]["1"]["p50_ms"], "ms", tolerance=0.15),
        ),
    ),
    Benchmark(
        "submission",
        ("benchmarks/submission.py",),
        4,
        "submission.json",
        (Figure("less than ray job submit", lambda r: -statistics.median(r["more_s"]), "s", True, 0.4),),
    ),
    Benchmark(
        "observability",
        ("benchmarks/observability.py",),
        4,
        "observability.json",
        (
            Figure("a step waits", lambda r: r["wandb_disabled"]["median_ms"], "ms", tolerance=0.3),
            Figure("with wandb", lambda r: r["wandb_offline"]["median_ms"], "ms", tolerance=0.3),
            Figure(
                "a member of a sweep", lambda r: (r["sweep_s"] - r["sweep_own_s"]) / r["members"], "s", tolerance=0.2
            ),
        ),
    ),
    Benchmark(
        "weight_transfer",
        ("benchmarks/weight_transfer.py",),
        6,
        "weight_transfer.json",
        (
            Figure("4 stand-ins", transferred("stand_ins", 4, "s"), "s", tolerance=0.2),
            Figure("one engine", transferred("engines", 1, "s"), "s", tolerance=0.15),
            Figure("its pause", transferred("engines", 1, "pause_s"), "s", tolerance=0.15),
        ),
    ),
    Benchmark(
        "group_generation",
        ("benchmarks/group_generation.py",),
        6,
        "group_generation.json",
        (Figure("a shared prompt", lambda r: r["groups"][0]["s"]["ratio"], "x", True, 0.2, is_of_machine=False),),
    ),
    Benchmark(
        "faults",
        ("-m", "benchmarks.faults"),
        6,
        "faults.json",
        (
            Figure("rollouts lost", lambda r: r["rollouts_lost"], tolerance=0.0, is_of_machine=False),
            *(Figure(f"{fault}: works again after", resumed(fault), "s", tolerance=0.25) for fault in FAULTS),
        ),
    ),
    Benchmark(
        "control_plane",
        ("benchmarks/control_plane.py",),
        10,
        "control_plane.json",
        (
            Figure(
                "10 actors", lambda r: r["results"]["same update"]["10"]["rollouts_per_cpu_s"], "/CPU s", True, 0.15
            ),
            Figure(
                "10,000", lambda r: r["results"]["same update"]["10000"]["rollouts_per_cpu_s"], "/CPU s", True, 0.15
            ),
        ),
    ),
    Benchmark(
        "checkpoint",
        ("benchmarks/checkpoint.py",),
        10,
        "checkpoint.json",
        (
            Figure("a commit", lambda r: r["commit_mb"], "MB", tolerance=0.01),
            Figure("costs", lambda r: r["cost_s"], "s", tolerance=0.3),
            Figure("the loop stands still", lambda r: r["loop_stood_still_s"], "s", tolerance=0.3),
        ),
    ),
    Benchmark(
        "async_overlap",
        ("benchmarks/async_overlap.py",),
        15,
        "async_overlap.json",
        (
            Figure(
                "share of the ceiling", lambda r: r["summary"]["ceiling reached"], "", True, 0.05, is_of_machine=False
            ),
            Figure(
                "against turns", lambda r: r["summary"]["against one thread each"], "x", True, 0.08, is_of_machine=False
            ),
        ),
    ),
    Benchmark(
        "busy",
        ("benchmarks/busy.py",),
        20,
        "busy.json",
        tuple(
            Figure(f"{beside}: slower", slower(beside), "x", False, 0.15, False)
            for beside in ("1 competitor", "2 competitors", "one core")
        ),
    ),
    Benchmark(
        "reward_gates",
        ("benchmarks/reward_gates.py",),
        15,
        "reward_service.json",
        (
            Figure("gates that fail", lambda r: sum(not row["holds"] for row in r["gates"]), "", False, 0.0, False),
            Figure("long texts", gate("~300-token texts, one thread: tokens/s"), "tokens/s", True),
            Figure("null scorer", gate("null scorer over HTTP: requests/s"), "requests/s", True, 0.15),
            Figure("back after kill -9", gate("kill -9: seconds until a new item is scored"), "s", False, 0.2),
            Figure("a replica", gate("replica in bfloat16, MiB (PSS)"), "MiB", False, 0.03, False),
        ),
    ),
    Benchmark(
        "plan_time",
        ("benchmarks/plan_time.py",),
        60,
        "plan_time.json",
        (
            Figure(
                "off by on average",
                lambda r: statistics.fmean(abs(off) for off in r["off_by"].values()),
                tolerance=0.3,
                is_of_machine=False,
            ),
        ),
        known=("plan_time.json", "plan_time_speeds.json"),
    ),
    Benchmark(
        "memory",
        ("benchmarks/memory.py",),
        60,
        "memory.json",
        tuple(Figure(run, job_mib(run), "MiB", tolerance=0.05) for run in MEMORY),
    ),
    Benchmark(
        "gpu_check",
        ("benchmarks/gpu_check.py",),
        8,
        "gpu_check.json",
        (
            Figure("an update", lambda r: r["update"]["phases"]["whole"]["s"], "s"),
            Figure("MFU", lambda r: r["update"]["phases"]["whole"]["share"], "", True, is_of_machine=False),
            Figure("peak memory", lambda r: r["update"]["peak_gib"], "GiB", False, 0.03),
        ),
        needs_gpu=True,
    ),
)


# ---- comparing


def other_machine(new: Any, old: Any) -> str:
    """How the machines of two results differ, or nothing. Both must say something, and only what both say can differ."""
    mine, theirs = (r.get("machine") if isinstance(r.get("machine"), dict) else {} for r in (new, old))
    if not (mine and theirs):
        return f"no machine is named {'here' if theirs else 'there'}"
    mine, theirs = mine | new.get("options", {}), theirs | old.get("options", {})
    different = [key for key in (*SAME, "dtype") if key in mine and key in theirs and mine[key] != theirs[key]]
    return ", ".join(f"{key} {theirs[key]} there, {mine[key]} here" for key in different)


def compared(benchmark: Benchmark, new: Any, old: Any | None) -> tuple[str, bool]:
    """One line, and whether a figure is worse."""
    figures = {f: _value(f, new) for f in benchmark.figures}
    missing = [f.name for f, value in figures.items() if value is None]
    if old is None:
        told = ", ".join(f"{f.name} {_shown(value, f.unit)}" for f, value in figures.items() if value is not None)
        return f"{benchmark.name}: no committed result; {told}", False
    where = other_machine(new, old)
    said: dict[str, list[str]] = {"better": [], "worse": []}
    same, left_out = 0, 0
    for f, value in figures.items():
        before = _value(f, old)
        if value is None or before is None:
            continue
        if where and f.is_of_machine:
            left_out += 1
        elif abs(value - before) <= f.tolerance * abs(before):
            same += 1
        else:
            kind = "better" if (value > before) == f.is_higher_better else "worse"
            said[kind].append(f"{f.name} {_shown(before, '')} -> {_shown(value, f.unit)}")
    parts = [f"{kind}: {', '.join(found)}" for kind, found in said.items() if found]
    parts += [f"{same} as before"] if same else []
    parts += [f"{left_out} not compared ({where})"] if left_out else []
    parts += [f"not there: {', '.join(missing)}"] if missing else []
    return f"{benchmark.name}: {'; '.join(parts) or 'nothing to compare'}", bool(said["worse"])


def _value(figure: Figure, record: Any) -> float | None:
    """None where the results do not have it, as without TRL or of an older benchmark."""
    try:
        return figure.of(record)
    except (KeyError, IndexError, StopIteration):
        return None


def _shown(value: float, unit: str) -> str:
    return f"{value:{',.3g' if abs(value) < 1000 else ',.0f'}} {unit}".strip()


# ---- running


def committed(file: str) -> Any | None:
    done = subprocess.run(["git", "show", f"HEAD:{RESULTS / file}"], cwd=ROOT, capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None


def run(benchmark: Benchmark) -> str:
    """What went wrong, or nothing. Some benchmarks end with 1 where their own bounds do not hold."""
    for file in benchmark.known:
        (ROOT / RESULTS / file).unlink(missing_ok=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    log, start = LOGS / f"{benchmark.name}.log", time.time()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("w") as said:
        done = subprocess.run([PYTHON, *benchmark.command], cwd=ROOT, env=environment, stdout=said, stderr=said)
    results = ROOT / RESULTS / benchmark.results
    if not results.exists() or results.stat().st_mtime < start - 1:
        last = (log.read_text().strip() or "it said nothing").splitlines()[-1]
        return f"FAILED with {done.returncode}, nothing was written: {last[:200]} ({log.relative_to(ROOT)})"
    return f"ended with {done.returncode} ({log.relative_to(ROOT)})" if done.returncode else ""


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def chosen(only: list[str] | None, quick: bool) -> list[Benchmark]:
    """Raises ValueError for a name that there is not."""
    names = [b.name for b in BENCHMARKS]
    if unknown := sorted(set(only or ()) - set(names)):
        raise ValueError(f"no benchmark {', '.join(unknown)}; there are {', '.join(names)}")
    return [b for b in BENCHMARKS if (b.name in only if only else b.is_quick or not quick)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"those of {QUICK_MINUTES} minutes or less")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--compare", action="store_true", help="run nothing")
    args = parser.parse_args()
    try:
        benchmarks = chosen(args.only, args.quick)
    except ValueError as error:
        parser.error(str(error))
    found = [line_of(benchmark, args.compare) for benchmark in benchmarks]
    print("\n".join(line for line, _ in found))
    return int(any(is_bad for _, is_bad in found))


def line_of(benchmark: Benchmark, only_compare: bool) -> tuple[str, bool]:
    """As `compared`, after the benchmark has run."""
    name, file, problem = benchmark.name, ROOT / RESULTS / benchmark.results, ""
    if benchmark.needs_gpu and not only_compare and not has_gpu():
        return f"{name}: left out, PyTorch sees no GPU here", False
    if not only_compare:
        print(f"{name}, about {benchmark.minutes} minutes ...", flush=True)
        problem = run(benchmark)
    if problem.startswith("FAILED"):
        return f"{name}: {problem}", True
    if not file.exists():
        return f"{name}: no results", False
    line, is_worse = compared(benchmark, json.loads(file.read_text()), committed(benchmark.results))
    return f"{line}; {problem}" if problem else line, is_worse or bool(problem)


if __name__ == "__main__":
    sys.exit(main())
