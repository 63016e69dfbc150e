"""Reading the rows of a data set, and which format they have."""

import gzip
import json
import re
import tempfile
import zlib
from collections.abc import Iterable
from glob import glob
from io import StringIO
from pathlib import Path
from typing import Any

from common.error_text import error_lines
from common.text.encoding import DataError
from contracts.config import SourceConfig
from contracts.plugins import closest
from controller.data.row_formats import pair_columns

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")
OTHERS_TEXTS = (
    "instruction",
    "input",
    "output",
    "question",
    "system",
)  # columns of known data sets (`row_formats.SHAPES`)
PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,300})(?:\.\d+)?(?:[eE][+-]?\d+)?")  # of JSON
SHARD = re.compile(r"(.+)-\d+-of-\d+")  # as the hub names files: its split may be any name, as train_prefs
SPLIT = re.compile(r"(?:^|(?<=[-_.]))(train|validation|valid|val|dev|test|eval)(?=[-_.])")  # in names of other files
NUMBERS = re.compile(r"\d+(?![^\W_])")  # that tell the parts of one split apart; the 10k of train_10k is no part's
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")  # beside shards; they hold no rows


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    found = closest(word, known)
    return f"; did you mean {found!r}?" if found else ""


def _raw(path: Path, base: str) -> bytes:
    """The bytes of a file, unpacked."""
    raw, codec = path.read_bytes(), PACKED.get(path.suffix)
    try:
        if codec == "gzip":
            return gzip.decompress(raw)
        if codec:
            import pyarrow

            with pyarrow.CompressedInputStream(pyarrow.BufferReader(raw), codec) as stream:
                return stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{base}.path: {path} cannot be unpacked as {path.suffix}: {error}") from None
    return raw


def _read_text(path: Path, base: str) -> str:
    raw = _raw(path, base)
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
    """One object a line; of a .json file also a list of objects, over as many lines as it likes."""
    text = _read_text(path, base)
    rule = f"{base}.path: a .jsonl file holds one object a line, a .json file that or one list of objects; {path}, line"
    # Not splitlines(): U+2028 and its like are legal inside a JSON string.
    lines = text.split("\n")
    whole = _kind(path) == ".json" and not _is_object(next(line for line in lines if line.strip()))
    rows: list[dict] = []
    for number, part in enumerate([text] if whole else lines, start=1):
        if not part.strip():
            continue
        try:
            value = json.loads(part)
        except json.JSONDecodeError as error:
            place = f"{number + error.lineno - 1}, column {error.colno}"
            raise DataError(f"{rule} {place}, is not valid JSON ({error.msg})") from None
        except (ValueError, RecursionError) as error:  # an integer of too many digits, or too many brackets
            raise DataError(f"{rule} {number}, cannot be read ({error_lines(error)[0]})") from None
        found = value if whole else [value]
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise DataError(f'{rule} {number}, holds something else: {part[:40]!r}. Write a row as {{"text": "..."}}')
        rows += found
    return rows


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_csv(path: Path, base: str) -> list[dict]:
    import pandas

    text = _read_text(path, base)
    try:
        # "NA", "null" and "None" are words of a text; only an empty cell is a missing value.
        table = pandas.read_csv(StringIO(text), keep_default_na=False, na_values=[""], low_memory=False, dtype=str)
    except ValueError as error:
        raise DataError(f"{base}.path: {path} cannot be read as csv: {error}") from error
    if not isinstance(table.index, pandas.RangeIndex):  # pandas took the first cells for names of the rows
        raise DataError(
            f"{base}.path: the first line of a .csv file names every column; {path} has rows with more cells. Write texts "
            "with commas in quotes"
        )
    columns = {str(name): _numbers([None if pandas.isna(c) else c for c in table[name]]) for name in table}
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _numbers(cells: list[str | None]) -> list[Any]:
    """The cells of a column, as numbers where that changes none of them: 007 and 0.50 may be answers."""
    said = [cell for cell in cells if cell is not None]
    if not all(NUMBER.fullmatch(cell) and json.dumps(json.loads(cell)) == cell for cell in said):
        return cells
    return [cell if cell is None else json.loads(cell) for cell in cells]


def _read_parquet(path: Path, base: str) -> list[dict]:
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        file = str(path)
        if path.suffix in PACKED:
            file = str(Path(cache) / "unpacked.parquet")
            Path(file).write_bytes(_raw(path, base))
        try:
            table = datasets.load_dataset(
                "parquet", data_files=file, split="train", cache_dir=cache, keep_in_memory=True
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{base}.path: {path} cannot be read as parquet: {error.__cause__ or error}") from error
        return _rows(table)


def _rows(table: Any) -> list[dict]:
    """Rows of a table, whose structures have every key that one of them has: below the columns a null is no key."""
    return [{column: _pruned(value) for column, value in row.items()} for row in table.to_list()]


def _pruned(value: Any) -> Any:
    if isinstance(value, list):
        return [_pruned(one) for one in value]
    if isinstance(value, dict):
        return {key: _pruned(one) for key, one in value.items() if one is not None}
    return value


def _read_saved(path: Path, split: str, base: str) -> list[dict]:
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):
        return _rows(saved)
    if split not in saved:
        raise DataError(f"{base}.split: {path} has {', '.join(saved)}; found {split!r}{_did_you_mean(split, saved)}")
    return _rows(saved[split])


def _shards(path: Path, split: str, base: str) -> list[Path]:
    """The files of a directory in the order of their names; those of `split` where names have one, as on the hub.

    Raises:
        DataError: where there are none, none of this split, or those of several data sets.
    """
    files = _data_files(path.iterdir()) or _data_files(path.glob("data/*"))
    if not files:
        raise DataError(
            f"{base}.path: a directory must hold files of {', '.join(EXTENSIONS)}, or be one that datasets' save_to_disk "
            f"wrote; {path} is neither. Name one file instead{_or_subset(path, base)}"
        )
    splits = {file: found for file in files if (found := _split(file))}
    if split == "train" and not any(SPLIT.search(file.name) for file in splits) and len(set(splits.values())) < 2:
        return files
    if split not in splits.values():
        names = sorted(set(splits.values())) or ["train"]
        raise DataError(f"{base}.split: {path} has {', '.join(names)}; found {split!r}{_did_you_mean(split, names)}")
    if others := [file.name for file in files if file not in splits]:
        raise DataError(
            f"{base}.path: of the files of {path} some have a split in their names, and {', '.join(others[:3])} "
            f"{'has' if len(others) == 1 else 'have'} none; write those that are meant, as {path}/*{split}*{files[0].suffix}"
        )
    mine = [file for file in files if splits.get(file) == split]
    parts = {_stem(file): file.name for file in mine}
    if len(parts) > 1:
        raise DataError(
            f"{base}.path: the files of one split differ in numbers alone; of those of {path} with {split} in their names "
            f"{', '.join([*parts.values()][:3])} differ in more. Write the one that is meant, as {mine[0]}, or a pattern"
        )
    return mine


def _split(path: Path) -> str | None:
    """The split that a file's name says."""
    shard = SHARD.match(path.name)
    if shard and re.fullmatch(r"\w+(\.\w+)*", shard[1]):  # what `datasets` takes for the name of a split
        return shard[1]
    found = SPLIT.search(path.name)
    return found[1] if found else None


def _stem(path: Path) -> str:
    """The name of a file without extensions and numbers."""
    shard = SHARD.match(path.name)
    return shard[1] if shard else NUMBERS.sub("", _unpacked(path).stem)


def _unpacked(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in PACKED else path


def _data_files(paths: Iterable[Path]) -> list[Path]:
    files = (path for path in paths if path.is_file() and path.name[0] not in "._" and path.name not in DESCRIPTIONS)
    return sorted(path for path in files if _kind(path) in EXTENSIONS)


def _kind(path: Path) -> str:
    """What a file holds: the extension before that of a packed one."""
    return _unpacked(path).suffix


def _folder(path: Path, subset: str, base: str) -> Path:
    """Of a directory, as a clone of a hub data set has them for its configurations. Raises DataError where there is none."""
    if not (path / subset).is_dir():
        names = _folders(path)
        there = f"has the folders {', '.join(names)}" if names else "has no folders"
        raise DataError(f"{base}.subset: {path} {there}; found {subset!r}{_did_you_mean(subset, names)}")
    return path / subset


def _folders(path: Path) -> list[str]:
    return sorted(one.name for one in path.iterdir() if one.is_dir() and one.name[0] not in "._")


def _or_subset(path: Path, base: str) -> str:
    names = _folders(path)
    return f", or with {base}.subset one of its folders {', '.join(names)}" if names else ""


def _read_hub(name: str, split: str, subset: str | None, base: str) -> list[dict]:
    import datasets

    try:
        return _rows(datasets.load_dataset(name, subset, split=split))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        of_subset = f" of its subset {subset!r}" if subset else ""
        raise DataError(
            f"{base}.path: no local file or directory is named {name!r}, and the split {split!r}{of_subset} of that data "
            f"set cannot be fetched from the Hugging Face hub: {' '.join(error_lines(error))}. Check id, split, "
            f"{base}.subset (which of its configurations, where it has several) and network, or write a local path"
        ) from error


def _read_file(path: Path, base: str) -> list[dict]:
    if _kind(path) not in EXTENSIONS:
        raise DataError(
            f"{base}.path: the extension says how to read a file; {path} has {path.suffix or 'none'!r}. "
            f"Rename or convert it to one of {', '.join(EXTENSIONS)}; each may be packed ({', '.join(PACKED)})"
        )
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    return readers.get(_kind(path), _read_json)(path, base)


def _files(source: SourceConfig, path: Path, base: str) -> list[Path]:
    """The file of this path, or those that match it."""
    files = [path] if path.is_file() else [] if path.exists() else sorted(map(Path, glob(str(path), recursive=True)))
    if files and source.split != "train":
        raise DataError(f"{base}.split: a file has one split; found {source.split!r}. Write split: train")
    if files and source.subset is not None:
        raise DataError(f"{base}.subset: a file has no subsets; found {source.subset!r}. Write subset: null")
    return files


def _read_files(files: list[Path], source: SourceConfig, base: str) -> list[dict]:
    """Their rows. Raises DataError also where one file is there packed and unpacked, or as two kinds: rows would count
    twice."""
    known: dict[Path, Path] = {}
    for file in files:
        first = known.setdefault(_unpacked(file).with_suffix(""), file)
        if first != file:
            raise DataError(
                f"{base}.path: files of one name are taken for the same rows; {source.path} has {first.name} and "
                f"{file.name}. Write the one that is meant, as {file}, or a pattern; where they differ, rename one"
            )
    return [row for file in files for row in _in_texts(_read_file(file, base), file, source)]


def _in_texts(rows: list[dict], file: Path, source: SourceConfig) -> list[dict]:
    """Those of a .csv file with every cell of a column of texts as it is written: 7 is what a completion says."""
    if _kind(file) != ".csv":
        return rows
    ours = (source.prompt_column, source.completion_column, source.text_column, *pair_columns(source))
    texts = {*ours, *OTHERS_TEXTS}
    return [
        {name: json.dumps(v) if name in texts and isinstance(v, int | float) else v for name, v in row.items()}
        for row in rows
    ]


def load_rows(source: SourceConfig, base: str = "data.x") -> list[dict]:
    """The rows of `source`, at most `max_rows`. Raises DataError; `base` is the name of the setting in its messages."""
    path = Path(source.path).expanduser()
    if path.is_dir() and source.subset is not None:
        path = _folder(path, source.subset, base)
    if files := _files(source, path, base):
        rows = _read_files(files, source, base)
    elif path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        rows = _read_saved(path, source.split, base)
    elif path.is_dir():
        rows = _read_files(_shards(path, source.split, base), source, base)
    elif _kind(path) in EXTENSIONS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{base}.path: no such file: {path.absolute()}{_did_you_mean(path.name, siblings)}")
    else:
        rows = _read_hub(source.path, source.split, source.subset, base)
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
            f"{base}.format: one of auto, {', '.join(needs)}; found {source.format!r}{_did_you_mean(source.format, needs)}"
        )
    for column in needs[source.format]:
        if column not in columns:
            raise DataError(
                f"{base}.format: {source.format} needs the column {column!r}; {source.path} has {there}"
                f"{_did_you_mean(column, columns)}"
            )
    return source.format
