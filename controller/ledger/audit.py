"""The audit of a run's rollouts, from its log: every one that was admitted is trained, quarantined, filtered or open."""

import argparse
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from contracts.records import SOURCE_STRIDE
from controller.ledger.entries import Key
from controller.ledger.log import NAME, replay
from controller.ledger.log_columns import keys_of, tables, validated


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


class _Accounts:
    """What ended, and what is open at the end, as columns over the whole log."""

    def __init__(self) -> None:
        self._keys: list[list[np.ndarray]] = [[], [], []]  # epoch, prompt id, sample index
        self._digests: list[np.ndarray] = []  # of those that ended, which come first

    def add(self, keys: np.ndarray) -> None:
        kind = np.int32 if keys.max(initial=0) < 2**31 else np.int64
        for column, values in zip(self._keys, keys.T, strict=True):
            column.append(values.astype(kind))

    def add_digests(self, digests: pa.ChunkedArray) -> None:
        """Of the columns that scorers saw, by hashes of 64 bits."""
        coded = digests.fill_null("").combine_chunks().dictionary_encode()
        hashes = np.array([hash(digest) for digest in coded.dictionary.to_pylist()], dtype=np.int64)
        self._digests.append(hashes[coded.indices.to_numpy()])

    def check(self, result: Audit) -> None:
        epoch, prompt, sample = map(_joined, self._keys)
        if not len(epoch):
            return
        order = np.lexsort((sample, epoch, prompt))
        prompt = prompt[order]  # one by one: with ten million rows each takes 40 or 80 MB
        epoch = epoch[order]
        sample = sample[order]
        _check_rows(prompt, order, _joined(self._digests), result)
        del order
        starts = _runs(prompt, epoch, sample)
        if len(starts) < len(prompt):
            numbers = _lengths(starts, len(prompt))
            for i, number in zip(starts[numbers > 1], numbers[numbers > 1], strict=True):
                result.faults.append(f"rollout ({epoch[i]}, {prompt[i]}, {sample[i]}) ended {number} times")
            prompt, epoch = prompt[starts], epoch[starts]
        result.samples_per_prompt = int(sample.max()) + 1
        del starts, sample
        _check_stream(prompt, epoch, result)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    whole = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    parts.clear()
    return whole


def _runs(*columns: np.ndarray) -> np.ndarray:
    """Where another row begins, of sorted columns."""
    changes = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return np.flatnonzero(np.concatenate([[True], changes])) if len(columns[0]) else np.empty(0, dtype=np.int64)


def _lengths(starts: np.ndarray, end: int) -> np.ndarray:
    return np.diff(starts, append=end)


def audit(log: Path) -> Audit:
    """Count the surviving line of a run: every admitted rollout is trained, quarantined or filtered once, or open at the
    end.

    The count of admissions is the ledger's own, so the keys are checked for themselves too: every prompt has all of its
    samples, and every finished epoch the same prompts. All samples of a prompt were scored with the same row.

    Raises:
        ValueError: where a line is damaged, or a row is none of a ledger's.
    """
    result, accounts, opened = Audit(), _Accounts(), np.empty((0, 3), dtype=np.int64)
    for table, is_alive in tables(log):
        if not is_alive:
            result.rolled_back += len(table) - table["key"].null_count
            continue
        ended = table.filter(table["key"].is_valid()) if table["key"].null_count else table
        accounts.add(keys_of(ended["key"]))
        accounts.add_digests(ended["row"])
        result.trained += len(ended) - ended["trained"].null_count
        result.filtered += len(ended) - ended["filtered"].null_count
        for name, counter in (("trained", result.by_version), ("quarantined", result.reasons)):
            for row in ended[name].drop_null().value_counts().to_pylist():
                counter[row["values"]] += row["counts"]
        commits = table.filter(table["commit"].is_valid())
        if len(commits):
            result.admitted, result.updates = commits["admitted"][-1].as_py(), commits["commit"][-1].as_py()
            opened = keys_of(commits["open"][-1:].combine_chunks().flatten())
    result.quarantined = result.reasons.total()
    accounts.add(opened)
    result.open = len(opened)
    total = result.trained + result.quarantined + result.filtered + result.open
    if total != result.admitted:
        result.faults.append(f"{result.admitted} rollouts were admitted, {total} are accounted for")
    accounts.check(result)
    return result


def _check_stream(prompt: np.ndarray, epoch: np.ndarray, result: Audit) -> None:
    """Of rollouts that are sorted by prompt, then epoch."""
    starts = _runs(prompt, epoch)
    numbers, prompt, epoch = _lengths(starts, len(prompt)), prompt[starts], epoch[starts]
    order = np.argsort(epoch, kind="stable")
    for i in order[numbers[order] != result.samples_per_prompt]:
        result.faults.append(
            f"epoch {epoch[i]}, prompt {prompt[i]}: {numbers[i]} of {result.samples_per_prompt} samples are accounted for"
        )
    first, last = prompt[epoch == 0], epoch.max()
    of_epoch = np.split(order, _runs(epoch[order])[1:])
    for number, rows in zip(np.unique(epoch), of_epoch, strict=True):
        missing = np.setdiff1d(first, prompt[rows], assume_unique=True)
        if len(missing) and missing.min() < SOURCE_STRIDE and number < last:
            result.faults.append(
                f"epoch {number} lacks {len(missing)} prompts of epoch 0, the first is {missing.min()}"
            )
    _check_passes(prompt, result)


def _check_passes(prompt: np.ndarray, result: Audit) -> None:
    """Of several sources each is passed through in a time of its own, so an epoch lacks some of their prompts; but no prompt
    of a source comes for the third time before all others that are known came twice."""
    starts = _runs(prompt)
    times, prompt = _lengths(starts, len(prompt)), prompt[starts]
    for source in np.unique(prompt // SOURCE_STRIDE):
        of_source = prompt // SOURCE_STRIDE == source
        late, most = np.argmin(times[of_source]), times[of_source].max()
        least = times[of_source][late]
        if source and least < most - 1:
            result.faults.append(
                f"source {source}: prompt {prompt[of_source][late]} came {least} times, others {most} times"
            )


def _check_rows(prompt: np.ndarray, order: np.ndarray, digests: np.ndarray, result: Audit) -> None:
    """Of sorted prompts, and where they stood in the log."""
    ended = order < len(digests)  # what is open has no digest yet
    prompt, digests = prompt[ended], digests[order[ended]]
    if not len(prompt):
        return
    starts = _runs(prompt)
    differ = np.minimum.reduceat(digests, starts) != np.maximum.reduceat(digests, starts)
    for start, number in zip(starts[differ], _lengths(starts, len(prompt))[differ], strict=True):
        rows = len(np.unique(digests[start : start + number]))
        result.faults.append(f"prompt {prompt[start]} was scored with {rows} different rows")


def way(log: Path, key: Key) -> list[str]:
    """What the log says of one rollout, one line each."""
    rows, undone = (validated(rows, log) for rows in replay(log))
    lines = []
    for row, mark in [*((r, " (rolled back)") for r in undone), *((r, "") for r in rows)]:
        if tuple(row.get("key", ())) == key:
            ends = {"trained": "trained into version ", "filtered": "filtered: ", "quarantined": "quarantined: "}
            end = next(f"{said}{row[name]}" for name, said in ends.items() if name in row)
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
