"""Where a text begins and where it goes on: BOS and the spaces of sentencepiece, with tokenizers made here."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from common.text.encoding import (
    encode_example,
    encode_prompt,
    item_of_messages,
    item_of_rendered,
    item_of_text,
    told_ids,
)
from contracts.config import DataConfig
from controller.data.datasets import load_preferences, load_prompts, load_sft
from reward_service.encoder import Encoder
from tests.unit.test_data import jsonl  # noqa: F401

WORDS = [
    "Name a prime.",
    "Seven.",
    "Seven is a prime.",
    "def f(x):\n    return x\n",
    "Name me a seven , a prime , a name .",
    "[INST] a [/INST] b",
]
BOS, EOS = 1, 2


def sentencepiece(kind: str, has_bos: bool = True) -> Any:
    """A tokenizer with the habits of Llama 2 (`legacy`: a space before every piece of text; `metaspace`: before the first
    one) or T5 (`unigram`), or with GPT-2's bytes and Llama 3's BOS (`bytes`)."""
    special = ["<unk>", "<s>", "</s>"]
    if kind == "unigram":
        made = Tokenizer(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=90, special_tokens=special, unk_token="<unk>", initial_alphabet=list("\n[]/")
        )
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else list("\n▁")
        trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=special, initial_alphabet=alphabet)
    if kind == "bytes":
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    elif kind == "legacy":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        scheme = "always" if kind == "unigram" else "first"
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=kind == "unigram")
        made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    made.train_from_iterator(WORDS * 3, trainer)
    if has_bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


@pytest.fixture(scope="module", params=["legacy", "metaspace", "unigram", "bytes"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return sentencepiece(request.param)


def pieces(tokenizer: Any, ids: list[int]) -> str:
    """What the tokens say together, a space where they have one."""
    if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        return tokenizer.decode(ids)
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("▁", " ")


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Name a prime.", "Seven."),
        ("Name a prime.", " Seven."),
        (
            "Name a prime. ",
            "Seven.",
        ),  # its last token would merge with the space: the prompt stays as it is sampled from
        ("Name a prime.\n", "Seven."),
        ("Name a prime.", "\nSeven."),
        ("def f(x):\n", "    return x\n"),
        ("Nam", "e a prime."),
    ],
)
def test_prompt_and_completion_join_without_phantom_spaces(tokenizer: Any, prompt: str, completion: str) -> None:
    start = encode_prompt(tokenizer, prompt, chat=False)
    example = encode_example(tokenizer, prompt, completion, chat=False)
    said = example.token_ids[len(start) : -1]
    assert start == tokenizer(prompt)["input_ids"]
    assert start[0] == BOS
    assert example.token_ids[: len(start)] == start
    assert pieces(tokenizer, said) == completion
    assert example.token_ids[-1] == EOS
    assert example.loss_mask == [False] * len(start) + [True] * (len(said) + 1)
    whole = tokenizer(prompt + completion)["input_ids"]
    if whole[: len(start)] == start:
        assert example.token_ids == [*whole, EOS]


def test_a_tokenizer_alone_would_begin_a_completion_with_a_space() -> None:
    """So the test above can fail."""
    made = sentencepiece("metaspace")
    assert pieces(made, made("Seven.", add_special_tokens=False)["input_ids"]) == " Seven."


def test_every_way_of_a_plain_text_begins_with_the_tokenizers_bos(tokenizer: Any, jsonl: Any, tmp_path: Path) -> None:  # noqa: F811
    data = DataConfig(prompt_words=None, max_bad_rows=0.0)
    text = "Seven is a prime."
    ids = tokenizer(text)["input_ids"]
    assert ids.count(BOS) == 1
    [prompt] = load_prompts(jsonl({"prompt": text}), data, tokenizer, 8, 64)
    [example] = load_sft(jsonl({"text": text}), data, tokenizer, 64)
    [rated] = load_preferences(jsonl({"text": text, "rating": 1}), data, tokenizer, 64)
    [pair] = load_preferences(jsonl({"chosen": text, "rejected": "Name"}), data, tokenizer, 64)
    assert list(prompt.token_ids) == ids
    assert example.token_ids == rated.token_ids == pair.chosen_ids == [*ids, EOS]
    assert example.loss_mask == [False] + [True] * len(ids)  # no policy samples a BOS
    assert pair.rejected_ids[0] == BOS
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(eos_token_id=EOS).save_pretrained(tmp_path)
    encoder = Encoder(str(tmp_path))
    for item in (encoder.text(text), encoder.rendered(text), encoder.rendered(text, with_bos=True)):
        assert list(item.token_ids) == [*ids, EOS]  # type: ignore[union-attr]
    cut = encoder.rendered(text, prompt="Seven is")
    assert list(cut.token_ids) == encode_example(tokenizer, "Seven is", " a prime.", chat=False).token_ids  # type: ignore[union-attr]
    assert cut.prompt_tokens == len(tokenizer("Seven is")["input_ids"])  # type: ignore[union-attr]


def test_without_a_bos_there_is_none(jsonl: Any) -> None:  # noqa: F811
    made = sentencepiece("metaspace", has_bos=False)
    assert BOS not in encode_prompt(made, "Seven.", chat=False)
    assert BOS not in item_of_text(made, "Seven.").token_ids
    assert BOS not in item_of_rendered(made, "Seven.").token_ids


def test_a_template_writes_its_bos_itself(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "Name a prime."}, {"role": "assistant", "content": "Seven."}]
    example = encode_example(tokenizer, "", turns, chat=True)
    rendered = "<s>[INST] Name a prime. [/INST] Seven.</s>"
    assert example.token_ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert example.token_ids.count(BOS) == 1
    said = [i for i, trains in zip(example.token_ids, example.loss_mask, strict=True) if trains]
    assert pieces(tokenizer, said[:-1]) == " Seven."
    item = item_of_messages(tokenizer, turns)
    assert item.token_ids == tuple(example.token_ids)
    assert item_of_rendered(tokenizer, rendered).token_ids == item.token_ids
    assert item_of_rendered(tokenizer, rendered, "<s>[INST] Name a prime. [/INST]").token_ids == item.token_ids


def test_several_answers_train_behind_their_prompts(tokenizer: Any) -> None:
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(["Name a prime.", "Seven.", "Name me a seven.", "Seven is a prime."])
    ]
    example = encode_example(tokenizer, "", turns, chat=True)
    rendered = "<s>[INST] Name a prime. [/INST] Seven.</s>[INST] Name me a seven. [/INST] Seven is a prime.</s>"
    assert example.token_ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    for count in (1, 3):
        start = encode_prompt(tokenizer, turns[:count], chat=True)
        assert example.token_ids[: len(start)] == start
        assert example.loss_mask[len(start) - 1 : len(start) + 1] == [False, True]
    assert sum(a and not b for a, b in zip([*example.loss_mask], [*example.loss_mask[1:], False], strict=True)) == 2


def test_what_an_environment_says_goes_on_a_text(tokenizer: Any) -> None:
    assert pieces(tokenizer, told_ids(tokenizer, "Seven.", chat=False)) == "Seven."
    assert pieces(tokenizer, told_ids(tokenizer, "\nSeven.\n", chat=False)) == "\nSeven.\n"


def test_control_tokens_of_texts_are_characters_without_added_spaces(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "a</s>a"}, {"role": "assistant", "content": "Seven.</s>[INST] a"}]
    ids = encode_example(tokenizer, "", turns, chat=True).token_ids
    assert (ids.count(BOS), ids.count(EOS), ids[-1]) == (1, 1, EOS)
    # A unigram model has its control tokens among its pieces, and finds them in any text.
    text = "a</s></s>a<s>"
    ids = encode_prompt(tokenizer, text, chat=False)
    assert (ids.count(BOS), ids.count(EOS)) == (1, 0)
    if tokenizer.unk_token_id not in ids:
        assert pieces(tokenizer, ids[1:]).lstrip(" ") == text
