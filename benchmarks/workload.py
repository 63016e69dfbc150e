"""What both sides of `ppo_step.py` train on: the same prompts, the same reward model, the same sizes.

    python workload.py JOB.json

adds `prompts`, `body_parameters` and `head_parameters` to the job and saves the reward model where the job says. A job is
one JSON file that every block of the benchmark reads. Prompts are human-written texts joined until they have
`PROMPT_TOKENS` tokens and cut there: equal lengths, so that TRL computes no padding.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from contracts.config import LearnerConfig, ModelConfig
from learner.models import load_scalar

PROMPT_TOKENS = 40


def make_prompts(tokenizer: Any, texts: list[str], count: int) -> list[list[int]]:
    """`count` prompts of exactly `PROMPT_TOKENS` token ids, whose texts have these tokens; the texts start again where they
    are used up."""
    prompts: list[list[int]] = []
    ids: list[int] = []
    while len(prompts) < count:
        for text in texts:
            ids += tokenizer((" " if ids else "") + text.strip(), add_special_tokens=False)["input_ids"]
            if len(ids) >= PROMPT_TOKENS:
                cut = ids[:PROMPT_TOKENS]
                if tokenizer(tokenizer.decode(cut), add_special_tokens=False)["input_ids"] == cut:
                    prompts.append(cut)
                ids = []
    return prompts[:count]


def parameters(path: str) -> tuple[int, int]:
    """(weights of the linear layers between embedding and LM head, weights of the LM head)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
    backbone = getattr(model, model.base_model_prefix)
    body = sum(m.weight.numel() for m in backbone.modules() if isinstance(m, nn.Linear))
    return body, model.get_output_embeddings().weight.numel()


def main(job_path: Path) -> None:
    job = json.loads(job_path.read_text())
    tokenizer = AutoTokenizer.from_pretrained(job["model"], trust_remote_code=False)
    texts = [json.loads(line)["text"] for line in Path(job["texts"]).read_text().splitlines()]
    job["prompts"] = make_prompts(tokenizer, texts, job["rollouts"] // job["samples"] * job["updates"])
    job["body_parameters"], job["head_parameters"] = parameters(job["model"])
    torch.manual_seed(job["seed"])
    # `sdpa`, since what is saved must also load where Tandem's own attention is not registered.
    learner = LearnerConfig(attention="sdpa")
    model = ModelConfig(path=job["model"], dtype=job["dtype"])
    scalar = load_scalar(job["model"], model, learner, on_cpu=True, seed=job["seed"])
    scalar.lm.save_pretrained(job["reward_model"])
    tokenizer.save_pretrained(job["reward_model"])
    job_path.write_text(json.dumps(job))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
