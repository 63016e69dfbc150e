"""Columns that travel with a prompt: which, as what, and what is refused."""

import datetime
import json
import math
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from common.text.encoding import DataError
from common.text.tokenizers import load_tokenizer
from contracts.config import DataConfig, ModelConfig, SourceConfig
from contracts.records import Prompt
from controller.data.datasets import LoadReport, fingerprint, load_prompts, load_some_prompts
from tests.conftest import SMOLLM

DATA = DataConfig(max_bad_rows=0.0)
TESTS = [
    {"input": [1, 2], "output": {"sum": 3, "note": 'ü \u2028 "q"'}},
    {"input": [], "output": {"sum": 0, "note": ""}},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(SMOLLM), ModelConfig(path=str(SMOLLM)))


def jsonl(folder: Path, rows: list[dict], **options: Any) -> SourceConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(path=str(path), **options)


def parquet(folder: Path, rows: list[dict], **options: Any) -> SourceConfig:
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return SourceConfig(path=str(path), **options)


def load(
    source: SourceConfig, tokenizer: Any, report: LoadReport | None = None, data: DataConfig = DATA
) -> list[Prompt]:
    return load_prompts(source, data, tokenizer, 8, 99, report)


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_nested_values_come_as_they_are(write: Any, tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": "What is 2+3?", "answer": "5", "level": 3, "tests": TESTS},
        {"prompt": "What is 2+4?", "answer": "6", "level": 4, "tests": TESTS[:1]},
    ]
    report = LoadReport()
    prompts = load(write(tmp_path, rows), tokenizer, report)
    assert [prompt.columns for prompt in prompts] == [{k: v for k, v in row.items() if k != "prompt"} for row in rows]
    # The text itself: keys sorted at every depth, letters as they are, and no line break in it.
    assert prompts[1].row == (
        '{"answer": "6", "level": 4, "tests": [{"input": [1, 2], "output": {"note": "ü \u2028 \\"q\\"", "sum": 3}}]}'
    )
    assert sorted(report.kept) == ["answer", "level", "tests"]
    assert (report.unread, report.dropped) == ([], {})
    assert all(prompt.messages is None for prompt in prompts)


def test_keep_chooses_columns(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": "One", "answer": "1", "source": "a", "id": 7},
        {"prompt": "Two", "answer": "2", "source": "b", "id": 8},
    ]
    report = LoadReport()
    chosen = load(jsonl(tmp_path, rows, keep=["source", "answer"]), tokenizer, report)
    assert [prompt.row for prompt in chosen] == [
        '{"answer": "1", "source": "a"}',
        '{"answer": "2", "source": "b"}',
    ]
    assert (report.kept, report.unread) == (["source", "answer"], ["id"])
    assert [prompt.row for prompt in load(jsonl(tmp_path, rows, keep=[]), tokenizer)] == [None, None]
    assert load_some_prompts(jsonl(tmp_path, rows, keep=["id"]), DATA, tokenizer, 8, 99, 1, 0)[0].columns in (
        {"id": 7},
        {"id": 8},
    )


ASK = {"role": "user", "content": "What is 2+3?"}


@pytest.mark.parametrize(
    ("row", "kept", "turns"),
    [
        ({"prompt": "It is", "a": 1}, {"a": 1}, None),
        ({"prompt": "It is", "completion": "5", "a": 1}, {"a": 1, "completion": "5"}, None),
        ({"prompt": [ASK], "a": 1}, {"a": 1}, [ASK]),
        ({"messages": [ASK, {"role": "assistant", "content": "5"}], "a": 1}, {"a": 1}, [ASK]),
        ({"conversations": [{"from": "human", "value": "What is 2+3?"}], "a": 1}, {"a": 1}, [ASK]),
        ({"instruction": "Add", "input": "2, 3", "output": "5", "a": 1}, {"a": 1, "output": "5"}, None),
        ({"prompt": "It is", "chosen": "5", "rejected": "6", "a": 1}, {"a": 1, "chosen": "5", "rejected": "6"}, None),
    ],
)
def test_what_the_prompt_is_made_of_is_not_kept(
    row: dict, kept: dict, turns: list | None, tmp_path: Path, tokenizer: Any
) -> None:
    [prompt] = load(jsonl(tmp_path, [row]), tokenizer)
    assert prompt.columns == kept
    assert (prompt.messages and json.loads(prompt.messages)) == turns


def test_a_value_that_some_rows_lack_is_null(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "One", "answer": "1"}, {"prompt": "Two"}, {"prompt": "Three", "answer": None, "hint": "h"}]
    assert [prompt.columns for prompt in load(jsonl(tmp_path, rows), tokenizer)] == [
        {"answer": "1", "hint": None},
        {"answer": None, "hint": None},
        {"answer": None, "hint": "h"},
    ]


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_a_named_column_has_a_value_in_every_row(write: Any, tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "One", "answer": "1"}, {"prompt": "Two", "answer": None}, {"prompt": "Three", "answer": None}]
    source = write(tmp_path, rows, keep=["answer"])
    with pytest.raises(DataError) as caught:
        load(source, tokenizer)
    assert str(caught.value).startswith(
        f"data.prompts.keep must name columns with a value in every row; {source.path} has none of 'answer' in 2 of 3 "
        "rows, first in row 1, counted from 0; give it one, or leave data.prompts.keep at null"
    )
    # Of rows that are used: the one without a prompt is not.
    rows = [{"prompt": "One", "answer": "1"}, {"prompt": None, "answer": None}]
    assert len(load(write(tmp_path, rows, keep=["answer"]), tokenizer)) == 1


def test_a_named_column_that_is_nowhere(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(tmp_path, [{"prompt": "One", "answer": "1"}], keep=["answr"])
    with pytest.raises(
        DataError, match=r"data.prompts.keep must name columns of the data; no row of .* has 'answr'"
    ) as caught:
        load(source, tokenizer)
    assert "did you mean 'answer'?; there are prompt, answer" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"\xff\x00", "row 1: Object of type bytes is not JSON serializable"),
        (datetime.datetime(2026, 1, 2), "row 1: Object of type datetime is not JSON serializable"),
        (datetime.date(2026, 1, 2), "row 1: Object of type date is not JSON serializable"),
        (Decimal("1.5"), "row 1: Object of type Decimal is not JSON serializable"),
        (math.nan, "row 1: Out of range float values are not JSON compliant"),
        ([1.0, -math.inf], "row 1: Out of range float values are not JSON compliant"),
        ({"deep": [b"x"]}, "row 1: Object of type bytes is not JSON serializable"),
    ],
)
def test_what_json_cannot_carry(value: Any, why: str, tmp_path: Path, tokenizer: Any) -> None:
    """Named, it is refused; else its column stays behind, and that is said."""
    rows = [{"prompt": "One", "odd": None, "answer": "1"}, {"prompt": "Two", "odd": value, "answer": "2"}]
    report = LoadReport()
    prompts = load(parquet(tmp_path, rows), tokenizer, report)
    assert [prompt.row for prompt in prompts] == ['{"answer": "1"}', '{"answer": "2"}']
    assert (report.kept, report.dropped["odd"].partition(": nan")[0], report.unread) == (["answer"], why, [])
    with pytest.raises(
        DataError, match=f"data.prompts.keep must name columns with values that JSON can carry.*'odd'.*{why}"
    ):
        load(parquet(tmp_path, rows, keep=["answer", "odd"]), tokenizer)


def test_half_a_character_stays_behind(tmp_path: Path, tokenizer: Any) -> None:
    report = LoadReport()
    [prompt] = load(jsonl(tmp_path, [{"prompt": "One", "odd": ["\ud800"], "answer": "1"}]), tokenizer, report)
    assert prompt.columns == {"answer": "1"}
    assert report.dropped == {"odd": "row 0: a lone surrogate, which is not valid Unicode"}


def test_the_same_prompt_with_another_answer_is_counted_for_itself(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "One", "answer": "1"}, {"prompt": "One", "answer": "1"}, {"prompt": "One", "answer": "2"}]
    report = LoadReport()
    assert len(load(jsonl(tmp_path, rows), tokenizer, report)) == 1
    assert report.left_out == {"duplicate prompt": 1, "duplicate prompt with other columns": 1}


def test_a_kept_value_is_part_of_the_fingerprint(tmp_path: Path, tokenizer: Any) -> None:
    """Of prompts without one it is what it was before there were any."""

    def of(answer: str, **options: Any) -> str:
        return fingerprint(load(jsonl(tmp_path, [{"prompt": "One", "answer": answer}], **options), tokenizer))

    assert of("1") == of("1") != of("2")
    assert of("1", keep=[]) == of("2", keep=[])
    [prompt] = load(jsonl(tmp_path, [{"prompt": "One"}]), tokenizer)
    before = {name: value for name, value in asdict(prompt).items() if name in ("prompt_id", "text", "token_ids")}
    assert fingerprint([prompt]) == fingerprint([before])
