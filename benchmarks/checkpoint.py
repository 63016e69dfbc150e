"""What a commit costs: the same run with and without one between two updates, beside a plain write of the same bytes.

    python benchmarks/checkpoint.py [--updates 9] [--trainable-layers 10]

`train.py stage=ppo` on SmolLM2-135M with `checkpoint.every=2`: every other update runs while the commit before it is being
written. The difference between neighbours is what the commit costs; all completions have the same length. Beside it, alone:
writing as many bytes with fsync, as `dd conv=fsync` does and as `dd oflag=direct` does, and hashing them.
"""

import argparse
import hashlib
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from machine import machine

from controller.commits import commit_store

ROOT = Path(__file__).resolve().parent.parent
CHUNK = 8 << 20
MODEL = ROOT / ".cache/models/smollm2-135m-instruct"


def reward_model(folder: Path) -> None:
    """A fresh head over the model: what it says does not matter here."""
    import torch
    from transformers import AutoTokenizer

    from contracts.config import LearnerConfig, ModelConfig
    from learner.models import load_scalar

    torch.manual_seed(1)
    model = ModelConfig(path=str(MODEL), dtype="bfloat16")
    load_scalar(str(MODEL), model, LearnerConfig(attention="sdpa"), on_cpu=True, seed=1).lm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False).save_pretrained(folder)


def train(folder: Path, updates: int, layers: int | None) -> list[dict[str, Any]]:
    reward_model(folder / "judge")
    command = [sys.executable, "train.py", "stage=ppo", f"run_dir={folder}/run", f"cache_dir={folder}/cache"]
    command += [f"model.path={MODEL}", f"sft_model={MODEL}", f"proxy_model={folder}/judge", "data.gold=null"]
    for name, part in {"sft": "sft", "prompts": "sft", "preferences": "proxy", "test": "test"}.items():
        command.append(f"data.{name}.path={ROOT}/.cache/data/vader/{part}.jsonl")
    command += ["ppo.gold_rollouts=0", "ppo.value_warmup_updates=0", f"ppo.updates={updates}", "checkpoint.every=2"]
    command += ["ppo.sampling.max_completion_tokens=48", "ppo.sampling.min_completion_tokens=47"]
    trainable = "null" if layers is None else layers
    command += [f"ppo.trainable_layers={trainable}", f"ppo.value_trainable_layers={trainable}"]
    done = subprocess.run([*command, "logger.wandb=disabled"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def write_s(folder: Path, size: int, flags: int = 0) -> float:
    """Seconds to write `size` bytes and fsync them."""
    chunk = mmap.mmap(-1, CHUNK)
    chunk[:] = os.urandom(CHUNK)
    start = time.perf_counter()
    file = os.open(folder / "raw", os.O_WRONLY | os.O_CREAT | flags)
    for _ in range(-(-size // CHUNK)):
        os.write(file, chunk)
    os.fsync(file)
    os.close(file)
    seconds = time.perf_counter() - start
    (folder / "raw").unlink()
    return seconds


def hash_s(size: int) -> float:
    chunk, digest, start = os.urandom(CHUNK), hashlib.sha256(), time.perf_counter()
    for _ in range(-(-size // CHUNK)):
        digest.update(chunk)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=9)
    parser.add_argument("--trainable-layers", type=int, default=None, help="of both models; all where it is left out")
    options, where = parser.parse_args(), machine("torch", "deepspeed")
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache", prefix="bench-") as name:
        folder = Path(name)
        rows = train(folder, options.updates, options.trainable_layers)
        size = commit_store.read_commit(commit_store.step_path(folder / "run", options.updates)).num_bytes
        writing, direct, hashing = write_s(folder, size), write_s(folder, size, os.O_DIRECT), hash_s(size)
    # Row k is update k + 1; the commit after update k runs beside it where k is even. The first two rows warm up.
    wall = [after["wall_s"] - before["wall_s"] for before, after in pairwise(rows)]
    pairs = [(wall[k - 1], wall[k]) for k in range(2, len(rows) - 1, 2)]
    costs = [beside - alone for beside, alone in pairs]
    neighbours = [(rows[k], rows[k + 1]) for k in range(2, len(rows) - 1, 2)]
    parts = {
        name: statistics.median(beside[f"perf/{name}_s"] - alone[f"perf/{name}_s"] for beside, alone in neighbours)
        for name in ("rollout", "train", "optimizer")
    }
    still = [rows[k]["perf/commit_s"] for k in range(2, len(rows), 2)]
    result = {
        "machine": where,
        "commit_mb": size / 1e6,
        "write_and_fsync_s": writing,
        "write_directly_s": direct,
        "sha256_s": hashing,
        "update_alone_s": statistics.median(alone for _, alone in pairs),
        "update_beside_a_commit_s": statistics.median(beside for beside, _ in pairs),
        "cost_s": statistics.median(costs),
        **{f"cost_in_{name}_s": seconds for name, seconds in parts.items()},
        "cost_range_s": [min(costs), max(costs)],
        "loop_stood_still_s": statistics.median(still),
        "commits_failed": rows[-1]["fault/commits_failed"],
    }
    for key, value in result.items():
        print(f"{key:<26} {value:.2f}" if isinstance(value, float) else f"{key:<26} {value}")
    (ROOT / "benchmarks/results/checkpoint.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
