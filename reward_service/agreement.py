"""How far a scorer agrees with people: `python -m reward_service.agreement [key=value ...] --gold FILE.jsonl`.

A row of the file has a prompt with a completion and its `score`, or with a `chosen` and a `rejected` completion. Its other
columns are the item's row, and `label` its label. The scorer is one of the configuration's, loaded in this process: no Ray,
no service. docs/judges.md says what the numbers mean.

Exit codes: 0 measured, 1 nothing has a score, 2 configuration or file cannot be used.
"""

import argparse
import asyncio
import json
import math
import os
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import chain, permutations
from pathlib import Path
from typing import Any

from common.processes.cores import usable_cores
from common.processes.process_env import scorer_env

if __name__ == "__main__":  # what a replica's process has, before torch is imported
    os.environ.update({k: v for k, v in scorer_env(usable_cores(), on_cpu=True).items() if k not in os.environ})

import numpy as np

from common.error_text import error_lines
from common.statistics import Interval, bootstrap_group_mean, bootstrap_groups
from common.strict_json import json_text, known
from common.text.encoding import DataError, Turns, as_turns, encode_prompt, scored_ids
from common.text.tokenizers import load_tokenizer, pinned
from contracts.checks.validation import ConfigError
from contracts.config import RewardServiceConfig, ScorerConfig, TandemConfig
from contracts.records import Score, ScoringItem
from reward_service.__main__ import read_config, tokenizer_of
from reward_service.front import Front, FrontLimits
from reward_service.judging.scale import scale_of
from reward_service.resolve import ScorerError, resolve
from reward_service.scorer_kind import scorer_kind
from reward_service.service_metrics import Metrics

CALL_ITEMS = 64  # that share one deadline
FORMS = ({"prompt", "completion", "score"}, {"prompt", "chosen", "rejected"})


class GoldError(ValueError):
    """The file cannot be used, with the line and what is wrong there."""


@dataclass(frozen=True)
class Gold:
    """What people say. An item is one completion."""

    rows: list[dict[str, Any]]
    completions: list[tuple[int, str]]  # its row, and what is scored
    ratings: list[float] | None  # of each item; None: pairs
    pairs: list[tuple[int, int]]  # items, the better one first
    prompts: list[int]  # of each item: the number of its prompt, which is what was sampled independently


def read_gold(path: Path) -> Gold:
    """Raises GoldError; OSError where there is no such file."""
    rows, form = [], None
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found = next(keys for keys in FORMS if keys <= row.keys())
        except (ValueError, AttributeError, StopIteration):
            raise GoldError(f"line {number}: no object with {' or '.join(map(_named, FORMS))}") from None
        if form not in (None, found):
            raise GoldError(f"line {number}: it has {_named(found)}, the first line {_named(form or set())}")
        form, score = found, row.get("score")
        if form is FORMS[0] and not _is_number(score):
            raise GoldError(f"line {number}: score is no finite number")
        texts = [row[key] for key in ("completion", "chosen", "rejected") if key in form]
        if not all(isinstance(text, str) for text in texts) or not isinstance(row["prompt"], str | list):
            raise GoldError(f"line {number}: the prompt is a text or messages, completions are texts")
        rows.append(row)
    if not rows:
        raise GoldError("no row")
    numbers: dict[str, int] = {}
    prompts = [numbers.setdefault(_prompt(row), len(numbers)) for row in rows]
    if form is FORMS[1]:
        both = [(number, row[key]) for number, row in enumerate(rows) for key in ("chosen", "rejected")]
        pairs = [(2 * number, 2 * number + 1) for number in range(len(rows))]
        return Gold(rows, both, None, pairs, [prompt for prompt in prompts for _ in range(2)])
    ratings = [float(row["score"]) for row in rows]
    siblings = defaultdict[int, list[int]](list)
    for item, prompt in enumerate(prompts):
        siblings[prompt].append(item)
    pairs = [(i, j) for group in siblings.values() for i, j in permutations(group, 2) if ratings[i] > ratings[j]]
    return Gold(rows, [(number, row["completion"]) for number, row in enumerate(rows)], ratings, pairs, prompts)


def _prompt(row: dict[str, Any]) -> str:
    """What tells prompts apart: in chat `system` and `tools` are part of one."""
    return json.dumps([row["prompt"], row.get("system"), row.get("tools")], sort_keys=True)


def _is_number(score: Any) -> bool:
    return isinstance(score, int | float) and not isinstance(score, bool) and abs(score) < math.inf


def _named(keys: set[str]) -> str:
    return ", ".join(sorted(keys))


def make_items(gold: Gold, config: TandemConfig, tokenizer_path: str) -> list[ScoringItem]:
    """As rollouts are scored. Raises GoldError where a row cannot be shown."""
    tokenizer = load_tokenizer(tokenizer_path, config.model)
    items = []
    for number, completion in gold.completions:
        row = gold.rows[number]
        kept = {name: value for name, value in row.items() if name not in ("prompt", "completion", "score")}
        label = row.get("label")
        try:
            prompt, tools = _framed(row, config.data.chat)
            chat = config.data.chat or not isinstance(prompt, str)
            ids = scored_ids(tokenizer, prompt, completion, chat, tools)
            start = len(encode_prompt(tokenizer, prompt, chat, tools))
        except (DataError, LookupError, TypeError, ValueError) as fault:
            raise GoldError(f"row {number + 1}: {error_lines(fault)[0]}") from None
        turns = json.dumps(prompt, ensure_ascii=False) if isinstance(prompt, list) else None
        label = label if isinstance(label, str) else None
        items.append(ScoringItem(tuple(ids), start, label, json.dumps(kept), turns))
    return items


def _framed(row: dict[str, Any], in_chat: bool) -> tuple[str | Turns, list | None]:
    """The prompt of a row, with its `system` turn, and its `tools`: where a chat template shows them, as PPO's prompts
    have them (controller/data/row_formats.py)."""
    prompt = row["prompt"]
    if isinstance(prompt, str) and not (in_chat and prompt):
        return prompt, None
    turns = as_turns(prompt, "user")
    if row.get("system") and turns[0]["role"] != "system":
        prompt = [{"role": "system", "content": row["system"]}, *turns]
    tools = row.get("tools") or None
    return prompt, json.loads(tools) if isinstance(tools, str) else tools


def score_items(
    scorers: dict[str, ScorerConfig], service: RewardServiceConfig, tokenizer: str, name: str, items: list[ScoringItem]
) -> list[Score]:
    """By the service's own parts, without the processes between them. Raises ScorerError, and what a scorer raises."""
    specs = resolve(scorers, service, tokenizer)
    todo, needed = [specs[name]], {}
    while todo:
        spec = todo.pop()
        needed[spec.name] = spec
        todo += [specs[part] for part in spec.parts]
    made = {
        spec.application: scorer_kind(spec.entry.kind).make(spec.entry, service, tokenizer)
        for spec in needed.values()
        if spec.application
    }

    async def call(application: str, items: list[ScoringItem], deadline_s: float) -> list[Score]:
        return await made[application].score(items, deadline_s)

    async def go() -> list[Score]:
        limits = FrontLimits(CALL_ITEMS, 0, service.deadline_s, CALL_ITEMS)
        front, found = Front(needed, limits, call, Metrics()), list[Score]()
        for start in range(0, len(items), CALL_ITEMS):
            found += await front.score(needed[name], items[start : start + CALL_ITEMS])
        for scorer in made.values():
            await scorer.close()
        return found

    return asyncio.run(go())


def weighted_kappa(gold: list[int], found: list[int], categories: int) -> float:
    """Cohen's kappa with quadratic weights (Cohen 1968): 1 - sum_ij w_ij O_ij / sum_ij w_ij E_ij, w_ij = (i - j)^2, O the
    share of items with gold i and found j, E what independent raters with the same margins would have. NaN where there is
    no disagreement to expect.

    Args:
        gold, found: [items], numbers of ordered categories.
    """
    observed = np.zeros((categories, categories))
    np.add.at(observed, (gold, found), 1 / len(gold))
    numbers = np.arange(categories)
    weights = (numbers[:, None] - numbers[None, :]) ** 2
    chance = (weights * np.outer(observed.sum(axis=1), observed.sum(axis=0))).sum()
    return float(1 - (weights * observed).sum() / chance) if chance > 0 else float("nan")


def agreement(gold: Gold, scores: list[Score], scale: list[float] | None, samples: int, seed: int) -> dict[str, Any]:
    """Every measure with its interval, a bootstrap over prompts, of the items that have a score.

    Args:
        scale: what a pointwise judge's answers are worth, in order, for kappa; ratings beside it have none.
    """
    from scipy.stats import kendalltau, spearmanr

    value = [math.nan if score.value is None else score.value for score in scores]
    scored = [item for item, number in enumerate(value) if not math.isnan(number)]
    pairs = [(i, j) for i, j in gold.pairs if not math.isnan(value[i]) and not math.isnan(value[j])]
    right = np.array([0.5 * (1 + np.sign(value[i] - value[j])) for i, j in pairs])

    def measured(statistic: Any, groups: list[int]) -> Interval:
        return bootstrap_groups(statistic, groups, samples, seed)

    of_pairs = [gold.prompts[i] for i, _ in pairs]
    measures = {"pair_accuracy": bootstrap_group_mean(right, of_pairs, samples, seed, bounds=(0, 1))}
    if gold.ratings is not None:
        rated, found = np.array(gold.ratings)[scored], np.array(value)[scored]
        groups = [gold.prompts[i] for i in scored]
        measures["spearman"] = measured(lambda rows: spearmanr(rated[rows], found[rows]).statistic, groups)
        measures["kendall"] = measured(lambda rows: kendalltau(rated[rows], found[rows]).statistic, groups)
        if scale is not None and set(gold.ratings) <= set(scale):
            points = np.array(sorted(set(scale)))
            of_gold = np.searchsorted(points, rated)
            of_judge = np.abs(found[:, None] - points[None, :]).argmin(axis=1) if scored else np.array([], dtype=int)
            measures["kappa"] = measured(
                lambda rows: weighted_kappa(of_gold[rows].tolist(), of_judge[rows].tolist(), len(points)), groups
            )
    parts = [score.parts for score in scores if score.parts]
    return {
        "rows": len(gold.rows),
        "items": len(scores),
        "scored": len(scored),
        "without_score": dict(Counter(score.code for score in scores if score.value is None)),
        "pairs": len(pairs),
        **known({name: interval.as_dict() for name, interval in measures.items()}),
        "parts": {name: _mean([part[name] for part in parts if name in part]) for name in dict.fromkeys(chain(*parts))},
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _table(found: dict[str, Any]) -> str:
    lines = [f"{found['scorer']} ({found['version']}): {found['scored']} of {found['items']} items have a score"]
    lines += [f"  without one: {count} {code}" for code, count in found["without_score"].items()]
    for name in ("pair_accuracy", "spearman", "kendall", "kappa"):
        if name in found:
            mean, low, high = (f"{v:.3f}" if v is not None else "unknown" for v in found[name].values())
            of_pairs = f", {found['pairs']} pairs" if name == "pair_accuracy" else ""
            lines.append(f"  {name:<14} {mean} [{low}, {high}]{of_pairs}")
    lines += [f"  {name:<14} {mean:.3f}, the mean" for name, mean in found["parts"].items()]
    return "\n".join(lines)


def measure(overrides: list[str], gold_file: Path, name: str | None, samples: int, seed: int) -> dict[str, Any]:
    """Raises ConfigError, ScorerError, GoldError, OSError, and what a scorer raises where it cannot start."""
    config, scorers = read_config(overrides, serves=False)
    name = name or next(iter(scorers))
    if name not in scorers:
        raise ConfigError(f"--scorer must be one of {', '.join(scorers)}; found {name}")
    gold, tokenizer = read_gold(gold_file), tokenizer_of(config, scorers)
    items = make_items(gold, config, tokenizer)
    scores = score_items(scorers, config.reward_service, pinned(tokenizer, config.model), name, items)
    entry = scorers[name]
    has_scale = entry.kind == "judge" and entry.judge.mode == "pointwise"
    scale = sorted(scale_of(entry.judge).values) if has_scale else None
    return {"scorer": name, "version": scores[0].version, **agreement(gold, scores, scale, samples, seed)}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reward_service.agreement", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as train.py takes them")
    parser.add_argument(
        "--gold", type=Path, required=True, help="JSON lines: prompt with completion, score or chosen, rejected"
    )
    parser.add_argument("--scorer", help="a name of reward_service.scorers, proxy or gold; the first without")
    parser.add_argument("--samples", type=int, default=2000, help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    given = parser.parse_intermixed_args(arguments)
    try:
        found = measure(given.overrides, given.gold, given.scorer, given.samples, given.seed)
    except (ConfigError, ScorerError) as error:
        print(f"the scorer cannot be used:\n{error}", file=sys.stderr)
        return 2
    except (GoldError, OSError, ValueError) as error:
        print(
            f"--gold {given.gold}: {error}" if isinstance(error, GoldError | OSError) else str(error), file=sys.stderr
        )
        return 2
    print(json_text(found) if given.json else _table(found))
    return 0 if found["scored"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
