"""Held-out prompts that the actors answer between updates (`evaluate.every`): no rollouts, so nothing of them trains."""

import re

import numpy as np

from contracts.config import EvaluateConfig
from contracts.records import Prompt, Rollout, RolloutRequest
from controller.data.kept_columns import source_of
from controller.data.prompts import sampling_seed


class HeldOut:
    """The requests, the same each time, and what is said of their completions. Without state: it is due by the version."""

    def __init__(self, prompts: list[Prompt], config: EvaluateConfig):
        self.config = config
        # As the first completions of stage evaluate, with which the last weights are judged.
        self.requests = [RolloutRequest(0, 0, p, sampling_seed(config.seed, 0, p.prompt_id, 0)) for p in prompts]

    def is_due(self, version: int) -> bool:
        return self.config.every is not None and version % self.config.every == 0

    def metrics(self, rollouts: list[Rollout]) -> dict[str, float]:
        """Of the completions that have a score; nothing where none has."""
        known = [(r, value) for r in rollouts if (value := r.scores["proxy"].value) is not None]
        found = {"heldout/unscored": float(len(rollouts) - len(known))}
        if known:
            found["heldout/score_mean"] = float(np.mean([value for _, value in known]))
        if self.config.success is None or not known:
            return found
        by_source: dict[str, list[bool]] = {}
        for rollout, value in known:
            source = re.sub(r"[^\w.-]+", "_", source_of(rollout.prompt, self.config.by))
            by_source.setdefault(source, []).append(value >= self.config.success)
        found["heldout/accuracy"] = float(np.mean([is_right for row in by_source.values() for is_right in row]))
        if self.config.by is None:
            return found
        return found | {f"heldout/accuracy/{source}": float(np.mean(row)) for source, row in sorted(by_source.items())}
