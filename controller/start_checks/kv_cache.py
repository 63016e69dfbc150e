"""The KV cache of an engine on CPU: what vLLM wants of it for one sequence, without which it does not start."""

from typing import Any

import torch

from contracts.config import TandemConfig
from contracts.placement import needs

GIB = 2**30
BLOCK = 32  # tokens: actors/vllm_engine.py
# Kinds of models of which every layer keeps keys and values of every token, in heads that `kv_bytes_a_token` counts. Of
# others (windows, latents, recurrent states, layers that share) that number is a bound, and vLLM may do with less.
WHOLE = ("cohere", "gemma", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo", "olmo2", "phi3", "qwen2",
         "qwen3", "qwen3_moe")  # fmt: skip


def kv_bytes_a_token(config: Any, size: int) -> int:
    """2 (keys and values) x layers x key-value heads x width of a head x bytes, as vLLM's FullAttentionSpec has it. Layers
    without attention keep less, so that this is a bound for hybrids."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    groups = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * text.num_hidden_layers * groups * width * size


def one_sequence_bytes(config: TandemConfig, model: Any) -> int:
    """The blocks of one sequence of `engine.max_model_len`, and one that vLLM holds back
    (vllm/v1/core/kv_cache_utils.py, get_kv_cache_configs). A bound, as `kv_bytes_a_token`.

    Args:
        model: its configuration.
    """
    blocks = -(-config.engine.max_model_len // BLOCK) + 1
    return blocks * BLOCK * kv_bytes_a_token(model, getattr(torch, config.model.dtype).itemsize)


def too_small(config: TandemConfig, model: Any) -> list[str]:
    """What is wrong with `engine.kv_cache_gib`, where that is certain."""
    engine, text = config.engine, model.get_text_config()
    is_asked = needs(config)[0].count > 0 and config.cluster.gpus_per_actor == 0 and config.model.dtype != "auto"
    layers = {"full_attention", *(getattr(text, "layer_types", None) or [])}
    has_windows = getattr(text, "sliding_window", None) is not None or len(layers) > 1
    if not is_asked or text.model_type not in WHOLE or has_windows:
        return []
    needed, there = one_sequence_bytes(config, model), int(engine.kv_cache_gib * GIB)
    if needed <= there:
        return []
    a_block = BLOCK * kv_bytes_a_token(model, getattr(torch, config.model.dtype).itemsize)
    fits = max(0, there // a_block - 1) * BLOCK
    shorter = f", or engine.max_model_len={fits} or less" if fits else ""
    return [
        f"engine.kv_cache_gib must hold a sequence of engine.max_model_len ({engine.max_model_len}) tokens, {needed} bytes "
        f"at {a_block // BLOCK} a token; found {engine.kv_cache_gib:g} ({there} bytes); write "
        f"engine.kv_cache_gib={-(-needed * 1000 // GIB) / 1000:g} or more{shorter}"
    ]
