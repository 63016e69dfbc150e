"""How many tokens a sequence of a model may have, as its configuration says it."""

from typing import Any

# Where configurations say how many there are. As vLLM reads them (transformers_utils/model_arch_config_convertor.py): the
# least counts, and Cohere's own key before all.
POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# Kinds of RoPE whose factor that number has in it already.
SCALED = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


def positions(model: Any) -> tuple[int, str] | None:
    """How many tokens a sequence of a model may have, and where its configuration says so; None where it does not."""
    known = {key: number for key in POSITIONS if (number := getattr(model, key, None)) is not None}
    if own := getattr(model, "model_max_length", None):
        known = {"model_max_length": own}
    if not known:
        return None
    key = min(known, key=lambda name: known[name])
    rope = getattr(model, "rope_parameters", None) or {}
    factor = 1.0
    for layers in [rope] if "rope_type" in rope else rope.values():  # one for all layers, or one for each kind of them
        if isinstance(layers, dict) and layers.get("rope_type") not in SCALED and "gemma3" not in model.model_type:
            factor = layers.get("factor") or factor
    return int(known[key] * factor), key
