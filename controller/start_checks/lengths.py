"""Sequences of more tokens than a model has positions: its tables end there, or it has never seen their like."""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from common.models.positions import longest_row
from contracts.checks.check import Check
from contracts.config import TandemConfig
from contracts.methods import readings, runs
from contracts.placement import needs
from contracts.scorer_roles import CHECKPOINTS, scoring_models, value_model_key


def too_long(config: TandemConfig, key: str, path: str, model: Any) -> list[str]:
    """What is longer than the model at `path` allows, which the configuration names at `key`; one text each.

    Args:
        model: its configuration, that of the text model.
    """
    found = longest_row(model)
    if found is None:
        return []
    rule = f"at most the {found[0]} positions of {path} ({found[1]})"
    return [
        Check(False, what, rule, length, f"{what}={found[0]} or less" if " " not in what else "less of them").message
        for what, length in _lengths(config, key)
        if length > found[0]
    ]


def _lengths(config: TandemConfig, key: str) -> Iterator[tuple[str, int]]:
    """The longest sequences that the model at `key` sees, by what says so."""
    samples = needs(config)[0].count > 0
    if samples and (key not in CHECKPOINTS or (runs(config, "ppo") and key == value_model_key(config))):
        yield "engine.max_model_len", config.engine.max_model_len
    if key == "model.path":
        limits = {key: None for reading in readings(config).values() for key in reading.limits}
        yield from ((key, attrgetter(key)(config)) for key in limits if key.endswith(".max_tokens"))
    scores = {given if getattr(config, given := f"{role}_model") else "model.path" for role in scoring_models(config)}
    if samples and key in scores:
        longest = max(config.ppo.sampling.max_completion_tokens, config.evaluate.sampling.max_completion_tokens)
        what = "data.max_prompt_tokens + max_completion_tokens + 1 (scoring appends an EOS)"
        yield what, config.data.max_prompt_tokens + longest + 1
