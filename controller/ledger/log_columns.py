"""`ledger.jsonl` as columns: a log of ten million rows is read in pieces, by pyarrow, and none of them becomes an object."""

import io
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from common.error_text import typed_line
from controller.ledger.log import Row, pieces, rows_of
from controller.ledger.trained_lines import trained_rows

THREADS = 2  # that read pieces while their rows are counted

Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Line(BaseModel):
    """A row of the log, which others may have written."""

    model_config = ConfigDict(strict=True, extra="forbid")


class _Ended(_Line):
    key: tuple[Count, Count, Count]
    update: Count
    sampled: list[Count] = []
    admitted_at: Count
    leases: Count
    holder: str
    row: str = ""  # digest of the columns that its scorers saw


class _Trained(_Ended):
    trained: Count


class _Quarantined(_Ended):
    quarantined: str


class _Filtered(_Ended):
    filtered: str


class _Commit(_Line):
    commit: Count
    version: Count
    admitted: Count
    open: list[tuple[Count, Count, Count]]


_ROWS = TypeAdapter(list[_Trained | _Quarantined | _Filtered | _Commit])

_INT, _TEXT = pa.int64(), pa.string()
_OF_ENDED = {"key": pa.list_(_INT), "update": _INT, "admitted_at": _INT, "leases": _INT, "holder": _TEXT}
_OF_COMMIT = {"version": _INT, "admitted": _INT, "open": pa.list_(pa.list_(_INT))}
_KINDS = {"trained": _INT, "quarantined": _TEXT, "filtered": _TEXT, "commit": _INT}  # a row has one of these
_OPTIONAL = {"sampled": pa.list_(_INT), "row": _TEXT}  # of what has ended
_SCHEMA = pa.schema({**_OF_ENDED, **_OF_COMMIT, **_KINDS, **_OPTIONAL})


def tables(log: Path) -> Iterator[tuple[pa.Table, bool]]:
    """The rows of a log, piece by piece, and whether they are of the surviving line of weights. Within a piece rows of one
    kind are in the order of the file.

    Raises:
        ValueError: where a line of the surviving line is damaged, or a row is none of a ledger's.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        ahead = deque[Future[tuple[list[pa.Table], bool]]]()
        for piece in pieces(log):
            ahead.append(pool.submit(_of_piece, log, *piece))
            if len(ahead) > THREADS:
                found, is_alive = ahead.popleft().result()
                yield from ((table, is_alive) for table in found)
        for future in ahead:
            found, is_alive = future.result()
            yield from ((table, is_alive) for table in found)


def _of_piece(log: Path, offset: int, lines: bytes, is_alive: bool) -> tuple[list[pa.Table], bool]:
    """All rows, those that trained first, and whether they are of the surviving line."""
    trained, others = trained_rows(lines)
    number = len(trained["key"])
    nulls = {field.name: pa.nulls(number, field.type) for field in _SCHEMA}
    table = _read(others) if others else pa.Table.from_pylist([], schema=_SCHEMA)
    if table is None:
        rows = validated(list(rows_of(log, offset, lines, is_alive)), log)
        return [pa.Table.from_pylist(rows, schema=_SCHEMA)], is_alive
    return [pa.table(nulls | trained, schema=_SCHEMA), table], is_alive


def validated(rows: list[Row], log: Path) -> list[Row]:
    """The same rows. Raises ValueError where one is none of a ledger's."""
    try:
        _ROWS.validate_json(json.dumps(rows))
    except ValidationError as error:
        raise ValueError(f"{log} has a row that is none of a ledger: {typed_line(error)}") from None
    return rows


def keys_of(lists: pa.ChunkedArray) -> np.ndarray:
    """[rows, 3] epoch, prompt id and sample index."""
    return pc.list_flatten(lists).to_numpy().reshape(-1, 3)


def _read(lines: bytes) -> pa.Table | None:
    """None where only a closer look says what these lines are: pyarrow takes null for a field that is not there, and skips
    empty lines."""
    if b"null" in lines or b"\r" in lines:
        return None
    parsing = pyarrow.json.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="error")
    try:
        table = pyarrow.json.read_json(io.BytesIO(lines), parse_options=parsing)
    except pa.ArrowInvalid:
        return None
    return table if table.num_rows == lines.count(b"\n") and _is_of_a_ledger(table) else None


def _is_of_a_ledger(table: pa.Table) -> bool:
    there = {name: table[name].is_valid().to_numpy() for name in _SCHEMA.names}
    is_commit = there["commit"]
    fields = [
        *(np.array_equal(there[name], ~is_commit) for name in _OF_ENDED),
        *(np.array_equal(there[name], is_commit) for name in _OF_COMMIT),
        *(not np.any(there[name] & is_commit) for name in _OPTIONAL),
        bool(np.all(sum(there[name].astype(np.int8) for name in _KINDS) == 1)),
    ]
    opened = pc.list_flatten(table["open"])
    keys = [table["key"].drop_null(), opened]
    numbers = [
        *(table[name] for name, kind in zip(_SCHEMA.names, _SCHEMA.types, strict=True) if kind == _INT),
        *(pc.list_flatten(lists) for lists in (table["key"], table["sampled"], opened)),
    ]
    # A null in a list would have been written as null.
    return (
        all(fields)
        and all(pc.all(pc.equal(pc.list_value_length(lists), 3)).as_py() is not False for lists in keys)
        and all((pc.min(column).as_py() or 0) >= 0 for column in numbers)
    )
