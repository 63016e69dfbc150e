"""The environment is rehearsed on the driver before an engine starts: a few prompts, and random tokens for the policy.

Each prompt is played three times: every turn as long as it may be and without an EOS, every turn as short as it may be (its
EOS alone, where nothing asks for more), and turns of random lengths. What an environment does wrong for other tokens than
these shows only in a run, where the same checks are made on every answer.
"""

import random
import threading
from collections.abc import Callable, Set
from typing import Any

import numpy as np

from actors.conversation import Ask, Conversation, Limits
from actors.environment import environment_maker
from common.error_text import told_by_others, whole_characters
from common.text.end_tokens import end_ids
from contracts.checks.validation import ConfigError
from contracts.config import SamplingConfig, TandemConfig
from contracts.environments import Environment, EnvironmentFault
from contracts.records import Completion, Prompt, RolloutRequest

SOURCES = {"ppo.sampling": "prompts", "evaluate.sampling": "eval_prompts"}  # of the prompts, by how they are sampled
PROMPTS = 4
DEADLINE_S = 60.0
# Tokens before the EOS of a turn that may have `least` to `most`: the longest, the shortest, any.
LENGTHS: list[Callable[[int, int, random.Random], int]] = [
    lambda least, most, draw: most,
    lambda least, most, draw: least,
    lambda least, most, draw: draw.randint(least, most),
]


def rehearse(
    config: TandemConfig,
    tokenizer: Any,
    prompts: dict[str, list[Prompt]],
    in_chat: Set[str],
    deadline_s: float = DEADLINE_S,
) -> None:
    """Play the environment of a configuration on prompts of each stage that samples.

    Args:
        tokenizer: that of the policy.
        prompts: by the key of the configuration that says how they are sampled (`SOURCES`).
        in_chat: sources whose completions end as the chat template ends an answer (`Inputs.in_chat`).

    Raises:
        ConfigError: with what is wrong and what to write instead; also where no answer has come after `deadline_s`.
    """
    if config.environment.name == "single_turn":
        return
    failures: list[BaseException] = []

    def play() -> None:
        try:
            _play(config, tokenizer, prompts, in_chat)
        except BaseException as error:  # of code that is not ours, in a thread of its own: raised again below
            failures.append(error)

    # A thread that may hang cannot be ended, only left behind; as a daemon it does not keep the driver alive.
    thread = threading.Thread(target=play, name="rehearsal", daemon=True)
    thread.start()
    thread.join(deadline_s)
    name = f"environment.name={config.environment.name}"
    if thread.is_alive():
        raise ConfigError(
            f"{name}: the rehearsal has not ended after {deadline_s:.0f} s: make, reset() and step() must answer at once, "
            "or the engines would wait for them"
        )
    if failures:
        error = failures[0]
        told = whole_characters(str(error)) if isinstance(error, EnvironmentFault) else told_by_others(error)
        raise ConfigError(f"{name}: {told}") from error


def _play(config: TandemConfig, tokenizer: Any, prompts: dict[str, list[Prompt]], in_chat: Set[str]) -> None:
    limits = Limits.of(config.model, config.environment, config.engine.max_model_len)
    make = environment_maker(config.environment, lambda: tokenizer)
    draw = random.Random(config.seed)
    for key, chosen in prompts.items():
        sampling = config.ppo.sampling if key == "ppo.sampling" else config.evaluate.sampling
        ends = end_ids(tokenizer, config.model, SOURCES[key] in in_chat)
        longest = sorted(chosen, key=lambda prompt: -len(prompt.token_ids))[:1]
        for prompt in longest + draw.sample(chosen, min(PROMPTS - 1, len(chosen))):
            for length in LENGTHS:
                conversation = _converse(prompt, sampling, make, limits, length, draw, ends)
                _check(conversation, config, key)


def _converse(
    prompt: Prompt,
    sampling: SamplingConfig,
    make: Callable[[], Environment],
    limits: Limits,
    length: Callable[[int, int, random.Random], int],
    draw: random.Random,
    ends: tuple[int, ...],
) -> Conversation:
    """One conversation in which the policy says random tokens, and one of `ends` behind a turn with room for it."""
    request = RolloutRequest(0, 0, prompt, seed=0)
    conversation = Conversation(request, sampling, make, limits, decode=lambda ids: "")
    ask: Ask | None = conversation.begin()
    while ask is not None:
        most = ask.sampling.max_completion_tokens
        said = length(ask.sampling.min_completion_tokens, most, draw)
        tokens = [draw.randrange(limits.vocab_size) for _ in range(said)]
        tokens += [draw.choice(ends)] if said < most else []
        ids = np.array(tokens, dtype=np.int32)
        zeros = np.zeros(len(tokens), dtype=np.int32)
        reason = "stop" if said < most else "length"
        ask = conversation.answer(Completion(ids, zeros.astype(np.float32), zeros, reason, ""))
    return conversation


def _check(conversation: Conversation, config: TandemConfig, key: str) -> None:
    """Raise EnvironmentFault for what is wrong with a whole conversation."""
    prompt_tokens, most = len(conversation.prompt.token_ids), conversation.sampling.max_completion_tokens
    if prompt_tokens > config.data.max_prompt_tokens:
        raise EnvironmentFault(
            f"reset() must return at most data.max_prompt_tokens ({config.data.max_prompt_tokens}) tokens, which engine, "
            f"learner and reward service are sized for; found {prompt_tokens}; write data.max_prompt_tokens={prompt_tokens}"
        )
    if not conversation.done:
        raise EnvironmentFault(
            f"a conversation must end within {key}.max_completion_tokens ({most}), which holds all turns and observations; "
            f"found no end after {len(conversation.turns)} turns of up to {conversation.limits.max_turn_tokens or most} "
            f"tokens; write a larger {key}.max_completion_tokens, a smaller environment.max_turn_tokens, or let step() "
            "say done earlier"
        )
