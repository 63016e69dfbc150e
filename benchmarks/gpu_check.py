"""Tandem's learner on a GPU: the passes of a PPO update, against float32 on the CPU, and a publish. No Ray, no vLLM.

    python benchmarks/gpu_check.py                             # a GPU, 1.2B random weights, within 8 minutes
    python benchmarks/gpu_check.py --device cpu --size tiny    # the same code without a GPU

    checkpoint of random weights ──> a slice in float32, on the CPU and on the device: log-probabilities, values, gradients
                                 ──> whole updates in the device's format: seconds, rate, memory of each phase
                                 ──> the weights sent to another process (benchmarks/gpu_publish.py)

It needs torch, transformers, numpy and PyYAML. With DeepSpeed the learner's own engine steps the networks, else a plain
AdamW with float32 masters. Rates are of operations that were carried out, a second forward pass included, against the best
matrix product of the same run. The exit code is 1 where numbers differ.
"""

import argparse
import faulthandler
import gc
import importlib.util
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.extend(map(str, Path(__file__).resolve().parents[:2]))

import numpy as np
import torch
import transformers
from gpu_publish import publish
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from common.models.precision import cpu_dtype
from common.models.proof import GRADIENT_TOLERANCE, TOLERANCE
from common.processes.network_interface import free_port
from contracts.config import ModelConfig, OptimizerConfig, TandemConfig
from contracts.records import Completion, Prompt, Rollout, TrainingBatch
from controller.loop.training_batches import make_batches
from learner.models import PolicyModel, ScalarModel, load_policy, load_scalar
from learner.passes import Places, Timer
from learner.ppo_update import PPOUpdate, shared_trunk
from learner.ranks import Ranks

HERE = Path(__file__).resolve().parent
LIMIT_S = 480  # of the whole run
KL_COEF, END_IDS = 0.05, (2,)


@dataclass(frozen=True)
class Size:
    """A model of Llama's class and the update that it is measured on."""

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    rollouts: int
    prompt: int  # tokens
    completion: int
    microbatch_tokens: int
    memory_gib: int  # of a device that holds three models, two optimizers and activations: by arithmetic, not measured

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=END_IDS[0],
            pad_token_id=END_IDS[0],
        )


SIZES = {
    "tiny": Size(64, 128, 2, 4, 2, 512, 8, 24, 16, 160, 1),
    "135m": Size(576, 1536, 30, 9, 3, 49_152, 32, 256, 256, 8192, 12),
    "500m": Size(896, 4864, 24, 14, 2, 151_936, 32, 512, 512, 8192, 36),
    "1b": Size(2048, 8192, 16, 32, 8, 128_256, 32, 512, 512, 8192, 70),  # of Llama 3.2 1B
}
SLICE = {"rollouts": 3, "prompt": 20, "completion": 12}  # at most


class Gradients:
    """An engine that only leaves the gradients of its model, clipped; so much as the numbers of a slice need."""

    def __init__(self, model: PolicyModel | ScalarModel, optimizer: OptimizerConfig):
        self.model, self._max_norm = model, optimizer.max_grad_norm
        self._weights = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, *args: Any) -> Any:
        return self.model(*args)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        loss.backward()

    def step(self) -> float:
        return nn.utils.clip_grad_norm_(self._weights, self._max_norm).item()

    def skip(self, steps: int) -> None:
        """No schedule."""


class PlainEngine(Gradients):
    """Steps a model where there is no DeepSpeed: AdamW on float32 copies of the weights."""

    def __init__(self, model: PolicyModel | ScalarModel, optimizer: OptimizerConfig):
        super().__init__(model, optimizer)
        self._masters = [p.detach().float().clone() for p in self._weights]
        self._adam = torch.optim.AdamW(
            self._masters,
            lr=optimizer.learning_rate,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    @torch.no_grad()
    def step(self) -> float:
        norm = super().step()
        for master, weight in zip(self._masters, self._weights, strict=True):
            master.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None
        self._adam.step()
        for master, weight in zip(self._masters, self._weights, strict=True):
            weight.copy_(master)
            master.grad = None
        return norm


# ---- what is computed


def settings(path: Path, size: Size, dtype: torch.dtype) -> TandemConfig:
    config = TandemConfig(model=ModelConfig(path=str(path), dtype=str(dtype).removeprefix("torch.")))
    config.learner.microbatch_tokens = size.microbatch_tokens
    return config


def make_batch(size: Size, rollouts: int, prompt: int, completion: int, seed: int = 0) -> TrainingBatch:
    """Groups of two with prompts and completions of several lengths, the longest as they are said."""
    drawn = np.random.default_rng(seed)
    made = []
    for number in range(rollouts):
        group, sample = divmod(number, 2)
        share = 1 - 0.5 * (group % 4) / 4
        of_group = np.random.default_rng([seed, group])
        ids = of_group.integers(3, size.vocabulary, max(2, int(prompt * share))).tolist()
        tokens = drawn.integers(3, size.vocabulary, max(2, int(completion * share) - sample)).astype(np.int32)
        logprobs, versions = np.full(len(tokens), -9.0, np.float32), np.zeros(len(tokens), np.int32)
        said = Completion(tokens, logprobs, versions, "length", "")
        made.append(Rollout((0, group, sample), Prompt(group, "", tuple(ids)), said))
    scores = drawn.normal(size=rollouts).tolist()
    [batch] = make_batches(made, scores, 1, 1, size.microbatch_tokens, np.random.default_rng(seed))
    return batch


def make_update(
    path: Path, size: Size, ranks: Ranks, dtype: torch.dtype, engine: Callable[..., Any], attention: str = "auto"
) -> PPOUpdate:
    """As `learner.ppo` puts it together, with engines that `engine` makes of a model and its optimizer's settings. The
    reference is made a little different, so that its KL is not 0."""
    config = settings(path, size, dtype)
    config.learner.attention = attention
    arguments = config.model, config.learner, ranks.on_cpu
    models: list[PolicyModel | ScalarModel] = [
        load_policy(str(path), *arguments),
        load_scalar(str(path), *arguments, seed=1),
    ]
    reference = load_policy(str(path), *arguments)
    reference.lm.model.norm.weight.data *= 1.05
    reference.requires_grad_(False).to(ranks.device)
    policy = engine(models[0].to(ranks.device), config.ppo.optimizer)
    value = engine(models[1].to(ranks.device), config.ppo.value_optimizer)
    return PPOUpdate(
        ranks,
        config,
        policy=policy,
        value=value,
        reference=reference,
        trunk=shared_trunk(config, ranks, policy, value, reference),
        end_ids=END_IDS,
        ptx=[],
    )


@torch.no_grad()
def first_numbers(update: PPOUpdate, batch: TrainingBatch) -> dict[str, Tensor]:
    """Of every completion token, before a step: log p under policy and reference, entropy, value; float32 on the CPU."""
    found: dict[str, list[Tensor]] = {}
    for mb in (mb for minibatch in batch.minibatches for mb in minibatch):
        places = Places(mb, update.ranks.device)
        logprobs, entropy = update.policy(places.packed, places.select, places.targets)
        of_reference, _ = update.reference(places.packed, places.select, places.targets)
        assert update.value is not None
        values = update.value(places.packed, places.select)
        for name, numbers in zip(NUMBERS, (logprobs, entropy, of_reference, values), strict=True):
            found.setdefault(name, []).append(numbers.float().cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


NUMBERS = ("log-probabilities", "entropies", "log-probabilities of the reference", "values")


def slice_of(update: PPOUpdate, batch: TrainingBatch) -> dict[str, Any]:
    """The numbers of a batch, the metrics of an update on it, and the gradients that it left."""
    numbers = first_numbers(update, batch)
    metrics = update.update(batch, KL_COEF, train_policy=True)
    gradients = {
        f"{name}: {key}": p.grad.float().cpu()
        for name, engine in (("policy", update.policy), ("value", update.value))
        if engine is not None
        for key, p in engine.model.named_parameters()
        if p.grad is not None
    }
    return {"numbers": numbers, "metrics": metrics, "gradients": gradients}


def gaps(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest differences of numbers, of metrics (relative, as large as 1 at least) and of gradients, each against the
    largest of its tensor (as `common.models.proof` compares them)."""
    result = {n: (found["numbers"][n] - expected["numbers"][n]).abs().max().item() for n in NUMBERS}
    compared = [n for n in expected["metrics"] if not n.startswith("perf/")]
    result["metrics"] = max(
        abs(found["metrics"][n] - expected["metrics"][n]) / max(1.0, abs(expected["metrics"][n])) for n in compared
    )
    mine, theirs = found["gradients"], expected["gradients"]
    assert mine.keys() == theirs.keys(), "other parameters have gradients"
    largest = max(g.abs().max().item() for g in theirs.values())
    result["gradients"] = max(
        (mine[n] - g).abs().max().item() / max(g.abs().max().item(), 1e-3 * largest) for n, g in theirs.items()
    )
    return result


# ---- how fast


def best_product(device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> float:
    """TFLOP/s of the fastest square product [n, n] x [n, n], random numbers."""
    rates = []
    for n in widths:
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        for _ in range(3):
            a @ b
        timer = Timer(device)
        with timer("products"):
            for _ in range(10):
                a @ b
        rates.append(10 * 2e-12 * n**3 / timer.seconds["products"])
    return max(rates)


def operations(update: PPOUpdate, batch: TrainingBatch) -> dict[str, float]:
    """Floating-point operations that an update carries out, by phase: 2 N a token for a forward pass through the N weights
    of the linear layers, 2 V d more where it needs logits, twice both backward (`benchmarks/step_report.py`). Without
    `learner.held_tokens` a policy that does not train at once has a second forward pass. One step an update."""
    lm = update.policy.model.lm
    body = sum(m.weight.numel() for m in lm.model.modules() if isinstance(m, nn.Linear))
    head = lm.get_output_embeddings().weight.numel()
    shares = update.shares_prompts
    microbatches = [mb for minibatch in batch.minibatches for mb in minibatch]
    tokens = sum(Places(mb, torch.device("cpu"), shares).packed.input_ids.numel() for mb in microbatches)
    logits = sum(int(mb.loss_mask.sum()) for mb in microbatches)
    passes = 1 if update.config.learner.held_tokens or update.estimator.trains_at_once else 2
    forward, of_policy = 2 * body * tokens, 2 * body * tokens + 2 * head * logits
    return {
        "perf/reference_s": of_policy,
        "perf/policy_forward_s": passes * of_policy,
        "perf/value_forward_s": forward,
        "perf/policy_backward_s": 2 * of_policy,
        "perf/value_backward_s": 2 * forward,
    }


def timed(update: PPOUpdate, batch: TrainingBatch, updates: int, peak_tflops: float) -> dict[str, Any]:
    """Medians of `updates` updates after one that warms up."""
    device = update.ranks.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rows = []
    for _ in range(1 + updates):
        timer = Timer(device)
        with timer("whole"):
            metrics = update.update(batch, KL_COEF, train_policy=True)
        rows.append(metrics | timer.seconds)
    names = [name for name in rows[0] if name.startswith("perf/") or name == "whole"]
    seconds = {name: median(row[name] for row in rows[1:]) for name in names}
    needed = operations(update, batch)
    phases = {name.removeprefix("perf/").removesuffix("_s"): {"s": s} for name, s in seconds.items()}
    for name, flop in {**needed, "whole": sum(needed.values())}.items():
        row = phases[name.removeprefix("perf/").removesuffix("_s")]
        row["tflop"], row["tflops"] = flop / 1e12, flop / 1e12 / row["s"]
        row["share"] = row["tflops"] / peak_tflops
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else of_process
    return {"phases": phases, "peak_gib": peak / 2**30}


# ---- the whole check


def deepspeed_engine(path: Path, size: Size, ranks: Ranks, steps: int) -> Callable[..., Any]:
    """The learner's own, in a process group of this process alone."""
    from learner.engine import TrainEngine, join

    join(0, 1, "127.0.0.1", free_port(), ranks.on_cpu, seed=0)
    learner = settings(path, size, torch.float32).learner
    return lambda model, optimizer: TrainEngine(model, optimizer, learner, ranks, steps)


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(device),
    }
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(), "devices": torch.cuda.device_count()}
        found |= {"memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def check(device: torch.device, name: str, deepspeed: bool, updates: int, attention: str = "auto") -> dict[str, Any]:
    """Everything, as it is written to the JSON file; `attention` is that of the updates.

    Raises:
        RuntimeError: where the device has less memory than the size needs.
    """
    size, where = SIZES[name], machine(device)
    if where.get("memory_gib", size.memory_gib) < size.memory_gib:
        raise RuntimeError(f"--size {name} needs {size.memory_gib} GiB on the device, it has {where['memory_gib']}")
    dtype = getattr(torch, cpu_dtype()) if device.type == "cpu" else torch.bfloat16
    result: dict[str, Any] = {"machine": where, "size": name, "dtype": str(dtype), "seconds": {}}
    ranks = Ranks(0, 1, on_cpu=device.type == "cpu")
    short = make_batch(size, **{key: min(most, getattr(size, key)) for key, most in SLICE.items()})

    @contextmanager
    def part(title: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        result["seconds"][title] = round(time.perf_counter() - start, 1)
        print(f"{title}: {result['seconds'][title]} s", flush=True)

    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        path = Path(folder)
        with part("checkpoint"):
            torch.manual_seed(0)
            model: Any = LlamaForCausalLM(size.config)
            model.to(torch.bfloat16)
            result["weights"] = model.num_parameters()
            model.save_pretrained(path)
            del model
        with part("a slice in float32 on the CPU"):
            expected = slice_of(make_update(path, size, Ranks(0, 1, on_cpu=True), torch.float32, Gradients), short)
        with part("the same on the device"):
            update = make_update(path, size, ranks, torch.float32, Gradients)
            result["float32"] = gaps(slice_of(update, short), expected)
            del update
        with part("updates"):
            widths = (256, 512) if name == "tiny" else (4096, 8192)
            result["best_product_tflops"] = best_product(device, dtype, widths)
            engine = deepspeed_engine(path, size, ranks, 1 + updates) if deepspeed else PlainEngine
            update = make_update(path, size, ranks, dtype, engine, attention)
            result["attention"] = update.policy.model.lm.config._attn_implementation
            found = first_numbers(update, short)
            off = {n: (found[n] - expected["numbers"][n]).abs() for n in NUMBERS}
            result["rounding"] = {n: {"mean": x.mean().item(), "max": x.max().item()} for n, x in off.items()}
            whole = make_batch(size, size.rollouts, size.prompt, size.completion)
            result["engine"] = type(update.policy).__name__
            result["update"] = timed(update, whole, updates, result["best_product_tflops"])
            del update
        with part("publish"):
            result["publish"] = publish(path, device)
    bounds = dict.fromkeys(result["float32"], TOLERANCE) | {"gradients": GRADIENT_TOLERANCE}
    result["agrees"] = all(gap <= bounds[n] for n, gap in result["float32"].items())
    return result


def lines(result: dict[str, Any]) -> Iterator[str]:
    """The table and what is said beside it."""
    where, update = result["machine"], result["update"]
    yield (
        f"{where['device']}, torch {where['torch']}; {result['weights'] / 1e6:,.4g}M random weights, {result['dtype']}, "
        f"attention {result['attention']}, stepped by {result['engine']}; best product "
        f"{result['best_product_tflops']:.3g} TFLOP/s"
    )
    yield f"{'phase of an update':<22}{'s':>10}{'TFLOP':>10}{'TFLOP/s':>10}{'MFU':>7}"
    for name, row in update["phases"].items():
        rate = f"{row['tflop']:>10.3g}{row['tflops']:>10.3g}{row['share']:>7.0%}" if "tflop" in row else ""
        yield f"{name.replace('_', ' '):<22}{row['s']:>10.4f}{rate}"
    yield f"peak memory {update['peak_gib']:.2f} GiB"
    for sent in result["publish"]:
        rate = "" if sent["problem"] else f"{sent['gb']:.3g} GB in {sent['s']:.4f} s, {sent['gb'] / sent['s']:.3g} GB/s"
        yield f"publish, {sent['way']}: {sent['problem'] or f'{rate}, bit for bit'}"
    for name, gap in result["float32"].items():
        yield f"float32 on the device against the CPU, {name}: {gap:.2g} at most"
    for name, gap in result["rounding"].items():
        yield f"{result['dtype']} against float32 on the CPU, {name}: {gap['mean']:.2g} on average, {gap['max']:.2g} at most"
    yield "the numbers agree" if result["agrees"] else "THE NUMBERS DIFFER"
    yield f"{sum(result['seconds'].values()):.0f} s in all"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument(
        "--engine", choices=("auto", "deepspeed", "plain"), default="auto", help="auto: as it is installed"
    )
    parser.add_argument("--attention", default="auto", help="learner.attention of the updates, as flash_attention_2")
    parser.add_argument("--updates", type=int, default=3, help="that are measured, after one that warms up")
    parser.add_argument("--json", type=Path, default=None, help="results/gpu_check.json on a GPU, else nothing")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --device cpu --size tiny runs the same code")
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    installed = importlib.util.find_spec("deepspeed") is not None
    deepspeed = args.engine == "deepspeed" or (args.engine == "auto" and installed)
    result = check(torch.device(args.device), args.size, deepspeed, args.updates, args.attention)
    for line in lines(result):
        print(line)
    file = args.json or (HERE / "results/gpu_check.json" if args.device == "cuda" else None)
    if file:
        file.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["agrees"] and not any(sent["problem"] for sent in result["publish"] if sent["must"]) else 1


if __name__ == "__main__":
    sys.exit(main())
