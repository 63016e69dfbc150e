"""Where a reward model's score is read: the last step from a scoring input to what the model sees.

A scoring input is prompt, completion and one EOS. A reward model of `stage=reward_model` was trained on that, and one of
OpenRLHF on nearly that: their score is at the EOS. Every other checkpoint has its score where its own class in
transformers takes it: at the last token that is not the pad token, of what the chat template writes for a conversation
(TRL's RewardTrainer trains on that; ChatML ends in a newline behind the EOS), or of a text with its EOS.
"""

import json
from collections.abc import Callable
from typing import Any

from common.text.encoding import ANCHORS, ids_after
from common.text.tokenizers import local_checkpoint

EOS, LAST = "eos", "last"
# In the config.json of a checkpoint that was trained with its score at the EOS: Tandem's normaliser, OpenRLHF's.
TRAINED_AT_EOS = ("score_mean", "normalize_reward")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")

Reading = Callable[[tuple[int, ...]], tuple[tuple[int, ...], int]]  # scoring input -> what the model sees, read where


class NoHeader(ValueError):
    """Nothing tells a conversation apart from other inputs."""


def chosen_read_at(path: str, read_at: str | None, append: str | None = None) -> str:
    """eos or last: as configured, or as the checkpoint at `path` was trained."""
    if read_at or append is not None:
        return read_at or LAST
    from common.models.adapters import set_by_training, split

    base, adapter = split(str(local_checkpoint(path)))
    config = json.loads((local_checkpoint(base) / "config.json").read_text()) | set_by_training(adapter)
    return EOS if any(config.get(field) is not None for field in TRAINED_AT_EOS) else LAST


def at_eos(token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    # The last token is found by length, never by its id: with pad = eos a search for padding finds the EOS.
    return token_ids, len(token_ids) - 1


class AtLast:
    """Reads where transformers' own classes pool (`GenericForSequenceClassification`).

    Args:
        tokenizer: of the checkpoint; one without a chat template leaves every input as it is.
        pad_token_id: of the checkpoint's configuration.
        append: what follows a completion instead of its EOS; None: in a conversation what the chat template writes.

    Raises:
        NoHeader: what the template writes before an answer is not to be found in its own rendering.
    """

    def __init__(self, tokenizer: Any, pad_token_id: int | None, append: str | None = None):
        self._pad = pad_token_id
        self._header: tuple[int, ...] = ()  # what every conversation contains, and every input where `append` is given
        self._tail: tuple[int, ...] | None = None
        asked, header, tail = ("", "", append) if append is not None else _around_an_answer(tokenizer)
        if tail is None:
            return

        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        # As they stand behind other text: alone, a sentencepiece tokenizer would begin them with a space.
        self._tail = tuple(ids_after(encode, ANCHORS[-1], encode(ANCHORS[-1]), tail))
        if self._tail == (tokenizer.eos_token_id,):
            return  # conversations and texts end alike
        whole = tuple(encode(asked))
        for text in (header.rstrip(), header):  # with its layout where that merges into its last token, as in ">\n"
            before = asked[: asked.rindex(text)]
            self._header = tuple(ids_after(encode, before, encode(before), text))
            if self._is_conversation(whole):
                return
        raise NoHeader(
            f"the chat template writes {header!r} before an answer, whose tokens are others in a conversation; "
            "write read_at: eos, or append"
        )

    def __call__(self, token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        if self._tail is not None and self._is_conversation(token_ids):
            token_ids = (*token_ids[:-1], *self._tail)
        last = len(token_ids) - 1
        while last > 0 and token_ids[last] == self._pad:
            last -= 1
        return token_ids, last

    def _is_conversation(self, token_ids: tuple[int, ...]) -> bool:
        size = len(self._header)
        return any(token_ids[i : i + size] == self._header for i in range(len(token_ids) - size + 1))


def _around_an_answer(tokenizer: Any) -> tuple[str, str, str | None]:
    """What a chat template writes up to an assistant's answer; the end of that, which stands right before one, without space
    before it; and what it writes behind the last one, None where it cannot show one."""
    if not tokenizer.chat_template:
        return "", "", None
    import jinja2

    asked, answer = "\ue000", "\ue001"  # characters that no template writes
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    try:
        whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
        prompt = str(tokenizer.apply_chat_template(turns[:1], tokenize=False))
        opened = str(tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True))
    except jinja2.exceptions.TemplateError:
        return "", "", None
    before, _, behind = whole.partition(answer)
    if opened.startswith(prompt) and opened != prompt:
        return opened, opened.removeprefix(prompt).lstrip(), behind
    return before, before.split(asked)[-1].lstrip(), behind


def has_tokenizer(path: str) -> bool:
    """Whether the checkpoint at `path` has one of its own. Raises OSError where there is no such checkpoint."""
    return any((local_checkpoint(path) / name).exists() for name in TOKENIZER_FILES)


def make_reading(path: str, read_at: str | None, append: str | None, tokenizer_path: str) -> Reading:
    """How the scores of a checkpoint are read, as configured or else found.

    Args:
        tokenizer_path: whose tokenizer the scoring inputs are made with, for a checkpoint that has none of its own.

    Raises:
        OSError: where there is no such checkpoint.
        NoHeader: as `AtLast`.
    """
    if chosen_read_at(path, read_at, append) == EOS:
        return at_eos
    from transformers import AutoTokenizer

    from common.models.adapters import config_of

    root = local_checkpoint(path)
    source = root if has_tokenizer(path) else local_checkpoint(tokenizer_path)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    return AtLast(tokenizer, config_of(str(root)).get_text_config().pad_token_id, append)
