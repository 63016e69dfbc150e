"""Records as JSON and a few flat arrays, so that a checkpoint needs no pickle.

Arrays of one dtype lie one behind the other in a single array: thousands of rollouts make a handful of tensors in a file.
"""

from collections import defaultdict
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from contracts import records


class ArrayStore:
    """Collects arrays while values are encoded; `arrays()` has one flat array a dtype."""

    def __init__(self) -> None:
        self._parts: dict[str, list[np.ndarray]] = defaultdict(list)
        self._sizes: dict[str, int] = defaultdict(int)

    def add(self, array: np.ndarray) -> dict[str, Any]:
        name, start = array.dtype.name, self._sizes[array.dtype.name]
        self._parts[name].append(array.ravel())
        self._sizes[name] += array.size
        return {"array": [name, start, list(array.shape)]}

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(parts) for name, parts in self._parts.items()}


def encode(value: Any, store: ArrayStore) -> Any:
    """`value` as JSON can hold it. Raises TypeError for what is no plain value, array or record of contracts.records."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, np.ndarray):
        return store.add(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list):
        return [encode(item, store) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item, store) for item in value]}
    if isinstance(value, dict):
        return {"dict": {str(name): encode(item, store) for name, item in value.items()}}
    if is_dataclass(value) and type(value).__module__ == records.__name__:
        parts = {field.name: encode(getattr(value, field.name), store) for field in fields(value)}
        return {"record": type(value).__name__, **parts}
    raise TypeError(f"{type(value).__name__} has no portable form: use plain values, arrays and records")


def decode(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """What `encode` was given."""
    if isinstance(value, list):
        return [decode(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        name, start, shape = value["array"]
        size = int(np.prod(shape))
        return arrays[name][start : start + size].reshape(shape) if size else np.zeros(shape, dtype=name)
    if "tuple" in value:
        return tuple(decode(item, arrays) for item in value["tuple"])
    if "dict" in value:
        return {name: decode(item, arrays) for name, item in value["dict"].items()}
    record = getattr(records, value["record"])
    return record(**{name: decode(item, arrays) for name, item in value.items() if name != "record"})
