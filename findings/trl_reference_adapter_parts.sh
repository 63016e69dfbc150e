#!/usr/bin/env bash
# TRL 1.16.0 with PEFT 0.21.2: training that goes on with a saved adapter is held to a reference that lacks parts of it.
#
# - DPO, KTO, GRPO and RLOO that are given a model with a trained adapter make a second adapter "ref", documented as an initial
#   copy of the first. What is copied are parameters with ".default." in their names. PEFT keeps others under names that end in
#   ".default": LoRA of an embedding (`target_modules` with "embed_tokens"), the rows of `trainable_token_indices`, and all of
#   IA3, LoHa, LoKr, VeRA and HRA. In the reference these are as they are when an adapter is made new. Nothing is said.
# - So a policy that has learnt its new tokens in SFT is compared with one that has not: before the first step the rewards of
#   DPO are not 0 and its loss is not ln 2, and the KL of GRPO pulls back to embeddings from before SFT.
# - LoRA of linear layers, DoRA, `modules_to_save` and OFT are copied, and there all is right.
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
from peft import HRAConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftModel, VeraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = [f"w{i}" for i in range(61)]
rust = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}, unk_token="<unk>"))
rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
pairs = Dataset.from_list([
    {"prompt": " ".join(words[i:i + 5]), "chosen": " " + " ".join(words[i + 20:i + 26]), "rejected": " " + words[i + 40]}
    for i in range(8)
])
single = Dataset.from_list([
    {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(pairs)
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


def build(kind: str, model: PeftModel):
    common = {
        "output_dir": "out", "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_steps": 1,
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 8, "beta": 0.1,
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    if kind == "DPO":
        return trl.DPOTrainer(model, args=trl.DPOConfig(**common), train_dataset=pairs, processing_class=tokenizer)
    if kind == "KTO":
        return trl.KTOTrainer(model, args=trl.KTOConfig(**common), train_dataset=single, processing_class=tokenizer)
    trainer, config = {"GRPO": (trl.GRPOTrainer, trl.GRPOConfig), "RLOO": (trl.RLOOTrainer, trl.RLOOConfig)}[kind]
    return trainer(model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config(**common),
                   train_dataset=pairs.select_columns("prompt"), processing_class=tokenizer)


def compare(name: str, config: peft.PeftConfig, kinds: tuple[str, ...]) -> None:
    """Trains an adapter (by chance), saves it, goes on with it, and asks for the log-probabilities of policy and reference."""
    config.task_type = "CAUSAL_LM"
    first = get_peft_model(base(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    first.save_pretrained("adapter")
    expected = logprobs(first.eval())
    for kind in kinds:
        trainer = build(kind, PeftModel.from_pretrained(base(), "adapter", is_trainable=True))
        trainer.model.eval()
        found = []
        for adapter in ("default", "ref"):
            trainer.model.set_adapter(adapter)
            found.append((logprobs(trainer.model) - expected).abs().max().item())
        trainer.model.set_adapter("default")
        line = f"{name}, {kind}: off by {found[0]:.2f} in the policy, by {found[1]:.2f} in the reference"
        assert found[0] < 1e-3, line
        if kind == "DPO":
            trainer.train()
            loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
            line += f"; loss of the first step {loss:.3f}"
            assert (abs(loss - math.log(2)) > 1e-3) == (found[1] > 1e-3), line
        print("found:", line, "" if found[1] < 1e-3 else "<- wrong")


print("found: trl", trl.__version__, "peft", peft.__version__, "transformers", transformers.__version__)
linear = ["q_proj", "v_proj"]
compare("LoRA", LoraConfig(target_modules=linear), ("DPO", "GRPO"))
compare("LoRA with embeddings", LoraConfig(target_modules=[*linear, "embed_tokens"]), ("DPO", "KTO", "GRPO", "RLOO"))
compare("LoRA with rows of tokens", LoraConfig(target_modules=linear, trainable_token_indices=list(range(3, 15))), ("DPO", "GRPO"))
compare("DoRA", LoraConfig(target_modules=linear, use_dora=True), ("DPO",))
compare("LoRA with modules_to_save", LoraConfig(target_modules=linear, modules_to_save=["lm_head"]), ("DPO",))
compare("OFT", OFTConfig(target_modules=linear, oft_block_size=8), ("DPO",))
compare("IA3", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), ("DPO",))
compare("LoHa", LoHaConfig(target_modules=linear), ("DPO",))
compare("LoKr", LoKrConfig(target_modules=linear), ("DPO",))
compare("VeRA", VeraConfig(target_modules=linear), ("DPO",))
compare("HRA", HRAConfig(target_modules=linear), ("DPO",))
PYTHON
python reference.py 2>errors.txt | grep "^found:" | tee found.txt || { tail -5 errors.txt; exit 1; }
grep -q "trl 1.16.0 peft 0.21.2 transformers 5.24.0" found.txt
test "$(grep -c "<- wrong" found.txt)" = 11
! grep -E "LoRA, |DoRA|modules_to_save|OFT" found.txt | grep -q wrong
