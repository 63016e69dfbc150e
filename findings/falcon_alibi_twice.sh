#!/usr/bin/env bash
# transformers 5.19.0: Falcon with ALiBi (falcon-rw) is three models, by how attention is computed and how long the text is.
#
# - attn_implementation="eager" adds the position biases twice: the model puts them into the mask that it hands to its
#   layers, and a layer adds them to its scores again. "sdpa", which takes the mask alone, adds them once, as the checkpoints
#   were trained. Asking for output_attentions changes the numbers too, since such a layer takes the way of eager.
# - Either way the biases are computed in bfloat16 whatever the model's format, float64 included. From position 256 on
#   neighbours share one (pairs up to 512, groups of four up to 1024, ...). BLOOM, with the same formula in the same library,
#   computes them in the model's format.
#
# So "the class in float32 with eager attention", the usual reference for an engine or a kernel, is wrong here, and float64
# does not show it. An engine that adds the biases once is right and looks wrong.
#
# Needs python3.11 and network for pip; takes 4 minutes. Exits 1 where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.19.0 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_biases
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon_biases

HEADS, WIDTH, LENGTH = 8, 64, 128  # below 256 positions bfloat16 is exact
torch.set_num_threads(2)


def falcon(attention):
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=256, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS, alibi=True, multi_query=False,
        new_decoder_architecture=False, parallel_attn=False, initializer_range=0.2, attn_implementation=attention,
    )
    return FalconForCausalLM(config).eval()


def by_hand(layer, hidden, times):
    """Attention of one layer with the biases of the ALiBi paper added `times` times: softmax((q k + times slope j) / sqrt d) v."""
    q, k, v = layer.query_key_value(hidden).view(LENGTH, HEADS, 3, WIDTH // HEADS).permute(2, 1, 0, 3)
    slopes = 2.0 ** (-8.0 / HEADS * torch.arange(1, HEADS + 1))
    scores = q @ k.transpose(1, 2) + times * slopes[:, None, None] * torch.arange(LENGTH)
    scores = (scores / (WIDTH // HEADS) ** 0.5).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
    return layer.dense((scores.softmax(-1) @ v).transpose(0, 1).reshape(LENGTH, WIDTH))


row, off, logprobs = torch.randint(3, 256, (1, LENGTH)), {}, {}
for attention in ("eager", "sdpa"):
    model, seen = falcon(attention), {}
    layer = model.transformer.h[0].self_attention
    layer.register_forward_hook(lambda module, given, made: seen.update(given=given[0][0], made=made[0][0]))
    with torch.no_grad():
        logprobs[attention] = model(row, use_cache=False).logits.log_softmax(-1)
        off[attention] = [(by_hand(layer, seen["given"], times) - seen["made"]).abs().max().item() for times in (1, 2)]

ones = torch.ones(1, 1024, dtype=torch.long)
distinct = {
    f"{name} {dtype}": len(set(biases(ones, HEADS, dtype)[0, 0].tolist()))
    for name, biases in (("falcon", falcon_biases), ("bloom", bloom_biases))
    for dtype in (torch.float32, torch.float64)
}
difference = (logprobs["eager"] - logprobs["sdpa"]).abs().max().item()
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
for attention, (once, twice) in off.items():
    print(f"{attention}: attention differs from biases added once by {once:.1e}, added twice by {twice:.1e}")
print(f"log-probabilities of eager and sdpa, one layer, {LENGTH} tokens: up to {difference:.2f} nats apart")
print(f"distinct biases of 1024 positions: {distinct}")
assert off["eager"][1] < 1e-4 < 0.01 < off["eager"][0]
assert off["sdpa"][0] < 1e-4 < 0.01 < off["sdpa"][1]
assert difference > 0.1
assert distinct["falcon torch.float32"] == distinct["falcon torch.float64"] < 600
assert distinct["bloom torch.float32"] == distinct["bloom torch.float64"] == 1024
PYTHON
