"""Reading the rows of a data set, and which format they have."""

import json
import re
import tempfile
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from contracts.config import SourceConfig
from contracts.encoding import DataError

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")


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
