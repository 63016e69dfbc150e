"""Shared memory that one process writes and others of the same node read in place, and the layout of weights in it.

A segment is an anonymous file: it has no name that somebody must clean up, and the kernel frees it with the last process
that uses it, however that process ends. Readers open it through the writer's entry in /proc and hold a shared lock while
they read; the writer takes the exclusive lock or leaves the segment alone. The lock of a process that dies is released by
the kernel, so a reader can be late, but it can neither read a mixture nor block the writer for good.

    | token, version | payload ...          a version of -1: being written, or never finished
"""

import fcntl
import math
import mmap
import os
import struct
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from contracts.weights import Parameters, SegmentAddress

NAME = "tandem-weights"
HEADER = struct.Struct("<16sq")
VERSION, VERSION_OFFSET = struct.Struct("<q"), 16
PAYLOAD_OFFSET = 64  # bytes; the payload keeps the alignment of `layout`
NO_VERSION = -1
ALIGNMENT = 64  # bytes; views of any dtype need their start aligned to it


class Unreachable(Exception):
    """No such segment can be read from here: its writer is on another node, in another container, or has ended."""


class Superseded(Exception):
    """The segment has, or is about to have, another version than the wanted one."""


class Segment:
    """The writer's side."""

    def __init__(self, payload_bytes: int):
        self._token = uuid.uuid4().bytes
        self._file = os.memfd_create(NAME)
        os.ftruncate(self._file, PAYLOAD_OFFSET + payload_bytes)
        self._map = mmap.mmap(self._file, PAYLOAD_OFFSET + payload_bytes)
        HEADER.pack_into(self._map, 0, self._token, NO_VERSION)
        self.payload = np.frombuffer(self._map, dtype=np.uint8)[PAYLOAD_OFFSET:]  # uint8 [payload_bytes], writable
        self.address = SegmentAddress(os.getpid(), self._file, self._token, payload_bytes)

    def begin(self) -> bool:
        """Make the segment unreadable, to be written; false where somebody reads it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self._stamp(NO_VERSION)
        return True

    def commit(self, version: int) -> None:
        """Let others read what was written since `begin`."""
        self._stamp(version)
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give it up. Who maps it keeps its memory; nobody else finds it any more."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.close()

    def _stamp(self, version: int) -> None:
        """The token is written once: who opens the segment reads it without the lock."""
        VERSION.pack_into(self._map, VERSION_OFFSET, version)


class SegmentReader:
    """A reader's mapping of one segment.

    Raises:
        Unreachable: where `address` leads to nothing, or to something else.
    """

    def __init__(self, address: SegmentAddress):
        path = f"/proc/{address.pid}/fd/{address.descriptor}"
        try:
            # Asked first, because opening whatever else may be there could block.
            if not os.readlink(path).startswith(f"/memfd:{NAME}"):
                raise Unreachable(f"{path} is not a segment of weights")
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise Unreachable(f"{path}: {error.strerror}") from error
        size = PAYLOAD_OFFSET + address.payload_bytes
        try:
            if os.fstat(self._file).st_size != size:
                raise Unreachable(f"{path} has another size")
            self._map = mmap.mmap(self._file, size, prot=mmap.PROT_READ)
            if HEADER.unpack_from(self._map)[0] != address.token:
                raise Unreachable(f"{path} is another segment")
        except BaseException:
            os.close(self._file)
            raise
        self._payload = np.frombuffer(self._map, dtype=np.uint8)[PAYLOAD_OFFSET:]

    @contextmanager
    def read(self, version: int) -> Iterator[np.ndarray]:
        """The payload of `version`, uint8 and read-only, which stays as it is inside the `with` block.

        Raises:
            Superseded: where the segment has another version.
        """
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Superseded(f"version {version} is being replaced") from error
        try:
            found = HEADER.unpack_from(self._map)[1]
            if found != version:
                raise Superseded(f"version {version} has been replaced by {found}")
            yield self._payload
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """The memory goes with the last view into it."""
        os.close(self._file)


def reachable(address: SegmentAddress) -> bool:
    """Whether this process can read the segment."""
    try:
        SegmentReader(address).close()
    except Unreachable:
        return False
    return True


# ---- what lies in it: sender and receiver of a weight transfer agree on this


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


def pack(tensors: Mapping[str, torch.Tensor]) -> tuple[Parameters, torch.Tensor]:
    """(layout, uint8 buffer) of tensors by name, as a sender makes them."""
    parameters = tuple((name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items())
    slots, size = layout(parameters)
    buffer = torch.zeros(size, dtype=torch.uint8)
    for slot in slots:
        view(buffer, slot).copy_(tensors[slot.name])
    return parameters, buffer
