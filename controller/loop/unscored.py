"""Rollouts without a score, and what a fault that stops a run leaves: its rollouts, readable by their owner alone."""

import json
import math
import os
from pathlib import Path
from typing import Any

from contracts.records import Rollout


class ScoreError(RuntimeError):
    """Too many rollouts came back without a score."""


def scored(rollouts: list[Rollout], max_failed: float, policy_version: int, run_dir: Path) -> list[Rollout]:
    """Those with a score.

    Args:
        max_failed: share of the others above which they are too many.

    Raises:
        ScoreError: they are too many, or all; their texts are in a file.
    """
    failed = [r for r in rollouts if r.scores["proxy"].value is None]
    if len(failed) > max_failed * len(rollouts) or len(failed) == len(rollouts):
        reasons = sorted({str(r.scores["proxy"].error) for r in failed})
        raise ScoreError(
            f"{len(failed)} of {len(rollouts)} rollouts of version {policy_version} have no score "
            f"(ppo.max_failed_scores allows {max_failed:.0%}), listed in "
            f"{save_rollouts(run_dir / 'unscored.jsonl', failed)}; reasons: {reasons[:3]}"
        )
    return [r for r in rollouts if r.scores["proxy"].value is not None]


def save_rollouts(path: Path, rollouts: list[Rollout]) -> Path:
    """Write one JSON line a rollout: key, texts, tokens, log-probabilities and scores. What is not finite becomes a text,
    half a character a question mark: the fault that is told here shall not be hidden by another."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
        for rollout in rollouts:
            file.write(json.dumps(_row(rollout), ensure_ascii=False, allow_nan=False) + "\n")
    return path


def _row(rollout: Rollout) -> dict[str, Any]:
    completion = rollout.completion
    scores = {name: {"value": _plain(s.value), "error": s.error} for name, s in rollout.scores.items()}
    return {
        "key": rollout.key,
        "prompt": rollout.prompt.text,
        **({"row": rollout.prompt.columns} if rollout.prompt.row else {}),
        "completion": completion.text,
        "prompt_ids": rollout.prompt.token_ids,
        "token_ids": completion.token_ids.tolist(),
        "behavior_logprobs": [_plain(p) for p in completion.behavior_logprobs.tolist()],
        "policy_versions": completion.policy_versions.tolist(),
        "scores": scores,
        "fault": rollout.fault,
    }


def _plain(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
