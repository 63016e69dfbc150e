"""The environments that come with Tandem, and the way to those that do not."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from contracts.config import EnvironmentConfig
from contracts.environments import Environment, EnvironmentFault, Step, is_import_path
from contracts.records import Prompt


class SingleTurn:
    """The policy answers once; the reward service judges."""

    def reset(self, prompt: Prompt) -> tuple[int, ...]:
        return prompt.token_ids

    def step(self, token_ids: list[int]) -> Step:
        return Step((), None, True)


class TwoTurn:
    """The policy answers, is told one thing, and answers again.

    The last answer is left to the reward service. The first is worth nothing, or with `score_first` what the service
    says of it.

    Args:
        follow_up: what the policy is told.
        chat: tell it as the user's turn of the tokenizer's chat template; else as plain text on a line of its own.
        end_ids: the tokens that end an answer; none: the tokenizer's EOS. The first of them is the template's own.
    """

    def __init__(
        self,
        tokenizer: Any,
        follow_up: str = "Say it again, better.",
        chat: bool = False,
        score_first: bool = False,
        end_ids: tuple[int, ...] = (),
    ):
        self._end_id = end_ids[0] if end_ids else int(tokenizer.eos_token_id)
        told = _users_turn(tokenizer, follow_up, self._end_id) if chat else f"\n{follow_up}\n"
        self._told = tokenizer(told, add_special_tokens=False)["input_ids"]
        # An answer that was cut off, or ended otherwise than the template ends it, is ended for the policy, so that the
        # user does not speak in the middle of it.
        self._end = [self._end_id] if chat else []
        self._score_first = score_first
        self._turns = 0

    def reset(self, prompt: Prompt) -> tuple[int, ...]:
        self._turns = 0
        return prompt.token_ids

    def step(self, token_ids: list[int]) -> Step:
        self._turns += 1
        if self._turns == 2:
            return Step((), None, True)
        end = [] if token_ids[-1] == self._end_id else self._end
        return Step([*end, *self._told], None if self._score_first else 0.0, False)


def _users_turn(tokenizer: Any, content: str, end_id: int) -> str:
    """What a chat template writes between an assistant's answer, the token that ends it included, and its next one."""
    answer = "\ue000"  # stands for the first answer: a character that no template writes
    turns = [
        {"role": "user", "content": "-"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": content},
    ]
    rendered = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return rendered.split(answer)[-1].removeprefix(tokenizer.convert_ids_to_tokens(end_id))


def environment_maker(
    config: EnvironmentConfig, load_tokenizer: Callable[[], Any], end_ids: tuple[int, ...] = ()
) -> Callable[[], Environment]:
    """A function that makes one environment, for one conversation.

    Args:
        load_tokenizer: called once, and only for an environment that needs it.
        end_ids: the tokens that end a turn; none: the tokenizer's EOS.

    Raises:
        EnvironmentFault: where the import path leads nowhere.
    """
    if config.name == "single_turn":
        return SingleTurn
    kind = partial(TwoTurn, end_ids=end_ids) if config.name == "two_turn" else _imported(config.name)
    tokenizer, options = load_tokenizer(), dict(config.options)
    return lambda: kind(tokenizer, **options)


def _imported(path: str) -> Any:
    if not is_import_path(path):
        raise EnvironmentFault(f"{path} is no import path: write package.module:Class")
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise EnvironmentFault(f"{path} cannot be imported: {error}") from error
