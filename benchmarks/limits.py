"""What the machine can do at most, measured beside the updates: `python limits.py training|generation JOB.json OUT.json`.

training     matrix products at the model's shapes, in the dtype of the run; a bare forward and backward loop over the same
             number of tokens, once as plain Hugging Face (sdpa, padded microbatches, logits everywhere), once packed
generation   vLLM alone on the prompts of one update, without Ray, with the arguments of Tandem's engine; medians, since they
             are compared with the medians of updates
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from common.microbatches import cut_microbatches
from contracts.config import EngineConfig, LearnerConfig, ModelConfig

MATMUL_S = 0.5  # of each shape
REPEATS = 3  # of a training loop; the fastest counts, since this is a limit
GENERATIONS = 7


def seconds(work: Callable[[], object], repeats: int) -> list[float]:
    work()  # memory and kernels are warm afterwards
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def best_seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    return min(seconds(work, repeats))


# ---- training


def matmul_gflops(rows: int, width_in: int, width_out: int, dtype: torch.dtype) -> float:
    """[rows, in] x [in, out], GFLOP/s of the fastest of as many runs as fit `MATMUL_S`."""
    x = torch.randn(rows, width_in, dtype=dtype)
    weight = torch.randn(width_out, width_in, dtype=dtype)
    once = best_seconds(lambda: F.linear(x, weight), repeats=1)
    repeats = max(3, min(200, int(MATMUL_S / once)))
    return 2e-9 * rows * width_in * width_out / best_seconds(lambda: F.linear(x, weight), repeats)


def matmul_peak(path: str, tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s by shape, for every distinct weight of the model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
    shapes = {tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    result = {}
    for width_out, width_in in sorted(shapes):
        for rows in (512, 1024, 2048, 4096) if width_out < 16384 else (256, 512):
            if rows <= max(tokens, 512):
                result[f"{rows}x{width_in}x{width_out}"] = matmul_gflops(rows, width_in, width_out, dtype)
    return result


def sampled_prompts(job: dict[str, Any]) -> list[list[int]]:
    """Of one update, as often as each is sampled."""
    samples = job["samples"]
    return [prompt for prompt in job["prompts"][: job["rollouts"] // samples] for _ in range(samples)]


def random_sequences(job: dict[str, Any]) -> list[np.ndarray]:
    """The prompts of one update with random completions."""
    rng = np.random.default_rng(job["seed"])
    return [np.concatenate([p, rng.integers(3, 10_000, job["completion_tokens"])]) for p in sampled_prompts(job)]


def padded_loop(job: dict[str, Any], sequences: list[np.ndarray]) -> float:
    """Seconds of plain Hugging Face: forward and backward of the language-model loss on every token."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": getattr(torch, job["dtype"]), "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(job["model"], trust_remote_code=False, **options)
    ids = torch.from_numpy(np.stack(sequences))  # lengths are equal: the mask is all ones

    def once() -> None:
        for batch in ids.split(job["trl_batch"]):
            model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss.backward()

    return best_seconds(once)


def packed_loop(job: dict[str, Any], sequences: list[np.ndarray]) -> float:
    """Seconds of Tandem's policy model without DeepSpeed and PPO: log-probabilities of the completions, and backward."""
    from common.models.packed_attention import Packed
    from learner.models import load_policy

    model = load_policy(job["model"], ModelConfig(path=job["model"], dtype=job["dtype"]), LearnerConfig(), on_cpu=True)
    cut = cut_microbatches([len(s) for s in sequences], job["microbatch_tokens"], ranks=1)[0]
    device, completion = torch.device("cpu"), job["completion_tokens"]

    def once() -> None:
        for rows in cut:
            packed = Packed.of([sequences[r] for r in rows], device)
            spans = zip(packed.starts, packed.lengths, strict=True)
            select = torch.cat([torch.arange(s + n - completion - 1, s + n - 1) for s, n in spans])
            logprobs, _ = model(packed, select, packed.input_ids[0, select + 1])
            (-logprobs.sum()).backward()

    return best_seconds(once)


def training(job: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    sequences = random_sequences(job)
    return {
        "matmul_gflops": matmul_peak(job["model"], sum(map(len, sequences)), getattr(torch, job["dtype"])),
        "packed_s": packed_loop(job, sequences),
        "padded_s": padded_loop(job, sequences),
    }


# ---- generation


def generation(job: dict[str, Any]) -> dict[str, float]:
    """Seconds for the prompts of one update: with vLLM's cheapest sampling, and with what `VLLMEngine.submit` asks for (a
    seed and a log-probability for every token, text). No request finds a prefix: every repetition computes its prompts."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from actors.vllm_engine import VLLMEngine

    # The engine inside has Tandem's arguments and is driven directly from here.
    engine = VLLMEngine(
        ModelConfig(path=job["model"], dtype=job["dtype"]), EngineConfig(), "shared_memory", on_cpu=True, end_ids=()
    )._engine
    prompts, tokens = sampled_prompts(job), job["completion_tokens"]
    common: dict[str, Any] = {
        "temperature": 1.0,
        "max_tokens": tokens,
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    serial = iter(range(1 << 30))

    def once(options: dict[str, Any], seeded: bool) -> None:
        for i, ids in enumerate(prompts):
            params = SamplingParams(**common, **options, seed=i if seeded else None)
            name = str(next(serial))
            engine.add_request(name, {"prompt_token_ids": ids, "cache_salt": name}, params)
        made = 0
        while engine.has_unfinished_requests():
            outputs: list[Any] = engine.step()
            made += sum(len(out.outputs[0].token_ids) for out in outputs if out.finished)
        if made != tokens * len(prompts):
            raise RuntimeError(f"vLLM generated {made} tokens, expected {tokens * len(prompts)}")

    cheapest = {"ignore_eos": True, "detokenize": False}
    ours = {"min_tokens": tokens - 1, "logprobs": 0, "detokenize": True}
    return {
        "bare_s": median(seconds(lambda: once(cheapest, seeded=False), GENERATIONS)),
        "same_options_s": median(seconds(lambda: once(ours, seeded=True), GENERATIONS)),
    }


if __name__ == "__main__":
    measured = {"training": training, "generation": generation}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
    Path(sys.argv[3]).write_text(json.dumps(measured))
