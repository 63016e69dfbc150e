"""Data sets to tokenised examples: read rows, check each one, encode it, and account for every row that is left out.

    load_rows -> detect_format -> _split (prompt, completion) -> encode -> Prompt | Example | RatedText | PreferencePair

Prompt and completion are encoded separately (`contracts.encoding`). What was left out: no packing, no truncation; a row
that is too long is left out and counted.
"""

import hashlib
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from contracts.config import DataConfig, SourceConfig
from contracts.encoding import DataError, LeftOut, Turns, as_turns, encode_example, encode_prompt, readable
from contracts.records import Example, PreferencePair, Prompt, RatedText
from controller.prompts import first_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

T = TypeVar("T")

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")
ROLES = ("system", "user", "assistant", "tool")


@dataclass
class LoadReport:
    """What became of the rows of one source."""

    rows: int = 0
    used: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> rows


def _closest(word: str, known: Iterable[str]) -> str:
    found = get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _read_text(path: Path, base: str) -> str:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{base}.path: text files must be UTF-8; {path}, line {line}, holds the byte 0x{raw[error.start]:02x}. "
            f"Convert the file, for example with iconv -f WINDOWS-1252 -t UTF-8"
        ) from None
    if not text.strip():
        raise DataError(f"{base}.path: {path} is empty; write the path of a file with at least one row")
    return text


def _read_json(path: Path, base: str) -> list[dict]:
    text, whole = _read_text(path, base), path.suffix == ".json"
    rule = f"{base}.path: a .jsonl file holds one object a line, a .json file one list of objects; {path}, line"
    # Not splitlines(): U+2028 and its like are legal inside a JSON string.
    parts = [text] if whole else text.split("\n")
    rows: list[dict] = []
    for number, part in enumerate(parts, start=1):
        if not part.strip():
            continue
        try:
            value = json.loads(part)
        except json.JSONDecodeError as error:
            place = f"{number + error.lineno - 1}, column {error.colno}"
            raise DataError(f"{rule} {place}, is not valid JSON ({error.msg})") from None
        found = value if whole else [value]
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise DataError(f'{rule} {number}, holds something else: {part[:40]!r}. Write a row as {{"text": "..."}}')
        rows += found
    return rows


def _read_table(path: Path, base: str) -> list[dict]:
    import datasets

    kind, options = path.suffix[1:], {}
    if kind == "csv":
        _read_text(path, base)
        # "NA", "null" and "None" are words of a text; only an empty cell is a missing value.
        options = {"keep_default_na": False, "na_values": [""]}
    with tempfile.TemporaryDirectory() as cache:
        try:
            table = datasets.load_dataset(
                kind, data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True, **options
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{base}.path: {path} cannot be read as {kind}: {error.__cause__ or error}") from error
        return table.to_list()


def _read_saved(path: Path, split: str, base: str) -> list[dict]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise DataError(
            f"{base}.path: a directory must be one that datasets' save_to_disk wrote; {path} is not. Name one file instead"
        ) from None
    if isinstance(saved, datasets.Dataset):
        return saved.to_list()
    if split not in saved:
        raise DataError(f"{base}.split: {path} has {', '.join(saved)}; found {split!r}{_closest(split, saved)}")
    return saved[split].to_list()


def _read_hub(name: str, split: str, base: str) -> list[dict]:
    import datasets

    try:
        return datasets.load_dataset(name, split=split).to_list()
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{base}.path: no local file or directory is named {name!r}, and the split {split!r} of that data set cannot "
            f"be fetched from the Hugging Face hub: {error}. Check id, split and network, or write a local path"
        ) from error


def load_rows(source: SourceConfig, base: str = "data.x") -> list[dict]:
    """The rows of `source`, at most `max_rows`. Raises DataError; `base` is the name of the setting in its messages."""
    path = Path(source.path).expanduser()
    is_file = path.is_file()
    if is_file and path.suffix not in EXTENSIONS:
        raise DataError(
            f"{base}.path: the extension says how to read a file; {path} has {path.suffix or 'none'!r}. "
            f"Rename or convert it to one of {', '.join(EXTENSIONS)}"
        )
    if is_file and source.split != "train":
        raise DataError(f"{base}.split: a file has one split; found {source.split!r}. Write split: train")
    if is_file:
        rows = (_read_json if path.suffix in (".json", ".jsonl") else _read_table)(path, base)
    elif path.is_dir():
        rows = _read_saved(path, source.split, base)
    elif path.suffix in EXTENSIONS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{base}.path: no such file: {path.absolute()}{_closest(path.name, siblings)}")
    else:
        rows = _read_hub(source.path, source.split, base)
    rows = rows[: source.max_rows]
    if not rows:
        raise DataError(f"{base}.path: {source.path} has no rows; write the path of a source with at least one")
    return rows


def detect_format(source: SourceConfig, columns: Iterable[str], base: str = "data.x") -> str:
    """One of text | prompt | prompt_completion | messages | pair | rated, checked against `columns`."""
    columns = list(columns)
    ratings = source.ratings_column if source.ratings_column in columns else source.rating_column
    # In the order in which "auto" tries them: the one that needs more comes first.
    needs = {
        "pair": [source.chosen_column, source.rejected_column],
        "prompt_completion": [source.prompt_column, source.completion_column],
        "rated": [source.text_column, ratings],
        "messages": [source.messages_column],
        "text": [source.text_column],
        "prompt": [source.prompt_column],
    }
    there = ", ".join(columns)
    if source.format == "auto":
        for name, needed in needs.items():
            if set(needed) <= set(columns):
                return name
        known = "; ".join(f"{name}: {' + '.join(needed)}" for name, needed in needs.items())
        raise DataError(
            f"{base}.format: auto reads the format off the columns, and those of {source.path} fit none: {there}. "
            f"Name them with {base}.text_column and the like. Formats: {known}"
        )
    if source.format not in needs:
        raise DataError(
            f"{base}.format: one of auto, {', '.join(needs)}; found {source.format!r}{_closest(source.format, needs)}"
        )
    for column in needs[source.format]:
        if column not in columns:
            raise DataError(
                f"{base}.format: {source.format} needs the column {column!r}; {source.path} has {there}"
                f"{_closest(column, columns)}"
            )
    return source.format


def _text(value: Any, what: str) -> str:
    if value is None:
        raise LeftOut(f"no {what}")
    if not isinstance(value, str):
        raise LeftOut(f"{what} is not a text", f"found {type(value).__name__}")
    if not value.strip():
        raise LeftOut(f"empty {what}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise LeftOut(f"{what} is not valid Unicode", "a lone surrogate")
    return value


def _content(row: dict, column: str) -> str | Turns:
    """A text, or checked messages."""
    value = row.get(column)
    if not isinstance(value, list):
        return _text(value, column)
    if not value:
        raise LeftOut(f"empty {column}")
    for turn in value:
        role = turn.get("role") if isinstance(turn, dict) else None
        if role not in ROLES:
            raise LeftOut(f"{column}: a message needs a role of {', '.join(ROLES)}", f"found {role!r}")
        _text(turn.get("content"), f"content in {column}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _split(row: dict, form: str, source: SourceConfig, words: int | None, side: str = "") -> tuple[Any, Any]:
    """(prompt, completion) of one row, each a text or messages; "" where there is none. `side`: column of a pair."""
    if form == "text":
        return first_words(_text(row.get(source.text_column), source.text_column), words)
    if form == "prompt":
        return _content(row, source.prompt_column), ""
    if form == "prompt_completion":
        return _content(row, source.prompt_column), _content(row, source.completion_column)
    if form == "messages":
        return "", _content(row, source.messages_column)
    column = side or (source.text_column if form == "rated" else source.chosen_column)
    completion = _content(row, column)
    # UltraFeedback's form: chosen and rejected are whole conversations next to a prompt column that repeats the start.
    if isinstance(completion, list) and completion[0]["role"] != "assistant":
        return "", completion
    if row.get(source.prompt_column) is not None:
        return _content(row, source.prompt_column), completion
    return first_words(completion, words) if isinstance(completion, str) else ("", completion)


def _ratings(row: dict, source: SourceConfig) -> list[float]:
    several = row.get(source.ratings_column) is not None
    column = source.ratings_column if several else source.rating_column
    values = row.get(column)
    if isinstance(values, str):  # a CSV cell holds a list as JSON
        with suppress(json.JSONDecodeError):  # then the check below names the text
            values = json.loads(values)
    values = values if several and isinstance(values, list) else [values]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise LeftOut(f"{column} is not a number", f"found {value!r}")
        if not math.isfinite(value):
            raise LeftOut(f"{column} is not finite", f"found {value}")
    if not values:
        raise LeftOut(f"empty {column}")
    return [float(value) for value in values]


def _keep(
    rows: list[dict], build: Callable[[int, dict], T], data: DataConfig, base: str, report: LoadReport | None
) -> list[T]:
    """`build` of every usable row. Raises DataError past `data.max_bad_rows`, or where nothing is left."""
    report = LoadReport() if report is None else report
    made: list[T] = []
    bad: list[str] = []
    for number, row in enumerate(rows):
        try:
            made.append(build(number, row))
        except LeftOut as out:
            report.left_out[out.reason] += 1
            if out.bad:
                bad.append(f"  row {number}: {out}")
    report.rows, report.used = len(rows), len(made)
    counts = ", ".join(f"{count} x {reason}" for reason, count in report.left_out.most_common())
    if len(bad) > data.max_bad_rows * len(rows):
        first = "\n".join(bad[:5])
        raise DataError(
            f"{base}: {len(bad)} of {len(rows)} rows are unusable ({len(bad) / len(rows):.2%}); data.max_bad_rows allows "
            f"{data.max_bad_rows:.2%}. Left out: {counts}. The first ones, counted from 0:\n{first}\n"
            "Repair or remove them, or raise data.max_bad_rows"
        )
    if not made:
        raise DataError(f"{base}: no row of {len(rows)} is left to use. Left out: {counts}")
    return made


def _open(source: SourceConfig, base: str, allowed: tuple[str, ...]) -> tuple[list[dict], str]:
    rows = load_rows(source, base)
    columns = dict.fromkeys(column for row in rows for column in row)
    form = detect_format(source, columns, base)
    if form not in allowed:
        raise DataError(
            f"{base}.format: one of {', '.join(allowed)} is needed here; found {form} (columns {', '.join(columns)})"
        )
    return rows, form


def _example(tokenizer: "Tokenizer", parts: tuple[Any, Any], chat: bool, max_tokens: int) -> Example:
    example = encode_example(tokenizer, *parts, chat)
    if len(example.token_ids) > max_tokens:
        raise LeftOut("over max_tokens", f"{len(example.token_ids)} > {max_tokens}", bad=False)
    return example


def load_prompts(
    source: SourceConfig,
    data: DataConfig,
    tokenizer: "Tokenizer",
    max_completion_tokens: int,
    max_model_len: int,
    report: LoadReport | None = None,
    base: str = "data.prompts",
) -> list[Prompt]:
    """Prompts with distinct tokens; `prompt_id` is the row number. A conversation's last answer is not part of it."""
    rows, form = _open(source, base, ("prompt", "text", "rated", "prompt_completion", "messages", "pair"))
    unprompted = form == "text" or (form == "rated" and not any(source.prompt_column in row for row in rows))
    if unprompted and data.prompt_words is None:
        raise DataError(
            f"{base}: a prompt is a column {source.prompt_column!r} or the first words of a text; found a text and "
            f"data.prompt_words: null. Write data.prompt_words: 4, or name {base}.prompt_column"
        )
    seen: set[tuple[int, ...]] = set()

    def build(number: int, row: dict) -> Prompt:
        prompt, completion = _split(row, form, source, data.prompt_words)
        if not prompt and isinstance(completion, list):
            prompt = completion[:-1] if completion[-1]["role"] == "assistant" else completion
        if not prompt:
            raise LeftOut("no prompt")
        ids = tuple(encode_prompt(tokenizer, prompt, data.chat))
        if len(ids) > data.max_prompt_tokens:
            raise LeftOut("prompt over data.max_prompt_tokens", f"{len(ids)} > {data.max_prompt_tokens}")
        if len(ids) + max_completion_tokens > max_model_len:
            detail = f"{len(ids)} + {max_completion_tokens} > {max_model_len}"
            raise LeftOut("prompt and max_completion_tokens over engine.max_model_len", detail)
        if ids in seen:
            raise LeftOut("duplicate prompt", bad=False)
        seen.add(ids)
        return Prompt(number, readable(prompt), ids)

    return _keep(rows, build, data, base, report)


def load_sft(
    source: SourceConfig,
    data: DataConfig,
    tokenizer: "Tokenizer",
    max_tokens: int,
    report: LoadReport | None = None,
    base: str = "data.sft",
) -> list[Example]:
    """Supervised examples of at most `max_tokens`; a pair gives its chosen side, a rated text the text."""
    rows, form = _open(source, base, ("text", "rated", "prompt_completion", "messages", "pair"))

    def build(_: int, row: dict) -> Example:
        return _example(tokenizer, _split(row, form, source, data.prompt_words), data.chat, max_tokens)

    return _keep(rows, build, data, base, report)


def load_preferences(
    source: SourceConfig,
    data: DataConfig,
    tokenizer: "Tokenizer",
    max_tokens: int,
    report: LoadReport | None = None,
    base: str = "data.preferences",
) -> list[RatedText] | list[PreferencePair]:
    """Scoring inputs of at most `max_tokens`, encoded as a prompt and its completion are at rollout time."""
    rows, form = _open(source, base, ("rated", "pair"))
    # A text without a chat template reads the same in one piece, and short ones need not be cut to be rated.
    words = data.prompt_words if data.chat else None

    def rated(_: int, row: dict) -> RatedText:
        prompt, completion = parts = _split(row, form, source, words)
        both = isinstance(prompt, str) and isinstance(completion, str)
        text = prompt + completion if both else readable(as_turns(prompt, "user") + as_turns(completion, "assistant"))
        return RatedText(text, _example(tokenizer, parts, data.chat, max_tokens).token_ids, _ratings(row, source))

    def pair(_: int, row: dict) -> PreferencePair:
        chosen, rejected = (
            _example(tokenizer, _split(row, form, source, words, side), data.chat, max_tokens).token_ids
            for side in (source.chosen_column, source.rejected_column)
        )
        if chosen == rejected:
            raise LeftOut("chosen equals rejected", bad=False)
        return PreferencePair(chosen, rejected)

    if form == "rated":
        return _keep(rows, rated, data, base, report)
    return _keep(rows, pair, data, base, report)


def fingerprint(rows_or_examples: Iterable[Any]) -> str:
    """SHA-256 (hex) of the content, in order: the same for the same rows in any process, on any day."""
    digest = hashlib.sha256()
    for item in rows_or_examples:
        content = asdict(item) if is_dataclass(item) and not isinstance(item, type) else item
        digest.update(json.dumps(content, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
