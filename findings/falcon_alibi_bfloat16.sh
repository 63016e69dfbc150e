#!/usr/bin/env bash
# transformers 5.19.0: Falcon with ALiBi (falcon-rw) adds position biases in bfloat16 whatever the model's number format.
#
# bfloat16 has 8 bits of precision, so from position 256 on neighbours share a bias (pairs up to 512, groups of four up to
# 1024, ...): a float32 model cannot tell the order of distant neighbours, and log-probabilities of the small random model
# below are up to 3.1 nats from those of the same weights with float32 biases (0 before position 256). In float64 the class keeps the same error, so comparing a run with
# "float64 as the reference" does not show it. BLOOM, with the same formula in the same library, computes it in the model's format.
# Whoever serves such a checkpoint with an engine that computes ALiBi in float32 has another policy than the one it trains.
#
# Needs python3.11 and network for pip. Takes 2 minutes. Exits 1 where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.19.0 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import BloomConfig, FalconConfig, FalconForCausalLM
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_alibi
from transformers.models.falcon import modeling_falcon

HEADS, LENGTH = 8, 1024
torch.manual_seed(0)
torch.set_num_threads(2)


def float32_alibi(mask, heads, dtype):
    """The same biases, position x slope, in float32; slopes of the paper for a power of two of heads."""
    slopes = 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1))
    positions = ((mask.cumsum(-1) - 1) * mask)[:, None, :].float()
    return (slopes[None, :, None] * positions).reshape(-1, 1, mask.shape[1]).to(dtype)


mask = torch.ones(1, LENGTH, dtype=torch.long)
theirs = modeling_falcon.build_alibi_tensor(mask, HEADS, torch.float32)[0, 0]  # of the first head, [LENGTH]
double = modeling_falcon.build_alibi_tensor(mask, HEADS, torch.float64)[0, 0]
bloom = bloom_alibi(mask, HEADS, torch.float32)[0, 0]
distinct = {name: len(set(bias.tolist())) for name, bias in (("falcon", theirs), ("falcon float64", double), ("bloom", bloom))}

config = FalconConfig(
    vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=HEADS, alibi=True, multi_query=False,
    new_decoder_architecture=False, parallel_attn=False, initializer_range=0.2, attn_implementation="eager",
)
model = FalconForCausalLM(config).eval()
row = torch.randint(3, 256, (1, LENGTH))
with torch.no_grad():
    as_it_is = model(row).logits.log_softmax(-1)
    modeling_falcon.build_alibi_tensor = float32_alibi
    exact = model(row).logits.log_softmax(-1)
    in_double = model.double()(row).logits.log_softmax(-1)
off = (as_it_is - exact).abs().amax((0, 2))
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print(f"distinct biases of {LENGTH} positions: {distinct}")
print(f"largest difference of a log-probability: {off[:256].max():.1e} nats before position 256, {off[256:].max():.2f} after")
print(f"float32 biases against float64 throughout: {(exact - in_double).abs().max():.1e} nats")
assert distinct["falcon"] == distinct["falcon float64"] < 0.6 * LENGTH
assert distinct["bloom"] == LENGTH
assert off[256:].max() > 0.05
assert (exact - in_double).abs().max() < 1e-3
PYTHON
