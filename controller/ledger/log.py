"""`ledger.jsonl`: what became of every rollout.

    {"key":[0,17,1],"trained":6,"update":7,"sampled":[5],"admitted_at":4,"leases":1,"holder":"actor-0"}
    {"key":[0,9,0],"quarantined":"no score","update":7,...}
    {"key":[0,4,2],"filtered":"the scores of its group are equal","update":7,...}
    {"commit":7,"version":6,"admitted":40,"open":[[0,3,0],...]}     the rows above are durable; what is still open
    {"resume":8123}                                                 rows from that byte on, up to here, were rolled back

The file is only ever appended to. A run that went back to an older commit keeps the rows of the line it left.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "ledger.jsonl"
BLOCK = 2**24  # bytes that are read at once
Row = dict[str, Any]


def rejoin(log: Path, offset: int, rows: str) -> int:
    """Append `rows`, which belong at byte `offset`, and fsync. Returns the size of the file.

    Rows that are there already stay. Whatever else lies behind `offset` is of a line that was left, or torn by a full disk
    or a crash: it is marked, not removed.

    Raises:
        ValueError: where the file ends before `offset`: rows of earlier commits are missing.
    """
    with log.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size < offset:
            raise ValueError(f"{log} has {size} bytes, the commit knows of {offset}: rows of earlier commits are lost")
        file.seek(offset)
        tail, new = file.read(), rows.encode()
        if tail.startswith(new):
            offset, tail, new = offset + len(new), tail[len(new) :], b""
        if tail:
            mark = json.dumps({"resume": offset}) + "\n"
            # A torn line must not become a row, even where its newline alone is missing.
            new = (b"" if tail.endswith(b"\n") else b"#torn\n") + mark.encode() + new
        file.write(new)
        file.flush()
        os.fsync(file.fileno())
        return file.seek(0, os.SEEK_END)


def replay(log: Path) -> tuple[list[Row], list[Row]]:
    """Rows of the surviving line of weights, and rows that were rolled back, each in the order of the file.

    Raises:
        ValueError: where a line of the surviving line is damaged.
    """
    rows: dict[bool, list[Row]] = {True: [], False: []}
    for offset, lines, is_alive in pieces(log):
        rows[is_alive] += rows_of(log, offset, lines, is_alive)
    return rows[True], rows[False]


def pieces(log: Path) -> Iterator[tuple[int, bytes, bool]]:
    """The log in whole lines: where they begin, they themselves, and whether they are of the surviving line of weights."""
    dead = sorted(_rolled_back(log))
    for offset, lines in _blocks(log):
        start, end = 0, len(lines)
        while start < end:
            while dead and dead[0][1] <= offset + start:
                dead.pop(0)
            is_alive = not dead or offset + start < dead[0][0]
            bound = min(end, dead[0][not is_alive] - offset) if dead else end
            bound = lines.find(b"\n", bound - 1) + 1 or end  # the end of a line, whatever a mark says
            yield offset + start, lines[start:bound], is_alive
            start = bound


def rows_of(log: Path, offset: int, lines: bytes, is_alive: bool) -> Iterator[Row]:
    """The rows of a piece. Raises ValueError where a line of the surviving line is damaged."""
    for line in lines.splitlines(keepends=True):
        row = _read(line)
        if row is None and is_alive:
            raise ValueError(f"{log} is damaged at byte {offset}")
        if row is not None and "resume" not in row:
            yield row
        offset += len(line)


def _rolled_back(log: Path) -> Iterator[tuple[int, int]]:
    """Bytes from which and up to which the lines count no more, marks among them."""
    for offset, lines in _blocks(log):
        found = lines.find(b'"resume"')
        while found >= 0:
            start, end = lines.rfind(b"\n", 0, found) + 1, lines.find(b"\n", found) + 1 or len(lines)
            row = _read(lines[start:end])
            if row and "resume" in row:
                yield min(row["resume"], offset + start), offset + end
            found = lines.find(b'"resume"', end)


def _blocks(log: Path) -> Iterator[tuple[int, bytes]]:
    with log.open("rb") as file:
        while lines := file.read(BLOCK) + file.readline():
            yield file.tell() - len(lines), lines


def _read(line: bytes) -> Row | None:
    """The row of a line, or None where it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("resume", 0)) is int else None
