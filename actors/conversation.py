"""A conversation: the policy's turns and the environment's observations in one sequence.

    reset ──> [ask the engine for a turn ──> step ──observation──>] ... ──> rollout

    tokens               prompt | turn 1 | observation | turn 2 | ...
    loss_mask                     true     false         true
    behavior_logprobs             engine   0             engine
    policy_versions               engine   as before it  engine

All turns and observations together are the completion, which `sampling.max_completion_tokens` bounds; a conversation that
reaches the bound before the environment has ended it is cut off there, with finish reason "length". It always ends in a
turn: an observation that nothing follows is dropped.

A fault of the environment costs its own rollout: it keeps the turns up to there, gets no score and leaves the batch as any
rollout without one does (`ppo.max_failed_scores`).
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from actors.environment import environment_maker
from common.error_text import told_by_others
from common.text.tokenizers import load_tokenizer, vocab_size
from contracts.config import EngineConfig, EnvironmentConfig, ModelConfig, SamplingConfig
from contracts.environments import Environment, EnvironmentFault, checked_ids, checked_step
from contracts.interfaces import Engine
from contracts.records import Completion, Rollout, RolloutRequest, Turn

STEP_THREADS = 8  # environments that answer at the same time; each waits more than it computes


@dataclass(frozen=True)
class Ask:
    """One turn to sample: what goes to `Engine.submit`."""

    token_ids: list[int]
    sampling: SamplingConfig
    seed: int


@dataclass(frozen=True)
class Limits:
    vocab_size: int
    max_model_len: int  # of the engine: prompt and completion
    max_turn_tokens: int | None
    min_turn_tokens: int = 0

    @classmethod
    def of(cls, model: ModelConfig, environment: EnvironmentConfig, max_model_len: int) -> "Limits":
        """Those of a configuration; reads the model's."""
        size = vocab_size(model.path, model)
        return cls(size, max_model_len, environment.max_turn_tokens, environment.min_turn_tokens)


def turn_seed(rollout_seed: int, turn: int) -> int:
    """Seed in [0, 2**31) of turn 0, 1, ... of a rollout. The first is the rollout's own, which follows from its key."""
    if turn == 0:
        return rollout_seed
    return int.from_bytes(hashlib.sha256(f"{rollout_seed}:{turn}".encode()).digest()[:4]) >> 1


@dataclass
class Conversation:
    """The state of one conversation; who samples the turns is the caller's business."""

    request: RolloutRequest
    sampling: SamplingConfig
    make_environment: Callable[[], Environment]
    limits: Limits
    decode: Callable[[list[int]], str]
    turns: list[Turn] = field(default_factory=list)
    fault: str | None = None
    done: bool = False  # said by the environment

    def __post_init__(self) -> None:
        self.prompt = self.request.prompt
        self._parts: list[Completion] = []  # turns and observations in order
        self._length = 0  # of the completion, tokens

    def begin(self) -> Ask:
        """Make the environment and reset it; the first turn to sample.

        Raises:
            EnvironmentFault: where the environment begins with what cannot be used.
            Exception: what the environment raises.
        """
        given = self.request.prompt.token_ids
        self._environment = self.make_environment()
        ids = checked_ids(self._environment.reset(self.request.prompt), self.limits.vocab_size, "reset()")
        longest = len(ids) + self.sampling.max_completion_tokens
        # A prompt that is too long as it came is the engine's to refuse.
        if len(ids) > len(given) and longest > self.limits.max_model_len:
            raise EnvironmentFault(
                f"reset() made {len(ids)} tokens of a prompt of {len(given)}: with {self.sampling.max_completion_tokens} "
                f"to sample they exceed engine.max_model_len ({self.limits.max_model_len})"
            )
        if not ids:
            raise EnvironmentFault("reset() must return at least one token")
        if tuple(ids) != given:
            self.prompt = replace(self.request.prompt, token_ids=tuple(ids))
        return self._ask()

    def answer(self, turn: Completion) -> Ask | None:
        """Take in a sampled turn and let the environment answer it; the next turn to sample, None at the end.

        Raises:
            EnvironmentFault: where the environment's answer cannot be used.
            Exception: what the environment raises.
        """
        self._parts.append(turn)
        self._length += len(turn.token_ids)
        self.turns.append(Turn(self._length, turn.finish_reason, None))
        step = checked_step(self._environment.step(turn.token_ids.tolist()), self.limits.vocab_size)
        self.turns[-1].reward, self.done = step.reward, step.done
        observation = list(step.observation)
        if self.done or self._length + len(observation) >= self.sampling.max_completion_tokens:
            if not self.done:
                self.turns[-1].finish_reason = "length"
            return None
        if not observation and self.limits.min_turn_tokens:
            raise EnvironmentFault("with environment.min_turn_tokens step() must observe something between two turns")
        if observation:
            self._parts.append(self._observed(observation))
            self._length += len(observation)
        return self._ask()

    def rollout(self) -> Rollout:
        """What has been said. A single turn without a reward is a plain completion: there is nothing else to record."""
        completion = self._parts[0] if len(self._parts) == 1 else self._joined()
        turns = [] if len(self.turns) == 1 and self.turns[0].reward is None else self.turns
        if self.turns and self.turns[-1].finish_reason != completion.finish_reason:
            completion = replace(completion, finish_reason=self.turns[-1].finish_reason)
        return Rollout(self.request.key, self.prompt, completion, turns=turns, fault=self.fault)

    def _ask(self) -> Ask:
        left = self.sampling.max_completion_tokens - self._length
        most = min(left, self.limits.max_turn_tokens or left)
        # As the learner counts them (`learner.passes.Places.early`): from the start of the completion and of the turn.
        least = min(max(self.limits.min_turn_tokens, self.sampling.min_completion_tokens - self._length), most)
        sampling = replace(self.sampling, max_completion_tokens=most, min_completion_tokens=least)
        ids = [*self.prompt.token_ids, *(int(token) for part in self._parts for token in part.token_ids)]
        return Ask(ids, sampling, turn_seed(self.request.seed, len(self.turns)))

    def _observed(self, token_ids: list[int]) -> Completion:
        count = len(token_ids)
        version = self._parts[-1].policy_versions[-1]
        return Completion(
            np.array(token_ids, dtype=np.int32),
            np.zeros(count, dtype=np.float32),
            np.full(count, version, dtype=np.int32),
            "length",
            self.decode(token_ids),
            loss_mask=np.zeros(count, dtype=bool),
        )

    def _joined(self) -> Completion:
        parts = self._parts
        if not parts:
            empty = np.zeros(0, dtype=np.int32)
            return Completion(empty, empty.astype(np.float32), empty, "length", "")
        masks = [np.ones(len(p.token_ids), dtype=bool) if p.loss_mask is None else p.loss_mask for p in parts]
        mask = np.concatenate(masks)
        return Completion(
            np.concatenate([p.token_ids for p in parts]),
            np.concatenate([p.behavior_logprobs for p in parts]),
            np.concatenate([p.policy_versions for p in parts]),
            parts[-1].finish_reason,
            "".join(p.text for p in parts),
            loss_mask=None if mask.all() else mask,
        )


@dataclass
class Conversations:
    """Runs conversations on an engine: one future each. Environments answer in threads of their own, so that neither a
    slow one nor the caller holds up the engine."""

    engine: Engine
    make_environment: Callable[[], Environment]
    limits: Limits
    decode: Callable[[list[int]], str]

    def __post_init__(self) -> None:
        self._threads = ThreadPoolExecutor(STEP_THREADS, thread_name_prefix="environment")

    def submit(self, request: RolloutRequest, sampling: SamplingConfig) -> "Future[Rollout]":
        """Begin a conversation. The future fails with what the engine raises; a fault of the environment is a `fault` of
        its rollout."""
        result: Future[Rollout] = Future()
        conversation = Conversation(request, sampling, self.make_environment, self.limits, self.decode)
        self._advance(conversation, conversation.begin, result)
        return result

    def _advance(self, conversation: Conversation, ask: Callable[[], Ask | None], result: "Future[Rollout]") -> None:
        """Sample the turn that `ask` says, or end the conversation."""
        try:
            turn = self._next(conversation, ask)
            if turn is None:
                result.set_result(conversation.rollout())
                return
            sampled = self.engine.submit(turn.token_ids, turn.sampling, turn.seed)
        except BaseException as error:  # whoever waits for the result must hear of it: nobody looks at this thread
            result.set_exception(error)
            return
        sampled.add_done_callback(lambda done: self._sampled(conversation, done, result))

    def _next(self, conversation: Conversation, ask: Callable[[], Ask | None]) -> Ask | None:
        try:
            return ask()
        except BaseException as error:
            # Code that is not ours: whatever it raises, argparse's SystemExit and asyncio's CancelledError too, costs this
            # one rollout, which counts as unscored.
            conversation.fault = f"environment: {told_by_others(error)}"
            return None

    def _sampled(self, conversation: Conversation, done: "Future[Completion]", result: "Future[Rollout]") -> None:
        """Called by the engine's thread, which must not wait for an environment."""
        error = done.exception()
        if error is not None:
            result.set_exception(error)
        else:
            turn = done.result()
            self._threads.submit(self._advance, conversation, lambda: conversation.answer(turn), result)


def start_conversations(
    engine: Engine, environment: EnvironmentConfig, model: ModelConfig, config: EngineConfig
) -> Conversations:
    """Conversations with the configured environment on an engine that serves `model`.

    Raises:
        EnvironmentFault: where the environment cannot be imported.
    """
    limits = Limits.of(model, environment, config.max_model_len)
    tokenizer = lru_cache(1)(lambda: load_tokenizer(model.path, model))

    def decode(ids: list[int]) -> str:
        return str(tokenizer().decode(ids, skip_special_tokens=True))

    return Conversations(engine, environment_maker(environment, tokenizer), limits, decode)
