"""Prompts: how text becomes what the policy is shown, and the order in which PPO asks for completions.

Text from a data set never becomes a control token: `<|im_end|>` inside a row is encoded as the characters it is made
of; only the chat template and the end of a completion write control tokens. Prompt and completion are encoded
separately, so that a supervised example begins with exactly the tokens that the policy is later prompted with.
"""

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from contracts.records import Example, Prompt, RolloutRequest
from contracts.scoring import scoring_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Turns = list[dict[str, str]]  # [{"role": ..., "content": ...}]

MIN_REST_WORDS = 3  # of a text that `prompt_words` cuts: below it there is next to nothing to complete


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


def first_words(text: str, words: int | None) -> tuple[str, str]:
    """(first `words` words, the rest with its leading space); without `words` everything is the rest."""
    text = text.strip()
    if words is None:
        return "", text
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    if len(ends) < words + MIN_REST_WORDS:
        raise LeftOut(f"fewer than {words + MIN_REST_WORDS} words", bad=False)
    return text[: ends[words - 1]], text[ends[words - 1] :]


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


def _hash(*key: int) -> bytes:
    return hashlib.sha256(":".join(map(str, key)).encode()).digest()


def sampling_seed(run_seed: int, epoch: int, prompt_id: int, sample_index: int) -> int:
    """Seed in [0, 2**31) that depends on nothing but its key: not on the batch, the actor or the time."""
    return int.from_bytes(_hash(run_seed, epoch, prompt_id, sample_index)[:4]) >> 1


class PromptStream:
    """Endless rollout requests. Each epoch is a permutation derived from (seed, epoch), so its state is two numbers.

    Prompts are ordered by a hash instead of a library's shuffle: a resumed run keeps its order under another version of
    Python or NumPy, and in a file whose rows were moved only the prompt ids decide.
    """

    def __init__(self, prompts: list[Prompt], samples_per_prompt: int, seed: int) -> None:
        if not prompts:
            raise ValueError("a prompt stream needs at least one prompt; found none")
        if samples_per_prompt < 1:
            raise ValueError(f"samples_per_prompt must be at least 1; found {samples_per_prompt}")
        if len({prompt.prompt_id for prompt in prompts}) != len(prompts):
            raise ValueError("prompt ids must be unique: with epoch and sample index they are the key of a rollout")
        self._prompts = prompts
        self._samples_per_prompt = samples_per_prompt
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._order = self._permutation(0)

    def _permutation(self, epoch: int) -> list[Prompt]:
        return sorted(self._prompts, key=lambda prompt: _hash(self._seed, epoch, prompt.prompt_id))

    def next_requests(self, n_prompts: int) -> list[RolloutRequest]:
        """The next `n_prompts * samples_per_prompt` requests, siblings side by side; may span epochs."""
        requests = []
        for _ in range(n_prompts):
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._permutation(self._epoch)
            prompt = self._order[self._position]
            self._position += 1
            for index in range(self._samples_per_prompt):
                seed = sampling_seed(self._seed, self._epoch, prompt.prompt_id, index)
                requests.append(RolloutRequest(self._epoch, index, prompt, seed))
        return requests

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises ValueError where it cannot belong to these prompts."""
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position <= len(self._prompts):
            raise ValueError(
                f"the state of the prompt stream is at position {position} of epoch {epoch}, but there are "
                f"{len(self._prompts)} prompts: resume with the data set that the run began with"
            )
        self._epoch, self._position = epoch, position
        self._order = self._permutation(epoch)
