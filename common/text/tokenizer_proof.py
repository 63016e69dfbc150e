"""Whether transformers reads a checkpoint's tokenizer as its file has it.

    tokenizer.json ─────────> tokenizers ──> tokens ─┐
    tokenizer.model ──────> SentencePiece ─> tokens ─┼─ the same, of a few texts
    what AutoTokenizer makes of either ────> tokens ─┘

A class of transformers may put rules of its own over the file. 5.19 does so for a `tokenizer.json` of type qwen2
(findings/transformers_qwen2_own_tokenizer.sh) and, where a text begins with spaces, for that of Llama 2; and it reads a
`tokenizer.model` with other joins (findings/transformers_sentencepiece_spaces.sh). A model would be trained, sampled and
scored on tokens that it has not learnt.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.text.tokenizers import fast_tokenizer, local_checkpoint, tokenizer_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# Numbers, runs of spaces, indented code, capitals, accents in both forms, other scripts.
TEXTS = (
    "In 2024 the fox had 1234567 dogs.",
    "What is 17 + 25?\nThink step by step.",
    "def f(x):\n    return x + 1\n\n\tif  y:\n",
    "  two  spaces, l'été naïve - \"quotes\", they DON'T, WE'LL",
    "- a\n  - b\n\n\n1. c",
    '{\n  "a": [1, 2]\n}',
    "cafe\u0301 café, 日本語のテキスト и русский",
    "x == y && !z; // 3.14%",
)
# Keys of tokenizer_config.json by which BERT's kind changes what tokenizer.json does.
CHANGES = ("do_lower_case", "strip_accents")
BACKEND = "TokenizersBackend"  # the class of transformers that takes tokenizer.json as it is
JSON = "a copy with a tokenizer.json, which save_pretrained() of an AutoTokenizer of transformers 4 makes"
SHOWN = 12  # tokens in a message
Split = Callable[[str], list[str]]


class OtherTokens(ValueError):
    """transformers makes other tokens of a text than the checkpoint's own file."""


def check_tokens(path: str, tokenizer: "Tokenizer") -> None:
    """Compare what has been loaded from `path` (as of `tokenizers.pinned`) with its file. Nothing is said of a class that
    comes with the checkpoint, nor where there is neither file.

    Raises:
        OtherTokens: with the text, both lists of tokens and what to do.
    """
    import transformers

    if type(tokenizer).__module__.startswith("transformers_modules"):
        return
    folder = local_checkpoint(path)
    file = next((name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()), "")
    options = tokenizer_options(path)
    split = _reader(folder / file, options) if file else None
    if split is None or (found := _first_other(tokenizer, split, options)) is None:
        return
    text, right, mine = found
    same = (a == b for a, b in zip(right, mine, strict=False))
    at = next((i for i, is_same in enumerate(same) if not is_same), min(len(right), len(mine)))
    raise OtherTokens(
        f"of {text!r} its {file} makes {_shown(right, at)}, and {type(tokenizer).__name__} of transformers "
        f"{transformers.__version__} makes {_shown(mine, at)}, which the model has not learnt; write "
        f"{_instead(folder, split, options) if file == 'tokenizer.json' else JSON}"
    )


def _reader(file: Path, options: dict[str, Any]) -> Split | None:
    """None where another than the file decides, or where SentencePiece cannot read it: tiktoken's have that name too."""
    if fast := fast_tokenizer(str(file.parent)):
        fast.no_padding()
        fast.no_truncation()
        is_changed = any(options.get(key) for key in CHANGES)
        return None if is_changed else lambda text: fast.encode(text, add_special_tokens=False).tokens
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(file))
    except RuntimeError:
        return None
    return lambda text: pieces.encode(text, out_type=str)


def _first_other(
    tokenizer: "Tokenizer", split: Split, options: dict[str, Any]
) -> tuple[str, list[str], list[str]] | None:
    """The first text that both split otherwise, and into what."""
    # An option, not the file, puts a space before a text that has none.
    before = " " if options.get("add_prefix_space") else ""
    for text in (before + text for text in TEXTS):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        right, mine = split(text), list(tokenizer.convert_ids_to_tokens(ids))
        if mine != right:
            return text, right, mine
    return None


def _shown(tokens: list[str], at: int) -> str:
    start = max(0, at - 2)
    part = tokens[start : start + SHOWN]
    return f"{'... ' if start else ''}{' '.join(part)}{' ...' if start + SHOWN < len(tokens) else ''}"


def _instead(folder: Path, split: Split, options: dict[str, Any]) -> str:
    """Of a tokenizer.json: by trying whether transformers takes it as it is where it is told to."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for beside in folder.glob("*.json"):
            shutil.copy(beside, copy)
        (copy / "tokenizer_config.json").write_text(json.dumps(options | {"tokenizer_class": BACKEND}))
        try:
            told = AutoTokenizer.from_pretrained(copy, trust_remote_code=False)
        except (OSError, ValueError):  # code of its own, which is not in the copy
            told = None
        if told is not None and _first_other(told, split, options) is None:
            return f'a copy whose tokenizer_config.json has "tokenizer_class": "{BACKEND}"'
    return (
        "another checkpoint; or, if the model has learnt the latter, what save_pretrained() of its AutoTokenizer makes"
    )
