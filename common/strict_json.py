"""JSON as every reader takes it: it has no NaN and no infinity, so that what is not known is null."""

import json
import math
from typing import Any


def known(value: Any) -> Any:
    """The value with None in place of each number in it that is not finite; tuples are lists then, as in JSON."""
    if isinstance(value, dict):
        return {name: known(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [known(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: Any, **options: Any) -> str:
    """`options` are those of `json.dumps`."""
    return json.dumps(known(value), allow_nan=False, **options)
