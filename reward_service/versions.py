"""The version of a scorer: a hash of everything that decides its values.

A model's version covers weights, configuration (the normaliser is part of it), tokenizer, chat template, the precision it
is served in and where its score is read; a function's its name, its source file and what that imports from beside it; a
composite's its formula and the versions of its parts.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from common.files.fingerprints import checkpoint_fingerprint
from common.files.source_code import source_digest

LENGTH = 16  # hexadecimal digits


def local_checkpoint(path: str) -> Path:
    """The directory of a checkpoint: itself, or where the hub's cache keeps it."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path))


def vocabulary(path: str) -> dict[str, int] | None:
    """Token -> id of a checkpoint's tokenizer, added tokens included; None where it has no `tokenizer.json`."""
    file = local_checkpoint(path) / "tokenizer.json"
    if not file.exists():
        return None
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)


def load_decoder(path: str) -> Callable[[Sequence[int]], str]:
    """Token ids to text, control tokens shown, by the tokenizer of a checkpoint. A fast tokenizer needs no torch for it."""
    file = local_checkpoint(path) / "tokenizer.json"
    if file.exists():
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(file))
        return lambda ids: fast.decode(list(ids), skip_special_tokens=False)
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    return lambda ids: slow.decode(list(ids), skip_special_tokens=False)


def model_version(path: str, dtype: str, reading: str = "") -> str:
    """Raises OSError or a hub error where there is no such checkpoint.

    Args:
        reading: how its scores are read, where that is not at the EOS.
    """
    return _hash(dtype + reading, checkpoint_fingerprint(str(local_checkpoint(path))))


def function_version(function: str) -> str:
    """Raises ValueError where there is no such source."""
    return _hash(source_digest(function))


def composite_version(kind: str, formula: dict[str, object], parts: list[str]) -> str:
    return _hash(kind, json.dumps(formula, sort_keys=True), *parts)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:LENGTH]
