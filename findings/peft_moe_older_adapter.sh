#!/usr/bin/env bash
# PEFT 0.21.2 with transformers 5.24.0: adapters of mixtures of experts from transformers 4 lose parts, or count 1.41 times.
#
# - transformers 5 keeps the experts of a layer in two tensors. PEFT turns adapters of transformers 4, with one pair of
#   matrices for each expert, into that form as it loads them; its code says that alpha / r of the parts stays what it was.
#   For LoRA of Qwen3-MoE and Mixtral all is right. Elsewhere another model comes out, and no warning says what was lost:
# - Qwen2-MoE: nothing of the experts is loaded, only attention and the shared expert.
# - DeepSeek-V3 and GLM-4-MoE: nothing of the shared experts and of the first, dense layers is loaded. A new adapter for the
#   same names of layers leaves them out too.
# - rsLoRA: rank and alpha of gate and up are doubled, but rsLoRA scales by alpha / sqrt(r), so these two count 1.414 times.
# - What is right: the log-probabilities under transformers 4, and those of the model merged there and loaded here.
#
# So a policy from SFT that is loaded for RL, as a reference or for its evaluation is another one, and so is what is merged
# from it: with experts that have learnt nothing, or too much.
#
# Needs python3.11 and network for pip; takes 3 minutes. Exits 1 where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
export PATH=$folder/venv/bin:$PATH HF_HUB_OFFLINE=1
cd "$folder"

cat >common.py <<'PYTHON'
import torch

CASES = {
    "Qwen3-MoE, LoRA": ("qwen3_moe", False), "Qwen3-MoE, rsLoRA": ("qwen3_moe", True),
    "Mixtral, LoRA": ("mixtral", False), "Mixtral, rsLoRA": ("mixtral", True), "Qwen2-MoE, LoRA": ("qwen2_moe", False),
    "DeepSeek-V3, LoRA": ("deepseek_v3", False), "GLM-4-MoE, LoRA": ("glm4_moe", False),
}
EXPERTS = {"mixtral": ["w1", "w2", "w3"]}
probe = torch.arange(3, 40)[None]


def targets(kind):
    return ["o_proj", *EXPERTS.get(kind, ["gate_proj", "up_proj", "down_proj"])]


def logprobs(model):
    with torch.no_grad():
        return model.eval()(input_ids=probe).logits.log_softmax(-1)
PYTHON

cat >make.py <<'PYTHON'
import common
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "num_experts_per_tok": 2, "initializer_range": 0.3, "moe_intermediate_size": 24,
}
MORE = {
    "qwen3_moe": {"num_experts": 4}, "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 24},
    "mixtral": {"num_local_experts": 4},
    "glm4_moe": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "deepseek_v3": {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8,
        "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
}
for name, (kind, rslora) in common.CASES.items():
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **MORE[kind])
    AutoModelForCausalLM.from_config(config).save_pretrained(f"{name}/base")
    model = AutoModelForCausalLM.from_pretrained(f"{name}/base")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=common.targets(kind), use_rslora=rslora, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, lora)
    with torch.no_grad():
        for key, parameter in tuned.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.1)
    tuned.save_pretrained(f"{name}/adapter")
    torch.save(common.logprobs(tuned), f"{name}/logprobs.pt")
    tuned.merge_and_unload().save_pretrained(f"{name}/merged")
PYTHON

cat >load.py <<'PYTHON'
import re
import warnings

import common
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

PARTS = {
    "attention": r"self_attn", "gate and up of experts": r"experts\.\d+\.(gate_proj|up_proj|w1|w3)",
    "down of experts": r"experts\.\d+\.(down_proj|w2)", "shared expert": r"shared_expert", "dense layer": r"mlp\.\w+_proj",
}
print("found: peft", peft.__version__, "transformers", transformers.__version__)
for name, (kind, _) in common.CASES.items():
    expected = torch.load(f"{name}/logprobs.pt")
    merged = common.logprobs(AutoModelForCausalLM.from_pretrained(f"{name}/merged"))
    assert (merged - expected).abs().max() < 1e-3, name
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{name}/base"), f"{name}/adapter")
    off = (common.logprobs(tuned) - expected).abs().max().item()
    assert not [entry for entry in said if re.search("expert|missing|unexpected|mlp", str(entry.message))]
    tuned.merge_and_unload().save_pretrained(f"{name}/again")
    weights = {which: load_file(f"{name}/{which}/model.safetensors") for which in ("base", "merged", "again")}
    counted = {}
    for key, right in weights["merged"].items():
        change, found = right - weights["base"][key], weights["again"][key] - weights["base"][key]
        if change.abs().max() > 0:
            part = next(part for part, pattern in PARTS.items() if re.search(pattern, key))
            counted.setdefault(part, set()).add(round(((found * change).sum() / (change * change).sum()).item(), 2))
    counted = {part: sorted(values) for part, values in counted.items()}
    wrong = {
        "rsLoRA": {"gate and up of experts": [1.41]}, "Qwen2": {"gate and up of experts": [0.0], "down of experts": [0.0]},
        "DeepSeek": {"shared expert": [0.0], "dense layer": [0.0]}, "GLM": {"shared expert": [0.0], "dense layer": [0.0]},
    }
    known = next((parts for mark, parts in wrong.items() if mark in name), {})
    print(f"found: {name}: log-probabilities off by {off:.1e}; the parts of the adapter count", counted)
    assert counted == {part: known.get(part, [1.0]) for part in counted} and set(known) <= set(counted), name
    assert off > 0.5 if known else off < 1e-3, name

fresh = get_peft_model(
    AutoModelForCausalLM.from_pretrained("DeepSeek-V3, LoRA/base"),
    LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"),
)
keys = [key.removeprefix("base_model.model.model.") for key, _ in fresh.named_parameters()]
where = sorted({key.split(".lora_")[0] for key in keys if "lora_" in key})
print("found: a new adapter for gate_proj, up_proj and down_proj of DeepSeek-V3 is on:", where)
assert where == ["layers.1.mlp.experts", "layers.1.mlp.experts.base_layer"]
PYTHON

pip install --quiet torch==2.13.0 numpy==2.3.5 transformers==4.57.6 peft==0.18.1
python make.py 2>errors.txt || { tail -5 errors.txt; exit 1; }
pip install --quiet transformers==5.24.0 peft==0.21.2
python load.py 2>errors.txt | grep "^found:" | tee found.txt || { tail -5 errors.txt; exit 1; }
! grep -iE "missing|unexpected|not loaded" errors.txt
