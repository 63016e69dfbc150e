"""Files and directories that a crash leaves whole or not at all.

A file is hashed from memory while it is written, so that what is recorded is what was meant, not what the disk gave back.
A directory is filled under another name and renamed when everything in it is durable.
"""

import errno
import fcntl
import hashlib
import json
import math
import mmap
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PIECE_BYTES = 4 << 20  # of a write


class FileRecord(NamedTuple):
    """What a manifest says of a file."""

    size: int  # bytes
    sha256: str


class RawTensor(NamedTuple):
    """A tensor as a file holds it, of whatever library."""

    dtype: str  # as in safetensors: F32, BF16, I64, U8 ...
    shape: tuple[int, ...]
    data: memoryview  # bytes, C order


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file and fsync it; a thread hashes it meanwhile. Raises OSError where the disk has no room or the file
    exists.

    Large files go past the page cache where the file system can (O_DIRECT): to copy gigabytes into it and out again takes
    more of a processor than to hash them, and those who train need it.
    """
    arrays = [np.frombuffer(chunk, np.uint8) for chunk in chunks if len(chunk)]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with ThreadPoolExecutor(1, "sha256") as pool:
            digest = pool.submit(_sha256, arrays)
            _write(descriptor, arrays)
            os.fsync(descriptor)
            return FileRecord(sum(array.size for array in arrays), digest.result())
    finally:
        os.close(descriptor)


def _sha256(arrays: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.data)
    return digest.hexdigest()


def _write(descriptor: int, arrays: list[np.ndarray]) -> None:
    piece, filled = np.frombuffer(mmap.mmap(-1, PIECE_BYTES), np.uint8), 0  # begins at a page, as O_DIRECT wants it
    _set_direct(descriptor, True)
    for array in arrays:
        while array.size:
            taken = array[: PIECE_BYTES - filled]
            piece[filled : filled + taken.size] = taken
            filled, array = filled + taken.size, array[taken.size :]
            if filled == PIECE_BYTES:
                _write_piece(descriptor, piece.data)
                filled = 0
    _write_piece(descriptor, piece[:filled].data)


def _write_piece(descriptor: int, piece: memoryview) -> None:
    while piece:  # a write may take less than it was given
        try:
            piece = piece[os.write(descriptor, piece) :]
        except OSError as error:
            # The end of a file, which fills no block of the disk; or a file system that wants larger ones.
            if error.errno != errno.EINVAL or not _set_direct(descriptor, False):
                raise


def _set_direct(descriptor: int, wanted: bool) -> bool:
    """Whether this changed anything; a file system without O_DIRECT refuses it."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if bool(flags & os.O_DIRECT) == wanted:
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags ^ os.O_DIRECT)
    except OSError:
        return False
    return True


def write_json(path: Path, value: Any) -> FileRecord:
    """NaN and infinity are refused (ValueError): readers of other languages could not take them."""
    return write_chunks(path, [json.dumps(value, allow_nan=False, separators=(",", ":")).encode()])


def write_tensors(path: Path, tensors: Mapping[str, RawTensor], metadata: Mapping[str, str]) -> FileRecord:
    """Write a safetensors file from memory that is read in place: nothing is copied, so that gigabytes cost no memory.

    Raises:
        ValueError: where the bytes of a tensor are not those of its shape (known only for whole-byte dtypes).
        OSError: as `write_chunks`.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        if math.prod(tensor.shape) and len(tensor.data) % math.prod(tensor.shape):
            raise ValueError(f"{name}: {len(tensor.data)} bytes are no tensor of shape {tensor.shape}")
        end = offset + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors aligned
    return write_chunks(path, [len(text).to_bytes(8, "little"), text, *(t.data for t in tensors.values())])


def record(path: Path) -> FileRecord:
    """Of a file that another library wrote; it is fsynced."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        os.fsync(file.fileno())
        return FileRecord(file.tell(), digest.hexdigest())


def problem(path: Path, expected: FileRecord, content: bool = True) -> str | None:
    """Why a file is not what its record says, or None. Without `content` the size alone is compared."""
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != expected.size:
        return f"{path.name} has {path.stat().st_size} bytes instead of {expected.size}"
    if not content:
        return None
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected.sha256:
        return f"{path.name} has SHA-256 {found[:12]}… instead of {expected.sha256[:12]}…"
    return None


def replace_text(path: Path, text: str) -> None:
    """Write a small file that others read meanwhile: they see the old one, the new one or none. It is not fsynced."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: the fsync of a file covers its content alone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Rename a directory whose files are durable, so that it exists whole or not at all, also after a power cut.

    Raises:
        FileExistsError: `final` exists; nothing is replaced.
    """
    if final.exists():
        raise FileExistsError(f"{final} exists")
    for folder, _, _ in os.walk(temporary):
        sync_directory(Path(folder))
    temporary.rename(final)
    sync_directory(final.parent)
