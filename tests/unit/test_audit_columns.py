"""The audit reads columns, in pieces; here is another that reads line by line and counts in dictionaries."""

import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from controller.ledger import log as log_module
from controller.ledger import log_columns
from controller.ledger.audit import audit
from controller.ledger.log import NAME, replay
from controller.ledger.log_columns import tables
from controller.ledger.trained_lines import trained_rows

STRIDE = 10**9


def plain_audit(text: str) -> dict[str, Any]:
    alive: list[tuple[int, dict]] = []
    undone, offset = 0, 0
    for line in text.splitlines(keepends=True):
        row = json.loads(line)
        if "resume" in row:
            undone += sum("key" in r for at, r in alive if at >= row["resume"])
            alive = [(at, r) for at, r in alive if at < row["resume"]]
        else:
            alive.append((offset, row))
        offset += len(line)
    ends = [row for _, row in alive if "key" in row]
    commits = [row for _, row in alive if "commit" in row] or [{"admitted": 0, "commit": 0, "open": []}]
    opened = commits[-1]["open"]
    times = Counter(tuple(key) for key in [*(row["key"] for row in ends), *opened])
    faults = {f"rollout {key} ended {n} times" for key, n in times.items() if n > 1}
    total, admitted = len(ends) + len(opened), commits[-1]["admitted"]
    if total != admitted:
        faults.add(f"{admitted} rollouts were admitted, {total} are accounted for")
    samples = Counter((epoch, prompt) for epoch, prompt, _ in times)
    size = max((sample + 1 for *_, sample in times), default=0)
    faults |= {
        f"epoch {e}, prompt {p}: {n} of {size} samples are accounted for" for (e, p), n in samples.items() if n != size
    }
    of_epoch: dict[int, set[int]] = defaultdict(set)
    passes: dict[int, Counter[int]] = defaultdict(Counter)
    for epoch, prompt in samples:
        of_epoch[epoch].add(prompt)
        passes[prompt // STRIDE][prompt] += 1
    for epoch, prompts in of_epoch.items():
        missing = of_epoch.get(0, set()) - prompts
        if missing and min(missing) < STRIDE and epoch < max(of_epoch):
            faults.add(f"epoch {epoch} lacks {len(missing)} prompts of epoch 0, the first is {min(missing)}")
    for source, counts in passes.items():
        late, most = min(counts, key=lambda p: (counts[p], p)), max(counts.values())
        if source and counts[late] < most - 1:
            faults.add(f"source {source}: prompt {late} came {counts[late]} times, others {most} times")
    rows = defaultdict(set)
    for row in ends:
        rows[row["key"][1]].add(row.get("row", ""))
    faults |= {f"prompt {p} was scored with {len(seen)} different rows" for p, seen in rows.items() if len(seen) > 1}
    return {
        "admitted": admitted,
        "trained": sum("trained" in row for row in ends),
        "quarantined": sum("quarantined" in row for row in ends),
        "filtered": sum("filtered" in row for row in ends),
        "open": len(opened),
        "rolled_back": undone,
        "updates": commits[-1]["commit"],
        "samples_per_prompt": size,
        "by_version": Counter(row["trained"] for row in ends if "trained" in row),
        "reasons": Counter(row["quarantined"] for row in ends if "quarantined" in row),
        "faults": faults,
    }


def random_log(rng: random.Random) -> str:
    """Of a few prompts of one source or two, with what may go wrong, and marks of what was rolled back, one in another."""
    text, starts, keys = "", [0], []
    wrong = rng.choice([0.0, 0.05])
    for update in range(rng.randint(0, 12)):
        for number in range(rng.randint(0, 8)):
            order = 8 * update + number
            epoch, prompt = divmod(order // 2, 5)
            key = [epoch, prompt + STRIDE * rng.choice([0, 0, 1, 7]) * (rng.random() < wrong), order % 2]
            if keys and rng.random() < wrong:
                key = rng.choice(keys)
            keys.append(key)
            end = rng.choice(
                [{"trained": update}] * 6 + [{"quarantined": f'no "score" {prompt}'}, {"filtered": "equal ä"}]
            )
            way = {
                "update": update,
                "sampled": [update] * rng.randint(0, 2),
                "admitted_at": 0,
                "leases": 1,
                "holder": "a",
            }
            row = {"key": key, **end, **way, **rng.choice([{}, {"row": "0" * 15 + str(prompt)}])}
            text += json.dumps(row, separators=(",", ":")) + "\n"
        opened = [rng.choice(keys)] if keys and rng.random() < 0.2 else []
        commit = {"commit": update, "version": update, "admitted": len(keys), "open": opened}
        text += json.dumps(commit) + "\n"
        starts.append(len(text.encode()))
        if rng.random() < 0.2:
            text += json.dumps({"resume": rng.choice(starts)}) + "\n"
    return text


@pytest.mark.parametrize("block", [1, 100, 1000, 2**24])
def test_both_audits_find_the_same(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "BLOCK", block)
    rng, log, with_faults = random.Random(block), tmp_path / NAME, 0
    for _ in range(40):
        text = random_log(rng)
        log.write_text(text)
        found = audit(log)
        assert len(found.faults) == len(set(found.faults))
        assert {**vars(found), "faults": set(found.faults)} == plain_audit(text)
        with_faults += bool(found.faults)
    assert with_faults > 10


ROW = {"key": [0, 0, 0], "trained": 1, "update": 1, "admitted_at": 0, "leases": 1, "holder": "a"}
COMMIT = {"commit": 1, "version": 1, "admitted": 1, "open": []}


@pytest.mark.parametrize(
    "row",
    [
        {**ROW, "key": [0, 0]},
        {**ROW, "key": [0, 0, None]},
        {**ROW, "key": [0, -1, 0]},
        {**ROW, "key": [0, 0.5, 0]},
        {**ROW, "key": [0, True, 0]},
        {**ROW, "key": [0, 2**63, 0]},
        {**ROW, "filtered": "too"},
        {**ROW, "trained": None, "filtered": "x"},
        {**ROW, "trained": -1},
        {**ROW, "commit": 1},
        {**ROW, "open": []},
        {**ROW, "other": 1},
        {**ROW, "sampled": [1, -1]},
        {**ROW, "row": 7},
        {name: value for name, value in ROW.items() if name != "trained"},
        {name: value for name, value in ROW.items() if name != "holder"},
        {**COMMIT, "row": ""},
        {**COMMIT, "open": [[0, 0]]},
        {**COMMIT, "open": [0]},
        {name: value for name, value in COMMIT.items() if name != "open"},
        {},
    ],
)
@pytest.mark.parametrize("is_alone", [True, False])
def test_what_is_no_row_of_a_ledger_is_refused(row: dict[str, Any], is_alone: bool, tmp_path: Path) -> None:
    rows = [row] if is_alone else [ROW, row, COMMIT]
    (tmp_path / NAME).write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(ValueError, match="has a row that is none of a ledger"):
        list(tables(tmp_path / NAME))


@pytest.mark.parametrize(
    "line", [b"\n", b"{}{}\n", b'{"key":[0,1\n', b"#torn\n", b"\xff\n", b'{"resume":1.5}\n', b"7\n"]
)
def test_a_damaged_line_is_named_by_its_byte(line: bytes, tmp_path: Path) -> None:
    first = json.dumps(ROW).encode() + b"\n"
    (tmp_path / NAME).write_bytes(first + line + json.dumps(COMMIT).encode() + b"\n")
    for read in (audit, replay):
        with pytest.raises(ValueError, match=f"is damaged at byte {len(first)}"):
            read(tmp_path / NAME)


def written(row: dict[str, Any]) -> bytes:
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"


def trained_row(**different: Any) -> dict[str, Any]:
    order = ("key", "trained", "update", "sampled", "admitted_at", "leases", "holder", "row")
    row = {"key": [0, 17, 1], "trained": 6, "update": 7, "sampled": [5], "admitted_at": 4, "leases": 1, "holder": "a"}
    return {name: (row | different)[name] for name in order if name in row | different}


def test_rows_that_trained_are_read_without_a_parser() -> None:
    digest = "0123456789abcdef"
    known = [
        trained_row(),
        trained_row(key=[10**17, 0, 99], trained=10**18 - 1, row=digest),
        trained_row(sampled=[]),
        trained_row(sampled=[4, 5], holder="", row="0" * 16),
        trained_row(holder=digest),
        trained_row(holder="row"),
        trained_row(holder="of, {several} [words]"),
    ]
    others = [
        trained_row(trained=10**18),  # as large a number may be more than 64 bits take
        trained_row(holder='quo"ted'),
        trained_row(holder="\u00e4"),
        trained_row(sampled=[1, 2, 3]),
        trained_row(row=digest[:-1]),
        trained_row(row=digest.upper()),
        {**ROW, "sampled": [0]},
        COMMIT,
    ]
    lines = [written(row) for row in known] + [json.dumps(known[0]).encode() + b"\n"] + [written(row) for row in others]
    order = random.Random(0).sample(range(len(lines)), len(lines))
    columns, rest = trained_rows(b"".join(lines[i] for i in order) + lines[0][:-1])
    found = [known[i] for i in order if i < len(known)]
    assert columns["key"].to_pylist() == [row["key"] for row in found]
    assert columns["trained"].to_pylist() == [row["trained"] for row in found]
    assert columns["row"].to_pylist() == [row.get("row") for row in found]
    assert rest == b"".join(lines[i] for i in order if i >= len(known)) + lines[0][:-1]


def test_whatever_a_log_holds_the_parser_alone_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs of which a few bytes were changed: the same accounts, or the same refusal."""
    rng, log, refused = random.Random(5), tmp_path / NAME, 0

    def found() -> Any:
        try:
            return vars(audit(log))
        except ValueError as error:
            return str(error)

    for _ in range(150):
        text = bytearray(random_log(rng).encode())
        for _ in range(rng.randint(0, 3) if text else 0):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 2)] = rng.choice(
                [b"", b"0", b"9", b"-", b'"', b" ", b"\n", b"\\", b"\xff", b",1"]
            )
        log.write_bytes(text)
        fast = found()
        with monkeypatch.context() as patched:
            patched.setattr(log_columns, "trained_rows", lambda lines: (trained_rows(b"")[0], lines))
            assert fast == found()
        refused += isinstance(fast, str)
    assert 30 < refused < 120
