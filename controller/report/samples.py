"""Completions to read: of the judged models on the same prompt, and how they changed while PPO ran."""

import json
from typing import Any

from markupsafe import Markup

from controller.record.evaluation import judged_name, judged_title
from controller.record.number_text import number
from controller.record.reader import Run
from controller.report.curves import RUN

EACH = 2  # prompts shown for "best", "median" and "worst"


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A line of samples.jsonl with the columns of its row as texts, and empty tables in place of what it lacks or others
    have written there."""
    columns, parts = (row[name] if isinstance(row.get(name), dict) else {} for name in ("row", "parts"))
    texts = {name: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for name, v in columns.items()}
    return row | {"row": texts, "parts": {name: values for name, values in parts.items() if isinstance(values, dict)}}


def chosen(run: Run) -> tuple[list[tuple[str, float, dict[str, dict[str, Any]]]], int]:
    """[(why, gain, samples by model)] and the number of prompts chosen from.

    Sorted by the gold gain over SFT: the largest, those in the middle, the smallest. Where there are too few
    prompts for all three, each is shown once.
    """
    third = judged_name(run.evaluation)
    by_prompt: dict[Any, dict[str, dict[str, Any]]] = {}
    for row in map(_shown, run.samples):
        if row.get("stage") == "evaluate" and row.get("model"):
            by_prompt.setdefault(str(row.get("prompt_id")), {})[str(row["model"])] = row  # of two evaluations the later
    ranked = []
    for models in by_prompt.values():
        mine, sft = number(models.get(third, {}).get("gold")), number(models.get("sft", {}).get("gold"))
        if mine is not None and sft is not None:
            ranked.append((mine - sft, models))
    ranked.sort(key=lambda item: -item[0])
    middle = (len(ranked) - EACH) // 2
    places = [("largest gain", i) for i in range(EACH)]
    places += [("median gain", middle + i) for i in range(EACH)]
    places += [("smallest gain", len(ranked) - EACH + i) for i in range(EACH)]
    found: dict[int, str] = {}
    for why, i in places:
        if 0 <= i < len(ranked):
            found.setdefault(i, why)
    return [(why, *ranked[i]) for i, why in sorted(found.items())], len(ranked)


def side_by_side(run: Run) -> Markup:
    picks, total = chosen(run)
    title = judged_title(run.evaluation)
    models = (("base", "Base", "base"), ("sft", "SFT", "sft"), (judged_name(run.evaluation), title, "ppo"))
    return RUN.samples(picks, total, EACH, title, models)


def during_ppo(run: Run) -> Markup:
    by_version: dict[int, list[dict[str, Any]]] = {}
    for row in map(_shown, run.samples):
        step = number(row.get("step"))
        if row.get("stage") == "ppo" and step is not None:
            by_version.setdefault(int(step), []).append(row)
    versions = sorted(by_version)
    shown = sorted({versions[0], versions[len(versions) // 2], versions[-1]}) if versions else []
    return RUN.during(run.loop_title, [(version, by_version[version][:4]) for version in shown])
