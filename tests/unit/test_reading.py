"""Where scores are read, against transformers' own class on the chat template's own rendering, as TRL and others train."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from common.text.encoding import item_of_messages, item_of_text
from contracts.config import RewardServiceConfig, ScorerConfig
from reward_service.model import RewardModel
from reward_service.resolve import ScorerError, resolve
from reward_service.score_position import AtLast, chosen_read_at, make_reading
from reward_service.scorer_kind import scorer_kind
from tests.unit.test_joins import sentencepiece

IM_END, END_OF_TEXT, START = 2, 0, 1
TURNS = [
    {"role": "user", "content": "Is this film worth an evening?"},
    {"role": "assistant", "content": "A warm, funny and well acted film."},
    {"role": "user", "content": "And the end?"},
    {"role": "assistant", "content": "It earns its tears."},
]
SHORT = [TURNS[0], {"role": "assistant", "content": "No."}]
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TEMPLATES = {
    "chatml": CHATML + OPEN,
    "no generation prompt": CHATML,
    "no newline": CHATML.replace("<|im_end|>\n", "<|im_end|>") + OPEN,
    # As Phi-3's: <|endoftext|> behind everything, and the generation prompt in its place.
    "phi": CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}",
    "words": "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}<|im_end|>\n\n{% endfor %}",
}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tiny_float32: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A reward model as others leave it: weights, configuration, tokenizer with a template."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_float32, num_labels=1, dtype=torch.float32)
    model.score.weight.data.normal_()

    def checkpoint(template: str | None, eos: int, pad: int | None, **fields: Any) -> Path:
        path = tmp_path_factory.mktemp("reading") / "model"
        tokenizer = AutoTokenizer.from_pretrained(tiny_float32)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(path)
        model.config.pad_token_id, model.config.eos_token_id = pad, eos
        model.save_pretrained(path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | fields))
        return path

    return checkpoint


def served(path: Path, inputs: list[list[int]], read_at: str | None = None, append: str | None = None) -> list[float]:
    reading = make_reading(str(path), read_at, append, str(path))
    scores = RewardModel(str(path), "float32", reading=reading).score(inputs)
    return [s.value for s in scores if s.value is not None]


def scoring_input(tokenizer: Any, turns: list[dict[str, str]]) -> list[int]:
    """What a rollout in this template is scored as: all that it writes before the answer, the answer, one EOS."""
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    before = text[: text.rindex(turns[-1]["content"])]
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, turns[-1]["content"])]
    return [*parts[0], *parts[1], tokenizer.eos_token_id]


def plain(path: Path, rows: list[list[int]]) -> list[float]:
    """By the class itself, padded on the right in one batch as TRL's collator does."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    width, pad = max(map(len, rows)), model.config.pad_token_id
    padded = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        return model(input_ids=padded, attention_mask=mask).logits[:, 0].tolist()


@pytest.mark.parametrize(
    ("template", "eos", "pad"),
    [
        ("chatml", IM_END, IM_END),
        ("chatml", IM_END, END_OF_TEXT),
        ("chatml", END_OF_TEXT, END_OF_TEXT),  # the turn ends otherwise than a text does
        ("no generation prompt", IM_END, END_OF_TEXT),
        ("no newline", IM_END, IM_END),
        ("no newline", IM_END, 3),
        ("no newline", END_OF_TEXT, IM_END),
        ("phi", END_OF_TEXT, END_OF_TEXT),
        ("phi", END_OF_TEXT, 3),
        ("words", IM_END, END_OF_TEXT),
    ],
)
def test_scores_of_conversations_are_those_of_the_templates_rendering(
    make: Make, template: str, eos: int, pad: int
) -> None:
    path = make(TEMPLATES[template], eos, pad)
    tokenizer = AutoTokenizer.from_pretrained(path)
    talks = [TURNS, SHORT, TURNS[:2]]
    expected = plain(path, [tokenizer.apply_chat_template(t, tokenize=True)["input_ids"] for t in talks])
    inputs = [scoring_input(tokenizer, t) for t in talks]
    assert chosen_read_at(str(path), None) == "last"
    assert served(path, inputs) == pytest.approx(expected, abs=1e-4)
    at_eos = served(path, inputs, "eos")
    same = template == "no newline" and eos == IM_END != pad  # there alone the rendering ends in the EOS
    gap = max(abs(a - b) for a, b in zip(at_eos, expected, strict=True))
    assert gap < 1e-4 if same else gap > 0.1


@pytest.mark.parametrize("pad", [IM_END, END_OF_TEXT])
def test_plain_texts_are_read_where_the_class_pools(make: Make, pad: int) -> None:
    """TRL trains on the text and its EOS; where that is the pad token, the class reads the token before it."""
    path = make(TEMPLATES["chatml"], IM_END, pad)
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = ["A warm, funny film", "No user in it: just assistant words"]
    expected = plain(path, [tokenizer(text + tokenizer.eos_token)["input_ids"] for text in texts])
    found = served(path, [list(item_of_text(tokenizer, text).token_ids) for text in texts])
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("fields", [{"score_mean": 0.0, "score_std": 1.0}, {"normalize_reward": False}])
def test_models_of_tandem_and_openrlhf_are_read_at_the_eos(make: Make, fields: dict[str, Any]) -> None:
    """OpenRLHF strips the template's newline and takes the last token that attention sees, whatever its id."""
    path = make(TEMPLATES["chatml"], IM_END, IM_END, **fields)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    expected, inputs = [], []
    for turns in (TURNS, SHORT):
        text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert ids[0, -1] == IM_END
        with torch.no_grad():
            expected.append(model.score(model.model(ids).last_hidden_state[0, -1]).item())
        inputs.append(scoring_input(tokenizer, turns))
    assert chosen_read_at(str(path), None) == "eos"
    assert served(path, inputs) == pytest.approx(expected, abs=1e-4)


def test_what_is_appended_is_read(make: Make) -> None:
    """A model with a token for its reward, as InternLM2's: behind everything that the template writes."""
    path = make(TEMPLATES["chatml"], IM_END, END_OF_TEXT)
    tokenizer = AutoTokenizer.from_pretrained(path)
    behind = "<|im_end|>\n<|im_start|>"
    rows = [
        tokenizer.apply_chat_template(TURNS, tokenize=False).rstrip() + "\n<|im_start|>",
        "A warm, funny film" + behind,
    ]
    expected = plain(path, [tokenizer(row, add_special_tokens=False)["input_ids"] for row in rows])
    inputs = [scoring_input(tokenizer, TURNS), list(item_of_text(tokenizer, "A warm, funny film").token_ids)]
    assert served(path, inputs, append=behind) == pytest.approx(expected, abs=1e-4)


def test_requests_in_messages_reach_the_rendering(make: Make, tiny_float32: Path) -> None:
    """SmolLM2's own template, with its system turn, through the function that encodes requests."""
    own = AutoTokenizer.from_pretrained(tiny_float32)
    path = make(own.chat_template, IM_END, IM_END)
    expected = plain(path, [own.apply_chat_template(turns, tokenize=True)["input_ids"] for turns in (TURNS, SHORT)])
    found = served(path, [list(item_of_messages(own, turns).token_ids) for turns in (TURNS, SHORT)])
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_checkpoint_without_a_tokenizer_has_the_template_of_the_service(make: Make) -> None:
    path, service = (make(TEMPLATES["chatml"], IM_END, END_OF_TEXT) for _ in range(2))
    for file in path.glob("*token*"):
        file.unlink()
    (path / "chat_template.jinja").unlink()
    inputs = [scoring_input(AutoTokenizer.from_pretrained(service), TURNS)]
    reading = make_reading(str(path), None, None, str(service))
    found = RewardModel(str(path), "float32", reading=reading).score(inputs)
    assert found[0].value == pytest.approx(served(service, inputs)[0], abs=1e-5)


ASKED_AND_ANSWERED = (
    "{% for m in messages %}{{ '[INST]' if m.role == 'user' else '[/INST]' }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[/INST]\n{% endif %}"
)


@pytest.mark.parametrize("kind", ["legacy", "metaspace", "unigram", "bytes"])
def test_a_header_without_a_token_of_its_own_is_found_as_it_stands_in_a_conversation(kind: str) -> None:
    """Zephyr's form: alone, tokenizers of sentencepiece would write [/INST] with a space before it."""
    tokenizer = sentencepiece(kind)
    tokenizer.chat_template = ASKED_AND_ANSWERED
    turns = [{"role": "user", "content": "Name a prime."}, {"role": "assistant", "content": "Seven."}]
    rendered = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    seen, at = AtLast(tokenizer, None)(item_of_messages(tokenizer, turns).token_ids)
    assert list(seen) == rendered
    assert at == len(rendered) - 1
    plain_text = item_of_text(tokenizer, "Seven is a prime.").token_ids
    assert AtLast(tokenizer, None)(plain_text) == (plain_text, len(plain_text) - 1)


def test_a_header_that_cannot_be_found_is_refused() -> None:
    """Here it merges with what the template writes before it."""
    tokenizer = sentencepiece("legacy")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ ' nam' if m.role == 'user' else eos_token ~ '.' }}"
        "{{ 'e' if m.role == 'user' and not loop.last }}{% endfor %}{{ 'e' if add_generation_prompt }}"
    )
    with pytest.raises(ValueError, match="the chat template writes 'e' before an answer"):
        AtLast(tokenizer, None)
    AtLast(tokenizer, None, append="</s>")


def with_merged_layout() -> Any:
    """As cl100k and Llama 3's: a newline merges into the punctuation before it, in ">\\n" and ":\\n"."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*symbols, ">Ċ", ":Ċ"])}
    made = Tokenizer(models.BPE(vocab, [(">", "Ċ"), (":", "Ċ")]))
    pattern = Regex(r" ?[^\s\p{L}\p{N}]+[\r\n]*|\p{L}+|\p{N}|\s+")
    split = pre_tokenizers.Split(pattern, "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


TULU = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token if m.role == 'assistant' }}"
    "{{ '\n' if not loop.last or m.role == 'user' }}{% endfor %}{{ '<|assistant|>\n' if add_generation_prompt }}"
)
ALPACA = (
    "{% for m in messages %}### {{ 'Response' if m.role == 'assistant' else 'Instruction' }}:\n{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}\n\n{% endfor %}{{ '### Response:\n' if add_generation_prompt }}"
)


@pytest.mark.parametrize(
    ("template", "tail"),
    [(TULU, ""), (TULU + "{{ '\n' if not add_generation_prompt }}", "\n"), (ALPACA, "\n\n")],
    ids=["tulu", "tulu with a newline behind", "alpaca"],
)
def test_a_header_whose_last_token_is_merged_with_its_layout_is_found(template: str, tail: str) -> None:
    """Where a conversation ends in the EOS alone there is none to be found, as a text ends so, too."""
    tokenizer = with_merged_layout()
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": "Name a prime."}, {"role": "assistant", "content": "Seven."}]
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    merged = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(merged[-1:])[0] in (">Ċ", ":Ċ")
    item = item_of_messages(tokenizer, turns).token_ids
    assert item[-1] == tokenizer.eos_token_id
    seen, at = AtLast(tokenizer, None)(item)
    assert list(seen) == [*item, *tokenizer(tail, add_special_tokens=False)["input_ids"]]
    assert tokenizer.decode(seen).endswith("Seven.</s>" + tail)
    assert at == len(seen) - 1
    plain_text = item_of_text(tokenizer, "Seven is a prime.").token_ids
    assert AtLast(tokenizer, None)(plain_text) == (plain_text, len(plain_text) - 1)


def test_a_header_that_cannot_be_found_is_refused_before_anything_starts(make: Make, tmp_path: Path) -> None:
    """Here SmolLM2's, in which "name" is one token."""
    template = (
        "{% for m in messages %}{{ m.content }}{{ ' nam' if m.role == 'user' else '.' }}"
        "{{ 'e' if m.role == 'user' and not loop.last }}{% endfor %}{{ 'e' if add_generation_prompt }}"
    )
    path = make(template, IM_END, END_OF_TEXT)
    entry, service = ScorerConfig(path=str(path)), RewardServiceConfig(dtype="float32")
    reason = "the chat template writes 'e' before an answer"
    with pytest.raises(ScorerError, match=f"^proxy: {reason}"):
        resolve({"proxy": entry}, service, str(path))
    [problem] = scorer_kind("model").problems("reward_service.scorers.proxy", entry)
    assert problem.startswith(f"reward_service.scorers.proxy: {reason}")
    at_eos = ScorerConfig(path=str(path), read_at="eos")
    assert resolve({"proxy": at_eos}, service, str(path))["proxy"].read_at == "eos"
    others = (at_eos, ScorerConfig(path=str(make(CHATML, IM_END, IM_END))), ScorerConfig(path=str(tmp_path / "none")))
    assert [scorer_kind("model").problems("proxy", other) for other in others] == [[], [], []]


def test_where_a_score_is_read_is_part_of_the_version(make: Make) -> None:
    path = make(TEMPLATES["chatml"], IM_END, END_OF_TEXT)
    config = RewardServiceConfig(dtype="float32")

    def spec(**fields: Any) -> Any:
        return resolve({"proxy": ScorerConfig(path=str(path), **fields)}, config)["proxy"]

    found, last, at_eos, appended = spec(), spec(read_at="last"), spec(read_at="eos"), spec(append="<|im_start|>")
    assert [s.read_at for s in (found, last, at_eos, appended)] == ["last", "last", "eos", "last"]
    assert found.version == last.version
    assert len({s.version for s in (found, at_eos, appended)}) == 3
