"""The version of a scorer: a hash of everything that decides its values.

A model's version covers weights, configuration (the normaliser is part of it), tokenizer, chat template, the precision it
is served in and where its score is read; a function's its source file and name; a composite's its formula and the
versions of its parts.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from contracts.scoring import GOLDEN_FILE

LENGTH = 16  # hexadecimal digits
# What transformers reads from a checkpoint. Golden scores, model cards and optimizer states decide nothing.
SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".jinja", ".txt", ".py")


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

    slow = AutoTokenizer.from_pretrained(path)
    return lambda ids: slow.decode(list(ids), skip_special_tokens=False)


def model_version(path: str, dtype: str, reading: str = "") -> str:
    """Raises OSError or a hub error where there is no such checkpoint.

    Args:
        reading: how its scores are read, where that is not at the EOS.
    """
    root = local_checkpoint(path)
    files = sorted(p for p in root.rglob("*") if p.suffix in SUFFIXES and p.name != GOLDEN_FILE and p.is_file())
    return _hash(
        dtype + reading, *(f"{file.relative_to(root)} {_file_hash(file, file.stat().st_mtime_ns)}" for file in files)
    )


@lru_cache(maxsize=4096)
def _file_hash(path: Path, mtime_ns: int) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def split_function(function: str) -> tuple[str, str]:
    """("package.module" or "path/file.py", name) of "module:name".

    Raises:
        ValueError: where it has another form.
    """
    module, _, name = function.rpartition(":")
    if not module or not name.isidentifier():
        raise ValueError(f"{function!r} is not of the form package.module:function or path/file.py:function")
    return module, name


def function_source(function: str) -> Path:
    """The file of a rule function, found without importing it.

    Raises:
        ValueError: where there is none.
    """
    module, _ = split_function(function)
    if module.endswith(".py"):
        path = Path(module)
    else:
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            spec = None
        path = Path(spec.origin) if spec and spec.origin else Path(module)
    if not path.is_file():
        raise ValueError(f"{function}: there is no source file {path}")
    return path.resolve()


def function_version(function: str) -> str:
    path = function_source(function)
    return _hash(split_function(function)[1], _file_hash(path, path.stat().st_mtime_ns))


def composite_version(kind: str, formula: dict[str, object], parts: list[str]) -> str:
    return _hash(kind, json.dumps(formula, sort_keys=True), *parts)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:LENGTH]
