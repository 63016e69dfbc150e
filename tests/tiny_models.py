"""Tiny random models of many architectures: two or three layers of each kind, and weights that tell them apart.

`TINY[name]()` is a configuration, `make(name, seed)` a model of it. A name with a suffix is a variant of an architecture:
`-window` has a sliding window of 8 tokens, `-tied` shares the head with the embeddings, `-longrope` turns dimensions by
factors of their own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

WINDOW = 8  # tokens
# Sizes of a decoder; heads of 32, the smallest that vLLM's attention takes on CPU.
SIZES = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
GROUPED = {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 32}
GPT = {
    "vocab_size": 300,
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT |= {"initializer_range": 0.1}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SHORT = {
    "vocab_size": 300,
    "hidden_size": 128,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 128, "truncate": False,
    "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
LONGROPE = {  # a factor for each pair of the dimensions of a head; the long ones for rows beyond the original positions
    "rope_type": "longrope", "rope_theta": 10000.0,
    "short_factor": [1 + i / 16 for i in range(16)], "long_factor": [2 + i / 2 for i in range(16)],
}  # fmt: skip
SLIDING_FULL = ["sliding_attention", "full_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "num_nextn_predict_layers": 0,
}  # fmt: skip
MLA = {  # latents as long as the real ones, which alone have a kernel in vLLM
    "num_key_value_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_chunk_size": 16,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip


def of(name: str, *sizes: dict[str, Any], **more: Any) -> Callable[[], PretrainedConfig]:
    """What makes the configuration of a class of transformers, by its name without "Config"."""
    known: dict[str, Any] = {}
    for part in (*sizes, more):
        known |= part
    return partial(_config, name, known)


def _config(name: str, known: dict[str, Any]) -> PretrainedConfig:
    cls: Any = getattr(transformers, f"{name}Config")
    return cls(**known)


TINY: dict[str, Callable[[], PretrainedConfig]] = {
    # ---- dense, rotary
    "llama": of("Llama", SIZES, HEADS),
    "llama-tied": of("Llama", SIZES, HEADS, tie_word_embeddings=True),
    "llama-bias": of("Llama", SIZES, HEADS, attention_bias=True, mlp_bias=True),
    "mistral": of("Mistral", SIZES, HEADS, sliding_window=None),
    "mistral-window": of("Mistral", SIZES, HEADS, sliding_window=WINDOW),
    "ministral-window": of("Ministral", SIZES, HEADS, sliding_window=WINDOW, layer_types=SLIDING_FULL),
    "qwen2": of("Qwen2", SIZES, GROUPED),
    "qwen2-window": of("Qwen2", SIZES, GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": of("Qwen3", SIZES, HEADS),
    "qwen3-tied": of("Qwen3", SIZES, HEADS, tie_word_embeddings=True),
    "gemma": of("Gemma", SIZES, HEADS),
    "gemma2": of(
        "Gemma2",
        SIZES,
        HEADS,
        sliding_window=64,
        query_pre_attn_scalar=32,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=2.0,
    ),
    "gemma2-window": of(
        "Gemma2",
        SIZES,
        HEADS,
        sliding_window=WINDOW,
        query_pre_attn_scalar=32,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=2.0,
    ),
    "gemma3": of("Gemma3Text", SIZES, HEADS, sliding_window=64, query_pre_attn_scalar=32, layer_types=SLIDING_FULL),
    "gemma3-window": of(
        "Gemma3Text", SIZES, HEADS, sliding_window=WINDOW, query_pre_attn_scalar=32, layer_types=SLIDING_FULL
    ),
    "phi": of("Phi", SIZES, num_key_value_heads=4),
    "phi3": of("Phi3", SIZES, GROUPED, original_max_position_embeddings=256, sliding_window=None),
    "phi3-window": of("Phi3", SIZES, GROUPED, original_max_position_embeddings=256, sliding_window=WINDOW),
    "phi3-longrope": of(
        "Phi3",
        SIZES | {"max_position_embeddings": 2048},
        GROUPED,
        original_max_position_embeddings=1024,
        sliding_window=None,
        rope_parameters=LONGROPE,
    ),
    "granite": of(
        "Granite",
        SIZES,
        GROUPED,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
    ),
    "cohere": of("Cohere", SIZES, GROUPED, logit_scale=0.75),
    "cohere-qk-norm": of("Cohere", SIZES, GROUPED, logit_scale=0.75, use_qk_norm=True),
    "cohere2": of("Cohere2", SIZES, HEADS, logit_scale=0.75, sliding_window=64, layer_types=SLIDING_FULL),
    "cohere2-window": of("Cohere2", SIZES, HEADS, logit_scale=0.75, sliding_window=WINDOW, layer_types=SLIDING_FULL),
    "olmo": of("Olmo", SIZES, GROUPED),
    "olmo2": of("Olmo2", SIZES, GROUPED),
    "olmo3-window": of("Olmo3", SIZES, GROUPED, sliding_window=WINDOW, layer_types=SLIDING_FULL),
    "stablelm": of("StableLm", SIZES, GROUPED, use_qkv_bias=True, hidden_dropout=0.0),
    "starcoder2": of("Starcoder2", SIZES, GROUPED, sliding_window=None, residual_dropout=0.0, embedding_dropout=0.0),
    "starcoder2-window": of(
        "Starcoder2", SIZES, GROUPED, sliding_window=WINDOW, residual_dropout=0.0, embedding_dropout=0.0
    ),
    "smollm3": of("SmolLM3", SIZES, GROUPED, no_rope_layers=[1, 0]),
    "glm": of("Glm", SIZES, HEADS, attention_bias=True),
    "glm4": of("Glm4", SIZES, HEADS, attention_bias=True),
    "helium": of("Helium", SIZES, HEADS),
    "nemotron": of("Nemotron", SIZES, HEADS),
    "exaone4-window": of("Exaone4", SIZES, GROUPED, sliding_window=WINDOW, layer_types=SLIDING_FULL),
    "ernie4_5": of("Ernie4_5", SIZES, HEADS),
    "arcee": of("Arcee", SIZES, HEADS),
    "seed_oss": of("SeedOss", SIZES, HEADS),
    "apertus": of("Apertus", SIZES, GROUPED),
    "hunyuan_dense": of("HunYuanDenseV1", SIZES, HEADS),
    "persimmon": of("Persimmon", SIZES, hidden_dropout=0.0),
    # ---- dense, the GPT family and its neighbours
    "gpt2": of("GPT2", GPT, NO_DROPOUT),
    "gpt_neo-window": of(
        "GPTNeo",
        SHORT,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        max_position_embeddings=256,
        intermediate_size=192,
    ),
    "gpt_neox": of("GPTNeoX", SIZES, attention_dropout=0.0, hidden_dropout=0.0),
    "gptj": of("GPTJ", GPT, NO_DROPOUT, rotary_dim=16),
    "gpt_bigcode": of("GPTBigCode", GPT, NO_DROPOUT),
    "codegen": of("CodeGen", GPT, NO_DROPOUT, n_ctx=256, rotary_dim=16),
    "bloom": of("Bloom", SHORT, n_layer=2, n_head=4),
    "falcon": of("Falcon", SIZES, alibi=False, new_decoder_architecture=False, multi_query=True, parallel_attn=True),
    "falcon-alibi": of(
        "Falcon", SIZES, alibi=True, new_decoder_architecture=False, multi_query=False, parallel_attn=False, bias=True
    ),
    "falcon-new": of("Falcon", SIZES, alibi=False, new_decoder_architecture=True, num_kv_heads=2),
    "opt": of(
        "OPT",
        SHORT,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=192,
        max_position_embeddings=256,
        word_embed_proj_dim=128,
        dropout=0.0,
        init_std=0.1,
    ),
    "mpt": of(
        "Mpt",
        vocab_size=300,
        d_model=128,
        n_heads=4,
        n_layers=2,
        max_seq_len=256,
        expansion_ratio=2,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
    ),
    # ---- mixtures of experts
    "mixtral": of("Mixtral", SIZES, HEADS, LOCAL_EXPERTS, sliding_window=None),
    "mixtral-window": of("Mixtral", SIZES, HEADS, LOCAL_EXPERTS, sliding_window=WINDOW),
    "qwen2_moe": of("Qwen2Moe", SIZES, GROUPED, EXPERTS, moe_intermediate_size=64, shared_expert_intermediate_size=96),
    "qwen3_moe": of("Qwen3Moe", SIZES, HEADS, EXPERTS, moe_intermediate_size=64, norm_topk_prob=True),
    "qwen3_moe-padded": of("Qwen3Moe", SIZES, HEADS, EXPERTS, moe_intermediate_size=48, norm_topk_prob=True),
    "olmoe": of("Olmoe", SIZES, GROUPED, EXPERTS),
    "flex_olmo": of("FlexOlmo", SIZES, GROUPED, EXPERTS),
    "granitemoe": of(
        "GraniteMoe",
        SIZES,
        GROUPED,
        LOCAL_EXPERTS,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
        tie_word_embeddings=True,
    ),
    "granitemoe_shared": of(
        "GraniteMoeShared", SIZES, GROUPED, LOCAL_EXPERTS, shared_intermediate_size=96, logits_scaling=2.0
    ),
    "phimoe": of("Phimoe", SIZES, GROUPED, LOCAL_EXPERTS, sliding_window=None),
    "glm4_moe": of("Glm4Moe", SIZES, HEADS, ROUTED, use_qk_norm=True),
    "dots1": of("Dots1", SIZES, HEADS, ROUTED),
    "deepseek_v2": of("DeepseekV2", SIZES, ROUTED, MLA),
    "deepseek_v3": of("DeepseekV3", SIZES, ROUTED, MLA, topk_method="noaux_tc", scoring_func="sigmoid"),
    "ernie4_5_moe": of(
        "Ernie4_5_Moe",
        SIZES,
        HEADS,
        moe_intermediate_size=64,
        moe_k=2,
        moe_num_experts=4,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=1,
    ),
    "hunyuan_moe": of("HunYuanMoEV1", SIZES, HEADS, num_experts=4, moe_topk=2),
    "gpt_oss": of(
        "GptOss",
        SIZES,
        HEADS,
        LOCAL_EXPERTS,
        sliding_window=64,
        layer_types=SLIDING_FULL,
        rope_parameters=YARN,
    ),
    "gpt_oss-window": of(
        "GptOss",
        SIZES,
        HEADS,
        LOCAL_EXPERTS,
        sliding_window=WINDOW,
        layer_types=SLIDING_FULL,
        rope_parameters=YARN,
    ),
    "minimax_m2": of(
        "MiniMaxM2",
        SIZES,
        HEADS,
        LOCAL_EXPERTS,
        rotary_dim=16,
        scoring_func="sigmoid",
        use_routing_bias=True,
        use_qk_norm=True,
    ),
    # ---- state spaces, convolutions, linear attention, and hybrids
    "mamba": of("Mamba", SHORT, num_hidden_layers=2, state_size=16),
    "falcon_mamba": of("FalconMamba", SHORT, num_hidden_layers=2, state_size=16),
    "mamba2": of(
        "Mamba2", SHORT, num_hidden_layers=2, state_size=16, num_heads=8, head_dim=32, n_groups=1, chunk_size=16
    ),
    "lfm2": of(
        "Lfm2",
        SIZES | {"num_hidden_layers": 3},
        GROUPED,
        layer_types=["conv", "full_attention", "conv"],
        block_auto_adjust_ff_dim=False,
        conv_dim=128,
        block_dim=128,
        block_ff_dim=192,
    ),
    "jamba": of(
        "Jamba",
        SIZES | {"num_hidden_layers": 4},
        GROUPED,
        EXPERTS,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=3,
        expert_layer_offset=2,
        mamba_dt_rank=8,
    ),
    "bamba": of("Bamba", SIZES, GROUPED, MAMBA, attn_layer_indices=[1]),
    "zamba": of(
        "Zamba",
        SIZES | {"num_hidden_layers": 4},
        num_key_value_heads=4,
        attention_hidden_size=256,
        attention_head_dim=64,
        n_mamba_heads=2,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
        mamba_dt_rank=8,
    ),
    "zamba2": of(
        "Zamba2",
        SIZES | {"num_hidden_layers": 4},
        num_key_value_heads=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        n_mamba_heads=8,
        mamba_d_state=16,
        mamba_headdim=32,
        chunk_size=16,
        adapter_rank=16,
    ),
    "falcon_h1": of(
        "FalconH1",
        SIZES,
        GROUPED,
        MAMBA,
        mamba_d_ssm=256,
        lm_head_multiplier=0.5,
        embedding_multiplier=2.0,
        key_multiplier=0.5,
    ),
    "granitemoe_hybrid": of(
        "GraniteMoeHybrid",
        SIZES,
        GROUPED,
        LOCAL_EXPERTS,
        MAMBA,
        shared_intermediate_size=96,
        layer_types=["mamba", "attention"],
        logits_scaling=2.0,
    ),
    "recurrent_gemma": of(
        "RecurrentGemma",
        SIZES | {"num_hidden_layers": 3},
        GROUPED,
        lru_width=128,
        attention_window_size=64,
        block_types=["recurrent", "recurrent", "attention"],
        w_init_variance_scale=1.0,
    ),
    "recurrent_gemma-window": of(
        "RecurrentGemma",
        SIZES | {"num_hidden_layers": 3},
        GROUPED,
        lru_width=128,
        attention_window_size=WINDOW,
        block_types=["recurrent", "recurrent", "attention"],
        w_init_variance_scale=1.0,
    ),
    "minimax": of(
        "MiniMax", SIZES, HEADS, LOCAL_EXPERTS, block_size=16, layer_types=["linear_attention", "full_attention"]
    ),
    "qwen3_next": of(
        "Qwen3Next",
        SIZES,
        HEADS,
        EXPERTS,
        LINEAR,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        layer_types=["linear_attention", "full_attention"],
    ),
}


def make(name: str, seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of `TINY[name]`, drawn by `seed`, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(TINY[name]())
    tell_apart(model)
    precise = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())  # what the class loads in float32 alone
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and name in model.state_dict() and not any(part in name for part in precise):
            tensor.data = tensor.data.to(dtype)
    return model.eval()


@torch.no_grad()
def tell_apart(model: PreTrainedModel) -> None:
    """Add noise to what every new model has the same: norms, biases, router corrections. A layer that ignored them, or kept
    another model's, would else not show."""
    buffers = [(n, b) for n, b in model.named_buffers() if n in model.state_dict() and b.is_floating_point()]
    for _, tensor in [*model.named_parameters(), *buffers]:
        if tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            tensor += 0.2 * torch.randn_like(tensor)
