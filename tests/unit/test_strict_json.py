"""What is not known is null."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from common.strict_json import json_text, known


def strict(path: Path) -> Any:
    """The content of a file, as a reader takes it that knows JSON alone."""

    def refused(word: str) -> None:
        raise AssertionError(f"{path.name} holds {word}")

    return json.loads(path.read_text(), parse_constant=refused)


def test_numbers_that_are_not_finite_are_null_at_any_depth() -> None:
    given = {"a": [1, math.nan, (math.inf, "NaN", None, True)], "b": {"c": -math.inf, "d": np.float64("nan")}, "e": 0.5}
    assert known(given) == {"a": [1, None, [None, "NaN", None, True]], "b": {"c": None, "d": None}, "e": 0.5}
    assert json_text(given["b"]) == '{"c": null, "d": null}'
