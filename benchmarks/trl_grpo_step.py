"""One block of TRL's GRPO updates: `python trl_grpo_step.py JOB.json OUT.json`, started by `grpo_step.py`.

It runs in TRL's environment and imports nothing of Tandem. TRL's trainer is used as it is; callbacks and hooks only read the
clock. Set in TRL's favour: as in `trl_ppo_step.py`. EOS is banned, so that every completion has full length.
"""

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl_clock import Clock, run_block


class GRPOClock(Clock):
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        optimizer.step = self.timed("optimizer_s", optimizer.step)
        super().on_train_begin()


def make_trainer(job: dict[str, Any], directory: str, clock: Clock) -> GRPOTrainer:
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left", trust_remote_code=False)
    tokens, samples = job["completion_tokens"], job["samples"]
    args = GRPOConfig(
        output_dir=directory,
        seed=job["seed"],
        use_cpu=True,
        bf16=False,  # the weights have the dtype of the run already; autocast would only add casts
        fp16=False,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": job["dtype"], "attn_implementation": "sdpa"},
        learning_rate=1e-5,
        per_device_train_batch_size=job["trl_batch"],
        gradient_accumulation_steps=job["rollouts"] // job["trl_batch"],
        num_generations=samples,
        max_steps=job["updates"],
        num_iterations=1,
        beta=job["kl_coef"],
        epsilon=0.2,
        loss_type="grpo",
        max_completion_length=tokens,
        generation_kwargs={"min_new_tokens": tokens},
        temperature=1.0,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=job["model"],
        reward_funcs=job["reward_model"],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [tokenizer.decode(ids) for ids in job["prompts"]]}),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    # Module calls are read at their `forward`; the policy's inside generation belong to generation.
    for phase, module in [
        ("policy_forward_s", trainer.model),
        ("reference_s", trainer.ref_model),
        ("score_s", trainer.reward_funcs[0]),
    ]:
        module.forward = clock.timed(phase, module.forward)
    trainer._generate_single_turn = clock.timed("generate_s", full_length(job, trainer._generate_single_turn))
    trainer.accelerator.backward = clock.timed("backward_s", trainer.accelerator.backward)
    return trainer


def full_length(job: dict[str, Any], generate: Any) -> Any:
    """`generate`, refusing prompts and completions of another length than the job's."""

    def call(prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        found = generate(prompt_ids, *args, **kwargs)
        shapes = {(len(p), len(c)) for p, c in zip(prompt_ids, found[0], strict=True)}
        if shapes != {(len(job["prompts"][0]), job["completion_tokens"])}:
            raise RuntimeError(f"TRL generated prompts and completions of {shapes} tokens")
        return found

    return call


if __name__ == "__main__":
    run_block(GRPOClock(), make_trainer, Path(sys.argv[1]), Path(sys.argv[2]))
