"""Nested configurations as flat ones."""

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any


def flat(inputs: Any, prefix: str = "", keeps_empty: bool = True) -> dict[str, Any]:
    """Nested configuration as {"ppo.clip": 0.2, ...}, with values as JSON has them. An empty section is a value, or nothing
    where not `keeps_empty`."""
    if is_dataclass(inputs) and not isinstance(inputs, type):
        inputs = asdict(inputs)
    if not isinstance(inputs, Mapping) or (prefix and not inputs and keeps_empty):
        return {prefix: json.loads(json.dumps(inputs, default=str))}
    result: dict[str, Any] = {}
    for name, value in inputs.items():
        result |= flat(value, f"{prefix}.{name}" if prefix else str(name), keeps_empty)
    return result
