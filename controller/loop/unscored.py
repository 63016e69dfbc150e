"""What a fault that stops a run leaves beside its logs: the rollouts that it is about, readable by their owner alone."""

import json
import math
import os
from pathlib import Path
from typing import Any

from contracts.records import Rollout


def save_rollouts(path: Path, rollouts: list[Rollout]) -> Path:
    """Write one JSON line a rollout: key, texts, tokens, log-probabilities and scores. What is not finite becomes a text."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        for rollout in rollouts:
            file.write(json.dumps(_row(rollout), ensure_ascii=False, allow_nan=False) + "\n")
    return path


def _row(rollout: Rollout) -> dict[str, Any]:
    completion = rollout.completion
    scores = {name: {"value": _plain(s.value), "error": s.error} for name, s in rollout.scores.items()}
    return {
        "key": rollout.key,
        "prompt": rollout.prompt.text,
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
