"""What is asked of a judge as its checkpoint's tokens, and the tokens that its answers begin with."""

from typing import TYPE_CHECKING

from common.text.encoding import encode_example, encode_prompt, turn_end_ids
from contracts.config import JudgeConfig
from reward_service.judging.scale import Scale

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


class Questions:
    """As turns of the chat template, or as a plain text where the checkpoint has none. A question's contents never become
    control tokens, so that no completion opens a turn of its own.

    Raises:
        ValueError: the template ends no answer, or two answers begin with one token.
    """

    def __init__(self, judge: JudgeConfig, scale: Scale, tokenizer: "Tokenizer", rubric: str):
        self._tokenizer = tokenizer
        self._cue = scale.cue
        self._is_chat = bool(tokenizer.chat_template)
        self.end_ids = list(turn_end_ids(tokenizer, self._is_chat))
        # A tokenizer may join the end of a plain text with what follows: the answers stand behind the rubric's last words.
        before = f"{self._cue}\n" if judge.max_tokens else rubric.strip()[-16:]
        self.first_ids = [self._first(before, answer) for answer in scale.answers]
        if judge.read == "probabilities":
            for row, first in enumerate(self.first_ids):
                if first in self.first_ids[:row]:
                    one, other = scale.answers[self.first_ids.index(first)], scale.answers[row]
                    raise ValueError(
                        f"{one!r} and {other!r} begin with one token of {judge.model}, {tokenizer.decode([first])!r}; "
                        "write answers that do not, or judge.read=text"
                    )

    def _first(self, before: str, answer: str) -> int:
        example = encode_example(self._tokenizer, "-" if self._is_chat else before, answer, self._is_chat)
        return example.token_ids[example.loss_mask.index(True)]

    def ask(self, question: str) -> list[int]:
        return encode_prompt(self._tokenizer, question, self._is_chat)

    def ask_again(self, question: str, reasoning: str) -> list[int]:
        """For the answer alone, behind what the judge wrote first."""
        if not self._is_chat:
            return encode_prompt(self._tokenizer, f"{question}{reasoning.rstrip()}\n\n{self._cue}\n", chat=False)
        contents = {"user": question, "assistant": reasoning}
        turns = [{"role": role, "content": content} for role, content in contents.items()]
        return encode_prompt(self._tokenizer, [*turns, {"role": "user", "content": self._cue}], chat=True)
