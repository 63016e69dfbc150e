"""What the reward service's answers say beside the scores themselves."""

import numpy as np

from contracts.records import Rollout


def score_metrics(rollouts: list[Rollout], scorer: str = "proxy") -> dict[str, float]:
    """Disagreement of an ensemble's parts, where the scorer is one; versions that scored (1: one scale), where known."""
    scores = [rollout.scores[scorer] for rollout in rollouts if scorer in rollout.scores]
    spreads = [s.spread for s in scores if s.spread is not None]
    versions = {s.version for s in scores if s.version is not None}
    metrics = {"reward/versions": float(len(versions))} if versions else {}
    if spreads:
        metrics |= {"reward/spread_mean": float(np.mean(spreads)), "reward/spread_max": float(np.max(spreads))}
    return metrics
