"""Golden scores: what a checkpoint's own training run said of a few texts, which a served copy must reproduce.

They catch what loads without an error and scores wrongly: another tokenizer's ids, a lost normaliser, a head that was not
loaded, the wrong token read. The file lies beside the weights and is written by `stage=reward_model`.
"""

import json
import math
from collections.abc import Callable

from contracts.records import Score
from contracts.scoring import GOLDEN_FILE
from reward_service.versions import local_checkpoint

WARM_UP = (1, 2, 3)  # token ids that every vocabulary has


def check_golden(path: str, score: Callable[[list[list[int]]], list[Score]], tolerance: float) -> None:
    """Warm up, and compare with the golden scores of the checkpoint at `path` where it has some.

    Raises:
        RuntimeError: where an item has no score, or the mean deviation is above `tolerance` (score units).
    """
    file = local_checkpoint(path) / GOLDEN_FILE
    rows = json.loads(file.read_text()) if file.exists() else []
    scores = score([row["token_ids"] for row in rows] or [list(WARM_UP)])
    failed = [s.error for s in scores if s.value is None and s.code != "too_long"]
    if failed:
        raise RuntimeError(f"{path}: no score for a first batch: {failed[0]}")
    gaps = [abs(s.value - row["score"]) for s, row in zip(scores, rows, strict=bool(rows)) if s.value is not None]
    if gaps and math.fsum(gaps) / len(gaps) > tolerance:
        raise RuntimeError(
            f"{path}: {GOLDEN_FILE} is missed by {math.fsum(gaps) / len(gaps):.3f} on average "
            f"(reward_service.golden_tolerance allows {tolerance}): this is not the model that was trained"
        )
