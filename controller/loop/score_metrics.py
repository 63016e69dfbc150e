"""What the texts of an update and the reward service's answers say, as metrics and as rows for people to read."""

from typing import Any

import numpy as np

from common.statistics import distinct_n, repeat_fraction, spread
from contracts.records import Rollout


def rollout_metrics(rollouts: list[Rollout]) -> dict[str, float]:
    """Metrics of rollouts that all have a score of the proxy."""
    values = [s for r in rollouts if (s := r.scores["proxy"].value) is not None]
    gold = [g.value for r in rollouts if (g := r.scores.get("gold")) and g.value is not None]
    tokens = [r.completion.sampled_ids.tolist() for r in rollouts]
    lengths = [len(ids) for ids in tokens]
    metrics = {
        "reward/score_mean": float(np.mean(values)),
        "reward/score_std": spread(values),
        "completion/len_mean": float(np.mean(lengths)),
        "completion/len_p95": float(np.percentile(lengths, 95)),
        "completion/eos_frac": float(np.mean([r.completion.finish_reason == "stop" for r in rollouts])),
        "completion/distinct_2": distinct_n(tokens, 2),
        "completion/repeat_frac": float(np.mean([repeat_fraction(t, 4) for t in tokens])),
    }
    metrics["completion/truncated_frac"] = 1 - metrics["completion/eos_frac"]
    if gold:
        metrics["reward/gold_mean"] = float(np.mean(gold))
    return metrics | score_metrics(rollouts) | part_metrics(rollouts)


def score_metrics(rollouts: list[Rollout], scorer: str = "proxy") -> dict[str, float]:
    """Disagreement of an ensemble's parts, where the scorer is one; versions that scored (1: one scale), where known."""
    scores = [rollout.scores[scorer] for rollout in rollouts if scorer in rollout.scores]
    spreads = [s.spread for s in scores if s.spread is not None]
    versions = {s.version for s in scores if s.version is not None}
    metrics = {"reward/versions": float(len(versions))} if versions else {}
    if spreads:
        metrics |= {"reward/spread_mean": float(np.mean(spreads)), "reward/spread_max": float(np.max(spreads))}
    return metrics


def part_metrics(rollouts: list[Rollout]) -> dict[str, float]:
    """Of every scorer that says what its scores are made of, the mean of each part over the rollouts that have it."""
    parts: dict[tuple[str, str], list[float]] = {}
    for rollout in rollouts:
        for scorer, score in rollout.scores.items():
            for name, value in (score.parts or {}).items():
                parts.setdefault((scorer, name), []).append(value)
    return {f"score/{scorer}/{name}": float(np.mean(values)) for (scorer, name), values in parts.items()}


def sample_row(rollout: Rollout, version: int) -> dict[str, Any]:
    """A line of `samples.jsonl`."""
    completion = rollout.completion
    row = {"stage": "ppo", "step": version, "prompt_id": rollout.prompt.prompt_id, "prompt": rollout.prompt.text}
    row |= {"completion": completion.text, "tokens": len(completion.sampled_ids)}
    row |= {name: score.value for name, score in rollout.scores.items()}
    return row | {"eos": completion.finish_reason == "stop"} | rollout.shown_fields
