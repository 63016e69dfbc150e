"""LoRA against whole layers on the demo: what is gained, and what it costs.

    python benchmarks/lora.py                     # some two hours and a half on two cores; goes on where it was stopped
    python benchmarks/lora.py --seeds 1           # a third of it
    python benchmarks/lora.py --seeds             # the costs alone

Roads from `model.path` to PPO: the top third of the layers as in the demo, and adapters of rank 16 in all layers
(`+experiment=lora`), judged by one gold judge (the first road's). The runs of a road differ in `ppo.seed` and share SFT and
reward models. What these cost, and what all layers do, is then measured in runs of a few updates, one after another. Memory
is that of all processes of PPO, sampled along the run, pages that they share counted once.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from machine import machine
from memory_sampler import ROOT, Job, sampled

sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks/results/lora.json"
DOCS = ROOT / "docs/lora.md"
MARKS = ("<!-- written by benchmarks/lora.py -->", "<!-- until here -->")
ALL = ["ppo.trainable_layers=null", "ppo.value_trainable_layers=null"]
SHORT = ["stage=ppo", "ppo.updates=6", "reuse_stages=false"]
ROADS = {"top third": [], "LoRA, rank 16": ["+experiment=lora"], "all layers": ALL}
JUDGED = ("top third", "LoRA, rank 16")


def _name(road: str) -> str:
    return road.replace(", ", "-").replace(" ", "-")


def run(work: Path, road: str, seed: int, *more: str) -> tuple[Path, Job, int]:
    """One road, to its end: its directory, what its processes held, and seconds."""
    cache, run_dir = work / "cache", work / f"{_name(road)}-{seed}{'-short' * bool(more)}"
    cache.mkdir(parents=True, exist_ok=True)
    for folder in ("models", "data"):
        if not (cache / folder).exists():
            (cache / folder).symlink_to(ROOT / ".cache" / folder)
    gold = sorted(cache.glob("stages/*gold*/model"))
    judged = [f"gold_model={gold[0]}"] if gold else []
    places = [f"cache_dir={cache}", f"run_dir={run_dir}", "logger.wandb=disabled", f"ppo.seed={seed}"]
    command = [sys.executable, "train.py", *ROADS[road], *places, *judged, *more]
    code, job, seconds = sampled(command, work / f"{run_dir.name}.log")
    if code:
        raise SystemExit(f"{road}, seed {seed}: train.py ended with {code}; see {work / run_dir.name}.log")
    return run_dir, job, seconds


def made(work: Path, road: str) -> list[str]:
    """The models of the road's first run; of one that has none those of the demo's, which are trained alike."""
    whole = work / f"{_name(road if road in JUDGED else JUDGED[0])}-1"
    paths = {row["name"]: row["path"] for row in json.loads((whole / "stages.json").read_text())}
    return [f"sft_model={paths['sft']}", f"proxy_model={paths['reward_model/proxy']}"]


def costs(run_dir: Path, job: Job) -> dict[str, float]:
    """Medians of the updates that move the policy, the newest commit, and peaks in MiB."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in lines if row["stage"] == "ppo" and row.get("perf/policy_backward_s", 0) > 0]
    found = {f"{name} s": statistics.median(row[f"perf/{name}_s"] for row in rows) for name in ("train", "sync_pause")}
    commit = max((run_dir / "checkpoints").glob("step_*"), key=lambda path: int(path.name.split("_")[1]))
    found["commit MB"] = sum(file.stat().st_size for file in commit.rglob("*") if file.is_file()) / 1e6
    ranks = [held.total for (role, _), held in job.processes.items() if role == "learner rank"]
    return found | {"job MiB": job.total, "rank MiB": max(ranks)}


def gains(run_dir: Path) -> dict[str, Any]:
    """On the held-out prompts: the gold gain over the road's own SFT model with its 95% interval, and the KL."""
    from controller.record.evaluation import against_sft, judged_model

    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    return {"gold gain": against_sft(evaluation)["gold_gain"], "kl": judged_model(evaluation)["kl"]["mean"]}


def tables(results: dict[str, dict[str, Any]]) -> str:
    seeds = sorted({seed for runs in results.values() for seed in runs if seed != "costs"}, key=int)
    lines = [
        "| road | gold gain over its SFT, seeds " + ", ".join(seeds) + " | mean | KL, nats |",
        "|---|---|---|---|",
    ]
    for road in JUDGED:
        runs = {seed: found for seed, found in results.get(road, {}).items() if seed != "costs"}
        gained = [runs[seed]["gold gain"] for seed in seeds if seed in runs]
        each = ", ".join(f"{g['mean']:+.2f} ({g['low']:+.2f} to {g['high']:+.2f})" for g in gained)
        kls = ", ".join(f"{runs[seed]['kl']:.1f}" for seed in seeds if seed in runs)
        if gained:
            lines.append(f"| {road} | {each} | {statistics.mean(g['mean'] for g in gained):+.2f} | {kls} |")
    costs = {road: runs["costs"] for road, runs in results.items() if "costs" in runs}
    if costs:
        lines += [
            "",
            "| road | an update trains s | actors pause to load it ms | commit MB | learner rank MiB | whole job MiB |",
            "|---|---|---|---|---|---|",
        ]
    for road, cost in costs.items():
        numbers = [f"{cost['train s']:.1f}", f"{1000 * cost['sync_pause s']:.0f}", f"{cost['commit MB']:,.0f}"]
        numbers += [f"{cost[f'{what} MiB']:,.0f}" for what in ("rank", "job")]
        lines.append(f"| {road} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--work", type=Path, default=ROOT / "runs/lora_or_layers")
    args = parser.parse_args()
    stored = (
        json.loads(RESULTS.read_text()) if RESULTS.exists() else {"machine": machine("torch", "peft"), "results": {}}
    )
    results: dict[str, dict[str, Any]] = stored["results"]

    def note(road: str, what: str, found: dict[str, Any]) -> None:
        results[road][what] = found
        print(road, what, json.dumps(found), flush=True)
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")

    for road, seed in [(road, seed) for seed in args.seeds for road in JUDGED]:
        if str(seed) not in results.setdefault(road, {}):
            run_dir, _, seconds = run(args.work, road, seed)
            note(road, str(seed), {"seconds": seconds} | gains(run_dir))
    for road in ROADS:
        if "costs" not in results.setdefault(road, {}):
            run_dir, job, _ = run(args.work, road, 1, *SHORT, *made(args.work, road))
            note(road, "costs", costs(run_dir, job))
    print(tables(results))
    head, rest = DOCS.read_text().split(MARKS[0])
    DOCS.write_text(f"{head}{MARKS[0]}\n{tables(results)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
