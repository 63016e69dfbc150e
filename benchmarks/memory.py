"""What the processes of a job hold, against what `python -m controller.plan` says that they will.

    python benchmarks/memory.py --only sft-135m ppo-135m   # measures these, and keeps the others' last measurements
    python benchmarks/memory.py --compare                  # plans again, and compares with what was measured

Each configuration is a short run of `train.py stage=...`; all of its processes are sampled twice a second. The measured
numbers are in results/memory.json, the table is docs/memory.md's.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.memory_sampler import Held, Job, Sampler

RESULTS = ROOT / "benchmarks/results/memory.json"
SMOLLM = ROOT / ".cache/models/smollm2-135m-instruct"
SMALL = {"sft.batch_size": 64, "data.sft.max_rows": 520, "sft.epochs": 1, "sft.max_tokens": 96}
SFT = {"stage": "sft", **SMALL}
REWARD = {"stage": "reward_model", "data.preferences.max_rows": 320, "data.test.max_rows": 64, "reward_model.epochs": 1}
PPO = {
    "stage": "ppo", "ppo.updates": 2, "ppo.value_warmup_updates": 1, "ppo.rollouts_per_update": 32,
    "ppo.gold_rollouts": 0, "ppo.sampling.max_completion_tokens": 32, "ppo.sampling.min_completion_tokens": 31,
    "data.prompts.max_rows": 400, "checkpoint.every": 0, "engine.kv_cache_gib": 0.5,
}  # fmt: skip
TWO = {"cluster.num_learner_ranks": 2}
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft, 4096 tokens a microbatch": ("smollm2", SFT),
    "sft, 1024 tokens a microbatch": ("smollm2", SFT | {"learner.microbatch_tokens": 1024}),
    "sft, 10 layers train": ("smollm2", SFT | {"sft.trainable_layers": 10}),
    "sft, 2 ranks, ZeRO-2": ("smollm2", SFT | TWO | {"learner.zero_stage": 2}),
    "sft, 2 ranks, ZeRO-3": ("smollm2", SFT | TWO | {"learner.zero_stage": 3, "learner.held_tokens": 0}),
    "sft, gradient checkpointing": ("smollm2", SFT | {"learner.gradient_checkpointing": True}),
    "reward model": ("smollm2", REWARD),
    "ppo, 10 layers train": ("smollm2", PPO),
    "sft": ("qwen3", SFT),
    "sft, 512 tokens a microbatch": ("qwen3", SFT | {"learner.microbatch_tokens": 512}),
    "sft, ZeRO-2": ("qwen3", SFT | {"learner.zero_stage": 2}),
    "sft, 2 ranks, ZeRO-3 ": ("qwen3", SFT | TWO | {"learner.zero_stage": 3, "learner.held_tokens": 0}),
    "reward model ": ("qwen3", REWARD),
    "ppo, all layers train": ("qwen3", PPO | {"ppo.trainable_layers": None, "ppo.value_trainable_layers": None}),
}


def make_model(folder: Path) -> Path:
    """A Qwen3 with SmolLM2's tokenizer: other norms within attention, an LM head of its own, eight layers."""
    from transformers import AutoTokenizer

    from tests import tiny_models

    sizes = {"vocab_size": 49152, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}
    sizes |= {"num_attention_heads": 6, "max_position_embeddings": 2048, "eos_token_id": 2, "pad_token_id": 2}
    heads = {"num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.02}
    tiny_models.TINY["qwen3-of-50m"] = tiny_models.of("Qwen3", tiny_models.SIZES, sizes, heads)
    import torch

    tiny_models.make("qwen3-of-50m", seed=1, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(SMOLLM).save_pretrained(folder)
    return folder


def make_judge(folder: Path, base: Path) -> Path:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=2, dtype="bfloat16")
    model.config.score_mean, model.config.score_std = 0.0, 1.0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def overrides(name: str, models: Path) -> list[str]:
    kind, chosen = CONFIGURATIONS[name]
    path = SMOLLM if kind == "smollm2" else models / kind
    if not path.exists():
        make_model(path)
    found = [f"model.path={path}", "data.gold=null", "logger.wandb=disabled", "cluster.min_memory_gib=1"]
    for source, part in {"sft": "sft", "prompts": "sft", "preferences": "proxy", "test": "test"}.items():
        found.append(f"data.{source}.path={ROOT}/.cache/data/vader/{part}.jsonl")
    if chosen["stage"] == "ppo":
        judge = models / f"{kind}-judge"
        if not judge.exists():
            make_judge(judge, path)
        found += [f"sft_model={path}", f"proxy_model={judge}"]
    return found + [f"{key}={'null' if value is None else value}" for key, value in chosen.items()]


def measure(name: str, models: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "train.py",
            f"run_dir={folder}/run",
            f"cache_dir={models}/cache",
            "reuse_stages=false",
        ]
        log = Path(folder, "log")
        start = time.time()
        with log.open("w") as out:
            process = subprocess.Popen([*command, *overrides(name, models)], cwd=ROOT, stdout=out, stderr=out)
            sampler = Sampler(process.pid)
            sampler.start()
            code = process.wait()
        job = sampler.stop()
        if code:
            raise SystemExit(f"{name}: train.py ended with {code}\n{log.read_text()[-3000:]}")
    return _stored(job) | {"seconds": round(time.time() - start)}


def _stored(job: Job) -> dict[str, Any]:
    """MiB: peak of each process that is there at the job's peak, and of each other that was."""

    def row(role: str, held: Held) -> dict[str, Any]:
        parts = {part: round(value, 1) for part, value in vars(held).items()}
        return {"role": role, "total": round(held.total, 1)} | parts

    peaks = {
        role: [held for (r, _), held in job.processes.items() if r == role]
        for role in sorted({r for r, _ in job.processes})
    }
    return {
        "job": round(job.total, 1),
        "processes": [row(role, held) for role, many in peaks.items() for held in sorted(many, key=lambda h: -h.total)],
        "at_peak": [row(role, held) for (role, _), held in sorted(job.peak.items())],
    }


def planned(name: str, models: Path) -> list[dict[str, Any]]:
    from common.text.tokenizers import load_tokenizer
    from controller.data.inputs import load_inputs
    from controller.plan.plan import plan_job
    from controller.plan.show import read_config

    config = read_config([*overrides(name, models), f"cache_dir={models}/cache"])
    data = load_inputs(config, load_tokenizer(config.model.path, config.model), lambda line: None)
    stage = plan_job(config, data.__getitem__).largest
    return [
        {
            "role": process.role,
            "total": process.cpu / 2**20,
            "items": {i.what: round(i.nbytes / 2**20) for i in process.items},
        }
        for process in stage.processes
        for _ in range(process.count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="parts of names")
    parser.add_argument("--compare", action="store_true", help="measures nothing")
    parser.add_argument("--measure", action="store_true", help="compares nothing")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "tandem-memory-models")
    known = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
    known.models.mkdir(exist_ok=True)
    for name, (kind, _) in CONFIGURATIONS.items():
        if known.compare:
            break
        if known.only and not any(part in f"{kind}: {name}" for part in known.only):
            continue
        found["runs"][f"{kind}: {name.strip()}"] = measure(name, known.models)
        found["machine"] = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{kind}: {name}: job {found['runs'][f'{kind}: {name.strip()}']['job']:.0f} MiB", flush=True)
    for name, (kind, _) in CONFIGURATIONS.items():
        if known.measure:
            break
        measured = found["runs"].get(f"{kind}: {name.strip()}")
        if measured is None or (known.only and not any(part in f"{kind}: {name}" for part in known.only)):
            continue
        plan = planned(name, known.models)
        total = sum(p["total"] for p in plan)
        print(
            f"== {kind}: {name}: plan {total:.0f}, measured {measured['job']:.0f}: {total / measured['job'] - 1:+.1%}"
        )
        pool = list(measured["processes"])
        for process in plan:
            mine = next((m for m in pool if m["role"] == process["role"]), None)
            if mine:
                pool.remove(mine)
            if mine and mine["total"] > 100:
                print(
                    f"   {process['role']}: plan {process['total']:.0f} measured {mine['total']:.0f} {process['total'] / mine['total'] - 1:+.1%} {mine} {process['items']}"
                )


if __name__ == "__main__":
    main()
