"""The scoring input: one form for the reward model's training data, the reward service and the learner. And the reasons
why an item has no score."""

import json
from pathlib import Path

# Worth another try: nothing is known against the item itself. All other codes (too_long, empty, out_of_vocabulary,
# non_finite, wrong_count, wrong_type, missing_column, bad_row, not_applicable, poison, unreadable) are final.
RETRYABLE = frozenset({"timeout", "overloaded", "unavailable"})
NOT_APPLICABLE = "not_applicable"  # the scorer has no score for this item, and says so
GOLDEN_FILE = "golden.json"  # beside a reward model's weights: texts, and what its training run scored them


def scoring_ids(token_ids: list[int], eos_token_id: int, *other_ends: int) -> list[int]:
    """`token_ids` with exactly one EOS at the end, whether the sampled completion ended with none, one or several, or with
    another of the tokens that end one (`common.text.end_tokens`): the EOS is what reward models know.

    The EOS is for scoring only: it is never appended to what trains the policy. An EOS further inside stays.
    """
    end = len(token_ids)
    while end and token_ids[end - 1] in (eos_token_id, *other_ends):
        end -= 1
    return [*token_ids[:end], eos_token_id]


def write_golden(folder: str, texts: list[list[int]], scores: list[float]) -> None:
    """Leave golden scores in a checkpoint for those who serve it."""
    rows = [{"token_ids": list(ids), "score": score} for ids, score in zip(texts, scores, strict=True)]
    (Path(folder) / GOLDEN_FILE).write_text(json.dumps(rows) + "\n")
