"""`ledger.jsonl`: what became of every rollout, and the audit of a run.

    {"key":[0,17,1],"trained":6,"update":7,"sampled":[5],"admitted_at":4,"leases":1,"holder":"actor-0"}
    {"key":[0,9,0],"quarantined":"no score","update":7,...}
    {"commit":7,"version":6,"admitted":40,"open":[[0,3,0],...]}     the rows above are durable; what is still open
    {"resume":8123}                                                 rows from that byte on, up to here, were rolled back

The file is only ever appended to. A run that went back to an older commit keeps the rows of the line it left.
"""

import argparse
import json
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "ledger.jsonl"
Row = dict[str, Any]
Key = tuple[int, int, int]


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
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if row and "resume" in row:
            undone += [r for start, r in alive if start >= row["resume"] and r]
            alive = [(start, r) for start, r in alive if start < row["resume"]]
        else:
            alive.append((offset, row))
        offset += len(line)
    damaged = [start for start, row in alive if row is None]
    if damaged:
        raise ValueError(f"{log} is damaged at byte {damaged[0]}")
    return [row for _, row in alive if row], undone


@dataclass
class Audit:
    """The accounts of a run."""

    admitted: int = 0
    trained: int = 0
    quarantined: int = 0
    open: int = 0
    rolled_back: int = 0
    updates: int = 0
    samples_per_prompt: int = 0
    by_version: Counter[int] = field(default_factory=Counter)  # rollouts that each policy version trained on
    reasons: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"admitted {self.admitted} = trained {self.trained} + quarantined {self.quarantined} + open {self.open}",
            f"updates {self.updates}, samples per prompt {self.samples_per_prompt}, rolled back {self.rolled_back}",
            *(f"  quarantined {number}: {reason}" for reason, number in self.reasons.most_common()),
            *(f"  WRONG: {fault}" for fault in self.faults),
            "does NOT balance" if self.faults else "balances: no rollout lost, none trained twice",
        ]
        return "\n".join(lines)


def audit(log: Path) -> Audit:
    """Count the surviving line of a run: every admitted rollout is trained or quarantined once, or open at the end.

    The count of admissions is the ledger's own, so the keys are checked for themselves too: every prompt has all of its
    samples, and every finished epoch the same prompts.
    """
    rows, undone = replay(log)
    ends = [row for row in rows if "key" in row]
    commits = [row for row in rows if "commit" in row]
    last: Row = commits[-1] if commits else {"commit": 0, "version": 0, "admitted": 0, "open": []}
    result = Audit(last["admitted"], updates=last["commit"], rolled_back=sum("key" in row for row in undone))
    times: Counter[Key] = Counter()
    for row in ends:
        times[tuple(row["key"])] += 1
        if "trained" in row:
            result.trained += 1
            result.by_version[row["trained"]] += 1
        else:
            result.quarantined += 1
            result.reasons[row["quarantined"]] += 1
    for key in map(tuple, last["open"]):
        times[key] += 1
        result.open += 1
    result.faults += [f"rollout {key} ended {number} times" for key, number in times.items() if number > 1]
    total = result.trained + result.quarantined + result.open
    if total != result.admitted:
        result.faults.append(f"{result.admitted} rollouts were admitted, {total} are accounted for")
    _check_stream(list(times), result)
    return result


def _check_stream(keys: list[Key], result: Audit) -> None:
    prompts: defaultdict[int, Counter[int]] = defaultdict(Counter)  # epoch -> prompt -> samples
    for epoch, prompt_id, sample_index in keys:
        prompts[epoch][prompt_id] += 1
        result.samples_per_prompt = max(result.samples_per_prompt, sample_index + 1)
    for epoch, samples in sorted(prompts.items()):
        for prompt_id, number in samples.items():
            if number != result.samples_per_prompt:
                result.faults.append(
                    f"epoch {epoch}, prompt {prompt_id}: {number} of {result.samples_per_prompt} samples are accounted for"
                )
        missing = prompts[0].keys() - samples.keys()
        if missing and epoch < max(prompts):
            result.faults.append(f"epoch {epoch} lacks {len(missing)} prompts of epoch 0, the first is {min(missing)}")


def way(log: Path, key: Key) -> list[str]:
    """What the log says of one rollout, one line each."""
    rows, undone = replay(log)
    lines = []
    for row, mark in [*((r, " (rolled back)") for r in undone), *((r, "") for r in rows)]:
        if tuple(row.get("key", ())) == key:
            end = f"trained into version {row['trained']}" if "trained" in row else f"quarantined: {row['quarantined']}"
            by = f"sampled by {row['holder'] or 'nobody'} with version {row.get('sampled', '-')}, lease {row['leases']}"
            lines.append(f"admitted at version {row['admitted_at']}, {by}, {end} in update {row['update']}{mark}")
    commits = [row for row in rows if "commit" in row]
    if commits and list(key) in commits[-1]["open"]:
        lines.append(f"open at the last commit (update {commits[-1]['commit']})")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """`python -m controller.ledger RUN [--key EPOCH,PROMPT,SAMPLE]`; 0 where the accounts balance."""
    parser = argparse.ArgumentParser("python -m controller.ledger", description="audit the rollouts of a run")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--key", help="show the way of one rollout: EPOCH,PROMPT_ID,SAMPLE_INDEX")
    options = parser.parse_args(arguments)
    log = options.run / NAME
    if not log.exists():
        print(f"{log} does not exist: this run has committed nothing")
        return 1
    if options.key:
        epoch, prompt_id, sample_index = map(int, options.key.split(","))
        lines = way(log, (epoch, prompt_id, sample_index))
        print("\n".join(lines) or f"no row of {log} names rollout {options.key}")
        return 0 if lines else 1
    try:
        result = audit(log)
    except ValueError as error:
        print(error)
        return 1
    print(result)
    for version, number in sorted(result.by_version.items()):
        print(f"  version {version}: trained on {number} rollouts")
    return 1 if result.faults else 0
