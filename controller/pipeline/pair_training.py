"""What the stages that learn from comparisons of texts share: their steps, and the accuracy on held-out preferences."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from common import statistics
from contracts.config import TandemConfig
from contracts.records import ExamplePair, PreferencePair, RatedExample, RatedText

if TYPE_CHECKING:
    from controller.pipeline.context import StageContext

T = TypeVar("T")
CHUNK = 256  # texts a call, so that progress and deadlines stay fine-grained


def chunks(items: Sequence[T], ranks: int) -> list[Sequence[T]]:
    """In order, each with an item for every rank where there are so many."""
    starts = list(range(0, len(items), CHUNK))
    if len(starts) > 1 and len(items) - starts[-1] < ranks:
        starts.pop()
    return [items[a:b] for a, b in zip(starts, [*starts[1:], len(items)], strict=True)]


def train_on_pairs(context: "StageContext", group: Any, title: str) -> None:
    """All steps of a task that compares texts; every 20 steps a line with the means."""
    steps, kind = group.call("num_steps")[0], context.result.split("/")[0]
    recent: list[dict[str, float]] = []
    for step in range(steps):
        metrics = group.call("step", step)[0]
        context.log_step(step + 1, metrics)
        recent.append(metrics)
        if step == steps - 1 or step % 20 == 19:
            means = {k: float(np.mean([m[k] for m in recent])) for k in metrics}
            recent = []
            context.progress.line(
                f"  {title} step {step + 1}/{steps} | loss {means[f'{kind}/loss']:.3f} | pairs right "
                f"{means[f'{kind}/accuracy']:.1%} | {means['perf/train_tokens_per_s']:.0f} tok/s"
            )


def accuracy(
    config: TandemConfig,
    items: Sequence[RatedText | RatedExample | PreferencePair | ExamplePair],
    score: Callable[[list[int]], list[float]],
    count: int,
) -> dict[str, float]:
    """Held-out pairs on which the higher score goes to the text that people rated higher, with 95% intervals.

    Args:
        items: all rated texts, or all pairs, of which ties do not count.
        score: of texts by their number; the texts of pair i are 2 i and 2 i + 1.
        count: pairs to draw of rated texts.
    """
    options = {"samples": config.evaluate.bootstrap_samples, "seed": config.seed}
    ratings = [float(np.mean(item.ratings)) for item in items if isinstance(item, RatedText | RatedExample)]
    if ratings:
        scores = score(list(range(len(ratings))))
        pairs = statistics.random_pairs(ratings, count, config.seed)
        found = statistics.pair_accuracy(scores, ratings, pairs, **options)
        return found.row("accuracy") | {"pairs": len(pairs), "texts": len(scores)}
    sides = [item for item in items if isinstance(item, PreferencePair | ExamplePair)]
    chosen = [2 * i for i, item in enumerate(sides) if item.preference != 0.5]
    wins = statistics.win_rate(score(chosen), score([i + 1 for i in chosen]), **options)
    return wins.row("accuracy") | {"pairs": len(chosen)}
