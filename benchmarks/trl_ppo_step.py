"""One block of TRL's PPO updates: `python trl_ppo_step.py JOB.json OUT.json`, started by `ppo_step.py` in TRL's environment.

It imports nothing of Tandem. TRL's trainer is used as it is; callbacks and hooks only read the clock.

Set in TRL's favour: no gradient checkpointing (its default), prompts of one length (no padding), one generation call for
the whole batch, Adam states in the dtype of the weights (Tandem keeps float32 masters). Set to equal work: no stop token,
and a pad token other than EOS, so that an EOS inside a completion is a token like any other and every completion has full
length.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from trl_clock import Clock, run_block


def make_trainer(job: dict[str, Any], directory: str, clock: Clock) -> PPOTrainer:
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left", trust_remote_code=False)
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.bos_token
    options = {"dtype": getattr(torch, job["dtype"]), "attn_implementation": "sdpa"}
    policy = AutoModelForCausalLM.from_pretrained(job["model"], trust_remote_code=False, **options)
    reference = AutoModelForCausalLM.from_pretrained(job["model"], trust_remote_code=False, **options)
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(
            job["reward_model"], num_labels=1, trust_remote_code=False, **options
        )
        for _ in range(2)
    )
    args = PPOConfig(
        output_dir=directory,
        seed=job["seed"],
        use_cpu=True,
        bf16=False,  # the weights have the dtype of the run already; autocast would only add casts
        fp16=False,
        gradient_checkpointing=False,
        learning_rate=1e-5,
        per_device_train_batch_size=job["trl_batch"],
        gradient_accumulation_steps=job["rollouts"] // job["trl_batch"],
        total_episodes=job["rollouts"] * job["updates"],
        num_ppo_epochs=1,
        num_mini_batches=1,
        local_rollout_forward_batch_size=min(job["trl_forward_batch"], job["rollouts"]),
        response_length=job["completion_tokens"],
        temperature=1.0,
        stop_token=None,
        missing_eos_penalty=None,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": job["prompts"]}),
        eval_dataset=Dataset.from_dict({"input_ids": job["prompts"][:8]}),  # required, never used
        callbacks=[clock],
    )
    # Module calls are read at their `forward`; the policy's inside generation belong to generation.
    for phase, module in [
        ("policy_forward_s", policy),
        ("reference_s", reference),
        ("value_forward_s", value.base_model),
        ("score_s", reward.base_model),
    ]:
        module.forward = clock.timed(phase, module.forward)
    ppo_trainer.batch_generation = clock.timed("generate_s", full_length(job, ppo_trainer.batch_generation))
    trainer.accelerator.backward = clock.timed("backward_s", trainer.accelerator.backward)
    trainer.optimizer.step = clock.timed("optimizer_s", trainer.optimizer.step)
    return trainer


def full_length(job: dict[str, Any], generate: Callable[..., Any]) -> Callable[..., Any]:
    """`generate`, refusing completions of another length than the job's."""

    def call(model: Any, queries: torch.Tensor, *args: Any) -> Any:
        sequences, logits = generate(model, queries, *args)
        shape = (job["rollouts"], queries.shape[1] + job["completion_tokens"])
        if tuple(sequences.shape) != shape:
            raise RuntimeError(f"TRL generated {tuple(sequences.shape)}, expected {shape}")
        return sequences, logits

    return call


if __name__ == "__main__":
    run_block(Clock(), make_trainer, Path(sys.argv[1]), Path(sys.argv[2]))
