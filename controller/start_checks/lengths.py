"""Sequences of more tokens than a model has positions: its tables end there, or it has never seen their like."""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from contracts.checks.check import Check
from contracts.config import TandemConfig
from contracts.methods import readings
from contracts.placement import needs
from contracts.scorer_roles import CHECKPOINTS, scoring_models

# Where configurations say how many there are. As vLLM reads them (transformers_utils/model_arch_config_convertor.py): the
# least counts, and Cohere's own key before all.
POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "max_seq_length",
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
    rope = getattr(model, "rope_parameters", None) or {}
    factor = 1.0
    for layers in [rope] if "rope_type" in rope else rope.values():  # one for all layers, or one for each kind of them
        if isinstance(layers, dict) and layers.get("rope_type") not in SCALED and "gemma3" not in model.model_type:
            factor = layers.get("factor") or factor
    return int(known[key] * factor), key


def steady_positions(model: Any) -> tuple[int, str] | None:
    """Up to where RoPE turns at the same speed in rows of any length; None where it always does.

    Beyond, transformers turns a row by the longest of its batch, and vLLM every row as if it were a long one
    (rotary_embedding/phi3_long_rope_scaled_rope.py): the two differ, and so does a row from itself in other company.
    """
    rope = getattr(model, "rope_parameters", None) or {}
    for layers in [rope] if "rope_type" in rope else rope.values():
        if isinstance(layers, dict) and layers.get("rope_type") in BY_LENGTH:
            original = layers.get("original_max_position_embeddings") or model.max_position_embeddings
            return int(original), f"original_max_position_embeddings of rope_type {layers['rope_type']}"
    return None


def too_long(config: TandemConfig, key: str, path: str, model: Any) -> list[str]:
    """What is longer than the model at `path` allows, which the configuration names at `key`; one text each.

    Args:
        model: its configuration, that of the text model.
    """
    known = [found for found in (positions(model), steady_positions(model)) if found]
    if not known:
        return []
    found = min(known)
    rule = f"at most the {found[0]} positions of {path} ({found[1]})"
    return [
        Check(False, what, rule, length, f"{what}={found[0]} or less" if " " not in what else "less of them").message
        for what, length in _lengths(config, key)
        if length > found[0]
    ]


def _lengths(config: TandemConfig, key: str) -> Iterator[tuple[str, int]]:
    """The longest sequences that the model at `key` sees, by what says so."""
    samples = needs(config)[0].count > 0
    if samples and key not in CHECKPOINTS:
        yield "engine.max_model_len", config.engine.max_model_len
    if key == "model.path":
        limits = {key: None for reading in readings(config).values() for key in reading.limits}
        yield from ((key, attrgetter(key)(config)) for key in limits if key.endswith(".max_tokens"))
    scores = {given if getattr(config, given := f"{role}_model") else "model.path" for role in scoring_models(config)}
    if samples and key in scores:
        longest = max(config.ppo.sampling.max_completion_tokens, config.evaluate.sampling.max_completion_tokens)
        what = "data.max_prompt_tokens + max_completion_tokens + 1 (scoring appends an EOS)"
        yield what, config.data.max_prompt_tokens + longest + 1
