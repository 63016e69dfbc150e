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
BY_LENGTH = ("dynamic", "longrope", "su")  # whose speed follows the length of what is computed together


def positions(model: Any) -> tuple[int, str] | None:
    """How many tokens a sequence of a model may have, and where its configuration says so; None where it does not."""
    known = {key: number for key in POSITIONS if (number := getattr(model, key, None)) is not None}
    if own := getattr(model, "model_max_length", None):
        known = {"model_max_length": own}
    if not known:
        return None
    key = min(known, key=lambda name: known[name])
    factor = 1.0
    for rope in _ropes(model):
        if rope.get("rope_type") not in SCALED and "gemma3" not in model.model_type:
            factor = rope.get("factor") or factor
    return int(known[key] * factor), key


def steady_positions(model: Any) -> tuple[int, str] | None:
    """Up to where RoPE turns at the same speed in rows of any length; None where it always does.

    Beyond, transformers turns a row by the longest of its batch, and vLLM every row as if it were a long one
    (rotary_embedding/phi3_long_rope_scaled_rope.py): the two differ, and so does a row from itself in other company.
    """
    known = [
        (
            int(rope.get("original_max_position_embeddings") or model.max_position_embeddings),
            f"original_max_position_embeddings of rope_type {rope['rope_type']}",
        )
        for rope in _ropes(model)
        if rope.get("rope_type") in BY_LENGTH
    ]
    return min(known, default=None)


def longest_row(model: Any) -> tuple[int, str] | None:
    """How many tokens a row may have so that its numbers are its own: the least of both, and what says so."""
    return min([found for found in (positions(model), steady_positions(model)) if found], default=None)


def _ropes(model: Any) -> list[dict[str, Any]]:
    """One for all layers, or one for each kind of them."""
    rope = getattr(model, "rope_parameters", None) or {}
    return [layers for layers in ([rope] if "rope_type" in rope else rope.values()) if isinstance(layers, dict)]
