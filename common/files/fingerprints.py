"""What a checkpoint is: a hash of all its content, one for whoever asks (stages, commits, scorers).

Two models may differ in their top layers alone, in the middle of a large file, so every byte counts. Files are hashed in
pieces side by side, and remembered by what the file system says of them, so that a checkpoint costs its reading once.
"""

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.files.checkpoint_files import adapter_base, checkpoint_files
from common.files.durable import replace_text

PIECE_BYTES, READ_BYTES = 32 << 20, 1 << 20
MEMORY = "fingerprints.json"  # in cache_dir
REMEMBERED = 4096  # files
# A file that was written this shortly ago may be written again without another time in its inode.
SETTLED_S = 2.0

_known: dict[str, str] = {}  # of this process: `_identity` -> SHA-256


def checkpoint_fingerprint(path: str, revision: str | None = None, memory: Path | None = None) -> str:
    """SHA-256 (hex) over names and contents of a checkpoint's files, or of a hub id with the commit that it stands for; of
    an adapter with that of its base. Golden scores, model cards and hidden files decide nothing and do not count.

    Args:
        revision: of a hub id.
        memory: a file that keeps the hashes of files for later processes; it may be missing or torn.

    Raises:
        OSError: there is no such checkpoint, here or on the hub.
        ValueError: `path` is no directory and no hub id, or a load would read files that are not of this directory.
    """
    root = Path(path)
    if not root.is_dir():
        return _sha256(f"{path}\0{_hub_commit(path, revision)}".encode())
    files = checkpoint_files(root)
    hashes = file_hashes(files, memory)
    content = "".join(f"{f.relative_to(root)}\0{h}\n" for f, h in zip(files, hashes, strict=True))
    if base := adapter_base(root):
        content += checkpoint_fingerprint(base, memory=memory)
    return _sha256(content.encode())


def file_hashes(files: list[Path], memory: Path | None = None) -> list[str]:
    """A SHA-256 (hex) of each file's content, by pieces of 32 MiB: not what `sha256sum` says. `memory` as above."""
    found = [_identity(file) for file in files]
    kept = _read(memory) if memory else {}
    _known.update({identity: kept[identity] for identity in found if identity in kept})
    new = [(file, identity) for file, identity in zip(files, found, strict=True) if identity not in _known]
    now, hashes = time.time(), dict[str, str]()
    with ThreadPoolExecutor(os.cpu_count() or 1, "sha256") as pool:
        # All pieces at once: a checkpoint may be one large file, or many.
        waiting = []
        for file, identity in new:
            starts = range(0, file.stat().st_size, PIECE_BYTES)
            waiting.append((file, identity, [pool.submit(_piece, file, start) for start in starts]))
        for file, identity, pieces in waiting:
            hashes[identity] = _sha256(b"".join(piece.result() for piece in pieces))
            stat = file.stat()
            if _identity(file) == identity and max(stat.st_mtime, stat.st_ctime) < now - SETTLED_S:
                _known[identity] = hashes[identity]
    if memory and (settled := {identity: _known[identity] for _, identity in new if identity in _known}):
        with suppress(OSError):  # it only saves time: a full disk, or a cache of somebody else's
            memory.parent.mkdir(parents=True, exist_ok=True)
            replace_text(memory, json.dumps(dict(list((_read(memory) | settled).items())[-REMEMBERED:])))
    return [hashes.get(identity) or _known[identity] for identity in found]


def _identity(file: Path) -> str:
    """With the time of the inode's last change, which no program can set back."""
    stat = file.stat()
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def _piece(file: Path, start: int) -> bytes:
    digest, buffer, left = hashlib.sha256(), memoryview(bytearray(READ_BYTES)), PIECE_BYTES
    with file.open("rb", buffering=0) as content:
        content.seek(start)
        while left and (count := content.readinto(buffer[: min(left, READ_BYTES)])):
            digest.update(buffer[:count])
            left -= count
    return digest.digest()


def json_digest(value: Any) -> str:
    """SHA-256 (hex) of a value as JSON has it, whatever the order of its keys; of what JSON does not have, as a text."""
    return _sha256(json.dumps(value, sort_keys=True, default=str).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(memory: Path) -> dict[str, str]:
    try:
        content = json.loads(memory.read_text())
    except (OSError, ValueError):  # it only saves time
        return {}
    return content if isinstance(content, dict) else {}


@lru_cache  # of this process: asked offline, the hub's client tries for half a minute before it reads its cache
def _hub_commit(path: str, revision: str | None) -> str:
    """The commit of a hub id's revision, of which the cache keeps `snapshots/COMMIT/config.json`."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(path, "config.json", revision=revision)).parent.name
