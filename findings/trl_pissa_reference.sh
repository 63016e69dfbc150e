#!/usr/bin/env bash
# TRL 1.16.0 with PEFT 0.21.2: with PiSSA or OLoRA the reference is not the model that training starts from, or both are broken.
#
# - These two begin an adapter with a part of a layer's own weights, which they take out of the weights: adapter and remainder
#   together are the model. Trainers with `peft_config` take the model without the adapter as the reference (their comments: that
#   yields the base model). Here it yields the remainder, which lacks the largest part of the weights. Before the first step the
#   rewards of DPO are not 0 and its loss is not ln 2, and the KL of GRPO pulls to the remainder. KTO and RLOO do the same.
# - Given a model that has such an adapter (made with get_peft_model, or saved and loaded again), the trainers add an adapter
#   "ref" with the same configuration, whose making takes a second part out of the weights, and copy the first adapter into it.
#   Now reference and policy agree, the loss is ln 2, and both are another model than the one that was given: to build the
#   trainer has changed it. What is saved afterwards is read back with one part taken out, so it is a third model.
# - LoRA's own initialization, "gaussian" and "orthogonal" do not touch the weights, and there all is right.
#
# Needs python3.11 and network for pip; takes 2 to 3 minutes. Exits 1 where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
export PATH=$folder/venv/bin:$PATH HF_HUB_OFFLINE=1
pip install --quiet torch==2.13.0 numpy==2.3.5 transformers==5.24.0 peft==0.21.2 trl==1.16.0
cd "$folder"

cat >reference.py <<'PYTHON'
import math

import peft
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = [f"w{i}" for i in range(61)]
rust = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}, unk_token="<unk>"))
rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
pairs = Dataset.from_list([
    {"prompt": " ".join(words[i:i + 5]), "chosen": " " + " ".join(words[i + 20:i + 26]), "rejected": " " + words[i + 40]}
    for i in range(8)
])
probe = torch.arange(3, 40)[None]


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3,
        pad_token_id=0, eos_token_id=1,
    ))


def logprobs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=probe).logits.log_softmax(-1)


def build(kind: str, model: torch.nn.Module, **more: object):
    common = {
        "output_dir": "out", "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_steps": 1,
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 8, "beta": 0.1,
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    if kind == "DPO":
        return trl.DPOTrainer(model, args=trl.DPOConfig(**common), train_dataset=pairs, processing_class=tokenizer, **more)
    return trl.GRPOTrainer(model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=trl.GRPOConfig(**common),
                           train_dataset=pairs.select_columns("prompt"), processing_class=tokenizer, **more)


def off(model: torch.nn.Module, expected: torch.Tensor) -> float:
    return (logprobs(model.eval()) - expected).abs().max().item()


def first_loss(trainer: trl.DPOTrainer) -> float:
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def report(start: str, kind: str, init: object, found: dict[str, float], wrong: tuple[str, ...]) -> None:
    print(f"found: {start}, {kind}, {init}: " + ", ".join(f"{what} {value:.3f}" for what, value in found.items()))
    for what, value in found.items():
        right = math.log(2) if what == "first loss" else 0.0
        assert (abs(value - right) > 0.02) == (what in wrong), (start, kind, init, what, value)


print("found: trl", trl.__version__, "peft", peft.__version__, "transformers", transformers.__version__)
expected = logprobs(base().eval())
for init in (True, "gaussian", "orthogonal", "pissa", "olora"):
    takes = init in ("pissa", "olora")
    for kind in ("DPO", "GRPO"):
        config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=init, task_type="CAUSAL_LM")

        trainer = build(kind, base(), peft_config=config)
        found = {"policy off by": off(trainer.model, expected)}
        with trainer.model.disable_adapter():
            found["reference off by"] = off(trainer.model, expected)
        if kind == "DPO":
            found["first loss"] = first_loss(trainer)
        report("peft_config", kind, init, found, ("reference off by", "first loss") if takes else ())

        given = get_peft_model(base(), config)
        found = {"before: policy off by": off(given, expected)}
        trainer = build(kind, given)
        found["built: policy off by"] = off(trainer.model, expected)
        if kind == "DPO":
            found["first loss"] = first_loss(trainer)
        trained = logprobs(trainer.model.eval())
        trainer.save_model("saved")
        found["saved and loaded: off by"] = off(PeftModel.from_pretrained(base(), "saved"), trained)
        report("PeftModel", kind, init, found, ("built: policy off by", "saved and loaded: off by") if takes else ())
PYTHON
python reference.py 2>errors.txt | grep "^found:" | tee found.txt || { tail -5 errors.txt; exit 1; }
grep -q "trl 1.16.0 peft 0.21.2 transformers 5.24.0" found.txt
test "$(grep -c "^found: [pP]" found.txt)" = 20
