"""The environments that come with Tandem, and the way to those that do not."""

from collections.abc import Callable
from importlib import import_module
from threading import RLock
from typing import Any

from common.text.encoding import DataError, told_ids, turn_end_ids
from contracts.config import EnvironmentConfig
from contracts.environments import Environment, EnvironmentFault, Step, is_import_path
from contracts.records import Prompt

ENCODES = RLock()  # a slow tokenizer's call calls itself


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

    Raises:
        EnvironmentFault: for a template that rewrites earlier answers, or ends them with no token of its own.
    """

    def __init__(
        self, tokenizer: Any, follow_up: str = "Say it again, better.", chat: bool = False, score_first: bool = False
    ):
        try:
            self._told = told_ids(tokenizer, follow_up if chat else f"\n{follow_up}\n", chat)
        except DataError as error:
            raise EnvironmentFault(str(error)) from error
        self._ends = turn_end_ids(tokenizer, chat)
        # An answer that was cut off is ended for the policy, so that the user does not speak in the middle of it.
        self._end = [self._ends[0]] if chat else []
        self._score_first = score_first
        self._turns = 0

    def reset(self, prompt: Prompt) -> tuple[int, ...]:
        self._turns = 0
        return prompt.token_ids

    def step(self, token_ids: list[int]) -> Step:
        self._turns += 1
        if self._turns == 2:
            return Step((), None, True)
        end = [] if token_ids[-1] in self._ends else self._end
        return Step([*end, *self._told], None if self._score_first else 0.0, False)


def environment_maker(config: EnvironmentConfig, load_tokenizer: Callable[[], Any]) -> Callable[[], Environment]:
    """A function that makes one environment, for one conversation.

    Args:
        load_tokenizer: called once, and only for an environment that needs it.

    Raises:
        EnvironmentFault: where the import path leads nowhere.
    """
    if config.name == "single_turn":
        return SingleTurn
    kind = TwoTurn if config.name == "two_turn" else _imported(config.name)
    tokenizer, options = _for_threads(load_tokenizer()), dict(config.options)
    return lambda: kind(tokenizer, **options)


def _for_threads(tokenizer: Any) -> Any:
    """Conversations are played in several threads, and `truncation`, `padding` and `split_special_tokens` of a call are
    settings of the tokenizer, which they share: one call at a time has it (findings/transformers_tokenizer_threads.sh)."""
    kind = type(tokenizer)

    def alone(self: Any, *arguments: Any, **options: Any) -> Any:
        with ENCODES:
            return kind._encode_plus(self, *arguments, **options)

    tokenizer.__class__ = type(kind.__name__, (kind,), {"_encode_plus": alone})
    return tokenizer


def _imported(path: str) -> Any:
    if not is_import_path(path):
        raise EnvironmentFault(f"{path} is no import path: write package.module:Class")
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise EnvironmentFault(f"{path} cannot be imported: {error}") from error
