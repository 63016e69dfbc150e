"""Files and directories that a crash leaves whole or not at all.

A file is written, hashed and fsynced in one pass, so that what is recorded is what was meant, not what the disk gave back.
A directory is filled under another name and renamed when everything in it is durable.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

CHUNK_BYTES = 8 << 20


class FileRecord(NamedTuple):
    """What a manifest says of a file."""

    size: int  # bytes
    sha256: str


class RawTensor(NamedTuple):
    """A tensor as a file holds it, of whatever library."""

    dtype: str  # as in safetensors: F32, BF16, I64, U8 ...
    shape: tuple[int, ...]
    data: memoryview  # bytes, C order


def write_chunks(path: Path, chunks: Iterator[bytes | memoryview]) -> FileRecord:
    """Write a new file, hash it on the way, fsync it. Raises OSError where the disk has no room or the file exists."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as file:
        for chunk in chunks:
            view = memoryview(chunk)
            for start in range(0, len(view), CHUNK_BYTES):
                part = view[start : start + CHUNK_BYTES]
                digest.update(part)
                size += len(part)
                while part:  # an unbuffered write may take less than it was given
                    part = part[file.write(part) :]
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def write_json(path: Path, value: Any) -> FileRecord:
    """NaN and infinity are refused (ValueError): readers of other languages could not take them."""
    return write_chunks(path, iter([json.dumps(value, allow_nan=False, separators=(",", ":")).encode()]))


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
    return write_chunks(path, iter([len(text).to_bytes(8, "little"), text, *(t.data for t in tensors.values())]))


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
    return (
        None
        if found == expected.sha256
        else f"{path.name} has SHA-256 {found[:12]}… instead of {expected.sha256[:12]}…"
    )


def replace_text(path: Path, text: str) -> None:
    """Write a small file that others read meanwhile: they see the old one, the new one or none. It is not fsynced."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
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
