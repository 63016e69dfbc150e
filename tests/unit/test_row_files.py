"""Files as people have them: packed, in shards, behind globs, and `.json` with an object a line."""

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest

from controller.data.row_files import _read_hub, load_rows
from tests.unit.test_data import refusal, source


def test_packed_files_and_lines_in_json(tmp_path: Path) -> None:
    rows = [{"text": "größer", "n": 1}, {"text": "two\u2028lines", "n": 2}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    listed = json.dumps(rows).encode()
    csv = "text,n\ngrößer,1\ntwo\u2028lines,2\n".encode()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    zst = pyarrow.compress(lines, codec="zstd", asbytes=True)
    for name, content in {
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": zst,
        "a.jsonl.bz2": bz2.compress(lines),
        "a.json": lines,
        "one.json": lines.splitlines()[0],
        "b.json.gz": gzip.compress(listed),
        "c.json.zst": pyarrow.compress(lines, codec="zstd", asbytes=True),
        "a.csv.gz": gzip.compress(csv),
        "a.parquet.zst": pyarrow.compress((tmp_path / "a.parquet").read_bytes(), codec="zstd", asbytes=True),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert load_rows(source(tmp_path / name)) == rows[: 1 if name == "one.json" else 2], name
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(lines)[:-9])
    assert "torn.jsonl.gz cannot be unpacked as .gz" in refusal(load_rows, source(tmp_path / "torn.jsonl.gz"))
    (tmp_path / "no.jsonl.zst").write_bytes(b"no")
    assert "no.jsonl.zst cannot be unpacked as .zst" in refusal(load_rows, source(tmp_path / "no.jsonl.zst"))
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"x"))
    assert "a.tar.gz has '.gz'" in refusal(load_rows, source(tmp_path / "a.tar.gz"))


def test_directories_of_shards_and_globs(tmp_path: Path) -> None:
    def shard(name: str, *values: int) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps({"n": value}) + "\n" for value in values))

    shard("plain/part-1.jsonl", 1, 2)
    shard("plain/part-0.jsonl", 0)
    shard("plain/.part-9.jsonl", 9)
    (tmp_path / "plain/README.md").write_text("no rows")
    shard("hub/data/train-00001-of-00002.jsonl", 3)
    shard("hub/data/train-00000-of-00002.jsonl", 2)
    shard("hub/data/test-00000-of-00001.jsonl", 4)

    def numbers(path: str, **options: Any) -> list[int]:
        return [row["n"] for row in load_rows(source(tmp_path / path, **options))]

    assert numbers("plain") == [0, 1, 2]
    assert numbers("plain", max_rows=2) == [0, 1]
    assert numbers("hub") == [2, 3]
    assert numbers("hub", split="test") == [4]
    assert numbers("hub/data/t*.jsonl") == [4, 2, 3]
    assert numbers("plain/part-[0-1].jsonl") == [0, 1, 2]
    message = refusal(load_rows, source(tmp_path / "hub", split="tst"), "data.test")
    assert message == f"data.test.split: {tmp_path / 'hub'} has test, train; found 'tst'; did you mean 'test'?"
    assert "has train; found 'test'" in refusal(load_rows, source(tmp_path / "plain", split="test"))
    assert "no such file" in refusal(load_rows, source(tmp_path / "plain/x*.jsonl"))
    assert "a file has one split" in refusal(load_rows, source(tmp_path / "plain/p*.jsonl", split="test"))
    assert "README.md has '.md'" in refusal(load_rows, source(tmp_path / "plain/*"))
    shard("named/sums_train.jsonl", 1)
    shard("named/sums_test.jsonl", 2)
    shard("hub/sub/deep/a.jsonl", 5)
    (tmp_path / "hub/dataset_infos.json").write_text('{"default": {}}')
    assert (numbers("named"), numbers("named", split="test")) == ([1], [2])
    assert numbers("hub") == [2, 3]
    assert numbers("hub/**/*.jsonl") == [4, 2, 3, 5]


def test_splits_of_a_directory_are_told_apart(tmp_path: Path) -> None:
    """As `datasets` does, and with a refusal where it would read several data sets as one."""

    def folder(name: str, *files: str) -> Path:
        (tmp_path / name / "data").mkdir(parents=True)
        for file in files:
            (tmp_path / name / "data" / file).write_text(json.dumps({"file": file}) + "\n")
        return tmp_path / name

    def files(path: Path, split: str) -> list[str]:
        return [row["file"] for row in load_rows(source(path, split=split))]

    shards = [f"{split}-00000-of-00001.jsonl" for split in ("test_prefs", "train_gen", "train_prefs", "train_sft")]
    ultra = folder("ultra", *shards)
    splits = datasets.load_dataset(str(ultra), cache_dir=str(tmp_path / "cache"))
    assert {split: files(ultra, split) for split in splits} == {split: rows["file"] for split, rows in splits.items()}
    assert [*splits] == ["test_prefs", "train_gen", "train_prefs", "train_sft"]
    message = refusal(load_rows, source(ultra), "data.sft")
    assert message.startswith(
        f"data.sft.split: {ultra} has test_prefs, train_gen, train_prefs, train_sft; found 'train'"
    )
    hashed = ["en.v1-00000-of-00002-a09b74b3.jsonl", "en.v1-00001-of-00002-7f3a0c1d.jsonl", "de-00000-of-00001.jsonl"]
    languages = folder("languages", *hashed)
    assert files(languages, "en.v1") == hashed[:2]
    assert "has de, en.v1; found 'train'" in refusal(load_rows, source(languages))

    for number, (several, split) in enumerate(
        (
            (["train-part1.jsonl", "train-part2.jsonl"], "train"),
            (["train.0.jsonl", "train.1.jsonl"], "train"),
            (["c4-train.00000-of-01024.jsonl", "c4-train.00001-of-01024.jsonl"], "train"),
            (["sums-test-00000-of-00002.jsonl", "sums-test-00001-of-00002.jsonl"], "test"),
            (["part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"], "train"),
            (["2023_train.jsonl", "2024_train.jsonl"], "train"),
            (["facts.jsonl", "sums.jsonl"], "train"),
        )
    ):
        assert files(folder(str(number), *several), split) == several
    for several in (
        ["train_prefs.jsonl", "train_sft.jsonl"],
        ["train.jsonl", "train_socratic.jsonl"],
        ["train_10k.jsonl", "train_1k.jsonl"],
        ["de-train-00000-of-00001.jsonl", "en-train-00000-of-00001.jsonl"],
    ):
        path = folder("-".join(several), *several)
        message = refusal(load_rows, source(path), "data.sft")
        assert f"{', '.join(several)} differ in more" in message
        assert f"as {path / 'data' / several[0]}" in message


def test_rows_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    """Packed and unpacked, or as two kinds; shards, and files of other names or folders, are not."""
    line = b'{"text": "a"}\n'
    kinds = {".jsonl": line, ".json": line, ".csv": b"text\na\n", ".jsonl.gz": gzip.compress(line)}
    for number, (first, second) in enumerate(
        [
            ("train.jsonl", "train.jsonl.gz"),
            ("train.csv", "train.jsonl"),
            ("rows.json", "rows.jsonl.gz"),
            ("train-00000-of-00001.jsonl", "train-00000-of-00001.jsonl.gz"),
        ]
    ):
        path = tmp_path / str(number)
        path.mkdir()
        for name in (first, second):
            (path / name).write_bytes(kinds[name.removeprefix(name.split(".")[0])])
        for written in (path, path / "*"):
            message = refusal(load_rows, source(written), "data.sft")
            assert f"files of one name are taken for the same rows; {written} has {first} and {second}" in message
        assert load_rows(source(path / first)) == [{"text": "a"}]
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/train-1.jsonl").write_bytes(line)
    (tmp_path / "parts/train-2.jsonl.gz").write_bytes(gzip.compress(line))
    assert len(load_rows(source(tmp_path / "parts"))) == 2
    assert len(load_rows(source(tmp_path / "[01]/train.jsonl"))) == 2


CARD = """---
configs:
- config_name: main
  data_files: main/train-*
- config_name: socratic
  data_files: socratic/train-*
---
"""


def test_a_data_set_of_several_subsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As openai/gsm8k: configurations on the hub, which `datasets` finds in a clone too, are folders of the clone."""
    clone = tmp_path / "gsm8k"
    for name in ("main", "socratic"):
        (clone / name).mkdir(parents=True)
        datasets.Dataset.from_list([{"text": name}]).to_parquet(clone / name / "train-00000-of-00001.parquet")
    datasets.Dataset.from_list([{"text": "saved"}]).save_to_disk(clone / "saved")
    (clone / "README.md").write_text(CARD)
    for name in ("main", "socratic"):
        assert load_rows(source(clone, subset=name)) == [{"text": name}]
    assert load_rows(source(clone, subset="saved")) == [{"text": "saved"}]
    message = refusal(load_rows, source(clone, subset="mian"), "data.sft")
    assert (
        message == f"data.sft.subset: {clone} has the folders main, saved, socratic; found 'mian'; did you mean 'main'?"
    )
    assert "has no folders; found 'main'" in refusal(load_rows, source(clone / "main", subset="main"))
    assert "with data.sft.subset one of its folders main, saved, socratic" in refusal(
        load_rows, source(clone), "data.sft"
    )
    file = clone / "main/train-00000-of-00001.parquet"
    for path in (file, clone / "main/*.parquet"):
        assert "a file has no subsets; found 'main'" in refusal(load_rows, source(path, subset="main"))

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("main", "socratic"):
        assert _read_hub(str(clone), "train", name, "data.sft") == [{"text": name}]
    for subset in (None, "mian"):
        message = refusal(_read_hub, str(clone), "train", subset, "data.sft")
        assert "['main', 'socratic']" in message
        assert "data.sft.subset (which of its configurations, where it has several)" in message
