#!/usr/bin/env bash
# transformers 5.19.0 with PEFT 0.21.2: a merged model that lies beside its adapter is loaded with the adapter counted twice.
#
# - A directory in which PEFT has saved an adapter, and then `merge_and_unload().save_pretrained` the whole model, has
#   `config.json` and `model.safetensors` beside `adapter_config.json`. `from_pretrained` of transformers, by the Auto class or
#   the model's own, reads the whole model and puts the adapter on it again: what training has added is there twice, and
#   nothing is said. Without PEFT installed, the same call loads the merged model alone.
# - PEFT's `AutoPeftModelForCausalLM.from_pretrained` of the same directory takes the base that `adapter_config.json` names, and
#   is right: the two libraries read one directory as two models.
# - The two calls are a common end of a training script; files that lie there from before are enough.
#
# Needs python3.11 and network for pip; takes 1 to 2 minutes. Exits 1 where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
export PATH=$folder/venv/bin:$PATH HF_HUB_OFFLINE=1
pip install --quiet torch==2.13.0 numpy==2.3.5 transformers==5.19.0 peft==0.21.2
cd "$folder"

cat >make.py <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("base")
model = LlamaForCausalLM.from_pretrained("base")
tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
for name, weight in tuned.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(weight)
tuned.save_pretrained("out")
tuned.merge_and_unload().save_pretrained("out")
PYTHON

cat >load.py <<'PYTHON'
import importlib.util
import warnings

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

warnings.simplefilter("error")
name = "model.layers.0.self_attn.q_proj"
base, merged = (load_file(f"{folder}/model.safetensors")[f"{name}.weight"] for folder in ("base", "out"))


def counted(model: torch.nn.Module) -> float:
    """How often the change of a weight is in what the layer computes."""
    layer = (model.get_base_model() if hasattr(model, "get_base_model") else model).get_submodule(name)
    with torch.no_grad():
        weight = layer(torch.eye(32)).T
    return round(((weight - base).norm() / (merged - base).norm()).item(), 3)


print("transformers", transformers.__version__)
print("AutoModelForCausalLM:", counted(AutoModelForCausalLM.from_pretrained("out")))
print("LlamaForCausalLM:", counted(LlamaForCausalLM.from_pretrained("out")))
if importlib.util.find_spec("peft"):
    from peft import AutoPeftModelForCausalLM, __version__

    print("peft", __version__)
    print("AutoPeftModelForCausalLM:", counted(AutoPeftModelForCausalLM.from_pretrained("out")))
PYTHON

python make.py 2>/dev/null
echo "with PEFT installed, the adapter counts so often:"
python load.py 2>/dev/null | tee with.txt
pip uninstall --quiet --yes peft
echo "without:"
python load.py 2>/dev/null | tee without.txt
printf '%s\n' "transformers 5.19.0" "AutoModelForCausalLM: 2.0" "LlamaForCausalLM: 2.0" "peft 0.21.2" \
    "AutoPeftModelForCausalLM: 1.0" | diff - with.txt
printf '%s\n' "transformers 5.19.0" "AutoModelForCausalLM: 1.0" "LlamaForCausalLM: 1.0" | diff - without.txt
