"""Readers of files that others may write: whatever is in them, what comes is a value or the reader's own error, and never a
wrong success."""

import gzip
import hashlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from common.files.fingerprints import json_digest
from common.text.encoding import DataError
from contracts.config import DataConfig, LoggerConfig, SourceConfig
from controller.commits.commit_store import CheckpointError, best, newest_valid, read_commit, verified
from controller.data import row_formats
from controller.data.row_files import detect_format, load_rows
from controller.ledger.audit import main as audit
from controller.ledger.log import NAME
from controller.pipeline.stage_cache import StageStore
from controller.record.reader import ReportError
from controller.record.run_log import RunLog
from controller.record.status_file import Status, read_status
from controller.report import run_page
from controller.report.status import lines_of

fuzz = settings(
    max_examples=150, phases=[Phase.generate], deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
# Numbers and texts that have broken readers before: beyond float, more digits than Python parses, other ends of lines.
leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([10**400, -(10**400), 2**63, -1, "\u2028", "\x1b[2J", "\x00", "../x", "1e999", [], {}])
)  # fmt: skip
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
broken = st.binary(max_size=60) | st.sampled_from(
    [
        b"",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 5000,
        b'"\\ud800"',
        b"\xed\xa0\x80",
        b"\xff\xfe",
        b"{}",
        b"[1]",
        b"1",
        b'"x"',
    ]
)


def changed(good: dict[str, Any], *path: str) -> st.SearchStrategy[dict[str, Any]]:
    """`good` with one or two of its values replaced, or gone."""

    def change(changes: list[tuple[str, Any, bool]]) -> dict[str, Any]:
        found = dict(good)
        for name, value, stays in changes:
            if stays:
                found[name] = value
            else:
                found.pop(name, None)
        return found

    one = st.tuples(st.sampled_from(sorted(good)), values, st.integers(0, 4).map(bool))
    return st.lists(one, min_size=1, max_size=2).map(change)


def line(row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


# ---- commits

CONTENT = {
    "format": 2, "step": 4, "version": 4, "identity": {"seed": 1}, "config": {}, "scorers": {"proxy": "v"}, "packages": {},
    "world_size": 1, "quality": ["reward/score_mean", 0.5],
    "files": {
        "driver.json": [2, hashlib.sha256(b"{}").hexdigest()], "driver.safetensors": [1, hashlib.sha256(b"a").hexdigest()],
        "rank_0.safetensors": [1, hashlib.sha256(b"r").hexdigest()],
    },
}  # fmt: skip


def commit_of(run_dir: Path, content: Any, digest: str | None = None) -> Path:
    folder = run_dir / "checkpoints/step_4"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("driver.json", "{}"), ("driver.safetensors", "a"), ("rank_0.safetensors", "r")):
        (folder / name).write_text(text)
    manifest = {"sha256": digest or json_digest(content), "content": content}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    return folder


def test_the_commit_that_is_changed_below_is_valid(tmp_path: Path) -> None:
    commit_of(tmp_path, CONTENT)
    assert verified(tmp_path, 4).step == 4


@fuzz
@given(
    content=changed(CONTENT) | changed(CONTENT["files"]).map(lambda files: {**CONTENT, "files": files}) | values  # type: ignore[arg-type]
)
def test_a_manifest_of_others_is_valid_or_refused(tmp_path: Path, content: Any) -> None:
    """Its digest is right, as everybody can compute it."""
    commit_of(tmp_path, content)
    try:
        commit = verified(tmp_path, 4)
    except CheckpointError:
        commit = None
    else:
        assert isinstance(commit.step, int)
        assert commit.num_bytes == sum(size for size, _ in content["files"].values())
        for name, (size, digest) in content["files"].items():
            raw = (commit.path / name).read_bytes()
            assert (len(raw), hashlib.sha256(raw).hexdigest()) == (size, digest)
        json.dumps([commit.run.config, commit.run.identity])
    best(tmp_path)
    try:
        newest_valid(tmp_path, lambda text: None)
    except CheckpointError:
        assert commit is None


@fuzz
@given(raw=broken)
def test_a_broken_manifest_is_refused(tmp_path: Path, raw: bytes) -> None:
    folder = commit_of(tmp_path, CONTENT)
    (folder / "MANIFEST.json").write_bytes(raw)
    with pytest.raises(CheckpointError):
        read_commit(folder)


# ---- the stage cache


class Cache:
    """One finished stage in a cache."""

    def __init__(self, folder: Path):
        self.said: list[str] = []
        self.log = RunLog(folder / "run", {}, LoggerConfig(wandb="disabled"), "test")
        self.store = StageStore(folder / "cache", self.log, True, self.said.append, lambda name: {"a.py": "1"})
        self.log.log("sft", 1, {"loss": 1.0})
        self.result = self.store.run("sft", {"seed": 1}, self._work)
        self.folder = Path(self.result.path).parent
        self.content = json.loads((self.folder / "stage.json").read_text())

    def _work(self, model: Path) -> dict[str, Any]:
        model.mkdir()
        (model / "config.json").write_text("{}")
        return {"loss": 1.0}

    def found(self) -> Any:
        return self.store.find("sft", {"seed": 1})


@pytest.fixture
def cache(tmp_path: Path, made_up_metrics: None) -> Cache:
    return Cache(tmp_path)


@fuzz
@given(data=st.data())
def test_a_stage_of_others_is_taken_whole_or_made_anew(cache: Cache, data: st.DataObject) -> None:
    content = data.draw(changed(cache.content) | values)
    (cache.folder / "stage.json").write_text(json.dumps(content))
    found = cache.found()
    if found is not None:
        assert {**content, "seconds": 0, "metrics": 0, "code": 0} == {
            **cache.content,
            "seconds": 0,
            "metrics": 0,
            "code": 0,
        }
        assert found.metrics == content["metrics"]


@fuzz
@given(raw=broken, name=st.sampled_from(["stage.json", "log/metrics.jsonl", "log/samples.jsonl", "log/phases.jsonl"]))
def test_a_broken_file_of_a_stage_is_made_anew(cache: Cache, raw: bytes, name: str) -> None:
    before = (cache.folder / name).read_bytes()
    (cache.folder / name).write_bytes(raw)
    found = cache.found()
    (cache.folder / name).write_bytes(before)
    if found is not None:
        assert name != "stage.json"
        assert all(isinstance(json.loads(text), dict) for text in raw.decode().split("\n") if text.strip())


# ---- the ledger

WAY = {"update": 1, "sampled": [0], "admitted_at": 0, "leases": 1, "holder": "actor-0"}
TRAINED = {"key": [0, 0, 0], "trained": 0, **WAY}
QUARANTINED = {"key": [0, 1, 0], "quarantined": "no score", **WAY}
COMMIT = {"commit": 1, "version": 1, "admitted": 2, "open": []}


def test_the_ledger_that_is_changed_below_balances(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / NAME).write_bytes(line(TRAINED) + line(QUARANTINED) + line(COMMIT))
    assert audit([str(tmp_path)]) == 0


@fuzz
@given(
    rows=st.lists(
        changed(TRAINED) | changed(QUARANTINED) | changed(COMMIT) | st.just(TRAINED) | st.just(COMMIT)
        | st.fixed_dictionaries({"resume": values}) | values,
        max_size=5,
    )
)  # fmt: skip
def test_a_ledger_of_others_is_counted_or_refused(tmp_path: Path, rows: list[Any]) -> None:
    (tmp_path / NAME).write_bytes(b"".join(map(line, rows)))
    code = audit([str(tmp_path)])
    assert code in (0, 1)
    if code == 0:  # every line was understood, and no rollout ended twice
        keys = [tuple(row["key"]) for row in rows if "resume" not in row and "key" in row]
        assert len(keys) == len(set(keys)) or any("resume" in row for row in rows)
    assert audit([str(tmp_path), "--key", "0,0,0"]) in (0, 1)


@fuzz
@given(raw=broken.filter(bytes.strip))
def test_a_broken_line_of_a_ledger_is_told(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / NAME).write_bytes(line(TRAINED) + raw + b"\n" + line(COMMIT))
    assert audit([str(tmp_path)]) == 1


# ---- status, metrics and the page of a run

FACTS = {"state": "running", "pid": 1, "host": socket.gethostname(), "started": 1.0, "beat": 2.0, "waiting_for": "x",
         "waiting_s": 1.0, "error": "y", "ended": 3.0, "code": "z"}  # fmt: skip
UPDATE = {
    "stage": "ppo", "step": 1, "progress/version": 1, "progress/eta_s": 3.0, "reward/score_mean": 0.1,
    "reward/gold_mean": 0.1,
    "reward/score_std": 1.0, "kl/ref_seq": 0.5, "perf/step_s": 1.0, "completion/len_mean": 10.0, "completion/eos_frac": 1.0,
    "policy/entropy": 1.0, "ppo/clip_frac": 0.1, "fault/actor_lost": 0,
}  # fmt: skip


@fuzz
@given(facts=changed(FACTS) | values, raw=st.none() | broken)
def test_a_status_of_others_is_told(tmp_path: Path, facts: Any, raw: bytes | None) -> None:
    (tmp_path / "status.json").write_bytes(json.dumps(facts).encode() if raw is None else raw)
    (tmp_path / "metrics.jsonl").write_bytes(line(UPDATE))
    found = read_status(tmp_path)
    assert isinstance(found, Status)
    if found.state == "running":
        assert isinstance(facts, dict)
        assert isinstance(facts["beat"], int | float)
    assert lines_of(tmp_path)


@fuzz
@given(rows=st.lists(changed(UPDATE) | values, max_size=4), raw=broken)
def test_metrics_of_others_are_told(tmp_path: Path, rows: list[Any], raw: bytes) -> None:
    (tmp_path / "status.json").write_bytes(json.dumps(FACTS).encode())
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(map(line, rows)) + raw)
    assert lines_of(tmp_path)


@settings(fuzz, max_examples=40)
@given(
    rows=st.lists(changed(UPDATE) | values, max_size=4), raw=broken,
    name=st.sampled_from(["samples.jsonl", "phases.jsonl", "stages.json", "evaluation.json", "config.yaml"]),
    content=values,
)  # fmt: skip
def test_a_page_is_drawn_of_whatever_is_there(
    tmp_path: Path, rows: list[Any], raw: bytes, name: str, content: Any
) -> None:
    for file in tmp_path.iterdir():
        file.unlink()
    (tmp_path / "metrics.jsonl").write_bytes(line(UPDATE) + b"".join(map(line, rows)))
    for value in (raw, json.dumps(content).encode()):
        (tmp_path / name).write_bytes(value)
        try:
            assert run_page.render(tmp_path).exists()
        except ReportError:
            continue


# ---- rows of data

COLUMNS = ("text", "prompt", "completion", "chosen", "rejected", "messages", "ratings", "rating", "label", "system", "tools",
           "instruction", "input", "output", "conversations", "info", "summaries", "choice", "score_chosen")  # fmt: skip


@fuzz
@given(raw=broken, pack=st.sampled_from([bytes, gzip.compress]), name=st.sampled_from([".jsonl", ".json", ".csv"]))
def test_a_broken_data_file_is_told(tmp_path: Path, raw: bytes, pack: Callable[[bytes], bytes], name: str) -> None:
    path = tmp_path / f"rows{name}{'' if pack is bytes else '.gz'}"
    path.write_bytes(pack(raw))
    try:
        rows = load_rows(SourceConfig(path=str(path)))
    except DataError:
        return
    assert rows
    assert all(isinstance(row, dict) for row in rows)


@settings(fuzz, max_examples=25)
@given(raw=broken, name=st.sampled_from([".parquet", ".jsonl.gz", ".jsonl.zst", ".csv.bz2"]))
def test_a_data_file_that_is_none_is_told(tmp_path: Path, raw: bytes, name: str) -> None:
    (tmp_path / f"rows{name}").write_bytes(raw)
    with pytest.raises(DataError):
        load_rows(SourceConfig(path=str(tmp_path / f"rows{name}")))


@settings(fuzz, max_examples=400)
@given(row=st.dictionaries(st.sampled_from(COLUMNS), values, min_size=1, max_size=6), chat=st.booleans())
def test_a_row_of_others_is_read_or_left_out(tmp_path: Path, row: dict[str, Any], chat: bool) -> None:
    (tmp_path / "rows.jsonl").write_bytes(line(row))
    source, data = SourceConfig(path=str(tmp_path / "rows.jsonl")), DataConfig(chat=chat)
    try:
        (found,) = load_rows(source)
    except DataError:
        return
    shape = row_formats.shape_of(found, source)
    for form in ("pair", "prompt_completion", "messages", "text", "prompt", "rated"):
        source.format = form
        try:
            ours = shape.convert(found, source) if shape else found
            detect_format(source, ours)
            traits = row_formats.traits_of([ours], source)
            if form == "pair":
                sides = row_formats.pair_parts(ours, source, data, 4, traits)
                assert 0.5 <= row_formats.preference(ours, source) <= 1
            elif form == "rated":
                assert all(abs(value) < float("inf") for value in row_formats.ratings(ours, source))
                continue
            else:
                sides = (row_formats.parts(ours, form, source, data, 4, traits),)
        except DataError:  # LeftOut is one
            continue
        assert all(isinstance(side.completion, str | list) for side in sides)
