"""The audit of a run's rollouts, from its log: every one that was admitted is trained, quarantined, filtered or open."""

import argparse
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from common.error_text import typed_line
from contracts.records import SOURCE_STRIDE
from controller.ledger.entries import Key
from controller.ledger.log import NAME, Row, replay

Count = Annotated[int, Field(ge=0)]


class _Line(BaseModel):
    """A row of the log, which others may have written."""

    model_config = ConfigDict(strict=True, extra="forbid")


class _Ended(_Line):
    key: tuple[Count, Count, Count]
    update: Count
    sampled: list[int] = []
    admitted_at: int
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


@dataclass
class Audit:
    """The accounts of a run."""

    admitted: int = 0
    trained: int = 0
    quarantined: int = 0
    filtered: int = 0
    open: int = 0
    rolled_back: int = 0
    updates: int = 0
    samples_per_prompt: int = 0
    by_version: Counter[int] = field(default_factory=Counter)  # rollouts that each policy version trained on
    reasons: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        filtered = f" + filtered {self.filtered}" if self.filtered else ""
        lines = [
            f"admitted {self.admitted} = trained {self.trained} + quarantined {self.quarantined}{filtered} "
            f"+ open {self.open}",
            f"updates {self.updates}, samples per prompt {self.samples_per_prompt}, rolled back {self.rolled_back}",
            *(f"  quarantined {number}: {reason}" for reason, number in self.reasons.most_common()),
            *(f"  WRONG: {fault}" for fault in self.faults),
            "does NOT balance" if self.faults else "balances: no rollout lost, none trained twice",
        ]
        return "\n".join(lines)


def audit(log: Path) -> Audit:
    """Count the surviving line of a run: every admitted rollout is trained, quarantined or filtered once, or open at the
    end.

    The count of admissions is the ledger's own, so the keys are checked for themselves too: every prompt has all of its
    samples, and every finished epoch the same prompts. All samples of a prompt were scored with the same row.
    """
    rows, undone = _replayed(log)
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
        elif "filtered" in row:
            result.filtered += 1
        else:
            result.quarantined += 1
            result.reasons[row["quarantined"]] += 1
    for key in map(tuple, last["open"]):
        times[key] += 1
        result.open += 1
    result.faults += [f"rollout {key} ended {number} times" for key, number in times.items() if number > 1]
    total = result.trained + result.quarantined + result.filtered + result.open
    if total != result.admitted:
        result.faults.append(f"{result.admitted} rollouts were admitted, {total} are accounted for")
    _check_stream(list(times), result)
    _check_rows(ends, result)
    return result


def _replayed(log: Path) -> tuple[list[Row], list[Row]]:
    """As `replay`. Raises ValueError where a row is none of a ledger's, too."""
    rows, undone = replay(log)
    try:
        _ROWS.validate_json(json.dumps([*rows, *undone]))
    except ValidationError as error:
        raise ValueError(f"{log} has a row that is none of a ledger: {typed_line(error)}") from None
    return rows, undone


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
        if missing and min(missing) < SOURCE_STRIDE and epoch < max(prompts):
            result.faults.append(f"epoch {epoch} lacks {len(missing)} prompts of epoch 0, the first is {min(missing)}")
    _check_passes(prompts, result)


def _check_passes(prompts: dict[int, Counter[int]], result: Audit) -> None:
    """Of several sources each is passed through in a time of its own, so an epoch lacks some of their prompts; but no prompt
    of a source comes for the third time before all others that are known came twice."""
    times: defaultdict[int, Counter[int]] = defaultdict(Counter)  # source -> prompt -> epochs
    for samples in prompts.values():
        for prompt_id in samples:
            times[prompt_id // SOURCE_STRIDE][prompt_id] += 1
    for source, counts in sorted(times.items()):
        late, most = min(counts, key=lambda prompt: (counts[prompt], prompt)), max(counts.values())
        if source and counts[late] < most - 1:
            result.faults.append(f"source {source}: prompt {late} came {counts[late]} times, others {most} times")


def _check_rows(ends: list[Row], result: Audit) -> None:
    seen: defaultdict[int, set[str]] = defaultdict(set)
    for row in ends:
        seen[row["key"][1]].add(row.get("row", ""))
    result.faults += [
        f"prompt {n} was scored with {len(rows)} different rows" for n, rows in seen.items() if len(rows) > 1
    ]


def way(log: Path, key: Key) -> list[str]:
    """What the log says of one rollout, one line each."""
    rows, undone = _replayed(log)
    lines = []
    for row, mark in [*((r, " (rolled back)") for r in undone), *((r, "") for r in rows)]:
        if tuple(row.get("key", ())) == key:
            end = next(f"{name}: {row[name]}" for name in ("trained", "filtered", "quarantined") if name in row)
            end = f"trained into version {row['trained']}" if "trained" in row else end
            by = f"sampled by {row['holder'] or 'nobody'} with version {row.get('sampled', '-')}, lease {row['leases']}"
            end += f" in update {row['update']}" + (f", scored with row {row['row']}" if row.get("row") else "")
            lines.append(f"admitted at version {row['admitted_at']}, {by}, {end}{mark}")
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
    try:
        if options.key:
            epoch, prompt_id, sample_index = map(int, options.key.split(","))
            lines = way(log, (epoch, prompt_id, sample_index))
            print("\n".join(lines) or f"no row of {log} names rollout {options.key}")
            return 0 if lines else 1
        result = audit(log)
    except (OSError, ValueError) as error:
        print(error)
        return 1
    print(result)
    for version, number in sorted(result.by_version.items()):
        print(f"  version {version}: trained on {number} rollouts")
    return 1 if result.faults else 0
