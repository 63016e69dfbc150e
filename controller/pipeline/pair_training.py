"""What the stages that learn from comparisons of texts share: their steps, and the accuracy on held-out preferences."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from common import statistics
from contracts.config import EvaluateConfig, TandemConfig
from contracts.records import ExamplePair, PreferencePair, RatedExample, RatedText

if TYPE_CHECKING:
    from controller.pipeline.context import StageContext

T = TypeVar("T")
Comparison = RatedText | RatedExample | PreferencePair | ExamplePair
CHUNK = 256  # texts a call, so that progress and deadlines stay fine-grained


def chunks(items: Sequence[T], ranks: int) -> list[Sequence[T]]:
    """In order, each with an item for every rank where there are so many."""
    starts = list(range(0, len(items), CHUNK))
    if len(starts) > 1 and len(items) - starts[-1] < ranks:
        starts.pop()
    return [items[a:b] for a, b in zip(starts, [*starts[1:], len(items)], strict=True)]


def lone_texts(stage: str, batch_size: int, sources: Iterable[Sequence[Any]]) -> list[str]:
    """Why no step has a pair: of rated texts all pairs within a batch count, and one alone has none."""
    is_rated = any(isinstance(items[0], RatedText | RatedExample) for items in sources if items)
    if batch_size > 1 or not is_rated:
        return []
    return [f"{stage}.batch_size must be at least 2 with rated texts, of which a step compares all; found {batch_size}"]


def few_held_out(stage: str, least: int, items: Sequence[Comparison]) -> list[str]:
    """Why `accuracy` would have too little to tell, which only shows when all is trained: fewer pairs than `least` that are
    no ties, or rated texts of which none is better than another."""
    if ratings := _mean_ratings(items):
        usable = len(ratings) if len(ratings) == 1 or len({*ratings}) > 1 else 0
    else:
        usable = len(_decided(items))
    if usable >= least:
        return []
    ties = ", where ties do not count" if usable < len(items) else ""
    return [f"data.test must have at least {least} usable rows for {stage}; found {usable}{ties}"]


def train_on_pairs(context: "StageContext", group: Any, title: str) -> None:
    """All steps of a task that compares texts; every 20 steps a line with the means."""
    steps, kind = group.call("num_steps")[0], context.result.split("/")[0]
    recent: list[dict[str, float]] = []
    for step in range(steps):
        metrics = group.call("step", step)[0]
        context.log_step(step + 1, metrics)
        recent.append(metrics)
        if step == steps - 1 or step % 20 == 19:
            loss, speed = (np.mean([m[k] for m in recent]) for k in (f"{kind}/loss", "perf/train_tokens_per_s"))
            decided = [m[f"{kind}/accuracy"] for m in recent if not np.isnan(m[f"{kind}/accuracy"])]  # NaN: ties alone
            right = f"{np.mean(decided):.1%}" if decided else "none to tell"
            recent = []
            context.progress.line(
                f"  {title} step {step + 1}/{steps} | loss {loss:.3f} | pairs right {right} | {speed:.0f} tok/s"
            )


def interval_inputs(config: TandemConfig) -> dict[str, Any]:
    """What the intervals of `accuracy` depend on beside data and seed; nothing where it is the default, as a new key would
    set the stages of before aside."""
    samples = config.evaluate.bootstrap_samples
    return {"bootstrap_samples": samples} if samples != EvaluateConfig().bootstrap_samples else {}


def accuracy(
    config: TandemConfig,
    items: Sequence[Comparison],
    score: Callable[[list[int]], list[float]],
    count: int,
) -> dict[str, float]:
    """Held-out pairs on which the higher score goes to the text that people rated higher, with 95% intervals over texts, or
    over the prompts of pairs.

    Args:
        items: all rated texts, or all pairs, of which ties do not count.
        score: of texts by their number; the texts of pair i are 2 i and 2 i + 1.
        count: pairs to draw of rated texts.
    """
    options = {"samples": config.evaluate.bootstrap_samples, "seed": config.seed}
    ratings = _mean_ratings(items)
    if ratings:
        scores = score(list(range(len(ratings))))
        pairs = statistics.random_pairs(ratings, count, config.seed)
        found = statistics.pair_accuracy(scores, ratings, pairs, **options)
        return found.row("accuracy") | {"pairs": len(pairs), "texts": len(scores)}
    sides = [item for item in items if isinstance(item, PreferencePair | ExamplePair)]
    chosen = [2 * i for i in _decided(items)]
    prompts = prompts_of([_tokens(sides[i // 2]) for i in chosen])
    wins = _win_rate(score(chosen), score([i + 1 for i in chosen]), prompts, **options)
    return wins.row("accuracy") | {"pairs": len(chosen)}


def _mean_ratings(items: Sequence[Comparison]) -> list[float]:
    return [float(np.mean(item.ratings)) for item in items if isinstance(item, RatedText | RatedExample)]


def _decided(items: Sequence[Comparison]) -> list[int]:
    """The pairs that are no ties, by number."""
    return [
        i for i, item in enumerate(items) if isinstance(item, PreferencePair | ExamplePair) and item.preference != 0.5
    ]


def _tokens(pair: PreferencePair | ExamplePair) -> tuple[list[int], list[int]]:
    if isinstance(pair, PreferencePair):
        return pair.chosen_ids, pair.rejected_ids
    return pair.chosen.token_ids, pair.rejected.token_ids


def prompts_of(pairs: Sequence[tuple[list[int], list[int]]]) -> list[int]:
    """A number for the prompt of each pair, as far as tokens tell: what both sides begin with, and answers may go on to
    begin alike. What all pairs begin with, a BOS or the head of a chat template, is no prompt: pairs that have no more in
    common are each of their own."""
    starts = [_common([tuple(side) for side in sides]) for sides in pairs]
    of_all, numbers, prompt = _common(starts), dict[tuple[int, ...], int](), None
    for new, start in enumerate(sorted({*starts} - {of_all}), len(starts)):  # a prompt, then those that begin with it
        if prompt is None or start[: len(prompt)] != prompt:
            prompt, number = start, new
        numbers[start] = number
    return [numbers.get(start, own) for own, start in enumerate(starts)]


def _common(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all of them begin with."""
    if not rows:
        return ()
    first, last = min(rows), max(rows)  # in between lies nothing that differs earlier
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:shared]


def _win_rate(
    a: Sequence[float], b: Sequence[float], prompts: Sequence[int], samples: int, seed: int
) -> statistics.Interval:
    """As `statistics.win_rate`, where several pairs may be of one prompt."""
    if len(set(prompts)) == len(prompts):
        return statistics.win_rate(a, b, samples, seed)
    first, second = np.asarray(a), np.asarray(b)
    right = (first > second) + 0.5 * (first == second)
    return statistics.bootstrap_group_mean(right, prompts, samples, seed, bounds=(0, 1))
