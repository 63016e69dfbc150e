"""Rows as people have them: other people's formats, and what is said once of what nobody reads."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from contracts.config import DataConfig, ModelConfig, SourceConfig, TandemConfig
from contracts.records import Example
from contracts.stages import Reading
from controller.data import inputs
from controller.data.datasets import (
    DataError,
    LoadReport,
    fingerprint,
    load_preferences,
    load_prompts,
    load_rated_examples,
    load_sft,
)
from controller.data.inputs import check_vocabulary, load_inputs
from controller.data.row_files import load_rows
from controller.data.row_formats import ratings
from tests.unit.test_data import DATA, jsonl, refusal, source, trained  # noqa: F401
from tests.unit.test_joins import sentencepiece

SMOLLM = Path(__file__).parents[2] / ".cache/models/smollm2-135m-instruct"
EOS = 2
CHAT = DataConfig(prompt_words=None, max_bad_rows=0.0, chat=True)
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
ASKED = "<|im_start|>user\nName a prime.<|im_end|>\n<|im_start|>assistant\n"
ASK, SAID = {"role": "user", "content": "Name a prime."}, {"role": "assistant", "content": "Seven."}
MORE, YES = {"role": "user", "content": "Another?"}, {"role": "assistant", "content": "Eleven."}
NO = {"role": "assistant", "content": "Nine, I believe, if you allow."}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SMOLLM)


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def example(tokenizer: Any, prompt: str, completion: str) -> Example:
    """The prompt masked; the completion, up to its end as written here, trains."""
    start, rest = ids(tokenizer, prompt), ids(tokenizer, completion)
    return Example(start + rest, [False] * len(start) + [True] * len(rest))


# ---- formats


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "Name a prime."}, {"from": "gpt", "value": "Seven."}]},
        {
            "conversations": json.dumps(
                [{"from": "human", "value": "Name a prime."}, {"from": "gpt", "value": "Seven."}]
            )
        },
        {"messages": json.dumps([ASK, SAID])},
        {"messages": [ASK, {**SAID, "tool_calls": None, "weight": None}]},
        {"chosen": json.dumps([ASK, SAID]), "rejected": json.dumps([ASK, YES])},
        {"text": "\n\nHuman: Name a prime.\n\nAssistant: Seven."},
        {"prompt": "Name a prime.", "completion": "Seven.", "label": True},
        {"instruction": "Name a prime.", "input": "", "output": "Seven."},
        {"instruction": "Name a prime.", "output": "Seven."},
    ],
)
def test_one_conversation_in_many_forms(jsonl: Any, tokenizer: Any, row: dict) -> None:  # noqa: F811
    report = LoadReport()
    assert load_sft(jsonl(row), CHAT, tokenizer, 99, report) == [example(tokenizer, SYSTEM + ASKED, "Seven.<|im_end|>")]
    assert report.unread == []
    [prompt] = load_prompts(jsonl(row), CHAT, tokenizer, 8, 99)
    assert list(prompt.token_ids) == ids(tokenizer, SYSTEM + ASKED)


@pytest.mark.parametrize("speaker", [["human"], {"name": "human"}, 1, True, None])
def test_a_speaker_that_is_no_text_is_refused_by_row(jsonl: Any, tokenizer: Any, speaker: Any) -> None:  # noqa: F811
    rows = [{"conversations": [{"from": who, "value": "Name a prime."}, {"from": "gpt", "value": "Seven."}]}
            for who in ("human", speaker)]  # fmt: skip
    message = refusal(load_sft, jsonl(*rows), CHAT, tokenizer, 99)
    assert "row 1: messages: a message needs a role of" in message
    assert f"found {speaker!r}" in message


@pytest.mark.parametrize("choice", [1, 1.0, True])
def test_the_choice_of_a_comparison_may_be_any_number(jsonl: Any, tokenizer: Any, choice: Any) -> None:  # noqa: F811
    row = {"info": {"post": "Long."}, "summaries": [{"text": "Worse."}, {"text": "Better."}], "choice": choice}
    [pair] = load_rated_examples(jsonl(row), DATA, tokenizer, 99)
    assert trained(tokenizer, pair.chosen) == "Better.<|im_end|>"
    torn = row | {"summaries": {"text": 7}}
    assert "row 1: a comparison needs info, two summaries" in refusal(
        load_preferences, jsonl(row, torn), DATA, tokenizer, 99
    )


def test_texts_that_are_no_messages_are_refused_by_row(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    fine = {"messages": json.dumps([ASK, SAID])}
    for text, said in (
        ("[{'role': 'user', 'content': 'Hi.'}]", "messages is a text but no JSON (Expecting property name"),
        ("Hi.", "messages is a text but no JSON (Expecting value"),
        ('"Hi."', "messages is no list of messages (found str)"),
        ('{"role": "user"}', "messages is no list of messages (found dict)"),
    ):
        message = refusal(load_sft, jsonl(fine, {"messages": text}), DATA, tokenizer, 64)
        assert f"row 1: {said}" in message
    pair = {"chosen": "[{'role': 'user', 'content': 'Hi.'}]", "rejected": "[{'role': 'user', 'content': 'Ho.'}]"}
    assert "row 0: chosen is a text but no JSON" in refusal(load_preferences, jsonl(pair), DATA, tokenizer, 64)
    # A text that only looks a little like it stays one.
    [text] = load_sft(jsonl({"prompt": "List: ", "completion": '[{"a": 1}]'}), DATA, tokenizer, 64)
    assert trained(tokenizer, text) == '[{"a": 1}]<|im_end|>'


def test_messages_of_a_csv_file(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(
        'messages\n"[{""role"": ""user"", ""content"": ""Name a prime.""}, '
        '{""role"": ""assistant"", ""content"": ""Seven.""}]"\n'
    )
    assert load_sft(source(tmp_path / "m.csv"), DATA, tokenizer, 99) == [
        example(tokenizer, SYSTEM + ASKED, "Seven.<|im_end|>")
    ]


def test_alpaca_with_an_input(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    row = {"instruction": "Name a prime.", "input": "below 10", "output": "7"}
    assert load_sft(jsonl(row), DATA, tokenizer, 99) == [example(tokenizer, "Name a prime.\nbelow 10", "7<|im_end|>")]
    [chat] = load_sft(jsonl(row), CHAT, tokenizer, 99)
    assert chat == example(tokenizer, SYSTEM + ASKED.replace("prime.", "prime.\nbelow 10"), "7<|im_end|>")


def test_a_system_column_is_used_or_named(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    row = {"system": "Answer in French.", "prompt": "Name a prime.", "chosen": "Sept.", "rejected": "Seven.", "id": 3}
    french = f"<|im_start|>system\nAnswer in French.<|im_end|>\n{ASKED}"
    report = LoadReport()
    [pair] = load_rated_examples(jsonl(row), CHAT, tokenizer, 99, report)
    assert pair.chosen == example(tokenizer, french, "Sept.<|im_end|>")
    assert pair.rejected == example(tokenizer, french, "Seven.<|im_end|>")
    assert report.unread == ["id"]
    [scored] = load_preferences(jsonl(row), CHAT, tokenizer, 99)
    assert (scored.chosen_ids, scored.rejected_ids) == (pair.chosen.token_ids, pair.rejected.token_ids)
    [prompt] = load_prompts(jsonl(row), CHAT, tokenizer, 8, 99)
    assert list(prompt.token_ids) == ids(tokenizer, french)
    [plain] = load_rated_examples(jsonl(row), DATA, tokenizer, 99, report := LoadReport())
    assert plain.chosen == example(tokenizer, "Name a prime.", "Sept.<|im_end|>")
    assert report.unread == ["system", "id"]
    whole = {"system": "Answer in French.", "messages": [ASK, SAID]}
    assert load_sft(jsonl(whole), DATA, tokenizer, 99) == [example(tokenizer, french, "Seven.<|im_end|>")]
    own = {"system": "Be brief.", "messages": [{"role": "system", "content": "Answer in French."}, ASK, SAID]}
    assert load_sft(jsonl(own), DATA, tokenizer, 99) == [example(tokenizer, french, "Seven.<|im_end|>")]


def test_tools_of_a_row_reach_the_template(jsonl: Any) -> None:  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM)
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for t in m.tool_calls or [] %}{{ t.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tool = {"name": "weather"}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]}
    expected = example(
        tokenizer, f'[{{"name": "weather"}}]\n{ASKED}', '{"name": "weather", "arguments": {"city": "Oslo"}}<|im_end|>'
    )
    for tools in ([tool], json.dumps([tool]), [json.dumps(tool)]):
        assert load_sft(jsonl({"messages": [ASK, call], "tools": tools}), DATA, tokenizer, 99) == [expected]
    shared = {"conversations": [{"from": "human", "value": "Name a prime."}], "tools": json.dumps([tool])}
    shared["conversations"].append(  # type: ignore[union-attr]
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'}
    )
    assert load_sft(jsonl(shared), DATA, tokenizer, 99) == [expected]
    for value in ("no JSON", '"text"', [1]):
        assert "row 0: " in refusal(load_sft, jsonl({"messages": [ASK, SAID], "tools": value}), DATA, tokenizer, 99)

    def called(value: Any) -> SourceConfig:
        asked = {"from": "human", "value": "Name a prime."}
        return jsonl({"conversations": [asked, {"from": "function_call", "value": value}]})

    first, second = {"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "time", "arguments": {}}
    both = f"{json.dumps(first)}{json.dumps(second)}<|im_end|>"
    for listed in ([first, second], json.dumps([first, {**second, "arguments": "{}"}])):
        assert load_sft(called(listed), DATA, tokenizer, 99) == [example(tokenizer, ASKED, both)]
    alone = example(tokenizer, ASKED, f"{json.dumps(first)}<|im_end|>")
    assert load_sft(called(json.dumps([first])), DATA, tokenizer, 99) == [alone]
    for value in ("[]", "7", '["weather"]', json.dumps([first, None]), None):
        assert "a function_call is a JSON object, or a list" in refusal(load_sft, called(value), DATA, tokenizer, 99)


def test_tables_fill_structures_with_nulls_that_are_no_keys(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": [ASK, {**SAID, "weight": 1}]}, {"messages": [ASK, {**SAID, "name": "a"}]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert load_rows(source(tmp_path / "a.parquet")) == rows


def test_weights_of_messages(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    turns = [ASK, {**SAID, "weight": 0}, MORE, {**YES, "weight": 1}]
    [found] = load_sft(jsonl({"messages": turns}), DATA, tokenizer, 99)
    history = f"{SYSTEM}{ASKED}Seven.<|im_end|>\n<|im_start|>user\nAnother?<|im_end|>\n<|im_start|>assistant\n"
    assert found == example(tokenizer, history, "Eleven.<|im_end|>")
    report = LoadReport()
    nothing = {"messages": [ASK, {**SAID, "weight": 0}]}
    assert len(load_sft(jsonl(nothing, {"messages": turns}), DATA, tokenizer, 99, report)) == 1
    assert report.left_out == {"every answer has weight 0": 1}
    template = "{% if m.role == 'assistant' and loop.last %}!{% endif %}{{ m.content }}"  # rewrites earlier answers
    other = AutoTokenizer.from_pretrained(SMOLLM)
    other.chat_template = f"{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{template}<|im_end|>\n{{% endfor %}}"
    report, rewritten = LoadReport(), {"messages": [ASK, SAID, MORE, {**YES, "weight": 0}]}
    assert len(load_sft(jsonl(rewritten, nothing, {"messages": [ASK, SAID]}), DATA, other, 99, report)) == 1
    assert report.left_out == {"no answer that may train is shown as it was given": 1, "every answer has weight 0": 1}
    half = {"messages": [ASK, {**SAID, "weight": 0.5}]}
    assert "row 0: messages: the weight of a message must be 0 or 1 (found 0.5)" in refusal(
        load_sft, jsonl(half), DATA, tokenizer, 99
    )


# ---- pairs


def test_whole_conversations_and_a_prompt_with_answers_are_one_pair(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    """What both sides share does not train: under rank and nll_coef it would count, and flip the sign of margins."""
    whole = {"chosen": [ASK, SAID, MORE, YES], "rejected": [ASK, SAID, MORE, NO]}
    apart = {"prompt": [ASK, SAID, MORE], "chosen": [YES], "rejected": [NO]}
    history = f"{SYSTEM}{ASKED}Seven.<|im_end|>\n<|im_start|>user\nAnother?<|im_end|>\n<|im_start|>assistant\n"
    for row in (whole, apart, {key: json.dumps(value) for key, value in whole.items()}, {**whole, "prompt": "unread"}):
        [pair] = load_rated_examples(jsonl(row), CHAT, tokenizer, 99)
        assert pair.chosen == example(tokenizer, history, "Eleven.<|im_end|>")
        assert pair.rejected == example(tokenizer, history, "Nine, I believe, if you allow.<|im_end|>")
        [scored] = load_preferences(jsonl(row), CHAT, tokenizer, 99)
        assert scored.chosen_ids == pair.chosen.token_ids
        assert scored.rejected_ids == pair.rejected.token_ids
    # As data.sft the chosen conversation teaches every answer.
    [taught] = load_sft(jsonl(whole), CHAT, tokenizer, 99)
    assert trained(tokenizer, taught) == "Seven.<|im_end|>Eleven.<|im_end|>"


def test_conversations_that_part_at_an_earlier_answer(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    row = {"chosen": [ASK, SAID, MORE, YES], "rejected": [ASK, NO]}
    [pair] = load_rated_examples(jsonl(row), CHAT, tokenizer, 99)
    assert trained(tokenizer, pair.chosen) == "Seven.<|im_end|>Eleven.<|im_end|>"
    assert trained(tokenizer, pair.rejected) == "Nine, I believe, if you allow.<|im_end|>"


OTHER = {"role": "user", "content": "Name a colour."}


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [ASK, SAID], "rejected": [OTHER, YES]},
        {"chosen": [ASK, SAID, MORE, YES], "rejected": [ASK, SAID, OTHER, NO]},
        {"chosen": [ASK, SAID, MORE, YES], "rejected": [ASK, SAID]},
        {"chosen": [ASK, SAID], "rejected": "Seven."},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
    ],
)
def test_sides_with_different_prompts_are_refused_by_row(jsonl: Any, tokenizer: Any, row: dict) -> None:  # noqa: F811
    for load in (load_preferences, load_rated_examples):
        for data in (DATA, CHAT):
            message = refusal(load, jsonl({"prompt": "p", "chosen": "a", "rejected": "b"}, row), data, tokenizer, 99)
            assert "row 1: chosen and rejected answer different prompts\n" in message


@pytest.mark.parametrize(("scores", "expected"), [((5.0, 5.0), 0.5), ((5, 4.5), 1.0), ((None, None), 1.0)])
def test_equal_scores_are_a_tie(jsonl: Any, tokenizer: Any, scores: tuple, expected: float) -> None:  # noqa: F811
    row = {
        "prompt": "Name a prime.",
        "chosen": [ASK, SAID],
        "rejected": [ASK, NO],
        "score_chosen": scores[0],
        "score_rejected": scores[1],
    }
    report = LoadReport()
    [pair] = load_preferences(jsonl(row), DATA, tokenizer, 99, report)
    [texts] = load_rated_examples(jsonl(row), DATA, tokenizer, 99)
    assert (pair.preference, texts.preference, report.unread) == (expected, expected, [])


def test_scores_against_the_pair_are_refused(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2}
    assert "row 0: score_chosen is below score_rejected (1 < 2)" in refusal(
        load_preferences, jsonl(row), DATA, tokenizer, 99
    )


def test_transcripts_are_turns_in_chat_and_texts_else(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    start = "\n\nHuman: Name a prime.\n\nAssistant: Seven.\n\nHuman: Another?\n\nAssistant:"
    row = {"chosen": f"{start} Eleven.", "rejected": f"{start} Nine."}
    history = f"{SYSTEM}{ASKED}Seven.<|im_end|>\n<|im_start|>user\nAnother?<|im_end|>\n<|im_start|>assistant\n"
    apart = {"prompt": start, "chosen": " Eleven.", "rejected": " Nine."}
    for given in (row, apart):
        [pair] = load_rated_examples(jsonl(given), CHAT, tokenizer, 99)
        assert pair.chosen == example(tokenizer, history, "Eleven.<|im_end|>")
        assert pair.rejected == example(tokenizer, history, "Nine.<|im_end|>")
        [prompt] = load_prompts(jsonl(given), CHAT, tokenizer, 8, 99)
        assert list(prompt.token_ids) == ids(tokenizer, history)
        [text] = load_rated_examples(jsonl(given), DATA, tokenizer, 99)
        assert text.chosen == example(tokenizer, start, " Eleven.<|im_end|>")
        assert text.chosen.token_ids == [*ids(tokenizer, row["chosen"]), EOS]
        [plain] = load_prompts(jsonl(given), DATA, tokenizer, 8, 99)
        assert list(plain.token_ids) == ids(tokenizer, start)
    open_end = {"chosen": f"{start} Eleven.", "rejected": start}
    assert "row 0: " in refusal(load_preferences, jsonl(open_end), CHAT, tokenizer, 99)


def test_comparisons_of_summaries(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    row = {"info": {"post": "Long."}, "summaries": [{"text": " a"}, {"text": " b"}], "choice": 1, "worker": "x"}
    report = LoadReport()
    [pair] = load_rated_examples(jsonl(row), DATA, tokenizer, 99, report)
    assert pair.chosen == example(tokenizer, "Long.", " b<|im_end|>")
    assert pair.rejected == example(tokenizer, "Long.", " a<|im_end|>")
    assert report.unread == ["worker"]
    columns = {"info": {"article": "Long."}, "summaries": {"text": [" a", " b"]}, "choice": 0}
    [other] = load_rated_examples(jsonl(columns), DATA, tokenizer, 99)
    assert (other.chosen, other.rejected) == (pair.rejected, pair.chosen)
    message = refusal(load_preferences, jsonl(row, {**row, "choice": 2}), DATA, tokenizer, 99)
    assert "row 1: a comparison needs info, two summaries and the choice 0 or 1 (found choice 2)" in message


def test_a_completion_that_is_labelled_bad_is_never_imitated(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    rows = [
        {"prompt": "Name a prime.", "completion": "Seven.", "label": True},
        {"prompt": "Name a prime.", "completion": "Nine.", "label": False},
        {"prompt": "Name a prime.", "completion": "Ten.", "label": 0},
        {"prompt": "Name a prime.", "completion": "Twelve.", "label": "FALSE"},
    ]
    report = LoadReport()
    [only] = load_sft(jsonl(*rows), DATA, tokenizer, 99, report)
    assert trained(tokenizer, only) == "Seven.<|im_end|>"
    assert report.left_out == {"label is false: not to be imitated": 3}
    message = refusal(load_preferences, jsonl(*rows), DATA, tokenizer, 99)
    assert "one of rated, pair is needed here; found prompt_completion (columns prompt, completion, label)" in message
    assert "say of one completion alone whether it is good" in message
    # LLaMA-Factory's form: conversations with a label.
    for column in ("messages", "conversations"):
        rows = [{column: [ASK, SAID], "label": True}, {column: [ASK, NO], "label": False}]
        report = LoadReport()
        [only] = load_sft(jsonl(*rows), CHAT, tokenizer, 99, report)
        assert trained(tokenizer, only) == "Seven.<|im_end|>"
        assert (report.left_out, report.unread) == ({"label is false: not to be imitated": 1}, [])
        message = refusal(load_preferences, jsonl(*rows), CHAT, tokenizer, 99)
        assert "say of one completion alone whether it is good" in message


def test_nulls_are_left_out_and_counted(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    rows = [{"prompt": "p", "chosen": "a", "rejected": None}, {"prompt": "p", "chosen": "a", "rejected": "b"}]
    for load in (load_preferences, load_rated_examples):
        report = LoadReport()
        assert len(load(jsonl(*rows), DATA, tokenizer, 64, report)) == 1
        assert report.left_out == Counter({"no rejected": 1})
    report = LoadReport()
    assert len(load_sft(jsonl({"text": None}, {"text": "a"}), DATA, tokenizer, 64, report)) == 1
    assert report.left_out == {"no text": 1}
    assert "row 1: no rejected" in refusal(
        load_preferences, jsonl(rows[1], {"prompt": "p", "chosen": "a"}), DATA, tokenizer, 64
    )


def test_a_null_beside_prompts_leaves_its_row_out(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    """It is no text without a prompt, which would train in another form than its neighbours."""
    pair, rated = {"chosen": "Seven.", "rejected": "Nine."}, {"text": "Seven.", "rating": 3}
    loads = (load_preferences, load_rated_examples, load_sft)
    for answer in (pair, rated, {"chosen": [SAID], "rejected": [NO]}):
        rows = [{"prompt": "Name a prime.", **answer}, {"prompt": None, **answer}]
        for load, data in ((load, data) for load in loads for data in (DATA, CHAT)):
            report = LoadReport()
            only = load(jsonl(rows[0]), data, tokenizer, 99)
            assert load(jsonl(*rows), data, tokenizer, 99, report) == only
            assert report.left_out == {"no prompt": 1}
            assert "row 1: no prompt" in refusal(load, jsonl(rows[0], answer), data, tokenizer, 99)
        assert len(load_prompts(jsonl(*rows), CHAT, tokenizer, 8, 99)) == 1
    for answer in (pair, rated):  # where no row has one, all are texts
        assert len(load_sft(jsonl({"prompt": None, **answer}, answer), DATA, tokenizer, 99)) == 2
    whole = {"chosen": [ASK, SAID], "rejected": [ASK, NO]}
    asked = {"prompt": [ASK], "chosen": [SAID], "rejected": [NO]}
    one, other = load_rated_examples(jsonl(asked, {"prompt": None, **whole}), DATA, tokenizer, 99)
    assert one == other


def test_rows_with_a_history_beside_rows_without_need_the_chat_template(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    """Which else would write some rows of the source alone."""
    for row in ({"output": "Seven."}, {"chosen": "Seven.", "rejected": "Nine."}):
        row = {"instruction": "Name a prime.", **row}
        rows = [{**row, "history": [["Name an even number.", "Two."]]}, {**row, "history": []}]
        message = "the chat template writes rows with a history, and without data.chat not the others"
        assert refusal(load_sft, jsonl(*rows), DATA, tokenizer, 199).startswith(f"data.sft: {message}")
        assert message in refusal(load_prompts, jsonl(*rows), DATA, tokenizer, 8, 199)
        assert len(load_sft(jsonl(*rows), CHAT, tokenizer, 199)) == 2
        for alone in rows:
            assert len(load_sft(jsonl(alone), DATA, tokenizer, 199)) == 1


def test_texts_keep_their_spaces(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    text = "\n\nHuman: Hi\n\nAssistant: Hello \n"
    assert load_sft(jsonl({"text": text}), DATA, tokenizer, 64) == [example(tokenizer, "", f"{text}<|im_end|>")]
    [pair] = load_rated_examples(jsonl({"chosen": "  indented\n", "rejected": "x"}), DATA, tokenizer, 64)
    assert pair.chosen == example(tokenizer, "", "  indented\n<|im_end|>")
    row = {"prompt": "def f(x):\n", "completion": "    return x\n"}
    [code] = load_sft(jsonl(row), CHAT, tokenizer, 99)
    assert trained(tokenizer, code) == "    return x\n<|im_end|>"


# ---- what is said once


def test_what_the_template_does_not_show_is_said_once(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    report = LoadReport()
    rows = [{"messages": [ASK, {**SAID, "reasoning_content": "Small."}], "source": "x"}] * 3
    assert len(load_sft(jsonl(*rows), DATA, tokenizer, 99, report)) == 3
    assert report.unread == ["source"]
    assert report.notes.lines() == [
        f"the chat template of {SMOLLM} does not show reasoning_content of messages (3 rows)"
    ]


def test_tokens_without_embeddings_are_refused_by_name(jsonl: Any) -> None:  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM)
    tokenizer.add_tokens(["<new>"])
    assert tokenizer.convert_tokens_to_ids("<new>") == 49152
    examples = load_sft(jsonl({"text": "fine"}, {"text": "a <new> b"}), DATA, tokenizer, 64)
    check_vocabulary(examples[:1], tokenizer, 49152, "data.sft", "somewhere")
    check_vocabulary(examples, tokenizer, 49153, "data.sft", "somewhere")
    with pytest.raises(DataError, match=r"^data.sft: item 1, 'a <new> b.*, has the token 49152 \('<new>'\)") as refused:
        check_vocabulary(examples, tokenizer, 49152, "data.sft", "somewhere")
    assert "model.path=somewhere has embeddings for the tokens below 49152 alone" in str(refused.value)
    pairs = load_preferences(jsonl({"chosen": "fine", "rejected": "a <new>"}), DATA, tokenizer, 64)
    with pytest.raises(DataError, match=r"^data.test: item 0"):
        check_vocabulary(pairs, tokenizer, 49152, "data.test", "somewhere")


def test_a_date_in_the_template_does_not_change_fingerprints(jsonl: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}" + tokenizer.chat_template
    [found] = load_sft(jsonl({"messages": [ASK, SAID]}), DATA, tokenizer, 99)
    assert tokenizer.decode(found.token_ids).startswith("01 Jan 2026 00:00:00.000000")
    again = load_sft(jsonl({"messages": [ASK, SAID]}), DATA, tokenizer, 99)
    assert fingerprint([found]) == fingerprint(again)


def test_a_csv_file_keeps_its_texts_however_long_it_is(tmp_path: Path) -> None:
    """Its end alone looks like numbers."""
    texts = ["word"] * 12_000 + ["007", "1.50", "True"] * 8_000
    (tmp_path / "a.csv").write_text("text,n\n" + "".join(f"{text},{i}\n" for i, text in enumerate(texts)))
    assert load_rows(source(tmp_path / "a.csv")) == [{"text": text, "n": i} for i, text in enumerate(texts)]


def test_a_source_is_read_by_a_tokenizer_of_any_kind(jsonl: Any) -> None:  # noqa: F811
    """The whole way with a sentencepiece tokenizer: prompts begin supervised examples, and preferences are scored alike."""
    made = sentencepiece("legacy")
    row = {"prompt": "Name a prime.", "chosen": " Seven.", "rejected": " a"}
    [prompt] = load_prompts(jsonl(row), DATA, made, 8, 99)
    [pair] = load_preferences(jsonl(row), DATA, made, 99)
    [found] = load_sft(jsonl(row), DATA, made, 99)
    assert found.token_ids[: len(prompt.token_ids)] == list(prompt.token_ids)
    assert pair.chosen_ids == found.token_ids == [*made("Name a prime. Seven.")["input_ids"], EOS]


def test_sources_without_a_format(jsonl: Any) -> None:  # noqa: F811
    message = refusal(load_sft, jsonl({"info": {}, "choice": 1}), DATA, sentencepiece("legacy"), 9)
    assert "fit none: info, choice" in message
    assert SourceConfig(path="x").format == "auto"


@pytest.mark.parametrize(("row", "in_chat"), [({"prompt": "Name a prime."}, set()), ({"prompt": [ASK]}, {"prompts"})])
def test_prompts_of_messages_are_in_chat_whatever_data_chat_says(
    jsonl: Any,  # noqa: F811
    tiny_config: Any,
    tokenizer: Any,
    row: dict,
    in_chat: set[str],
) -> None:
    """So sampling stops at the token that ends an answer."""
    tiny_config.data.prompts, tiny_config.stage, tiny_config.data.chat = jsonl(row), "ppo", False
    tiny_config.sft_model = tiny_config.proxy_model = tiny_config.gold_model = tiny_config.model.path
    said: list[str] = []
    assert load_inputs(tiny_config, tokenizer, said.append).in_chat == in_chat
    assert said == []


def test_numbers_of_a_csv_file_stay_as_they_are_written(tmp_path: Path) -> None:
    """An answer is compared as text; a trailing row of commas, as spreadsheets write them, makes no floats of a column."""
    (tmp_path / "a.csv").write_text("prompt,answer,rating,padded\nWhat is 5+7?,12,4.50,007\nAnd 1+1?,2,3,010\n,,,\n")
    first, second, empty = load_rows(source(tmp_path / "a.csv"))
    assert first == {"prompt": "What is 5+7?", "answer": 12, "rating": "4.50", "padded": "007"}
    assert (second["answer"], second["rating"]) == (2, "3")
    assert set(empty.values()) == {None}
    assert ratings(first, source(tmp_path / "a.csv")) == [4.5]


@pytest.mark.parametrize("chosen", ["Eleven.", {"from": "gpt", "value": "Eleven."}])
def test_conversations_beside_two_answers_are_their_prompt(chosen: Any, jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    """LLaMA-Factory's form."""
    turns = [("human", "Name a prime."), ("gpt", "Seven."), ("human", "Another?")]
    conversations = [{"from": who, "value": said} for who, said in turns]
    rejected = {"from": "gpt", "value": NO["content"]} if isinstance(chosen, dict) else NO["content"]
    row = {"system": "Be brief.", "conversations": conversations, "chosen": chosen, "rejected": rejected}
    ours = {"system": "Be brief.", "prompt": [ASK, SAID, MORE], "chosen": [YES], "rejected": [NO]}
    for load in (load_rated_examples, load_preferences, load_sft):
        assert load(jsonl(row), CHAT, tokenizer, 99) == load(jsonl(ours), CHAT, tokenizer, 99)
    [pair] = load_preferences(jsonl(row), CHAT, tokenizer, 99)
    assert "Another?" in tokenizer.decode(pair.chosen_ids)


def test_a_text_prompt_of_messages_is_shown_as_it_is_trained_on(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    row = {"prompt": "Name a prime.", "completion": [SAID]}
    [taught] = load_sft(jsonl(row), DATA, tokenizer, 99)
    [prompt] = load_prompts(jsonl(row), DATA, tokenizer, 8, 99)
    start = taught.loss_mask.index(True)
    assert tuple(taught.token_ids[:start]) == prompt.token_ids


def test_pairs_beside_an_instruction_or_a_question_are_its_answers(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    """LLaMA-Factory's preferences in Alpaca's form, and Orca's."""
    sides = {"chosen": "Seven.", "rejected": "Nine."}
    asked = [
        {"instruction": "Name a prime.", "input": "", **sides},
        {"instruction": "Name", "input": "a prime.", **sides},
        {"system": "Be brief.", "question": "Name a prime.", **sides},
    ]
    ours = [
        {"prompt": "Name a prime.", **sides},
        {"prompt": "Name\na prime.", **sides},
        {"system": "Be brief.", "prompt": "Name a prime.", **sides},
    ]
    for row, same in zip(asked, ours, strict=True):
        report = LoadReport()
        for load in (load_rated_examples, load_preferences, load_sft):
            assert load(jsonl(row), CHAT, tokenizer, 99, report) == load(jsonl(same), CHAT, tokenizer, 99)
            assert report.unread == []


@pytest.mark.parametrize("labels", [["72", "0"], [72, 0], ["yes", "0"]])
def test_a_label_that_is_an_answer_leaves_no_row_out(labels: list[Any], jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    rows = [{"prompt": "What is it?", "completion": str(label), "label": label} for label in labels]
    report = LoadReport()
    assert len(load_sft(jsonl(*rows), DATA, tokenizer, 99, report)) == 2
    assert report.left_out == {}


def test_a_transcript_beside_its_prompt_is_asked_once(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    start = "\n\nHuman: Name a prime.\n\nAssistant:"
    whole = {"chosen": f"{start} Seven.", "rejected": f"{start} Nine."}
    for load in (load_sft, load_rated_examples, load_preferences):
        assert load(jsonl({"prompt": start, **whole}), DATA, tokenizer, 99) == load(jsonl(whole), DATA, tokenizer, 99)
    [text] = load_sft(jsonl({"prompt": start, **whole}), DATA, tokenizer, 99)
    assert tokenizer.decode(text.token_ids).count("Name a prime.") == 1


def test_sides_that_repeat_their_prompt_are_asked_once(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    apart = {"prompt": "Name a prime:", "chosen": " Seven.", "rejected": " Nine."}
    whole = {**apart, "chosen": "Name a prime: Seven.", "rejected": "Name a prime: Nine."}
    for load in (load_sft, load_rated_examples, load_preferences):
        assert load(jsonl(whole), DATA, tokenizer, 99) == load(jsonl(apart), DATA, tokenizer, 99)
    one = {**apart, "chosen": "Name a prime: Seven."}  # of one side alone it is what it says
    [text] = load_sft(jsonl(one), DATA, tokenizer, 99)
    assert tokenizer.decode(text.token_ids).count("Name a prime:") == 2


def test_numbers_that_a_csv_file_has_as_texts_are_texts(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\nWhat is 3+4?,7\nWhat is 1+1?,2\n")
    found = load_sft(source(tmp_path / "a.csv"), CHAT, tokenizer, 99)
    assert [trained(tokenizer, one) for one in found] == ["7<|im_end|>", "2<|im_end|>"]
    (tmp_path / "b.csv").write_text("instruction,output\nWhat is 3+4?,7\n2,4\n")
    assert len(load_sft(source(tmp_path / "b.csv"), CHAT, tokenizer, 99)) == 2


@pytest.mark.parametrize(
    "said", ['[{"value": 1}]', '[{"content": "x"}, {"content": "y"}]', '[{"value": 1}, {"from": 2']
)
def test_an_answer_that_is_json_is_no_conversation(said: str, jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    [found] = load_sft(jsonl({"prompt": "Extract.", "completion": said}), CHAT, tokenizer, 99)
    assert trained(tokenizer, found) == f"{said}<|im_end|>"


def test_a_prompt_beside_a_text_is_the_prompt(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    row = {"prompt": "Name a prime.", "text": "a whole page"}
    [prompt] = load_prompts(jsonl(row), CHAT, tokenizer, 8, 99)
    assert prompt.text.count("Name a prime.") == 1
    assert json.loads(prompt.row or "") == {"text": "a whole page"}
    [text] = load_sft(jsonl(row), DATA, tokenizer, 99)
    assert trained(tokenizer, text) == "a whole page<|im_end|>"


def test_a_limit_that_leaves_most_rows_out_is_refused(
    jsonl: Any,  # noqa: F811
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    config = TandemConfig(stage="sft", model=ModelConfig(path=str(SMOLLM)), run_dir=str(tmp_path))
    config.data.sft = jsonl({"text": "short"}, *({"text": "word " * 60} for _ in range(3)))
    config.sft.max_tokens = 48
    with pytest.raises(
        DataError, match=r"data\.sft: 3 of 4 rows \(75%\) are longer than sft\.max_tokens=48 tokens .*Write a larger"
    ):
        load_inputs(config, tokenizer, print)
    config.data.max_long_rows = 0.8
    assert len(load_inputs(config, tokenizer, print)["sft"]) == 1
    config.data.max_long_rows, config.sft.max_tokens = 0.5, 64
    assert len(load_inputs(config, tokenizer, print)["sft"]) == 4


def test_an_answer_that_begins_with_its_prompt_by_chance_stays_whole(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    by_chance = {"prompt": "Hello", "chosen": "Hello! How can I help?", "rejected": "Hello."}
    rows = jsonl(by_chance, {"prompt": "Name a prime.", "chosen": "Seven.", "rejected": "Nine."})
    assert trained(tokenizer, load_sft(rows, CHAT, tokenizer, 99)[0]) == "Hello! How can I help?<|im_end|>"
    pair = load_rated_examples(rows, CHAT, tokenizer, 99)[0]
    assert [trained(tokenizer, text) for text in pair.texts] == ["Hello! How can I help?<|im_end|>", "Hello.<|im_end|>"]
    # Where most repeat it, one that does not keeps its sides, and what is left must be an answer.
    whole = {"prompt": "Name a prime:", "chosen": "Name a prime: Seven.", "rejected": "Name a prime: Nine."}
    others = load_sft(jsonl(whole, whole, by_chance | {"prompt": "Hi"}), DATA, tokenizer, 99)
    assert [trained(tokenizer, one) for one in others] == [
        *[" Seven.<|im_end|>"] * 2,
        "Hello! How can I help?<|im_end|>",
    ]
    nothing = {"prompt": "Name a prime:", "chosen": "Name a prime:", "rejected": "Name a prime: Nine."}
    assert "empty chosen" in refusal(load_preferences, jsonl(nothing), DATA, tokenizer, 99)


def test_a_completion_that_begins_with_a_result_keeps_its_prompt(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    row = {"prompt": [ASK, call], "completion": [{"role": "tool", "content": "4"}, SAID]}
    message = refusal(load_sft, jsonl(row), CHAT, tokenizer, 199)
    assert "the completion begins with another turn than the assistant's" in message


@pytest.mark.parametrize(
    "labels",
    [(1, -1), ("desirable", "undesirable"), ("chosen", "rejected"), (1.0, 0.0)],
)
@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_labels_of_every_spelling(column: str, labels: tuple, jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    rows = [
        {"prompt": "Name a prime.", "completion": said, column: label}
        for said, label in zip(("Seven.", "Nine."), labels, strict=True)
    ]
    report = LoadReport()
    [only] = load_sft(jsonl(*rows), DATA, tokenizer, 99, report)
    assert trained(tokenizer, only) == "Seven.<|im_end|>"
    assert (report.left_out, report.unread) == ({"label is false: not to be imitated": 1}, [])


def test_a_label_that_says_nothing_of_answers_is_named_as_unread(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    report = LoadReport()
    rows = jsonl({"prompt": "Name a prime.", "completion": "Seven.", "label": "sports"})
    assert len(load_sft(rows, DATA, tokenizer, 99, report)) == 1
    assert report.unread == ["label"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: thanks", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            "the last turn is not the assistant's",
        ),
        ({"chosen": "\n\nHuman: q\n\nAssistant:", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "empty chosen"),
    ],
)
def test_transcripts_without_a_last_answer_are_refused(row: dict, said: str, jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    assert said in refusal(load_sft, jsonl(row), DATA, tokenizer, 99)
    assert said.replace("empty chosen", "answer different prompts") in refusal(
        load_preferences, jsonl(row), DATA, tokenizer, 99
    )


def test_sides_that_are_last_turns_of_a_transcript_keep_their_prompt(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    row = {"prompt": "\n\nHuman: q", "chosen": "\n\nAssistant: Seven.", "rejected": "\n\nAssistant: Nine."}
    [text] = load_sft(jsonl(row), DATA, tokenizer, 99)
    assert tokenizer.decode(text.token_ids) == "\n\nHuman: q\n\nAssistant: Seven.<|im_end|>"
    [pair] = load_preferences(jsonl(row), DATA, tokenizer, 99)
    assert tokenizer.decode(pair.rejected_ids) == "\n\nHuman: q\n\nAssistant: Nine.<|im_end|>"


def test_alpaca_with_its_columns_named_by_hand(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    row = {"instruction": "Name a prime.", "input": "below 10", "output": "Seven."}
    by_itself = load_sft(jsonl(row), CHAT, tokenizer, 99)
    named = jsonl(row)
    named.prompt_column, named.completion_column = "instruction", "output"
    report = LoadReport()
    assert load_sft(named, CHAT, tokenizer, 99, report) == by_itself
    assert report.unread == []
    history = {**row, "history": [["Name an even number.", "Two."]]}
    [text] = load_sft(jsonl(history), CHAT, tokenizer, 99)
    shown = tokenizer.decode(text.token_ids)
    assert shown.index("Name an even number.") < shown.index("Two.") < shown.index("Name a prime.\nbelow 10")
    assert trained(tokenizer, text) == "Seven.<|im_end|>"
    message = refusal(load_sft, jsonl({**row, "history": ["Two."]}), CHAT, tokenizer, 99)
    assert "history is no list of instructions with their answers" in message


def test_a_column_that_some_rows_of_a_known_form_lack_is_told(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    rows = [{"instruction": "Name a prime.", "output": "Seven."}, {"instruction": "Name a prime.", "response": "Five."}]
    assert "1 x no completion" in refusal(load_sft, jsonl(*rows), DATA, tokenizer, 99)


def test_sides_that_come_to_the_same_tokens_are_no_pair(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    rows = [{"prompt": "Name a prime.", "chosen": "Seven.", "rejected": "Seven.<|im_end|>"},
            {"prompt": "Name a prime.", "chosen": "Seven.", "rejected": "Nine."}]  # fmt: skip
    for load in (load_preferences, load_rated_examples):
        report = LoadReport()
        assert len(load(jsonl(*rows), DATA, tokenizer, 99, report)) == 1
        assert report.left_out == {"chosen equals rejected": 1}


def test_texts_that_a_template_has_written_already_are_told(jsonl: Any, tokenizer: Any) -> None:  # noqa: F811
    written = f"{ASKED}Seven.<|im_end|>"
    for row in ({"text": written}, {"prompt": ASKED, "completion": "Seven."}):
        report = LoadReport()
        load_sft(jsonl(row, row), DATA, tokenizer, 99, report)
        assert "<|im_start|> (2 rows)" in report.notes.lines()[0]
    report = LoadReport()
    load_prompts(jsonl({"prompt": ASKED}), CHAT, tokenizer, 8, 99, report)
    assert "<|im_start|> (1 rows)" in report.notes.lines()[0]
    report = LoadReport()  # an end at the end is what it should be
    load_sft(jsonl({"text": "Seven.<|im_end|>"}), DATA, tokenizer, 99, report)
    assert report.notes.lines() == []


def test_files_of_no_split_beside_some_that_have_one_are_refused(tmp_path: Path) -> None:
    for name in ("train.jsonl", "facts.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    message = refusal(load_rows, source(tmp_path), "data.sft")
    assert "some have a split in their names, and facts.jsonl has none" in message


def config_of(tmp_path: Path, **sources: list[dict]) -> TandemConfig:
    data = replace(CHAT)
    for name, rows in sources.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        setattr(data, name, source(file))
    return TandemConfig(stage="ppo", model=ModelConfig(path=str(SMOLLM)), run_dir=str(tmp_path), data=data)


def test_held_out_rows_that_training_sees_are_refused(
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    def reads(**loaders: str) -> None:
        found = {name: Reading(name, name, loader, limits(loader)) for name, loader in loaders.items()}
        monkeypatch.setattr(inputs, "readings", lambda config: found)

    def limits(loader: str) -> tuple[str, ...]:
        return ("reward_model.max_tokens",) if loader == "load_preferences" else (
            "ppo.sampling.max_completion_tokens", "engine.max_model_len")  # fmt: skip

    asked = [{"prompt": f"Name prime {number}."} for number in range(40)]
    config = config_of(tmp_path, prompts=asked, eval_prompts=[*asked[38:], {"prompt": "New?"}])
    reads(prompts="load_prompts", eval_prompts="load_prompts")
    with pytest.raises(DataError, match=r"data\.eval_prompts: 2 of 3 items are in data\.prompts too \(67%\)"):
        load_inputs(config, tokenizer, print)
    others = [{"prompt": f"Another {number}?"} for number in range(39)]
    config = config_of(tmp_path, prompts=asked, eval_prompts=[asked[0], *others])
    said: list[str] = []
    load_inputs(config, tokenizer, said.append)
    assert "  data.eval_prompts: 1 of 40 items are in data.prompts too" in said

    pair = {"prompt": "Name a prime.", "chosen": "Seven.", "rejected": "Nine."}
    for held, other in (("test", "preferences"), ("test", "gold"), ("preferences", "gold")):
        both = [pair, {**pair, "chosen": "Five."}]
        config = config_of(tmp_path, **{held: both, other: [*both, {**pair, "rejected": "One."}]})
        reads(**{held: "load_preferences", other: "load_preferences"})
        with pytest.raises(DataError, match=rf"data\.{held}: 2 of 2 items are in data\.{other} too"):
            load_inputs(config, tokenizer, print)
        config.data.max_seen_rows = 1.0
        assert len(load_inputs(config, tokenizer, print)[held]) == 2
    config = config_of(tmp_path, test=[pair], preferences=[pair])  # one may be chance
    reads(test="load_preferences", preferences="load_preferences")
    assert len(load_inputs(config, tokenizer, print)["test"]) == 1


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("loader", ["load_rated_examples", "load_best_rated"])
def test_what_a_policy_learns_from_is_not_what_its_judge_learns_from(
    loader: str,
    chat: bool,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """Read by other loaders, with another end: the template's own, where a scoring input has the EOS."""
    best = ("sft.max_tokens", "sft.top_fraction")
    found = {
        "completions": Reading("completions", "preferences", loader, best if "best" in loader else best[:1]),
        "gold": Reading("gold", "gold", "load_preferences", ("reward_model.max_tokens",)),
    }
    monkeypatch.setattr(inputs, "readings", lambda config: found)
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM, eos_token="<|endoftext|>")
    pairs = [{"prompt": "Name a prime:", "chosen": f" {n}", "rejected": f" {n + 1}"} for n in range(40)]
    rated = [{"prompt": "Name a prime:", "text": f" Is it {n}? It may be.", "rating": n} for n in range(40)]
    rows = rated if "best" in loader else pairs
    config = config_of(tmp_path, preferences=rows, gold=rows[::-1])
    config.data.chat, config.data.prompt_words = chat, None if chat else 2
    count = 20 if "best" in loader else 40
    with pytest.raises(DataError, match=rf"data\.preferences: {count} of {count} items are in data\.gold too \(100%\)"):
        load_inputs(config, tokenizer, print)
    config.data.max_seen_rows, said = 1.0, list[str]()
    found["texts"] = Reading("texts", "preferences", "load_preferences", ("reward_model.max_tokens",))
    load_inputs(config, tokenizer, said.append)
    assert len([line for line in said if "are in data.gold too" in line]) == 1
    others = [{**row, "prompt": "Name a number:"} for row in rows]
    config = config_of(tmp_path, preferences=rows, gold=others)
    config.data.chat = chat
    assert len(load_inputs(config, tokenizer, print)["completions"]) == count


def test_rewards_of_another_form_than_what_they_score_are_refused(
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """The column of the pair's prompt has another name, so that the sides alone would train."""
    limits = ("ppo.sampling.max_completion_tokens", "engine.max_model_len")
    found = {
        "prompts": Reading("prompts", "prompts", "load_prompts", limits),
        "preferences": Reading("preferences", "preferences", "load_preferences", ("reward_model.max_tokens",)),
    }
    monkeypatch.setattr(inputs, "readings", lambda config: found)
    pairs = [{"query": "Name a prime.", "chosen": "Seven.", "rejected": "Nine."}]
    config = config_of(tmp_path, prompts=[{"prompt": "Name a prime."}], preferences=pairs)
    with pytest.raises(
        DataError, match=r"writes data\.prompts, while data\.preferences has plain texts .*prompt_column"
    ):
        load_inputs(config, tokenizer, print)
    config.data.preferences.prompt_column = "query"
    assert len(load_inputs(config, tokenizer, print)["preferences"]) == 1


@pytest.mark.parametrize("learns", ["preferences", "gold", "test", "sft"])
def test_held_out_prompts_of_another_form_than_what_is_learned_from_are_refused(
    learns: str,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """Of a run without PPO, as with method dpo, best_of_n or none."""
    limits = ("ppo.sampling.max_completion_tokens", "engine.max_model_len")
    loader = "load_sft" if learns == "sft" else "load_preferences"
    found = {
        learns: Reading(learns, learns, loader, ("reward_model.max_tokens",)),
        "eval_prompts": Reading("eval_prompts", "eval_prompts", "load_prompts", limits),
    }
    monkeypatch.setattr(inputs, "readings", lambda config: found)
    pairs = [{"query": "Name a prime.", "chosen": "Seven.", "rejected": "Nine."}]
    config = config_of(tmp_path, eval_prompts=[{"prompt": "Name a prime."}], **{learns: pairs})
    told = f"writes data.eval_prompts, while data.{learns} has plain texts"
    if learns == "sft":
        said: list[str] = []
        load_inputs(config, tokenizer, said.append)
        assert any("WARNING" in line and told in line for line in said)
    else:
        with pytest.raises(DataError, match=told):
            load_inputs(config, tokenizer, print)
    getattr(config.data, learns).prompt_column = "query"
    assert len(load_inputs(config, tokenizer, print)[learns]) == 1
