"""What a run reads of a checkpoint beside its weights: tokenizer and configuration, each loaded in one way by all rooms."""

import json
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def with_date(tokenizer: "Tokenizer", day: str) -> "Tokenizer":
    """Let the tokenizer's chat template write `day` (ISO 8601) for today, also once it has been saved and loaded again."""
    date.fromisoformat(day)
    tokenizer.init_kwargs["template_date"] = day
    return tokenizer


def load_tokenizer(path: str, model: ModelConfig) -> "Tokenizer":
    """The tokenizer of a checkpoint as the configuration of its model has it loaded."""
    from transformers import AutoTokenizer

    from common.models.adapters import holder

    path = holder(path, "tokenizer_config.json")
    options = {"revision": model.revision_of(path), "trust_remote_code": model.trust_remote_code}
    return with_date(AutoTokenizer.from_pretrained(path, **options), model.template_date)


def load_config(path: str, model: ModelConfig) -> Any:
    """The configuration of a checkpoint, likewise. Raises OSError or ValueError where there is none."""
    from common.models.adapters import config_of

    return config_of(path, model.trust_remote_code, model.revision_of(path))


def vocab_size(path: str, model: ModelConfig) -> int:
    """Tokens of a checkpoint's model; models of several parts say it of their text part. Raises as `load_config`."""
    return int(load_config(path, model).get_text_config().vocab_size)


def pinned(path: str, model: ModelConfig) -> str:
    """The checkpoint at `path` in one text, a hub id with the revision that it has as `model.path`: ID@REVISION. What is
    below reads both."""
    revision = model.revision_of(path)
    return path if revision is None or Path(path).is_dir() else f"{path}@{revision}"


def local_checkpoint(path: str, revision: str | None = None) -> Path:
    """The directory of a checkpoint: itself, or where the hub's cache keeps that revision of it; `path` as of `pinned`."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    name, _, of_name = path.partition("@")  # no id has one
    return Path(snapshot_download(name, revision=revision or of_name or None))


def fast_tokenizer(path: str) -> Any:
    """None where the checkpoint has no `tokenizer.json`."""
    file = local_checkpoint(path) / "tokenizer.json"
    if not file.exists():
        return None
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(file))


def tokenizer_options(path: str) -> dict[str, Any]:
    """What a checkpoint's tokenizer_config.json has; nothing where there is none."""
    file = local_checkpoint(path) / "tokenizer_config.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _slow(path: str) -> "Tokenizer":
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(local_checkpoint(path), trust_remote_code=False)


def vocabulary(path: str) -> dict[str, int] | None:
    """Token -> id of a checkpoint's tokenizer, added tokens included; None where it has no `tokenizer.json`."""
    fast = fast_tokenizer(path)
    return fast.get_vocab(with_added_tokens=True) if fast else None


def known_ids(path: str) -> frozenset[int]:
    """The ids of a checkpoint's tokenizer that are tokens, added ones included."""
    tokens = vocabulary(path)
    return frozenset((_slow(path).get_vocab() if tokens is None else tokens).values())


def text_start(path: str) -> int | None:
    """The token that a checkpoint's tokenizer writes before every text, its BOS; None where it writes none."""
    said, fast = tokenizer_options(path), fast_tokenizer(path)
    token = said.get("bos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token and said.get("add_bos_token"):
        return (vocabulary(path) or _slow(path).get_vocab()).get(token)
    if fast is None:
        whole, text = (_slow(path)("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    else:
        whole, text = (fast.encode("a", add_special_tokens=added).ids for added in (True, False))
    return whole[0] if len(whole) > len(text) and whole[0] != text[0] else None


def load_decoder(path: str, with_controls: bool = True) -> Callable[[Sequence[int]], str]:
    """Token ids to text, control tokens shown or left out, by the tokenizer of a checkpoint. A fast one needs no torch."""
    fast = fast_tokenizer(path)
    tokenizer: Any = _slow(path) if fast is None else fast
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=not with_controls)
