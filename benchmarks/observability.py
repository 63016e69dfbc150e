"""What watching costs: logging in each step, and a sweep beyond the training of its members.

python benchmarks/observability.py            # both tables
python benchmarks/observability.py --rows 500 --members 4
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from machine import machine, said

from contracts.catalogue import catalogue
from contracts.config import LoggerConfig
from controller.record.run_log import RunLog

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/observability.json"
METRICS = 78  # of a PPO update of the demo


def row(version: int) -> dict[str, float]:
    """As a PPO update logs it: the names that alarms read, and as many others as there are."""
    named = {"policy/approx_kl": 0.01, "policy/clipfrac": 0.1, "policy/ratio_max": 2.0, "kl/mismatch_k3": 0.002}
    named |= {
        "value/explained_var": 0.3,
        "completion/eos_frac": 0.99,
        "completion/repeat_frac": 0.05,
        "kl/ref_seq": 2.0,
    }
    named |= {"reward/score_mean": version / 100, "reward/gold_mean": version / 120, "reward/score_std": 1.0}
    named |= {"policy/entropy": 2.0, "completion/len_mean": 30.0, "perf/step_s": 14.0, "perf/sync_s": 0.3}
    named |= {"progress/version": float(version), "ledger/trained": 64.0 * version}
    others = [name for name in catalogue() if name not in named]
    return named | dict.fromkeys(others[: METRICS - len(named)], 1.0)


SAMPLES = [{"stage": "ppo", "step": 1, "prompt": "p" * 40, "completion": "c" * 160, "proxy": 0.5, "eos": True}] * 4


def logging_cost(mode: str, rows: int) -> tuple[float, float, float]:
    """(median ms and worst ms that a step waits, CPU ms of driver and wandb's process together) for each step."""
    with tempfile.TemporaryDirectory() as folder:
        me = psutil.Process()
        before = _cpu_s(me)
        log = RunLog(folder, {"name": "bench"}, LoggerConfig(wandb=mode), "ppo")
        waited = []
        for version in range(1, rows + 1):
            start = time.perf_counter()
            log.log("ppo", version, row(version))
            log.samples(SAMPLES)
            waited.append(1000 * (time.perf_counter() - start))
        cpu = _cpu_s(me) - before
        log.close()
    return sorted(waited)[rows // 2], max(waited), 1000 * max(cpu, _cpu_s(me) - before) / rows


def _cpu_s(process: psutil.Process) -> float:
    times = [p.cpu_times() for p in (process, *process.children(recursive=True)) if p.is_running()]
    return sum(t.user + t.system for t in times)


def sweep_cost(members: int, folder: Path) -> tuple[float, float, float, float]:
    """Seconds: the whole sweep, its members' own time, the same members as single commands, and one command's own time.

    The members find their only stage in the cache, so that nothing but the overhead is left.
    """
    common = [
        f"cache_dir={folder}/cache",
        "stage=sft",
        "name=bench",
        "logger.wandb=disabled",
        "cluster.min_memory_gib=1",
    ]
    common += [
        "data.sft.max_rows=64",
        "sft.epochs=1",
        "sft.trainable_layers=1",
        f"model.path={ROOT}/.cache/models/{MODEL}",
    ]
    common += [f"data.sft.path={ROOT}/.cache/data/vader/sft.jsonl"]
    _run(*common, f"run_dir={folder}/first")  # fills the cache
    coefs = [round(0.01 * (i + 1), 2) for i in range(members)]
    whole = _run("-m", *common, f"hydra.sweep.dir={folder}/sweep", f"ppo.kl.coef={','.join(map(str, coefs))}")
    own = sum(_own_s(path) for path in (folder / "sweep").glob("*/status.json"))
    singly = sum(_run(*common, f"run_dir={folder}/single-{coef}", f"ppo.kl.coef={coef}") for coef in coefs)
    return whole, own, singly, sum(_own_s(folder / f"single-{coef}/status.json") for coef in coefs)


MODEL = "smollm2-135m-instruct"


def _run(*overrides: str) -> float:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "train.py", *overrides], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    return time.perf_counter() - start


def _own_s(status: Path) -> float:
    facts = json.loads(status.read_text())
    return facts["ended"] - facts["started"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=500, help="PPO updates that are logged")
    parser.add_argument("--members", type=int, default=4, help="of the sweep")
    parser.add_argument("--step-s", type=float, default=14.0, help="seconds of a PPO update, for the share")
    given = parser.parse_args()
    where = machine()
    print(said(where))
    print(f"\n| wandb | a step waits, median | worst | CPU of all processes | CPU share of a {given.step_s:g} s step |")
    print("|---|---|---|---|---|")
    result: dict[str, Any] = {"machine": where, "step_s": given.step_s}
    for mode in ("disabled", "offline"):
        median, worst, cpu = logging_cost(mode, given.rows)
        print(f"| {mode} | {median:.2f} ms | {worst:.1f} ms | {cpu:.1f} ms | {cpu / 10 / given.step_s:.3f}% |")
        result[f"wandb_{mode}"] = {"median_ms": median, "worst_ms": worst, "cpu_ms": cpu}
    with tempfile.TemporaryDirectory() as folder:
        whole, own, singly, single_own = sweep_cost(given.members, Path(folder))
    print(f"\n| {given.members} members with every stage cached | seconds | beyond the members' own, for each |")
    print("|---|---|---|")
    print(f"| one sweep | {whole:.1f} | {(whole - own) / given.members:.1f} |")
    print(f"| {given.members} commands | {singly:.1f} | {(singly - single_own) / given.members:.1f} |")
    result |= {"members": given.members, "sweep_s": whole, "sweep_own_s": own}
    result |= {"commands_s": singly, "commands_own_s": single_own}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
