"""The layout of a packed weight buffer: what sender and receiver of a weight transfer must agree on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

ALIGNMENT = 64  # bytes; views of any dtype need their start aligned to it


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in the buffer."""

    name: str
    dtype: str  # as in torch, e.g. "bfloat16"
    shape: tuple[int, ...]
    offset: int  # bytes
    nbytes: int


def layout(parameters: Sequence[tuple[str, str, Sequence[int]]]) -> tuple[list[Slot], int]:
    """Slots for (name, dtype, shape) in order, and the size of the buffer in bytes."""
    slots, size = [], 0
    for name, dtype, shape in parameters:
        nbytes = math.prod(shape) * getattr(torch, dtype).itemsize
        slots.append(Slot(name, dtype, tuple(shape), size, nbytes))
        size += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return slots, size


def view(buffer: torch.Tensor, slot: Slot) -> torch.Tensor:
    """The parameter of `slot` as a view into the uint8 `buffer`."""
    return buffer[slot.offset : slot.offset + slot.nbytes].view(getattr(torch, slot.dtype)).view(slot.shape)
