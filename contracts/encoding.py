"""How texts and conversations become tokens: for SFT, for reward models and for whatever is scored, in training and serving.

Text from a data set or a request never becomes a control token: `<|im_end|>` inside it is encoded as the characters it is
made of; only the chat template and the end of a completion write control tokens. Prompt and completion are encoded
separately, so that a supervised example begins with exactly the tokens that the policy is later prompted with.
"""

import hashlib
import json
import re
from itertools import takewhile
from typing import TYPE_CHECKING

from contracts.records import Example, ScoringItem
from contracts.scoring import scoring_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Turns = list[dict[str, str]]  # [{"role": ..., "content": ...}]


class DataError(ValueError):
    """A message for the user: the rule, the value found and what to write instead."""


class LeftOut(DataError):
    """One row cannot be used. `bad` rows count against `data.max_bad_rows`; the others are merely unsuitable."""

    def __init__(self, reason: str, detail: str = "", bad: bool = True) -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.bad = reason, bad


def as_turns(content: str | Turns, role: str) -> Turns:
    return [{"role": role, "content": content.strip()}] if isinstance(content, str) else content


def readable(content: str | Turns) -> str:
    """As a person reads it."""
    return content if isinstance(content, str) else "\n".join(f"{t['role']}: {t['content']}" for t in content)


def _encode_text(tokenizer: "Tokenizer", text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _shield(tokenizer: "Tokenizer", turns: Turns) -> tuple[Turns, dict[str, str]]:
    """`turns` with a placeholder for every content that would yield a control token, and placeholder -> content.

    The tokenizer itself is asked, so that no spelling is missed. All other contents stay in place, where the template
    and the tokenizer treat them as they would anywhere else.
    """
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    # Derived from the contents, so that no content can spell its neighbour's placeholder.
    nonce = hashlib.sha256(json.dumps(turns).encode()).hexdigest()[:16]
    safe, hidden = [], {}
    for index, turn in enumerate(turns):
        content = turn["content"]
        if control & set(tokenizer(content, add_special_tokens=False)["input_ids"]):
            hidden[f"\ue000{nonce}-{index}\ue001"] = content
            content = f"\ue000{nonce}-{index}\ue001"
        safe.append({"role": turn["role"], "content": content})
    return safe, hidden


def _encode_chat(tokenizer: "Tokenizer", turns: Turns) -> tuple[list[int], list[bool]]:
    """Token ids and loss mask (true on what the assistant says and the EOS after it) of a conversation.

    It ends with that EOS, or with the generation prompt where the last turn is not the assistant's. An assistant turn
    is encoded on its own, as it is sampled: a conversation begins with exactly the tokens of each of its prompts.
    Raises DataError without a chat template, LeftOut where the template cannot show this conversation.
    """
    if not tokenizer.chat_template:
        raise DataError("data.chat: the tokenizer has no chat template; write data.chat: false and plain text columns")
    import jinja2

    eos = str(tokenizer.eos_token)
    turns = [{**t, "content": t["content"].strip().removesuffix(eos)} if t["role"] == "assistant" else t for t in turns]
    safe, hidden = _shield(tokenizer, turns)
    pattern = "(" + "|".join(map(re.escape, hidden)) + ")"

    def encode(rendered: str) -> list[int]:
        ids: list[int] = []
        for piece in re.split(pattern, rendered) if hidden else [rendered]:
            if piece in hidden:
                ids += _encode_text(tokenizer, hidden[piece])
            elif piece:
                ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids

    ids: list[int] = []
    mask: list[bool] = []
    done = ""  # rendered text of the turns in `ids`
    for index, turn in enumerate([*safe, None]):
        if turn is None and safe[-1]["role"] == "assistant":
            break
        if turn is not None and turn["role"] != "assistant":
            continue
        if index == 0:
            raise LeftOut("the conversation begins with the assistant's turn")
        try:
            shown = tokenizer.apply_chat_template(safe[:index], tokenize=False, add_generation_prompt=True)
        except jinja2.exceptions.TemplateError as error:
            raise LeftOut("refused by the chat template", str(error)) from None
        rendered = str(shown)
        if not rendered.startswith(done):
            raise LeftOut("the chat template rewrites earlier turns")
        new = rendered[len(done) :]
        piece = encode(new.removeprefix(eos) if done else new)  # the template's own EOS: `ids` has it already
        ids, mask = ids + piece, mask + [False] * len(piece)
        if turn is not None:
            said = [*_encode_text(tokenizer, turns[index]["content"]), int(tokenizer.eos_token_id)]
            ids, mask = ids + said, mask + [True] * len(said)
            done = rendered + turn["content"]
    return ids, mask


def encode_prompt(tokenizer: "Tokenizer", text_or_messages: str | Turns, chat: bool) -> list[int]:
    """What the policy is shown: the tokens of a plain text, or with `chat` (or messages) of the template up to its answer.

    Raises LeftOut (a DataError) where messages end with the assistant's turn.
    """
    if isinstance(text_or_messages, str) and not chat:
        return _encode_text(tokenizer, text_or_messages)
    turns = as_turns(text_or_messages, "user")
    if turns[-1]["role"] == "assistant":
        raise LeftOut("the prompt ends with the assistant's turn")
    return _encode_chat(tokenizer, turns)[0]


def encode_example(tokenizer: "Tokenizer", prompt: str | Turns, completion: str | Turns, chat: bool) -> Example:
    """The prompt masked; the completion and one EOS train. Without a prompt, all of a text or every assistant turn."""
    if isinstance(prompt, str) and isinstance(completion, str) and not (chat and prompt):
        masked = _encode_text(tokenizer, prompt) if prompt else []
        rest = _encode_text(tokenizer, completion.removesuffix(str(tokenizer.eos_token)))
        ids = scoring_ids(masked + rest, int(tokenizer.eos_token_id))
        return Example(ids, [False] * len(masked) + [True] * (len(ids) - len(masked)))
    turns = (as_turns(prompt, "user") if prompt else []) + as_turns(completion, "assistant")
    if turns[-1]["role"] != "assistant":
        raise LeftOut("the last turn is not the assistant's")
    if prompt and isinstance(completion, list) and completion[0]["role"] != "assistant":
        raise LeftOut("the completion begins with another turn than the assistant's")
    ids, mask = _encode_chat(tokenizer, turns)
    if prompt:
        start = len(encode_prompt(tokenizer, prompt, chat))
        mask = [False] * start + mask[start:]
    return Example(ids, mask)


# ---- what is scored, as requests give it


def item_of_messages(tokenizer: "Tokenizer", turns: Turns, label: str | None = None) -> ScoringItem:
    """A conversation that ends with the completion. Raises DataError where it cannot be shown by the chat template."""
    example = encode_example(tokenizer, "", turns, chat=True)
    completion = len(example.loss_mask) - len(list(takewhile(bool, reversed(example.loss_mask))))
    return ScoringItem(tuple(example.token_ids), completion, label)


def item_of_text(tokenizer: "Tokenizer", text: str, label: str | None = None) -> ScoringItem:
    """A plain text, in which control tokens are the characters they are made of, but for an EOS at its end."""
    return ScoringItem(tuple(encode_example(tokenizer, "", text, chat=False).token_ids), 0, label)


def item_of_rendered(
    tokenizer: "Tokenizer", text: str, prompt: str | None = None, label: str | None = None, with_bos: bool = False
) -> ScoringItem:
    """A text that a chat template has rendered already, as `/classify`, `/pooling` and `/get_reward` get it: its control
    tokens count, and space after a final EOS is the template's layout.

    Where the `prompt` is known, none that follows it does, as a completion cannot open new turns.

    Args:
        with_bos: as the tokenizer adds it to a text, unless the text has it.
    """
    eos, eos_id = str(tokenizer.eos_token), int(tokenizer.eos_token_id)
    text = text.rstrip() if text.rstrip().endswith(eos) else text
    head, tail = (prompt, text[len(prompt) :]) if prompt and text.startswith(prompt) else ("", text)
    start = _encode_rendered(tokenizer, head) if head else []
    if head:
        end = tail
        while end.endswith(eos):
            end = end.removesuffix(eos)
        ids = start + _encode_text(tokenizer, end)
    else:
        ids = _encode_rendered(tokenizer, text)
    bos = tokenizer.bos_token_id
    if with_bos and ids[:1] != [bos] and tokenizer("a")["input_ids"][:1] == [bos]:
        ids, start = [bos, *ids], [bos, *start] if start else start
    return ScoringItem(tuple(scoring_ids(ids, eos_id)), len(start), label)


def _encode_rendered(tokenizer: "Tokenizer", text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def tokenizer_hash(tokenizer: "Tokenizer") -> str:
    """16 hexadecimal digits that two tokenizers share when they give the same ids to every text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state = tokenizer.get_vocab()
    else:
        state = json.loads(backend.to_str()) | {"padding": None, "truncation": None}  # of a call, not of the vocabulary
    content = json.dumps([state, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
