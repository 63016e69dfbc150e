"""What the policy talks to: tokens in, tokens out. `docs/environments.md` shows how to write one.

    reset(prompt) ──token ids──> policy samples a turn ──token ids──> step ──observation──> policy samples a turn ...
                                                                        └── reward, done

`Turn` (contracts.records) is what is kept of each turn. The checks below are made before training starts
(controller/start_checks/rehearsal.py) and on every answer of a run.
"""

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from contracts.records import Prompt

SHIPPED = ("single_turn", "two_turn")


class EnvironmentFault(ValueError):
    """An environment answered with something that cannot be used."""


@dataclass(frozen=True)
class Step:
    """What the environment makes of one turn."""

    observation: Iterable[int]  # token ids that the policy sees next; of a conversation's last step they are dropped
    reward: float | None  # what the turn is worth; None leaves it to the reward service
    done: bool


class Environment(Protocol):
    """One conversation. It is made with a tokenizer and `environment.options` as keyword arguments, reset once, and then
    asked step by step. Conversations run side by side in several threads, each with an environment of its own.

    The same prompt and the same turns must give the same answers: a rollout is sampled again where its actor was lost.
    """

    def reset(self, prompt: Prompt) -> Iterable[int]:
        """Begin: token ids that the policy sees first, usually `prompt.token_ids`; `prompt.columns` has what else its row
        says, such as the answer."""

    def step(self, token_ids: list[int]) -> Step:
        """Answer a turn: the tokens that the policy sampled, a sampled EOS included."""


def is_import_path(name: str) -> bool:
    """Whether `name` has the form `package.module:Class`."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), attribute])


def checked_ids(token_ids: Any, vocab_size: int, source: str) -> list[int]:
    """Token ids of an environment as plain integers.

    Raises:
        EnvironmentFault: for what is no sequence of integers in [0, vocab_size).
    """
    if isinstance(token_ids, str | bytes | dict) or not isinstance(token_ids, Iterable):
        raise EnvironmentFault(f"{source} must be a sequence of token ids; found {_shown(token_ids)}")
    result = []
    for token in token_ids:
        try:
            if isinstance(token, bool | np.bool_):
                raise TypeError
            result.append(operator.index(token))
        except TypeError:
            raise EnvironmentFault(f"{source} must hold integers; found {_shown(token)}") from None
        if not 0 <= result[-1] < vocab_size:
            raise EnvironmentFault(
                f"{source} holds token {result[-1]}, which is out of vocabulary: the model has tokens 0 to {vocab_size - 1}"
            )
    return result


def checked_step(step: Any, vocab_size: int) -> Step:
    """An environment's answer to a turn, as plain values.

    Raises:
        EnvironmentFault: for another type than `Step`, and for an observation, reward or `done` that cannot be used.
    """
    if not isinstance(step, Step):
        raise EnvironmentFault(f"step() must return a contracts.environments.Step; found {_shown(step)}")
    observation = checked_ids(step.observation, vocab_size, "the observation of step()")
    reward = step.reward
    if reward is not None:
        try:
            if isinstance(reward, str | bytes):
                raise TypeError
            reward = float(reward)
        except (TypeError, ValueError):
            raise EnvironmentFault(f"the reward of step() must be a number or None; found {_shown(reward)}") from None
        if not math.isfinite(reward):
            raise EnvironmentFault(f"the reward of step() must be finite; found {reward}")
    if not isinstance(step.done, bool | np.bool_):
        raise EnvironmentFault(f"`done` of step() must be true or false; found {_shown(step.done)}")
    return Step(observation, reward, bool(step.done))


def _shown(value: Any) -> str:
    return f"{value!r:.60} ({type(value).__name__})"
