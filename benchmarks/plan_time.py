"""How long updates take, against what `python -m controller.plan --time` says that they will.

    python benchmarks/plan_time.py                   # what has not been measured yet: speeds, then runs; then the table
    python benchmarks/plan_time.py --only drained    # these, again; the others' last measurements are kept
    python benchmarks/plan_time.py --compare         # plans again, compares, writes the table of docs/scale.md

Speeds come from `benchmarks/calibrate.py`, with one thread a process and with two; each configuration is a short run of
`train.py stage=ppo` on two cores. Nothing is fitted to the runs but the lengths of their completions, of which a
plan is for. Wants a machine with nothing beside it: about an hour.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from common.processes.process_env import driver_env

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS, SPEEDS = HERE / "results/plan_time.json", HERE / "results/plan_time_speeds.json"
DOCS = ROOT / "docs/scale.md"
SMOLLM = ROOT / ".cache/models/smollm2-135m-instruct"
UPDATES = 8
WITHIN, RIGHT = 0.12, 0.9  # of a step; of the pairs of configurations
TAILED = {"ppo.sampling.max_completion_tokens": 96, "ppo.sampling.min_completion_tokens": 0}
BASE = {
    "stage": "ppo", "ppo.updates": UPDATES, "ppo.value_warmup_updates": 0, "ppo.rollouts_per_update": 16,
    "ppo.gold_rollouts": 0,
    "ppo.sampling.max_completion_tokens": 24, "ppo.sampling.min_completion_tokens": 23, "data.prompts.max_rows": 400,
    "checkpoint.every": 0, "logger.samples_per_update": 64, "logger.wandb": "disabled", "data.gold": "null",
    "cluster.min_memory_gib": 1,
}  # fmt: skip


def threads(actor: int, learner: int, reward: int) -> dict[str, Any]:
    sides = {"actor": actor, "learner_rank": learner, "reward_replica": reward}
    return {f"cluster.threads_per_{side}": number for side, number in sides.items()}


TURNS, TOGETHER = threads(2, 2, 2), threads(1, 1, 1) | {"ppo.max_staleness": 1}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "in turns": TURNS,
    "in turns, 32 rollouts": TURNS | {"ppo.rollouts_per_update": 32},
    "in turns, long tails": TURNS | TAILED,
    "in turns, groups of 4": TURNS | {"ppo.samples_per_prompt": 4, "ppo.rollouts_per_update": 32},
    "in turns, 2 actors": threads(1, 2, 2) | {"cluster.num_actors": 2, "ppo.rollouts_per_update": 32},
    "in turns, one thread each": threads(1, 1, 1),
    "together": TOGETHER,
    "together, 32 rollouts": TOGETHER | {"ppo.rollouts_per_update": 32},
    "together, long tails": TOGETHER | TAILED,
    "together, staleness 2, groups of 4": TOGETHER | {"ppo.max_staleness": 2, "ppo.samples_per_prompt": 4},
    "together, drained": TOGETHER | {"ppo.weight_update": "drain"},
    "together, 2 actors": TOGETHER | {"cluster.num_actors": 2},
}


def overrides(name: str, models: Path) -> list[str]:
    judge = models / "judge"
    found = [f"model.path={SMOLLM}", f"sft_model={SMOLLM}", f"proxy_model={judge}", f"cache_dir={models}/cache"]
    for source, part in {"sft": "sft", "prompts": "sft", "preferences": "proxy", "test": "test"}.items():
        found.append(f"data.{source}.path={ROOT}/.cache/data/vader/{part}.jsonl")
    return found + [f"{key}={value}" for key, value in (BASE | CONFIGURATIONS[name]).items()]


def run(command: list[str]) -> None:
    """Raises SystemExit with the end of what it said, where it fails."""
    env = {**driver_env(), **os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} ended with {done.returncode}\n{done.stdout[-3000:]}")


def measure_speeds(models: Path) -> None:
    for name in ("in turns, one thread each", "in turns"):
        run([sys.executable, str(HERE / "calibrate.py"), str(SPEEDS), *overrides(name, models)])


def measure(name: str, models: Path) -> dict[str, Any]:
    """Steps and lengths of a run."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        run([sys.executable, "train.py", f"run_dir={folder}/run", "reuse_stages=false", *overrides(name, models)])
        rows = [row for row in _rows(Path(folder, "run/metrics.jsonl")) if row["stage"] == "ppo"]
        samples = [row["tokens"] for row in _rows(Path(folder, "run/samples.jsonl")) if row["stage"] == "ppo"]
    parts = {key for row in rows for key in row if key.startswith("perf/")}
    return {
        "steps_s": [row["perf/step_s"] for row in rows],
        "staleness": [row["staleness/mean"] for row in rows],
        "parts_s": {key: [round(row.get(key, 0.0), 4) for row in rows] for key in sorted(parts)},
        "lengths": samples,
        "load_before": round(os.getloadavg()[0], 2),
        "seconds": round(time.time() - start),
    }


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    yield from (json.loads(line) for line in file.read_text().splitlines())


def planned(name: str, models: Path, lengths: list[int]) -> Any:
    """The forecast, as the command makes it of this configuration."""
    from common.text.tokenizers import load_tokenizer
    from controller.data.inputs import load_inputs
    from controller.plan.schedule.calibration import read_calibration
    from controller.plan.schedule.completion_lengths import empirical
    from controller.plan.schedule.simulation import simulate
    from controller.plan.show import read_config

    config, calibration = read_config(overrides(name, models)), read_calibration(SPEEDS)
    calibration.check(config)
    data = load_inputs(config, load_tokenizer(config.model.path, config.model), lambda line: None)
    prompts = [len(prompt.token_ids) for prompt in data["prompts"]]
    most = config.ppo.sampling.max_completion_tokens
    return simulate(config, calibration, prompts, empirical(lengths, most), UPDATES, config.seed)


def compare(found: dict[str, Any], models: Path) -> tuple[list[tuple[str, float, float, float, float]], float, int]:
    """(name, planned step, measured step, planned and measured mean staleness) of each; the share of the pairs of which the
    one with more rollouts a second was foreseen; and how many pairs there are."""
    from contracts.config import register_schema
    from controller.plan.schedule.simulation import FILLING

    register_schema()
    rows, rates = [], []
    for name in CONFIGURATIONS:
        if name not in found["runs"]:
            continue
        measured = found["runs"][name]
        forecast = planned(name, models, measured["lengths"])
        step_s, stale = fmean(measured["steps_s"][FILLING:]), fmean(measured["staleness"][FILLING:])
        rows.append((name, forecast.step_s, step_s, forecast.mean_staleness, stale))
        rates.append((forecast.rollouts_per_s, forecast.rollouts_per_update / step_s))
    pairs = [(a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in combinations(rates, 2)]
    return rows, fmean(pairs) if pairs else 1.0, len(pairs)


def table(found: dict[str, Any], models: Path) -> str:
    """As docs/scale.md has it."""
    rows, right, pairs = compare(found, models)
    lines = [
        "| configuration | planned s | measured s | off by | staleness planned, measured |",
        "|---|---|---|---|---|",
    ]
    shown, outside = Table("configuration", "planned s", "measured s", "off by"), 0
    for name, mine, theirs, planned_staleness, staleness in rows:
        off = mine / theirs - 1
        outside += (is_outside := abs(off) > WITHIN)
        text = f"**{off:+.0%}**" if is_outside else f"{off:+.0%}"
        lines.append(f"| {name} | {mine:.2f} | {theirs:.2f} | {text} | {planned_staleness:.2f}, {staleness:.2f} |")
        shown.add_row(name, f"{mine:.2f}", f"{theirs:.2f}", text)
    found["off_by"] = {name: mine / theirs - 1 for name, mine, theirs, _, _ in rows}
    Console(width=None if sys.stdout.isatty() else 120).print(shown)
    end = (
        f"{len(rows) - outside} of {len(rows)} within {WITHIN:.0%}. Of {pairs} pairs the one with more rollouts a second "
        f"was foreseen in {right:.0%}."
    )
    print(end)
    return "\n".join([*lines, "", end, "", f"Measured on {found['machine']}."])


START, END = "<!-- written by benchmarks/{} -->\n", "<!-- end -->"


def write_docs(page: Path, author: str, text: str) -> None:
    """Between the marks of the program `author`."""
    before, start, rest = page.read_text().partition(START.format(author))
    assert start, f"{page} has no place for {author}"
    page.write_text(f"{before}{start}{text}\n{END}{rest.partition(END)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="parts of names")
    parser.add_argument("--compare", action="store_true", help="measures nothing")
    parser.add_argument("--no-docs", action="store_true", help="leaves docs/scale.md as it is")
    # Beside this file is a benchmark by the name of the package `submission`, which Hydra's plugins want.
    sys.path.append(sys.path.pop(0))
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "tandem-plan-models")
    known = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
    known.models.mkdir(exist_ok=True)
    if not known.compare:
        if not (known.models / "judge").exists():
            from memory import make_judge

            make_judge(known.models / "judge", SMOLLM)
        if not SPEEDS.exists():
            measure_speeds(known.models)
            print(f"speeds: {SPEEDS.relative_to(ROOT)}", flush=True)
        found["machine"] = json.loads(SPEEDS.read_text())["machine"]
        for name in CONFIGURATIONS:
            chosen = any(part in name for part in known.only) if known.only else name not in found["runs"]
            if chosen:
                found["runs"][name] = measure(name, known.models)
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")
                print(f"{name}: {fmean(found['runs'][name]['steps_s'][2:]):.2f} s an update", flush=True)
    text = table(found, known.models)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    if not known.no_docs:
        write_docs(DOCS, "plan_time.py", text)


if __name__ == "__main__":
    main()
