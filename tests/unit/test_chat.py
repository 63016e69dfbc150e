"""What chat templates of every kind make of a conversation: token ids and masks, piece by piece as they write it."""

# Templates are one line each, as checkpoints hold them.
# ruff: noqa: E501

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import AutoTokenizer

from actors.environment import TwoTurn
from common.text import chat_template
from common.text.chat_template import render
from common.text.encoding import (
    DataError,
    LeftOut,
    Notes,
    Turns,
    encode_conversation,
    encode_example,
    encode_prompt,
    item_of_messages,
    item_of_rendered,
    told_ids,
    turn_end_ids,
)
from common.text.template_turns import turn_starts
from common.text.tokenizers import load_tokenizer, with_date
from contracts.config import ModelConfig
from contracts.environments import EnvironmentFault

SMOLLM = Path(__file__).parents[2] / ".cache/models/smollm2-135m-instruct"
END, EOT = 2, 0  # <|im_end|> and <|endoftext|>
Make = Callable[..., Any]

HEAD = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
TAIL = "<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# The last answer as it is given; of earlier ones the thinking goes.
DROPS = "{% set c = m['content'] %}{% if m['role']=='assistant' and '</think>' in c and not loop.last %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
# As DeepSeek-R1's distilled models: the thinking goes from every answer, the last one too.
FORGETS = DROPS.replace(" and not loop.last", "")
TEMPLATES = {
    "trim": HEAD + "{{ m['content'] | trim }}" + TAIL + ASK,
    "nogen": HEAD + "{{ m['content'] }}" + TAIL,
    "thinkgen": "{% for m in messages %}" + DROPS + "<|im_start|>{{ m['role'] }}\n{{ c }}" + TAIL + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    "qwen3": "{% for m in messages %}" + DROPS + "<|im_start|>{{ m['role'] }}\n{{ c }}" + TAIL + ASK,
    "inst": "{{ bos_token }}{% for m in messages %}{% if m['role']=='user' %}[INST] {{ m['content'] }} [/INST]{% elif m['role']=='assistant' %} {{ m['content'] }}{{ eos_token }}{% else %}{{ raise_exception('System role not supported') }}{% endif %}{% endfor %}",
    "date": "<|im_start|>system\nToday: {{ strftime_now('%d %b %Y') }}<|im_end|>\n" + HEAD + "{{ m['content'] }}" + TAIL + ASK,
    "tools": "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}" + HEAD + "{{ m['content'] or '' }}{% if m.tool_calls %}{% for t in m.tool_calls %}<tool_call>{{ (t.function if t.function else t) | tojson }}</tool_call>{% endfor %}{% endif %}" + TAIL + ASK,
    "phi": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}" + TAIL + "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    # As Qwen3 itself: an answer that was not thought about gets an empty block while it is the last one.
    "empty_think": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and (loop.last or m.reasoning_content) %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}" + TAIL + ASK,
    # As gpt-oss: the last answer ends with another token than earlier ones, a call with a third.
    "returns": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}<file_sep>{% elif loop.last and m.role == 'assistant' %}<|endoftext|>{% else %}<|im_end|>{% endif %}{% endfor %}" + ASK,
}  # fmt: skip
USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"
THOUGHT = "<think>\nSmall.\n</think>\n\nSeven."


@pytest.fixture(scope="module")
def plain() -> Any:
    return AutoTokenizer.from_pretrained(SMOLLM)


@pytest.fixture(scope="module")
def make() -> Make:
    def tokenizer(template: str, eos: str = "<|im_end|>") -> Any:
        made = AutoTokenizer.from_pretrained(SMOLLM)
        made.chat_template, made.eos_token = TEMPLATES.get(template, template), eos
        return made

    return tokenizer


def turns(*contents: str) -> Turns:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def check(tokenizer: Any, plain: Any, conversation: Turns, pieces: list[tuple[str, bool]], **options: Any) -> None:
    """`pieces`: text and whether it trains, in order; encoded one by one with SmolLM2's tokenizer as it is."""
    example = encode_example(tokenizer, "", conversation, chat=True, **options)
    encoded = [(plain(text, add_special_tokens=False)["input_ids"], trains) for text, trains in pieces]
    assert example.token_ids == [i for ids, _ in encoded for i in ids]
    assert example.loss_mask == [trains for ids, trains in encoded for _ in ids]
    tools = options.get("tools")
    # Every answer that trains stands behind exactly the tokens that the policy is prompted with.
    start = 0
    answers = [i for i, turn in enumerate(conversation) if turn["role"] == "assistant" and turn.get("weight") != 0]
    trained = [i for i, (_, trains) in enumerate(encoded) if trains]
    for index, piece in zip(answers[-len(trained) :], trained, strict=True):
        start = sum(len(ids) for ids, _ in encoded[:piece])
        assert encode_prompt(tokenizer, conversation[:index], chat=True, tools=tools) == example.token_ids[:start]


FOUR = turns("Name a prime.", "Seven.", "Another?", "Eleven.")
FOUR_PIECES = [
    (f"{USER}Name a prime.<|im_end|>\n{ASSISTANT}", False),
    ("Seven.<|im_end|>", True),
    (f"\n{USER}Another?<|im_end|>\n{ASSISTANT}", False),
    ("Eleven.<|im_end|>", True),
]


@pytest.mark.parametrize("template", ["trim", "nogen", "qwen3", "tools"])
def test_answers_train_up_to_the_end_that_the_template_writes(make: Make, plain: Any, template: str) -> None:
    """The EOS is another token, and stands nowhere in the conversation; without a generation prompt the header is there."""
    tokenizer = make(template, "<|endoftext|>")
    check(tokenizer, plain, FOUR, FOUR_PIECES)
    check(tokenizer, plain, FOUR[:2], FOUR_PIECES[:2])
    assert turn_end_ids(tokenizer, chat=True) == (END,)
    assert turn_end_ids(tokenizer, chat=False) == (EOT,)


def test_by_number(make: Make) -> None:
    example = encode_example(make("trim", "<|endoftext|>"), "", turns("Hi.", "Hello."), chat=True)
    # <|im_start|> user \n Hi . <|im_end|> \n <|im_start|> ass istant \n Hello . <|im_end|>
    assert example.token_ids == [1, 4093, 198, 26843, 30, 2, 198, 1, 520, 9531, 198, 19556, 30, 2]
    assert example.loss_mask == [False] * 11 + [True] * 3


def test_what_follows_the_whole_conversation_is_no_end_of_a_turn(make: Make, plain: Any) -> None:
    tokenizer = make("phi", "<|endoftext|>")
    assert render(tokenizer, FOUR).endswith("Eleven.<|im_end|>\n<|endoftext|>")
    pieces = [
        ("<|user|>\nName a prime.<|im_end|>\n<|assistant|>\n", False),
        ("Seven.<|im_end|>", True),
        ("\n<|user|>\nAnother?<|im_end|>\n<|assistant|>\n", False),
        ("Eleven.<|im_end|>", True),
    ]
    check(tokenizer, plain, FOUR, pieces)
    assert turn_end_ids(tokenizer, chat=True) == (END,)


def test_the_space_before_an_answer_is_sampled_with_its_first_token(make: Make, plain: Any) -> None:
    pieces = [
        ("<|im_start|>[INST] Name a prime. [/INST]", False),
        (" Seven.<|im_end|>", True),
        ("[INST] Another? [/INST]", False),
        (" Eleven.<|im_end|>", True),
    ]
    check(make("inst"), plain, FOUR, pieces)
    with pytest.raises(LeftOut, match="System role not supported"):
        encode_prompt(make("inst"), [{"role": "system", "content": "Be brief."}, *FOUR[:1]], chat=True)


def test_a_thinking_block_is_opened_once(make: Make, plain: Any) -> None:
    tokenizer = make("thinkgen")
    pieces = [(f"{USER}Name a prime.<|im_end|>\n{ASSISTANT}<think>\n", False)]
    check(tokenizer, plain, turns("Name a prime.", THOUGHT), [*pieces, ("Small.\n</think>\n\nSeven.<|im_end|>", True)])
    with pytest.raises(LeftOut) as refused:  # an answer without thinking is none to this prompt
        encode_example(tokenizer, "", turns("Name a prime.", "Seven."), chat=True)
    message = str(refused.value)
    assert "the chat template of" in message
    assert "smollm2-135m-instruct prompts for an answer otherwise than it writes it" in message
    assert repr("assistant\n<think>\n")[1:] in message
    assert repr("assistant\nSeven.<|im_end|>\n")[1:] in message


@pytest.mark.parametrize("template", ["thinkgen", "qwen3"])
def test_answers_that_lose_their_thinking_do_not_train(make: Make, plain: Any, template: str) -> None:
    tokenizer, notes = make(template), Notes()
    opened = "<think>\n" if template == "thinkgen" else ""
    conversation = turns("Name a prime.", THOUGHT, "Another?", THOUGHT)
    history = (
        f"{USER}Name a prime.<|im_end|>\n{ASSISTANT}Seven.<|im_end|>\n{USER}Another?<|im_end|>\n{ASSISTANT}{opened}"
    )
    said = THOUGHT.removeprefix(opened) + "<|im_end|>"
    check(tokenizer, plain, conversation, [(history, False), (said, True)], notes=notes)
    [line] = notes.lines()
    assert "smollm2-135m-instruct shows 1 earlier answers otherwise than they were given; they do not train" in line
    assert "give each a row of its own" in line


def test_an_answer_that_survives_trains_beside_one_that_does_not(make: Make, plain: Any) -> None:
    conversation = [*turns("Name a prime.", "Seven.", "Another?", THOUGHT), *turns("A third?", THOUGHT)]
    pieces = [
        *FOUR_PIECES[:2],
        (f"\n{USER}Another?<|im_end|>\n{ASSISTANT}Seven.<|im_end|>\n{USER}A third?<|im_end|>\n{ASSISTANT}", False),
        (f"{THOUGHT}<|im_end|>", True),
    ]
    example = encode_example(make("qwen3"), "", conversation, chat=True)
    encoded = [(plain(text, add_special_tokens=False)["input_ids"], trains) for text, trains in pieces]
    assert example.token_ids == [i for ids, _ in encoded for i in ids]
    assert example.loss_mask == [trains for ids, trains in encoded for _ in ids]


def test_what_the_template_adds_to_a_last_answer_is_a_part_of_it(make: Make, plain: Any) -> None:
    """Earlier ones are not written so: they are no answers that the policy gives."""
    block = "<think>\n\n</think>\n\n"
    history = f"{USER}Name a prime.<|im_end|>\n{ASSISTANT}Seven.<|im_end|>\n{USER}Another?<|im_end|>\n{ASSISTANT}"
    check(make("empty_think"), plain, FOUR, [(history, False), (f"{block}Eleven.<|im_end|>", True)])


def test_reasoning_reaches_the_template_or_is_named(make: Make, plain: Any) -> None:
    conversation = [*turns("Name a prime."), {"role": "assistant", "content": "Seven.", "reasoning_content": "Small."}]
    notes = Notes()
    check(
        make("empty_think"),
        plain,
        conversation,
        [FOUR_PIECES[0], ("<think>\nSmall.\n</think>\n\nSeven.<|im_end|>", True)],
        notes=notes,
    )
    assert notes.lines() == []
    check(make("qwen3"), plain, conversation, FOUR_PIECES[:2], notes=notes)
    check(make("qwen3"), plain, conversation, FOUR_PIECES[:2], notes=(silent := Notes()))
    assert silent.lines() == [f"the chat template of {SMOLLM} does not show reasoning_content of messages (1 rows)"]


def test_an_answer_of_weight_0_does_not_train(make: Make, plain: Any) -> None:
    conversation = [{**turn, "weight": i // 2} for i, turn in enumerate(FOUR)]
    pieces = [(text, trains and i == 3) for i, (text, trains) in enumerate(FOUR_PIECES)]
    example = encode_example(make("trim"), "", conversation, chat=True)
    encoded = [(plain(text, add_special_tokens=False)["input_ids"], trains) for text, trains in pieces]
    assert example.token_ids == [i for ids, _ in encoded for i in ids]
    assert example.loss_mask == [trains for ids, trains in encoded for _ in ids]


CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


@pytest.mark.parametrize("said", ["Let me look.", None])
@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'])
def test_calls_results_and_tools_are_rendered(make: Make, plain: Any, said: str | None, arguments: Any) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    conversation = [
        {"role": "user", "content": "Weather in Oslo?"},
        {"role": "assistant", "content": said, "tool_calls": [call]},
        {"role": "tool", "content": "4 degrees", "tool_call_id": "1", "name": "weather"},
        {"role": "assistant", "content": "Four degrees."},
    ]
    listed = '[{"type": "function", "function": {"name": "weather", "parameters": {}}}]'
    pieces = [
        (f"<|im_start|>system\nTools: {listed}<|im_end|>\n{USER}Weather in Oslo?<|im_end|>\n{ASSISTANT}", False),
        ((said or "") + '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call><|im_end|>', True),
        (f"\n<|im_start|>tool\n4 degrees<|im_end|>\n{ASSISTANT}", False),
        ("Four degrees.<|im_end|>", True),
    ]
    check(make("tools"), plain, conversation, pieces, tools=[TOOL])
    with pytest.raises(LeftOut, match="smollm2-135m-instruct does not show tool_calls"):
        encode_example(make("trim"), "", conversation, chat=True)
    notes = Notes()
    encode_example(make("trim"), "", FOUR, chat=True, tools=[TOOL], notes=notes)
    assert notes.lines() == [f"the chat template of {SMOLLM} does not show tools (1 rows)"]


def test_a_call_may_end_with_a_token_of_its_own(make: Make, plain: Any) -> None:
    """And the last answer with another than the earlier ones, which then do not survive."""
    tokenizer = make("returns")
    assert turn_end_ids(tokenizer, chat=True) == (EOT, plain.convert_tokens_to_ids("<file_sep>"))
    history = f"{USER}Name a prime.<|im_end|>{ASSISTANT}Seven.<|im_end|>{USER}Another?<|im_end|>{ASSISTANT}"
    check(tokenizer, plain, FOUR, [(history, False), ("Eleven.<|endoftext|>", True)])
    asked = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    pieces = [(f"{USER}Name a prime.<|im_end|>{ASSISTANT}", False), ("weather<file_sep>", True)]
    check(tokenizer, plain, [*FOUR[:1], asked], pieces)


# With control tokens between its parts, as Ministral 3's [ARGS] and gpt-oss's <|channel|>.
PARTS = "{% for m in messages %}<|im_start|>{{ m.role }}<gh_stars>final\n{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}<jupyter_code>{{ f.name }}<file_sep>{{ f.arguments | tojson }}CALLED{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"


@pytest.mark.parametrize("end", ["<|im_end|>", "<jupyter_output><|im_end|>", "<jupyter_output>"])
def test_control_tokens_inside_a_call_do_not_end_it(make: Make, plain: Any, end: str) -> None:
    tokenizer = make(PARTS.replace("CALLED", end))
    ends = ["<|im_end|>"] if "<|im_end|>" in end else ["<|im_end|>", end]
    assert turn_end_ids(tokenizer, chat=True) == tuple(plain.convert_tokens_to_ids(ends))
    asked = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    pieces = [
        ("<|im_start|>user<gh_stars>final\nName a prime.<|im_end|><|im_start|>assistant", False),
        ('<gh_stars>final\n<jupyter_code>weather<file_sep>{"city": "Oslo"}' + end, True),
        ("<|im_start|>user<gh_stars>final\nAnother?<|im_end|><|im_start|>assistant", False),
        ("<gh_stars>final\nEleven.<|im_end|>", True),
    ]
    check(tokenizer, plain, [FOUR[0], asked, *FOUR[2:]], pieces)


# As Gemma 4: control tokens quote texts, close every call, and say that the calls are over.
QUOTES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for t in m.tool_calls or [] %}<jupyter_code>{{ t.function.name }}{% for k, v in t.function.arguments | items %}{{ k }}:<file_sep>{{ v }}<file_sep>{% endfor %}<jupyter_output>{% if loop.last %}OVER{% endif %}{% endfor %}{% if not m.tool_calls %}<|im_end|>\n{% endif %}{% endfor %}"
    + ASK
)


def asks(*calls: dict, said: str | None = None) -> Turns:
    return [*FOUR[:1], {"role": "assistant", "content": said, "tool_calls": [*calls]}]


def test_control_tokens_that_quote_arguments_do_not_end_a_call(make: Make, plain: Any) -> None:
    tokenizer = make(QUOTES.replace("OVER", "<empty_output>"))
    assert turn_end_ids(tokenizer, chat=True) == tuple(plain.convert_tokens_to_ids(["<|im_end|>", "<empty_output>"]))
    one = "<jupyter_code>weathercity:<file_sep>Oslo<file_sep><jupyter_output>"
    for count in (1, 2):
        pieces = [FOUR_PIECES[0], (one * count + "<empty_output>", True)]
        check(tokenizer, plain, asks(*[CALL] * count), pieces)
        asked = [(f"{USER}Another?<|im_end|>\n{ASSISTANT}", False), FOUR_PIECES[3]]
        check(tokenizer, plain, [*asks(*[CALL] * count), *FOUR[2:]], [*pieces, *asked])


def test_calls_of_which_each_has_an_end_are_not_cut_at_the_first(make: Make, plain: Any) -> None:
    tokenizer, one = make(QUOTES.replace("OVER", "")), "<jupyter_code>weathercity:<file_sep>Oslo<file_sep>"
    check(tokenizer, plain, asks(CALL), [FOUR_PIECES[0], (one + "<jupyter_output>", True)])
    with pytest.raises(LeftOut, match="does not end an answer where it is over"):
        encode_example(tokenizer, "", asks(CALL, CALL), chat=True)
    notes = Notes()
    example = encode_example(tokenizer, "", [*asks(CALL, CALL), *FOUR[2:]], chat=True, notes=notes)
    assert (trained(plain, example), notes.rewritten) == ("Eleven.<|im_end|>", 1)


def trained(plain: Any, example: Any) -> str:
    return plain.decode([i for i, trains in zip(example.token_ids, example.loss_mask, strict=True) if trains])


NEWS = {"id": "2", "type": "function", "function": {"name": "news", "arguments": {"topic": "Oslo"}}}
CALLED = "{% for t in m.tool_calls or [] %}<tool_call>{{ t.function | tojson }}</tool_call>{% endfor %}"
SHOWN = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'


def test_every_call_of_every_row_is_shown_or_the_row_is_refused(make: Make, plain: Any) -> None:
    """Whatever rows before it were, and though the text speaks of what is called."""
    either = make(
        HEAD + "{% if m.content %}{{ m.content }}{% elif m.tool_calls %}" + CALLED + "{% endif %}" + TAIL + ASK
    )
    first = make(
        HEAD + "{{ m.content }}" + CALLED.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]") + TAIL + ASK
    )
    notes = Notes()
    for row in (asks(CALL), [*asks(CALL), *FOUR[2:]]):
        assert trained(plain, encode_example(either, "", row, chat=True, notes=notes)).startswith(SHOWN)
    for row in (asks(CALL, said="The weather?"), [*asks(CALL, said="The weather?"), *FOUR[2:]]):
        with pytest.raises(LeftOut, match=r"does not show tool_calls \(1 of 1, the first is .*weather"):
            encode_example(either, "", row, chat=True, notes=notes)
    assert trained(plain, encode_example(first, "", asks(CALL), chat=True, notes=notes)) == SHOWN + "<|im_end|>"
    for calls in ([CALL, NEWS], [CALL, CALL]):
        with pytest.raises(LeftOut, match=r"does not show tool_calls \(1 of 2"):
            encode_prompt(first, [*asks(*calls), FOUR[2]], chat=True, notes=notes)


def test_an_earlier_answer_of_which_a_part_is_never_shown_does_not_train(make: Make, plain: Any) -> None:
    """As Llama 3.1's call beside a text, and the thinking of DeepSeek-R1."""
    call_alone = make(HEAD + "{% if m.tool_calls %}" + CALLED + "{% else %}{{ m.content }}{% endif %}" + TAIL + ASK)
    forgets = make("{% for m in messages %}" + FORGETS + "<|im_start|>{{ m['role'] }}\n{{ c }}" + TAIL + ASK)
    for tokenizer, row in (
        (call_alone, asks(CALL, said="Let me look.")),
        (call_alone, [*asks(CALL, said="Name"), *FOUR[2:], *asks(CALL, said="Eleven.")]),  # said elsewhere
        (forgets, turns("Name a prime.", THOUGHT)),
    ):
        with pytest.raises(LeftOut, match="does not show an answer as it was given"):
            encode_example(tokenizer, "", row, chat=True)
        notes = Notes()
        example = encode_example(tokenizer, "", [*row, *FOUR[2:]], chat=True, notes=notes)
        assert not trained(plain, example).startswith("<tool_call>")
        assert trained(plain, example).replace("Eleven.<|im_end|>", "") == ""
        assert notes.rewritten in (1, 2)
    check(call_alone, plain, [*asks(CALL), *FOUR[2:]], [FOUR_PIECES[0], (SHOWN + "<|im_end|>", True), *FOUR_PIECES[2:]])


# As DeepSeek-V3, which joins arguments with texts; its first template shows calls only where the content is null.
JOINS = HEAD + "{% for t in m.tool_calls or [] %}{{ t.function.name + ' ' + t.function.arguments }}{% endfor %}{{ m.content or '' }}" + TAIL + ASK  # fmt: skip
NULLS = HEAD + "{% if m.content is none %}{% for t in m.tool_calls %}{{ t.function.name }} {{ t.function.arguments }}{% endfor %}{% else %}{{ m.content }}{% endif %}" + TAIL + ASK  # fmt: skip


@pytest.mark.parametrize("template", [JOINS, NULLS])
@pytest.mark.parametrize("arguments", ['{"city":"Oslo"}', {"city": "Oslo"}])
@pytest.mark.parametrize("said", [None, ""])
def test_templates_that_take_arguments_as_a_text(
    make: Make, plain: Any, template: str, arguments: Any, said: str | None
) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    written = arguments if isinstance(arguments, str) else '{"city": "Oslo"}'
    check(make(template), plain, asks(call, said=said), [FOUR_PIECES[0], (f"weather {written}<|im_end|>", True)])
    with pytest.raises(LeftOut, match="the arguments of a tool call are not JSON"):
        encode_example(make(template), "", asks({**CALL, "function": {"name": "f", "arguments": "{"}}), chat=True)


def test_no_calls_are_as_if_there_were_no_such_key(make: Make, plain: Any) -> None:
    tokenizer = make(HEAD + "{% if 'tool_calls' in m %}" + CALLED + "{% else %}{{ m.content }}{% endif %}" + TAIL + ASK)
    for calls in ([], None):
        check(tokenizer, plain, [FOUR[0], FOUR[1] | {"tool_calls": calls}, *FOUR[2:]], FOUR_PIECES)


def test_what_a_template_cannot_do_without_is_shown(make: Make, plain: Any) -> None:
    """Mistral's fails on a result without the call's id."""
    template = TEMPLATES["tools"].replace("{{ m['content'] or", "{% if m.role == 'tool' %}{{ m.tool_call_id + ': ' }}{% endif %}{{ m['content'] or")  # fmt: skip
    conversation = [
        {"role": "user", "content": "Weather in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "4 degrees", "tool_call_id": "1", "name": "weather"},
        {"role": "assistant", "content": "Four degrees."},
    ]
    notes, tokenizer = Notes(), make(template)
    example = encode_example(tokenizer, "", conversation, chat=True, notes=notes)
    assert "<|im_start|>tool\n1: 4 degrees<|im_end|>\n" in plain.decode(example.token_ids)
    roles = {"turns of the role user", "turns of the role tool"}
    assert (notes.shown - roles, dict(notes.hidden)) == ({"tool_call_id"}, {"name of messages": 1})


def test_a_template_without_an_end_is_refused(make: Make) -> None:
    tokenizer = make("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(DataError, match=r"smollm2-135m-instruct must end an answer .*'user: -\\nassistant: ANSWER\\n'"):
        encode_example(tokenizer, "", FOUR, chat=True)


def test_spaces_of_contents_are_the_template_s_business(make: Make, plain: Any) -> None:
    conversation = turns("  Name a prime.\n", "  Seven. \n")
    pieces = [(f"{USER}  Name a prime.\n<|im_end|>\n{ASSISTANT}", False), ("  Seven. \n<|im_end|>", True)]
    check(make("qwen3"), plain, conversation, pieces)
    check(make("trim"), plain, conversation, FOUR_PIECES[:2])
    # Here the answer's line breaks would merge with the header's: the prompt keeps its tokens, as when it is sampled from.
    check(make("qwen3"), plain, turns("Name a prime.", "\n\nSeven."), [FOUR_PIECES[0], ("\n\nSeven.<|im_end|>", True)])


def test_answers_whose_tokens_merge_with_their_header_are_shown_only(make: Make) -> None:
    """Else they would stand behind other tokens than the prompts of later answers have."""
    tokenizer, notes = make("qwen3"), Notes()
    conversation = turns("Name a prime.", "\n\nSeven.", "Another?", "Eleven.")
    example = encode_example(tokenizer, "", conversation, chat=True, notes=notes)
    prompt = encode_prompt(tokenizer, conversation[:3], chat=True)
    assert example.token_ids[: len(prompt)] == prompt
    assert (
        tokenizer.decode([i for i, m in zip(example.token_ids, example.loss_mask, strict=True) if m])
        == "Eleven.<|im_end|>"
    )
    assert notes.rewritten == 1


def test_a_date_is_that_of_the_configuration(make: Make, tmp_path: Path) -> None:
    tokenizer = make("date")
    assert "Today: 01 Jan 2026" in render(tokenizer, FOUR)
    assert "Today: 29 Feb 2024" in render(with_date(tokenizer, "2024-02-29"), FOUR)
    tokenizer.save_pretrained(tmp_path)  # a checkpoint keeps its date, as the reward service loads it
    assert "Today: 29 Feb 2024" in render(AutoTokenizer.from_pretrained(tmp_path), FOUR)
    later = load_tokenizer(str(tmp_path), ModelConfig(path=str(tmp_path), template_date="2025-12-31"))
    assert "Today: 31 Dec 2025" in render(later, FOUR)


# ---- the same rule elsewhere


def test_scoring_inputs_end_with_one_eos_whatever_ended_the_turn(make: Make) -> None:
    tokenizer = make("trim", "<|endoftext|>")
    example = encode_example(tokenizer, "", FOUR, chat=True)
    item = item_of_messages(tokenizer, FOUR)
    assert example.token_ids[-1] == END
    assert list(item.token_ids) == [*example.token_ids[:-1], EOT]
    assert item.prompt_tokens == len(encode_prompt(tokenizer, FOUR[:3], chat=True))
    assert item_of_rendered(tokenizer, render(tokenizer, FOUR)).token_ids == item.token_ids
    # And where the template writes layout and the EOS behind that. The completion's own spaces stay.
    tokenizer, conversation = make("phi", "<|endoftext|>"), turns("Name a prime.", "Seven. \n")
    item = item_of_messages(tokenizer, conversation)
    assert tokenizer.decode(item.token_ids).endswith("<|assistant|>\nSeven. \n<|endoftext|>")
    assert item_of_rendered(tokenizer, render(tokenizer, conversation)).token_ids == item.token_ids


def test_a_long_conversation_is_scored_with_a_fixed_number_of_renderings(make: Make) -> None:
    tokenizer, rendered = make("trim"), []
    apply = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda messages, **options: (
        rendered.append(len(messages)) or apply(messages, **options)
    )
    item_of_messages(tokenizer, turns(*["word"] * 400))
    item_of_messages(tokenizer, turns(*["word"] * 40))
    assert [count for count in rendered if count > 2] == [400, 399, 40, 39]


@pytest.mark.parametrize("template", ["trim", "nogen", "inst"])
def test_an_environment_goes_on_as_the_template_does(make: Make, template: str) -> None:
    tokenizer = make(template, "<|im_end|>" if template == "inst" else "<|endoftext|>")
    prompt = encode_prompt(tokenizer, FOUR[:1], chat=True)
    said = encode_example(tokenizer, "", FOUR[:2], chat=True).token_ids[len(prompt) :]
    for sampled in (said, said[:-1]):  # an answer that was cut off is ended for it
        observed = list(TwoTurn(tokenizer, "Another?", chat=True).step(sampled).observation)
        assert [*prompt, *sampled, *observed] == encode_prompt(tokenizer, FOUR[:3], chat=True)
    assert told_ids(tokenizer, "\nAgain\n", chat=False) == tokenizer("\nAgain\n", add_special_tokens=False)["input_ids"]


def test_an_environment_refuses_a_template_that_rewrites_answers(make: Make) -> None:
    with pytest.raises(EnvironmentFault, match="rewrites earlier answers, so a conversation cannot go on behind one"):
        TwoTurn(make("empty_think"), chat=True)


# ---- long conversations

# As Gemma and Llama 3.1: the system's turn goes before the loop, and the loop over what is left.
LLAMA = "{{ bos_token }}{% if messages[0].role == 'system' %}{% set intro = messages[0].content %}{% set messages = messages[1:] %}{% else %}{% set intro = 'Be brief.' %}{% endif %}<|im_start|>system\n{{ intro }}<|im_end|>\n{% for m in messages %}{% if loop.first %}{% set _ = 1 %}{% endif %}<|im_start|>{{ m.role }}{% for call in m.tool_calls or [] %}{{ call.function.name }}{% if not loop.last %}, {% endif %}{% endfor %}{{ '\n' }}{{ m.content | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
COUNTS = "{% set ns = namespace(n=0) %}" + HEAD + "{% set ns.n = ns.n + 1 %}{{ ns.n }} {{ m['content'] }}" + TAIL
TURN_BY_TURN = ["trim", "nogen", "inst", "date", "tools", "phi", LLAMA, COUNTS + ASK, HEAD + "{{ m.content }}{% if not loop.first %}{{ loop.previtem.role }}{% endif %}" + TAIL + ASK]  # fmt: skip
LOOKS_AHEAD = [
    "thinkgen",
    "qwen3",
    "empty_think",
    "returns",
    COUNTS + "{% if add_generation_prompt %}{% if ns.n > 2 %}<|im_start|>assistant\n{% else %}<|im_start|>\n{% endif %}{% endif %}",
    HEAD + "{% if messages | length > 3 %}!{% endif %}{{ m.content }}" + TAIL + ASK,
    HEAD + "{{ m.content }}{{ messages[loop.index0 - 1].content }}" + TAIL + ASK,
    HEAD + "{{ m.content }}{{ loop.nextitem.content }}" + TAIL + ASK,
    HEAD + "{{ m.content }}{{ messages[1].content }}" + TAIL + ASK,
    "{% macro all() %}{{ messages | length }}{% endmacro %}" + HEAD + "{{ all() }}{{ m.content }}" + TAIL + ASK,
    "{% set n = messages[1:] %}" + HEAD + "{{ n | length }}{{ m.content }}" + TAIL + ASK,
    HEAD + "{% if m.content == 'Stop.' %}{% break %}{% endif %}{{ m.content }}" + TAIL + ASK,
    "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}" + HEAD + "{{ m.content }}" + TAIL + ASK,
    HEAD + "{% set l = loop %}{% for c in m.content %}{{ c }}{{ l.last }}{% endfor %}" + TAIL + ASK,
    "{% if messages %}" + HEAD + "{{ m.content }}" + TAIL + "{% endif %}" + ASK,
]  # fmt: skip
CONTENTS = [
    "Name a prime.",
    "Seven.",
    "  Another? \n",
    THOUGHT,
    "\n\nOne more",
    "",
    "<|im_end|>",
    "Stop.",
    "x\ue000y",
    "Ende",
]


def conversations() -> list[Turns]:
    random, found = Random(7), []
    for count in (4, 5, 6, 9, 14):
        made = turns(*random.choices(CONTENTS, k=count))
        found += [made, [{"role": "system", "content": "Help."}, *made], made[1:]]
        found += [[{**turn, "weight": random.randrange(2)} for turn in made]]
        found += [[*made[:2], {"role": "tool", "content": "4"}, *made[1:]]]
    return found


@pytest.mark.parametrize("template", [*TURN_BY_TURN, *LOOKS_AHEAD])
def test_one_rendering_finds_what_one_for_each_answer_finds(
    make: Make, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, known = make(template), []

    def starts(*arguments: Any) -> dict[int, int]:
        known.append(turn_starts(*arguments))
        return known[-1]

    def found(conversation: Turns) -> Any:
        notes = Notes()
        try:
            example = encode_conversation(tokenizer, conversation, notes=notes)
        except LeftOut as error:
            return str(error)
        return example, notes.rewritten

    for conversation in conversations():
        monkeypatch.setattr(chat_template, "turn_starts", starts)
        linear = found(conversation)
        monkeypatch.setattr(chat_template, "turn_starts", lambda *_: {})
        assert linear == found(conversation)
    assert any(known) is (template in TURN_BY_TURN)


def test_a_long_conversation_trains_with_a_fixed_number_of_renderings(make: Make) -> None:
    tokenizer, rendered = make("trim"), []
    apply = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda messages, **options: (
        rendered.append(len(messages)) or apply(messages, **options)
    )
    example = encode_example(tokenizer, "", turns(*["word"] * 400), chat=True)
    assert sum(example.loss_mask) == 2 * 200
    assert [count for count in rendered if count > 2] == [400, 399]


def test_too_many_answers_of_a_template_that_looks_ahead(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_TURNS", 100)
    conversation = turns(*["word"] * 16)
    encode_example(make("trim"), "", conversation, chat=True)
    item_of_messages(make("qwen3"), conversation)
    with pytest.raises(
        LeftOut, match=r"each of 7 answers takes renderings of its own, 105 turns in all, more than 100"
    ):
        encode_example(make("qwen3"), "", conversation, chat=True)


def test_an_answer_that_the_template_does_not_show_whole_is_refused(make: Make) -> None:
    tokenizer = make("{% for m in messages %}" + FORGETS + "<|im_start|>{{ m['role'] }}\n{{ c }}" + TAIL + ASK)
    asked = {"role": "user", "content": "Name a prime."}
    with pytest.raises(LeftOut, match=r"does not show an answer as it was given .*'<think>"):
        encode_example(tokenizer, "", [asked, {"role": "assistant", "content": THOUGHT}], chat=True)
    with pytest.raises(LeftOut, match="does not show an answer as it was given"):
        item_of_messages(tokenizer, [asked, {"role": "assistant", "content": THOUGHT}])
    encode_example(tokenizer, "", [asked, {"role": "assistant", "content": "Seven."}], chat=True)


def test_roles_that_the_template_leaves_out_are_told(make: Make) -> None:
    """Its branches know two roles, as Phi-3's first template."""
    tokenizer = make(
        "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
        + ASK
    )
    turns = [{"role": role, "content": f"{role} says."} for role in ("system", "user", "assistant")]
    notes = Notes()
    encode_example(tokenizer, "", turns, chat=True, notes=notes)
    assert notes.lines() == [f"{notes.template} does not show turns of the role system (1 rows)"]
