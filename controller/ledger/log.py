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
from pathlib import Path
from typing import Any

NAME = "ledger.jsonl"
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
    alive: list[tuple[int, Row | None]] = []  # byte offset and row; None: not readable
    undone: list[Row] = []
    offset = 0
    for line in log.read_bytes().splitlines(keepends=True):
        row = _read(line)
        if row and "resume" in row:
            undone += [r for start, r in alive if start >= row["resume"] and r]
            alive = [(start, r) for start, r in alive if start < row["resume"]]
        else:
            alive.append((offset, row))
        offset += len(line)
    damaged = [start for start, row in alive if row is None]
    if damaged:
        raise ValueError(f"{log} is damaged at byte {damaged[0]}")
    return [row for _, row in alive if row is not None], undone


def _read(line: bytes) -> Row | None:
    """The row of a line, or None where it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("resume", 0)) is int else None
