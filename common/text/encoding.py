"""How texts and conversations become tokens: for SFT, for reward models and for whatever is scored, in training and serving.

Text from a data set or a request never becomes a control token: `<|im_end|>` inside it is encoded as the characters it is
made of; only the chat template and the end of a completion write control tokens. A prompt is encoded on its own, so that a
supervised example begins with exactly the tokens that the policy is later prompted with; what follows it is encoded as it
stands behind it, without the space that sentencepiece tokenizers put before the beginning of a text.
"""

import copy
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from common.text.chat_template import (
    DataError,
    LeftOut,
    Notes,
    Turn,
    Turns,
    check_calls,
    first_of,
    note_spelled,
    note_unshown,
    prepared,
    render,
    show,
    template_form,
    template_name,
)
from contracts.records import Example, ScoringItem
from contracts.scoring import scoring_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Encode = Callable[[str], list[int]]
ANCHORS = ("\n", "a", ".")  # of which one merges with nothing that begins a text

__all__ = ["DataError", "LeftOut", "Notes", "Turn", "Turns"]  # of common.text.chat_template, for those who encode


def turn_end_ids(tokenizer: "Tokenizer", chat: bool) -> tuple[int, ...]:
    """The tokens of which each ends what the policy says: the EOS of a plain text; in chat what the template ends an answer
    with, and one that calls a tool.

    Raises:
        DataError: where the template ends an answer with no token of its own.
    """
    if not chat or not tokenizer.chat_template:
        return (int(tokenizer.eos_token_id),)
    return tuple(_encode_rendered(tokenizer, end)[0] for end in template_form(tokenizer).ends)


def _encode_text(tokenizer: "Tokenizer", text: str) -> list[int]:
    """The tokens of a text, none of them a control token."""
    ids = _splitter(tokenizer)(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if _control_ids(tokenizer).isdisjoint(ids):
        return ids
    # A unigram model has its control tokens among its pieces, and finds them in any text: it gets them in two parts.
    token = first_of(text, [str(tokenizer.decode([i])) for i in _control_ids(tokenizer).intersection(ids)])
    if token is None:  # the one for unknown characters
        return ids
    encode, at = partial(_encode_text, tokenizer), text.index(token) + 1
    return [*encode(text[:at]), *ids_after(encode, ANCHORS[0], encode(ANCHORS[0]), text[at:])]


@lru_cache(8)
def _splitter(tokenizer: "Tokenizer") -> "Tokenizer":
    """The tokenizer that splits control tokens: a copy of a fast one.

    To a fast tokenizer `split_special_tokens` is no argument of a call: transformers sets it on the object, for whoever
    encodes at that moment. Objects that always split, or never, can be shared by threads.
    """
    if not tokenizer.is_fast:
        return tokenizer
    splitter = copy.deepcopy(tokenizer)
    splitter.backend_tokenizer.encode_special_tokens = True  # before another thread has it
    return splitter


def _encode_rendered(tokenizer: "Tokenizer", text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@lru_cache(8)
def plain_start(tokenizer: "Tokenizer") -> tuple[int, ...]:
    """What the tokenizer writes before every plain text: its BOS, or nothing."""
    text, whole = _encode_rendered(tokenizer, "a"), tokenizer("a")["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), 0)
    return tuple(whole[:at])


def ids_after(encode: Encode, before: str, before_ids: list[int], text: str) -> list[int]:
    """The tokens of `text` as it stands behind `before`, whose tokens stay as they are.

    They are those of both together where no token spans the seam. Else they are found behind a text that `text` does not
    merge with: alone, a sentencepiece tokenizer would begin it with a space.
    """
    for context in (before, *ANCHORS):
        ids = before_ids if context == before else encode(context)
        both = encode(context + text)
        if both[: len(ids)] == ids:
            return both[len(ids) :]
    return encode(text)


def _has_control(tokenizer: "Tokenizer", text: str) -> bool:
    """Whether `text` yields a control token. The tokenizer itself is asked, so that no spelling is missed."""
    found = _control_ids(tokenizer).intersection(_encode_rendered(tokenizer, text))
    # The token for unknown characters is one where it is spelled: SmolLM2's is <|endoftext|>.
    return bool(found - {tokenizer.unk_token_id}) or (bool(found) and str(tokenizer.unk_token) in text)


@lru_cache(8)
def _control_ids(tokenizer: "Tokenizer") -> frozenset[int]:
    return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)


def _shield(tokenizer: "Tokenizer", turns: Turns, tools: list | None) -> tuple[Turns, dict[str, str]]:
    """`turns` with a placeholder for every text that would yield a control token, and placeholder -> text.

    All other texts stay in place, where the template and the tokenizer treat them as they would anywhere else.
    """
    # Derived from the contents, so that no content can spell its neighbour's placeholder.
    nonce = hashlib.sha256(json.dumps(turns, default=str).encode()).hexdigest()[:16]
    safe: Turns = []
    hidden: dict[str, str] = {}
    for turn in turns:
        kept = dict(turn)
        for key, value in turn.items():
            if isinstance(value, str) and key != "role" and _has_control(tokenizer, value):
                kept[key] = f"\ue000{nonce}-{len(hidden)}\ue001"
                hidden[kept[key]] = value
        safe.append(kept)
    structures = [value for turn in turns for value in turn.values() if isinstance(value, list | dict)]
    if any(_has_control(tokenizer, json.dumps(part, ensure_ascii=False)) for part in [*structures, tools] if part):
        raise LeftOut("a tool or a call of one spells a control token")
    return safe, hidden


def _encoder(tokenizer: "Tokenizer", hidden: dict[str, str]) -> Encode:
    """Encodes rendered text, with what `hidden` has in place of its placeholders, as characters."""
    if not hidden:
        return partial(_encode_rendered, tokenizer)
    pattern = "(" + "|".join(map(re.escape, hidden)) + ")"

    def encode(rendered: str) -> list[int]:
        ids: list[int] = []
        for piece in filter(None, re.split(pattern, rendered)):
            write = partial(_encode_text if piece in hidden else _encode_rendered, tokenizer)
            text = hidden.get(piece, piece)
            ids += ids_after(write, "\n", write("\n"), text) if ids else write(text)
        return ids

    return encode


@dataclass
class Conversation:
    """A rendered conversation. It ends with the token that ends its last answer, or where an answer is to begin."""

    token_ids: list[int]
    loss_mask: list[bool]  # true on the answers that train and on the token that ends each
    prompt_tokens: int  # before the last answer


def encode_conversation(
    tokenizer: "Tokenizer",
    turns: Turns,
    tools: list | None = None,
    learnt: list[bool] | None = None,
    notes: Notes | None = None,
) -> Conversation:
    """Token ids and loss mask of a conversation, as the chat template writes it.

    An answer trains as it is sampled: behind exactly the tokens that the policy is prompted with, up to the token that ends
    it. An earlier answer that the template rewrites, or whose tokens merge with what is before it, is only shown.

    Args:
        tools: JSON schemas that the template may show.
        learnt: of each turn, whether it may train; None: every answer whose `weight` is not 0.
        notes: gathers what the template does not show; None looks for calls alone.

    Raises:
        DataError: without a chat template, or where it ends no answer.
        LeftOut: where the template cannot show this conversation, or prompts for its answer otherwise than it writes it.
    """
    learnt = learnt or [turn["role"] == "assistant" for turn in turns]
    learnt = [learns and turn.get("weight") != 0 for learns, turn in zip(learnt, turns, strict=True)]
    form = template_form(tokenizer)
    ends = [*form.ends, str(tokenizer.eos_token)]
    safe, hidden = _shield(tokenizer, [prepared(turn, ends, form.calls) for turn in turns], tools)
    check_calls(tokenizer, safe, tools)
    note_unshown(tokenizer, safe, tools, notes)
    note_spelled(tokenizer, hidden.values(), notes)
    if notes is not None:
        notes.template = template_name(tokenizer)
    shown = show(tokenizer, safe, tools, learnt)
    encode = _encoder(tokenizer, hidden)
    if not shown.answers:
        ids = encode(shown.text)
        return Conversation(ids, [False] * len(ids), len(ids))
    start, alone = shown.answers[-1][0], len(shown.answers) == 1
    history = encode(shown.text[:start])
    said = ids_after(encode, shown.text[:start], history, shown.text[start:])
    mask = [False] * len(history) if alone else _earlier(encode, shown.text, shown.answers, ends, history)
    if notes is not None:
        notes.rewritten += shown.rewritten + (len(shown.answers) - 1 if mask is None else 0)
    return Conversation([*history, *said], [*(mask or [False] * len(history)), *[learnt[-1]] * len(said)], len(history))


def _earlier(
    encode: Encode, text: str, answers: list[tuple[int, int]], ends: list[str], history: list[int]
) -> list[bool] | None:
    """The loss mask of `history`, the tokens before the last answer; None where its answers alone are other tokens."""
    ids: list[int] = []
    mask: list[bool] = []
    before, begin = "", 0  # the end token of the answer before, with which the next piece is encoded as it stands
    for start, stop in answers:
        context = before + text[begin:start]
        head = encode(context)
        piece = head[1:] if before else head
        ids += piece
        mask += [False] * len(piece)
        if stop == answers[-1][1]:
            break
        answer = ids_after(encode, context, head, text[start:stop])
        ids += answer
        mask += [True] * len(answer)
        before, begin = next(end for end in ends if text.endswith(end, 0, stop)), stop
    return mask if ids == history else None


def as_turns(content: str | Turns, role: str) -> Turns:
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def readable(content: str | Turns) -> str:
    """As a person reads it."""
    if isinstance(content, str):
        return content
    calls = [json.dumps(turn["tool_calls"], ensure_ascii=False) if turn.get("tool_calls") else "" for turn in content]
    return "\n".join(f"{t['role']}: {t.get('content') or ''}{call}" for t, call in zip(content, calls, strict=True))


def encode_prompt(
    tokenizer: "Tokenizer",
    text_or_messages: str | Turns,
    chat: bool,
    tools: list | None = None,
    notes: Notes | None = None,
) -> list[int]:
    """What the policy is shown: a plain text as the tokenizer begins one, or with `chat` (or messages) what the template
    writes up to the answer.

    Raises LeftOut (a DataError) where messages end with the assistant's turn.
    """
    if isinstance(text_or_messages, str) and not chat:
        note_spelled(tokenizer, [text_or_messages], notes)
        return [*plain_start(tokenizer), *_encode_text(tokenizer, text_or_messages)]
    turns = as_turns(text_or_messages, "user")
    if turns[-1]["role"] == "assistant":
        raise LeftOut("the prompt ends with the assistant's turn")
    return encode_conversation(tokenizer, turns, tools, notes=notes).token_ids


def encode_example(
    tokenizer: "Tokenizer",
    prompt: str | Turns,
    completion: str | Turns,
    chat: bool,
    tools: list | None = None,
    notes: Notes | None = None,
) -> Example:
    """The prompt masked; the completion and the token that ends it train. Without a prompt a text or every answer trains."""
    if isinstance(prompt, str) and isinstance(completion, str) and not (chat and prompt):
        encode = partial(_encode_text, tokenizer)
        eos, start = int(tokenizer.eos_token_id), list(plain_start(tokenizer))
        head, said = encode(prompt) if prompt else [], completion.removesuffix(str(tokenizer.eos_token))
        note_spelled(tokenizer, [prompt, said], notes)
        ids = scoring_ids([*start, *head, *ids_after(encode, prompt, head, said)], eos)
        masked = len(start) + len(head)
        return Example(ids, [False] * masked + [True] * (len(ids) - masked))
    asked = as_turns(prompt, "user") if prompt else []
    answered = as_turns(completion, "assistant")
    if answered[-1]["role"] != "assistant":
        raise LeftOut("the last turn is not the assistant's")
    if asked and answered[0]["role"] != "assistant":
        raise LeftOut("the completion begins with another turn than the assistant's")
    if asked and asked[-1]["role"] == "assistant":
        raise LeftOut("the prompt ends with the assistant's turn")
    if not asked and answered[0]["role"] == "assistant":
        raise LeftOut("the conversation begins with the assistant's turn")
    learnt = [False] * len(asked) + [turn["role"] == "assistant" for turn in answered]
    found = encode_conversation(tokenizer, [*asked, *answered], tools, learnt, notes)
    return Example(found.token_ids, found.loss_mask)


def scored_ids(
    tokenizer: "Tokenizer",
    prompt: str | Turns,
    completion: str | Turns,
    chat: bool,
    tools: list | None = None,
    notes: Notes | None = None,
) -> list[int]:
    """The scoring input of `encode_example`: with one EOS in place of what ends it, as that of a rollout."""
    return list(_scored(tokenizer, encode_example(tokenizer, prompt, completion, chat, tools, notes).token_ids))


def told_ids(tokenizer: "Tokenizer", text: str, chat: bool) -> list[int]:
    """What stands between an answer and the next one when the policy is told `text`: with `chat` as the user's turn of the
    template, from behind the answer's end token; else as it is.

    Raises:
        DataError: where the template rewrites earlier answers, so that tokens cannot go on from what was sampled.
    """
    if not chat:
        encode = partial(_encode_text, tokenizer)
        return ids_after(encode, ANCHORS[-1], encode(ANCHORS[-1]), text)
    answer = "\ue000"  # stands for the first answer: a character that no template writes
    turns = [
        {"role": "user", "content": "-"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": text},
    ]
    opening, ends, _ = template_form(tokenizer)
    rendered = render(tokenizer, turns, ask=True) + opening
    alone = show(tokenizer, turns[:2], None, [False, True]).text
    if not rendered.startswith(alone):
        raise DataError(
            f"{template_name(tokenizer)} rewrites earlier answers, so a conversation cannot go on behind one: "
            f"with the answer it is {alone!r}, later {rendered!r}"
        )
    end = next(end for end in ends if alone.endswith(end))
    safe, hidden = _shield(tokenizer, turns, None)
    shielded = render(tokenizer, safe, ask=True) + opening if hidden else rendered
    return _encoder(tokenizer, hidden)(end + shielded[len(alone) :])[1:]


# ---- what is scored, as requests give it


def _scored(tokenizer: "Tokenizer", ids: list[int]) -> tuple[int, ...]:
    """`ids` with one EOS in place of whatever ends them."""
    return tuple(scoring_ids(ids, int(tokenizer.eos_token_id), *answer_end_ids(tokenizer)))


def answer_end_ids(tokenizer: "Tokenizer") -> tuple[int, ...]:
    """`turn_end_ids` of the chat template; none where it has no end of its own."""
    try:
        return turn_end_ids(tokenizer, chat=True)
    except DataError:  # a template that is of no use: what is scored was not made by it
        return ()


def item_of_messages(
    tokenizer: "Tokenizer", turns: Turns, label: str | None = None, tools: list | None = None
) -> ScoringItem:
    """A conversation that ends with the completion. Raises DataError where it cannot be shown by the chat template."""
    if turns[-1]["role"] != "assistant":
        raise LeftOut("the last turn is not the assistant's")
    if len(turns) == 1:
        raise LeftOut("the conversation begins with the assistant's turn")
    found = encode_conversation(tokenizer, turns, tools, [False] * len(turns))
    return ScoringItem(_scored(tokenizer, found.token_ids), found.prompt_tokens, label)


def item_of_text(tokenizer: "Tokenizer", text: str, label: str | None = None) -> ScoringItem:
    """A plain text, in which control tokens are the characters they are made of, but for an EOS at its end."""
    return ScoringItem(tuple(encode_example(tokenizer, "", text, chat=False).token_ids), 0, label)


def item_of_rendered(
    tokenizer: "Tokenizer",
    text: str,
    prompt: str | None = None,
    label: str | None = None,
    with_bos: bool | None = None,
) -> ScoringItem:
    """A text that a chat template has rendered already, as `/classify`, `/pooling` and `/get_reward` get it: its control
    tokens count, and space after a final end token is the template's layout.

    Where the `prompt` is known, none that follows it does, as a completion cannot open new turns.

    Args:
        with_bos: as the tokenizer adds it to a text, unless the text has it; None: to a text without control tokens, which
            no template has written.
    """
    ends = [str(tokenizer.eos_token), *map(str, tokenizer.convert_ids_to_tokens(list(answer_end_ids(tokenizer))))]
    body = text
    while end := next((end for end in ends if body.rstrip().endswith(end)), None):
        body = body.rstrip().removesuffix(end)  # layout may stand between two: Phi-3's <|end|>, newline, <|endoftext|>
    head = prompt if prompt and body.startswith(prompt) else ""
    tail = body[len(head) :]
    hidden: dict[str, str] = {}
    if head and _has_control(tokenizer, tail):
        hidden = {"\ue000completion\ue001": tail}
        tail = "\ue000completion\ue001"
    encode = _encoder(tokenizer, hidden)
    start = encode(head) if head else []
    ids = [*start, *ids_after(encode, head, start, tail)]
    bos = list(plain_start(tokenizer))
    if with_bos is None:
        with_bos = not _has_control(tokenizer, body)
    if with_bos and bos and ids[: len(bos)] != bos:
        ids, start = [*bos, *ids], [*bos, *start] if start else start
    return ScoringItem(_scored(tokenizer, ids), len(start), label)


def tokenizer_hash(tokenizer: "Tokenizer") -> str:
    """16 hexadecimal digits that two tokenizers share when they give the same ids to every text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state = tokenizer.get_vocab()
    else:
        state = json.loads(backend.to_str()) | {"padding": None, "truncation": None}  # of a call, not of the vocabulary
    content = json.dumps([state, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
