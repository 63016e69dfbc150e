"""Judged answers of models that runs have in common, base and SFT: the members of a sweep sample and judge them once.

    cache_dir/answers/<hash of all that decides them>.json

Seeds are of prompts, so that what is kept is what would be sampled again, but for the last bits of log-probabilities.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from common.files.durable import replace_text
from common.files.fingerprints import json_digest
from common.files.portable_records import ArrayStore, decode, encode
from common.strict_json import json_text
from controller.evaluation.judging import Judged

FOLDER, FORMAT = "answers", 1


class KeptAnswers:
    """`decided_by` is what decides the answers beside the model: JSON."""

    def __init__(self, cache_dir: str, decided_by: dict[str, Any]):
        self.folder, self._decided_by = Path(cache_dir) / FOLDER, decided_by

    def _path(self, model: str) -> Path:
        return self.folder / f"{json_digest([FORMAT, model, self._decided_by])[:24]}.json"

    def find(self, model: str) -> Judged | None:
        """Of the model with this fingerprint; None where nothing is kept that can be read."""
        try:
            found = json.loads(self._path(model).read_text())
            arrays = {name: np.array(values, dtype=name) for name, values in found["arrays"].items()}
            return Judged(**decode(found["judged"], arrays))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None

    def keep(self, model: str, judged: Judged) -> None:
        store, parts = (
            ArrayStore(),
            {"rollouts": judged.rollouts, "log_ratio": judged.log_ratio, "others": judged.others},
        )
        encoded = encode(parts, store)
        arrays = {name: values.tolist() for name, values in store.arrays().items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self._path(model), json_text({"judged": encoded, "arrays": arrays}))
