"""Nested configurations as flat ones."""

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any


def flat(inputs: Any, prefix: str = "") -> dict[str, Any]:
    """Nested configuration as {"ppo.clip": 0.2, ...}, with values as JSON has them. An empty section is a value."""
    if is_dataclass(inputs) and not isinstance(inputs, type):
        inputs = asdict(inputs)
    if not isinstance(inputs, Mapping) or (prefix and not inputs):
        return {prefix: json.loads(json.dumps(inputs, default=str))}
    result: dict[str, Any] = {}
    for name, value in inputs.items():
        result |= flat(value, f"{prefix}.{name}" if prefix else str(name))
    return result
