"""Loaders on small files in every format, every message they refuse with, and the demo's own data."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from contracts.config import DataConfig, SourceConfig
from contracts.records import Example
from contracts.scoring import scoring_ids
from controller.data.datasets import (
    DataError,
    LoadReport,
    encode_prompt,
    fingerprint,
    load_best_rated,
    load_preferences,
    load_prompts,
    load_rated_examples,
    load_sft,
)
from controller.data.row_files import detect_format, load_rows

ROOT = Path(__file__).parents[2]
EOS = 2
DATA = DataConfig(prompt_words=None, max_bad_rows=0.0)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / ".cache/models/smollm2-135m-instruct")


@pytest.fixture
def jsonl(tmp_path):
    """Writes rows to a file; gives its source."""

    def write(*rows: dict, **options) -> SourceConfig:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return SourceConfig(path=str(path), **options)

    return write


def source(path: Path, **options) -> SourceConfig:
    return SourceConfig(path=str(path), **options)


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(DataError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def trained(tokenizer, example: Example) -> str:
    return tokenizer.decode([i for i, train in zip(example.token_ids, example.loss_mask, strict=True) if train])


# Reading.


def test_the_same_rows_from_every_kind_of_file(tmp_path):
    rows = [{"text": "größer", "rating": 1.5}, {"text": "NA", "rating": -2.0}, {"text": 'a "b", c', "rating": 0.0}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8-sig")
    (tmp_path / "a.csv").write_text('text,rating\ngrößer,1.5\nNA,-2.0\n"a ""b"", c",0.0\n', encoding="utf-8")
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "splits")
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "saved", "splits"):
        assert load_rows(source(tmp_path / name)) == rows, name
    assert load_rows(source(tmp_path / "splits", split="test")) == rows[1:2]
    assert load_rows(source(tmp_path / "a.csv", max_rows=2)) == rows[:2]


def test_line_separators_inside_a_json_string_are_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two"}\r\n{"text": "three"}\r\n', encoding="utf-8")
    assert load_rows(source(tmp_path / "a.jsonl")) == [{"text": "one\u2028two"}, {"text": "three"}]


@pytest.mark.parametrize("name", ["bad.jsonl", "bad.json", "bad.csv"])
def test_bytes_that_are_not_utf8_name_file_and_line(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    message = refusal(load_rows, source(tmp_path / name), "data.sft")
    assert message.startswith("data.sft.path: text files must be UTF-8")
    assert f"{tmp_path / name}, line 2, holds the byte 0xe9" in message
    assert "iconv" in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', ["line 3, column 10, is not valid JSON", "one object a line"]),
        ("a.json", '[{"text": "a"},\n {"text" "b"}]', ["line 2, column 10, is not valid JSON", "one list of objects"]),
        ("a.json", '{"text": "a"}\n{"text" "b"}', ["line 2, column 9, is not valid JSON"]),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', ["line 2, holds something else: '[\"b\"]'", 'Write a row as {"text"']),
        ("a.json", '{\n"rows": []}', ["one list of objects", "holds something else"]),
        ("a.json", '["b"]', ["holds something else"]),
        ("a.jsonl", " \n", ["a.jsonl is empty", "at least one row"]),
        ("a.csv", "", ["a.csv is empty"]),
        ("a.json", "[]", ["a.json has no rows"]),
        ("a.csv", "text\n", ["a.csv has no rows"]),
        ("a.csv", "prompt,text\n1,Well, yes\n", ["names every column; ", "a.csv has rows with more cells"]),
        ("a.csv", 'text\n"open\n', ["a.csv cannot be read as csv", "EOF inside string"]),
        ("a.parquet", "junk", ["a.parquet cannot be read as parquet"]),
        ("a.txt", "hello", ["a.txt has '.txt'", ".jsonl, .json, .csv, .parquet"]),
    ],
)
def test_unreadable_files(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    message = refusal(load_rows, source(tmp_path / name), "data.test")
    assert message.startswith("data.test.path: ")
    for part in expected:
        assert part in message


def test_missing_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("{}")
    message = refusal(load_rows, source(tmp_path / "promts.jsonl"), "data.prompts")
    assert message == (f"data.prompts.path: no such file: {tmp_path / 'promts.jsonl'}; did you mean 'prompts.jsonl'?")
    assert "no such file" in refusal(load_rows, source(tmp_path / "nowhere" / "saved"))


def test_missing_splits(tmp_path):
    table = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "splits")
    message = refusal(load_rows, source(tmp_path / "splits", split="tets"), "data.test")
    assert "data.test.split: " in message
    assert "has train, test; found 'tets'; did you mean 'test'?" in message
    (tmp_path / "a.csv").write_text("text\nhello\n")
    message = refusal(load_rows, source(tmp_path / "a.csv", split="test"))
    assert message == "data.x.split: a file has one split; found 'test'. Write split: train"


def test_directory_that_datasets_did_not_write(tmp_path):
    message = refusal(load_rows, source(tmp_path))
    assert "save_to_disk" in message
    assert "Name one file instead" in message


def test_hub_id_out_of_reach(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # the library's own switch: fails without waiting
    message = refusal(load_rows, SourceConfig(path="nobody/nothing-here", split="dev"), "data.gold")
    assert message.startswith("data.gold.path: no local file or directory is named 'nobody/nothing-here'")
    assert "split 'dev'" in message
    assert "cannot be fetched from the Hugging Face hub: " in message
    assert "OfflineModeIsEnabled" in message
    assert "write a local path" in message


# Formats.


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["text"], "text"),
        (["prompt"], "prompt"),
        (["prompt", "completion", "text"], "prompt_completion"),
        (["messages", "id"], "messages"),
        (["prompt", "chosen", "rejected", "messages"], "pair"),
        (["text", "ratings"], "rated"),
        (["text", "rating", "ratings"], "rated"),
    ],
)
def test_auto_reads_the_format_off_the_columns(columns, expected):
    assert detect_format(SourceConfig(path="x"), columns) == expected


def test_renamed_columns():
    renamed = SourceConfig(path="x", prompt_column="question", completion_column="answer")
    assert detect_format(renamed, ["question", "answer"]) == "prompt_completion"


def test_formats_that_do_not_fit():
    message = refusal(detect_format, SourceConfig(path="x.csv"), ["txt", "label"], "data.sft")
    assert "data.sft.format: auto" in message
    assert "x.csv fit none: txt, label" in message
    assert "prompt_completion: prompt + completion" in message
    message = refusal(detect_format, SourceConfig(path="x.csv", format="text"), ["Text", "label"])
    assert message == "data.x.format: text needs the column 'text'; x.csv has Text, label; did you mean 'Text'?"
    message = refusal(detect_format, SourceConfig(path="x.csv", format="rated"), ["text", "ratngs"])
    assert "rated needs the column 'rating'; x.csv has text, ratngs; did you mean 'ratngs'?" in message
    message = refusal(detect_format, SourceConfig(path="x.csv", format="pairs"), ["chosen"])
    assert "found 'pairs'; did you mean 'pair'?" in message


def test_format_that_a_loader_cannot_use(jsonl, tokenizer):
    message = refusal(load_preferences, jsonl({"text": "hello"}), DATA, tokenizer, 64, base="data.gold")
    assert message == "data.gold.format: one of rated, pair is needed here; found text (columns text)"
    message = refusal(load_sft, jsonl({"prompt": "hello"}), DATA, tokenizer, 64)
    assert "found prompt (columns prompt)" in message


# Prompts.


def test_prompt_rows(jsonl, tokenizer):
    rows = [{"prompt": "Name a prime."}, {"prompt": [{"role": "user", "content": "Hi"}]}]
    plain, chat = load_prompts(jsonl(*rows), DATA, tokenizer, 8, 64)
    assert (plain.prompt_id, plain.text) == (0, "Name a prime.")
    assert plain.token_ids == tuple(tokenizer("Name a prime.")["input_ids"])
    assert (chat.prompt_id, chat.text) == (1, "user: Hi")
    assert chat.token_ids == tuple(encode_prompt(tokenizer, "Hi", chat=True))


def test_last_answer_is_no_part_of_a_prompt(jsonl, tokenizer):
    ask = [{"role": "user", "content": "Hi"}]
    answer = [{"role": "assistant", "content": "Hello."}]
    expected = tuple(encode_prompt(tokenizer, ask, chat=True))
    for row in (
        {"messages": ask + answer},
        {"messages": ask},
        {"chosen": ask + answer, "rejected": ask},
        {"prompt": "Hi", "chosen": ask + answer, "rejected": ask},
        {"prompt": ask, "completion": answer},
        {"prompt": ask, "chosen": answer, "rejected": answer},
    ):
        (prompt,) = load_prompts(jsonl(row), DATA, tokenizer, 8, 64)
        assert prompt.token_ids == expected, row


def test_first_words_are_the_prompt_and_short_texts_are_counted(jsonl, tokenizer):
    data, report = replace(DATA, prompt_words=4), LoadReport()
    rows = [{"text": "one two three four five six"}, {"text": " one  two three four five six seven "}]
    (prompt,) = load_prompts(jsonl(*rows), data, tokenizer, 8, 64, report)
    assert (prompt.prompt_id, prompt.text) == (1, " one  two three four")
    assert report == LoadReport(rows=2, used=1, left_out=Counter({"fewer than 7 words": 1}))


def test_text_needs_prompt_words(jsonl, tokenizer):
    for row in ({"text": "one two"}, {"text": "one two", "rating": 1}):
        message = refusal(load_prompts, jsonl(row), DATA, tokenizer, 8, 64, base="data.eval_prompts")
        assert message.startswith("data.eval_prompts: a prompt is a column 'prompt' or the first words of a text")
        assert "data.prompt_words: null. Write data.prompt_words: 4" in message


def test_pair_without_a_prompt(jsonl, tokenizer):
    message = refusal(load_prompts, jsonl({"chosen": "a b", "rejected": "c d"}), DATA, tokenizer, 8, 64)
    assert "row 0: no prompt" in message


def test_duplicate_prompts_are_kept_once(jsonl, tokenizer):
    report = LoadReport()
    rows = [{"prompt": text} for text in ("a", "b", "a", "c", "a")]
    prompts = load_prompts(jsonl(*rows), DATA, tokenizer, 8, 64, report)
    assert [(p.prompt_id, p.text) for p in prompts] == [(0, "a"), (1, "b"), (3, "c")]
    assert report == LoadReport(rows=5, used=3, left_out=Counter({"duplicate prompt": 2}))


def test_over_long_prompts(jsonl, tokenizer):
    rows = jsonl({"prompt": "a"}, {"prompt": "a" + " a" * 9})
    message = refusal(load_prompts, rows, replace(DATA, max_prompt_tokens=9), tokenizer, 8, 64)
    assert "row 1: prompt over data.max_prompt_tokens (10 > 9)" in message
    message = refusal(load_prompts, rows, DATA, tokenizer, 8, 17)
    assert "row 1: prompt and max_completion_tokens over engine.max_model_len (10 + 8 > 17)" in message
    assert len(load_prompts(rows, replace(DATA, max_prompt_tokens=10), tokenizer, 8, 18)) == 2


# Supervised examples.


def test_text_trains_whole_and_ends_with_one_eos(jsonl, tokenizer):
    (example,) = load_sft(jsonl({"text": " A warm film. "}), DATA, tokenizer, 64)
    assert example.token_ids == [*tokenizer(" A warm film. ")["input_ids"], EOS]
    assert example.loss_mask == [True] * len(example.token_ids)


@pytest.mark.parametrize("chat", [False, True])
def test_example_begins_with_its_prompt_and_no_eos_is_lost(jsonl, tokenizer, chat):
    data = replace(DATA, prompt_words=4, chat=chat)
    text = "It's  a warm, funny\tfilm  with <|im_end|> inside"
    rows = jsonl({"text": text})
    (example,), (prompt,) = load_sft(rows, data, tokenizer, 99), load_prompts(rows, data, tokenizer, 8, 99)
    start = len(prompt.token_ids)
    assert tuple(example.token_ids[:start]) == prompt.token_ids
    assert example.loss_mask == [False] * start + [True] * (len(example.token_ids) - start)
    rest = "film  with <|im_end|> inside<|im_end|>"
    assert trained(tokenizer, example) == (rest if chat else "\t" + rest)
    # pad = eos: the last token is the only control token that trains, and it does.
    assert example.token_ids[start:].count(EOS) == 1
    assert example.token_ids[-1] == EOS
    assert example.loss_mask[-1]
    if not chat:
        assert tokenizer.decode(example.token_ids) == text + "<|im_end|>"


def test_sft_formats_train_the_answer_alone(jsonl, tokenizer):
    ask, answer = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Hello."}]
    for row in (
        {"prompt": "Hi", "completion": "Hello."},
        {"prompt": ask, "completion": answer},
        {"messages": ask + answer},
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."},
        {"chosen": ask + answer, "rejected": ask},
        {"text": "Hello.", "rating": 2},
    ):
        (example,) = load_sft(jsonl(row), DATA, tokenizer, 64)
        assert trained(tokenizer, example) == "Hello.<|im_end|>", row


def test_every_assistant_turn_trains(jsonl, tokenizer):
    turns = [
        {"role": r, "content": c} for r, c in [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    ]
    (example,) = load_sft(jsonl({"messages": turns}), DATA, tokenizer, 64)
    assert trained(tokenizer, example) == "2<|im_end|>4<|im_end|>"


def test_long_examples_are_counted_and_only_nothing_left_is_an_error(jsonl, tokenizer):
    report = LoadReport()
    rows = jsonl({"text": "a a a"}, {"text": "a a a a"}, {"text": "a a a a a"})
    assert len(load_sft(rows, DATA, tokenizer, 4, report)) == 1  # three tokens and EOS
    assert report == LoadReport(rows=3, used=1, left_out=Counter({"over max_tokens": 2}))
    message = refusal(load_sft, rows, DATA, tokenizer, 3)
    assert message == "data.sft: no row of 3 is left to use. Left out: 3 x over max_tokens"


# Preferences.


def test_rated_rows(jsonl, tokenizer):
    rows = [
        {"text": "Fine film.", "rating": 9.0, "ratings": [1, 2, 3]},
        {"text": "Bad film.", "rating": -1},
        {"text": "Odd film.", "ratings": "[0, -1.5]"},  # as a CSV cell holds it
    ]
    several, one, cell = load_preferences(jsonl(*rows), DATA, tokenizer, 64)
    prompted = {"prompt": "Your view? ", "text": "Good.", "rating": "2.5"}
    [answer] = load_preferences(jsonl(prompted), DATA, tokenizer, 64)
    assert (several.text, several.ratings) == ("Fine film.", [1.0, 2.0, 3.0])
    assert several.token_ids == [*tokenizer("Fine film.")["input_ids"], EOS]
    assert (one.ratings, cell.ratings, answer.ratings) == ([-1.0], [0.0, -1.5], [2.5])
    assert answer.text == "Your view? Good."


def test_pair_rows(jsonl, tokenizer):
    ask = [{"role": "user", "content": "Hi"}]
    yes, no = ([{"role": "assistant", "content": word}] for word in ("Yes.", "No."))
    template = encode_prompt(tokenizer, ask, chat=True)
    in_chat = [[*template, *tokenizer(word)["input_ids"], EOS] for word in ("Yes.", "No.")]
    plain = [[*tokenizer(f"Hi{word}")["input_ids"], EOS] for word in (" Yes.", " No.")]
    for row, chat, expected in (
        ({"chosen": "Hi Yes.", "rejected": "Hi No."}, False, plain),
        ({"prompt": "Hi", "chosen": " Yes.", "rejected": " No."}, False, plain),
        ({"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}, True, in_chat),
        ({"chosen": ask + yes, "rejected": ask + no}, False, in_chat),
        ({"prompt": "Hi", "chosen": ask + yes, "rejected": ask + no}, True, in_chat),
        ({"prompt": ask, "chosen": yes, "rejected": no}, False, in_chat),
    ):
        (pair,) = load_preferences(jsonl(row), replace(DATA, chat=chat), tokenizer, 64)
        assert [pair.chosen_ids, pair.rejected_ids] == expected, row
        assert pair.preference == 1.0


def test_pairs_that_say_nothing_are_counted(jsonl, tokenizer):
    report = LoadReport()
    rows = jsonl(
        {"chosen": "same", "rejected": "same"}, {"chosen": "a", "rejected": "b"}, {"chosen": "a a a", "rejected": "b"}
    )
    assert len(load_preferences(rows, DATA, tokenizer, 3, report)) == 1
    assert report.left_out == {"chosen equals rejected": 1, "over max_tokens": 1}


@pytest.mark.parametrize("chat", [False, True])
def test_scoring_input_of_training_is_that_of_a_rollout(jsonl, tokenizer, chat):
    data = replace(DATA, prompt_words=4, chat=chat)
    rows = jsonl({"text": "one two three four five six seven", "rating": 1})
    (rated,) = load_preferences(rows, data, tokenizer, 99)
    (prompt,) = load_prompts(rows, data, tokenizer, 8, 99)
    completion = tokenizer("five six seven" if chat else " five six seven")["input_ids"]
    for sampled in (completion, [*completion, EOS]):
        assert scoring_ids([*prompt.token_ids, *sampled], EOS) == rated.token_ids


# Rows that are left out.

BAD_TEXT = [
    ({"text": ""}, "empty text"),
    ({"text": " \n\t"}, "empty text"),
    ({}, "no text"),
    ({"text": 7}, "text is not a text (found int)"),
    ({"text": "\ud800"}, "text is not valid Unicode (a lone surrogate)"),
]
BAD_RATING = [
    ({"rating": float("nan")}, "rating is not finite (found nan)"),
    ({"ratings": [1, float("inf")]}, "ratings is not finite (found inf)"),
    ({"rating": "good"}, "rating is not a number (found 'good')"),
    ({"rating": True}, "rating is not a number (found True)"),
    ({"rating": None}, "rating is not a number (found None)"),
    ({"ratings": []}, "empty ratings"),
    ({"ratings": [1, None]}, "ratings is not a number (found None)"),
]
BAD_MESSAGES = [
    ([], "empty messages"),
    ("", "empty messages"),
    ([{"role": "human", "content": "hi"}], "a message needs a role of system, user, assistant, tool (found 'human')"),
    (["hi"], "a message needs a role of system, user, assistant, tool (found None)"),
    ([{"role": "user", "content": " "}], "empty content in messages"),
    ([{"role": "user", "content": "hi"}], "the last turn is not the assistant's"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_TEXT)
def test_bad_texts(jsonl, tokenizer, row, reason):
    message = refusal(load_sft, jsonl({"text": "fine"}, row), DATA, tokenizer, 64)
    assert f"row 1: {reason}\n" in message
    report = LoadReport()
    assert len(load_sft(jsonl({"text": "fine"}, row), replace(DATA, max_bad_rows=0.5), tokenizer, 64, report)) == 1
    assert report.left_out == {reason.split(" (")[0]: 1}


@pytest.mark.parametrize(("row", "reason"), BAD_RATING)
def test_bad_ratings(jsonl, tokenizer, row, reason):
    rows = jsonl({"text": "fine", "rating": 1, "ratings": [1]}, {"text": "fine", **row})
    assert f"row 1: {reason}\n" in refusal(load_preferences, rows, DATA, tokenizer, 64)


@pytest.mark.parametrize(("messages", "reason"), BAD_MESSAGES)
def test_bad_messages(jsonl, tokenizer, messages, reason):
    fine = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    message = refusal(load_sft, jsonl({"messages": fine}, {"messages": messages}), DATA, tokenizer, 64)
    assert reason in message
    assert "row 1: " in message


def test_too_many_bad_rows_are_listed(jsonl, tokenizer):
    rows = [{"text": "fine"}] * 93 + [{"text": ""}] * 4 + [{"text": 1}, {}, {"text": 2}]
    message = refusal(load_sft, jsonl(*rows), replace(DATA, max_bad_rows=0.06), tokenizer, 64)
    assert message.splitlines() == [
        "data.sft: 7 of 100 rows are unusable (7.00%); data.max_bad_rows allows 6.00%. Left out: 4 x empty text, "
        "2 x text is not a text, 1 x no text. The first ones, counted from 0:",
        *[f"  row {number}: empty text" for number in (93, 94, 95, 96)],
        "  row 97: text is not a text (found int)",
        "Repair or remove them, or raise data.max_bad_rows",
    ]
    report = LoadReport()
    examples = load_sft(jsonl(*rows), replace(DATA, max_bad_rows=0.07), tokenizer, 64, report)
    assert (len(examples), report.rows, report.used, report.left_out.total()) == (93, 100, 93, 7)


# Fingerprints.


def test_fingerprint_is_of_the_content(jsonl, tokenizer):
    rows = [{"text": "größer", "rating": 1.0}, {"text": "b", "rating": None}]
    # sha256 of the two lines, from sha256sum
    assert fingerprint(rows) == "53320e2d5bc6fb8f36f2d445f0669da321f77d057bf1222f7bec3f38dcc59e76"
    assert fingerprint([dict(reversed(row.items())) for row in rows]) == fingerprint(rows)
    assert fingerprint(rows[::-1]) != fingerprint(rows)
    assert fingerprint(["ab"]) != fingerprint(["a", "b"])
    first, second = (load_sft(jsonl({"text": text}), DATA, tokenizer, 64) for text in ("one", "two"))
    assert fingerprint(first) == fingerprint([replace(first[0])]) != fingerprint(second)


# The demo's data and the files under conf/data.


def test_loading_needs_no_torch():
    code = "import sys, controller.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.fixture(scope="module")
def vader() -> DataConfig:
    group = OmegaConf.load(ROOT / "conf/data/vader.yaml")
    merged = OmegaConf.merge(
        {"cache_dir": str(ROOT / ".cache"), "data": OmegaConf.structured(DataConfig)}, {"data": group}
    )
    return OmegaConf.to_object(merged.data)


def test_template_for_own_files_has_known_keys_alone():
    group = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(ROOT / "conf/data/files.yaml"))
    assert OmegaConf.missing_keys(group) == {
        f"{s}.path" for s in ("sft", "prompts", "preferences", "test", "eval_prompts")
    }


def test_demo_prompts_and_examples_agree(vader, tokenizer):
    report, sft_report = LoadReport(), LoadReport()
    prompts = load_prompts(vader.prompts, vader, tokenizer, 48, 512, report)
    examples = load_sft(vader.sft, vader, tokenizer, 512, sft_report)
    assert report.rows == sft_report.rows == 1103
    assert set(sft_report.left_out) == {"fewer than 7 words"}
    beginnings = {tuple(e.token_ids[: e.loss_mask.index(True)]) for e in examples}
    assert beginnings == {p.token_ids for p in prompts}
    for example in examples:
        assert example.token_ids.count(EOS) == 1
        assert example.token_ids[-1] == EOS
        assert example.loss_mask[-1]


def test_demo_scoring_inputs_are_the_examples(vader, tokenizer):
    """Cutting a text changes none of its tokens, so a reward model may train on whole texts."""
    examples = load_sft(vader.sft, vader, tokenizer, 512)
    whole = load_preferences(replace(vader.sft, format="rated"), vader, tokenizer, 512)
    assert len(whole) == 1103
    assert {tuple(e.token_ids) for e in examples} <= {tuple(r.token_ids) for r in whole}


def test_demo_parts_do_not_overlap(vader):
    parts = [vader.sft, vader.preferences, vader.gold, vader.test]
    texts = [row["text"].lower() for part in parts for row in load_rows(part)]
    assert len(texts) == len(set(texts)) == 10603


# What a policy is trained on by preference.


def test_rated_texts_and_pairs_train_what_the_policy_would_write(tokenizer, jsonl):
    data = replace(DATA, prompt_words=2)
    [item] = load_rated_examples(jsonl({"text": "A warm and funny film.", "ratings": [3, 4]}), data, tokenizer, 64)
    assert item.ratings == [3.0, 4.0]
    assert trained(tokenizer, item.example) == " and funny film.<|im_end|>"
    row = {"prompt": "Name a prime.", "chosen": " Seven.", "rejected": " Eight."}
    [pair] = load_rated_examples(jsonl(row), DATA, tokenizer, 64)
    assert trained(tokenizer, pair.chosen) == " Seven.<|im_end|>"
    assert trained(tokenizer, pair.rejected) == " Eight.<|im_end|>"
    assert tokenizer.decode(pair.chosen.token_ids).startswith("Name a prime.")
    turns = {
        "prompt": [{"role": "user", "content": "Name a prime."}],
        "chosen": [{"role": "assistant", "content": "Seven."}],
        "rejected": [{"role": "assistant", "content": "Eight."}],
    }
    [talk] = load_rated_examples(jsonl(turns), replace(DATA, chat=True), tokenizer, 64)
    assert trained(tokenizer, talk.rejected) == "Eight.<|im_end|>"


def test_the_best_rated_texts_in_their_order(tokenizer, jsonl):
    rows = [
        {"text": f"text number {i}", "ratings": ratings} for i, ratings in enumerate([[1, 2], [4], [3, 4], [0], [4]])
    ]
    found = load_best_rated(jsonl(*rows, format="text"), DATA, tokenizer, 64, 0.6)
    assert [trained(tokenizer, example) for example in found] == [f"text number {i}<|im_end|>" for i in (1, 2, 4)]
    [best] = load_best_rated(jsonl(*rows), DATA, tokenizer, 64, 0.01)
    assert trained(tokenizer, best) == "text number 1<|im_end|>"
    message = refusal(load_best_rated, jsonl({"text": "one"}, {"text": "two"}), DATA, tokenizer, 64, 0.5)
    assert message.startswith(
        "data.preferences: stage filtered_sft keeps the texts that people rated highest, so it needs the column"
    )
    assert "has text. Add them, or name them with data.preferences.ratings_column" in message
