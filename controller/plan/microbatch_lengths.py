"""The tokens of a stage's largest microbatches: from the data where it has been read, else from the keys that bound it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.microbatches import cut_microbatches
from contracts.config import TandemConfig
from contracts.records import ExamplePair, PreferencePair, RatedExample

DRAWS = 64  # batches that are looked at; the largest of them counts


@dataclass(frozen=True)
class Lengths:
    """Of the largest microbatch of a rank, and how many there are between two optimizer steps."""

    largest: tuple[int, ...]  # tokens of each sequence
    microbatches: int
    tokens: int  # of all of a rank's microbatches, between two optimizer steps
    sizes: int  # microbatches of the whole stage that have a number of tokens of their own
    certain: bool = False  # of texts that are there; else as long as they may get

    @property
    def sequences(self) -> int:
        return len(self.largest)


def item_lengths(item: Any) -> list[int]:
    """Tokens of each text of what a stage has read."""
    if isinstance(item, PreferencePair):
        return [len(item.chosen_ids), len(item.rejected_ids)]
    if isinstance(item, ExamplePair | RatedExample):
        return [len(text.token_ids) for text in item.texts]
    return [len(item.token_ids)]


def batch_lengths(
    config: TandemConfig, items: Sequence[Any], *, batch_size: int, steps: int, most: int, extra: int = 0
) -> Lengths:
    """Of batches of `batch_size` of `items`.

    Args:
        items: what has been read; empty: texts of `most` tokens.
        steps: of the stage, each with a batch.
        extra: tokens that are added to each text.
    """
    ranks, budget = config.cluster.num_learner_ranks, config.learner.microbatch_tokens
    rng, found = np.random.default_rng(config.seed), []
    batches = [[most] * max(batch_size, ranks)]
    if items:
        texts = [item_lengths(item) for item in items]
        order = np.concatenate([rng.permutation(len(texts)) for _ in range(-(-batch_size * 2 // len(texts)) or 1)])
        starts = range(0, max(1, len(order) - batch_size + 1), batch_size)
        batches = [[n + extra for i in order[s : s + batch_size] for n in texts[i]] for s in starts][:DRAWS]
    for lengths in batches:
        for cut in cut_microbatches(lengths, budget, ranks):
            parts = [tuple(lengths[i] for i in rows) for rows in cut]
            sizes = min(steps * len(parts), budget)
            tokens, certain = sum(map(sum, parts)), bool(items) and not extra
            found.append(Lengths(max(parts, key=sum), len(parts), tokens, sizes, certain))
    return max(found, key=lambda lengths: (sum(lengths.largest), lengths.tokens))
