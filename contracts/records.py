"""The records that move between components: one type per stage of a prompt's way."""

import json
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

SOURCE = "source"  # the column of a prompt's row that names its source, where there are several
SOURCE_STRIDE = 10**9  # between the prompt ids of two sources; below it, ids of a single one


def row_text(columns: dict[str, Any]) -> str:
    """The form of `Prompt.row`: one text for equal columns.

    Raises:
        TypeError, ValueError, RecursionError: for what JSON cannot carry, half a character among it.
    """
    text = json.dumps(columns, ensure_ascii=False, sort_keys=True, allow_nan=False)
    text.encode()
    return text


@dataclass(frozen=True)
class Prompt:
    """A tokenised dataset input."""

    # Row number in its source, of several sources also SOURCE_STRIDE times its place, from 1 on; with epoch and sample_index
    # it is the key of a rollout
    prompt_id: int
    text: str  # as a person reads it, for samples and reports
    token_ids: tuple[int, ...]  # what the policy sees, chat template included
    row: str | None = None  # JSON object, keys sorted: the columns of its row that data.prompts.keep leaves it
    messages: str | None = None  # JSON list: its turns, where the data has messages and no text

    @property
    def columns(self) -> dict[str, Any]:
        """What `row` holds; empty where nothing was kept."""
        return json.loads(self.row) if self.row is not None else {}

    @property
    def place(self) -> str:
        """Where its row is, for messages."""
        source, number = divmod(self.prompt_id, SOURCE_STRIDE)
        return f"row {number} of source {self.columns.get(SOURCE)}" if source else f"row {number}"

    @property
    def row_digest(self) -> str:
        """16 hexadecimal digits of `row`, by which the ledger's log knows it; empty where nothing was kept."""
        return "" if self.row is None else blake2b(self.row.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class RolloutRequest:
    """One completion to sample. The seed follows from the key, so a repeated request samples the same tokens."""

    epoch: int
    sample_index: int
    prompt: Prompt
    seed: int

    @property
    def key(self) -> tuple[int, int, int]:
        return (self.epoch, self.prompt.prompt_id, self.sample_index)

    @property
    def group(self) -> tuple[int, int]:
        """What the requests of one rollout group share."""
        return self.key[:2]


@dataclass
class Completion:
    """What follows one prompt: what an engine sampled and, between the turns of a conversation, observations."""

    token_ids: np.ndarray  # int32 [C]; the last one is sampled, and a sampled EOS ends its turn
    behavior_logprobs: np.ndarray  # float32 [C], log p under the sampling policy at the sampling temperature; 0 else
    policy_versions: np.ndarray  # int32 [C], version of the weights that sampled each token, or the one before it
    finish_reason: str  # "stop" (EOS sampled) or "length"
    text: str
    loss_mask: np.ndarray | None = None  # bool [C], false on observations; None: every token was sampled

    @property
    def sampled_ids(self) -> np.ndarray:
        """int32 [at most C]: without the observations."""
        return self.token_ids if self.loss_mask is None else self.token_ids[self.loss_mask]


@dataclass(frozen=True)
class ScoringItem:
    """One completion to score, as every scorer of the reward service gets it."""

    token_ids: tuple[int, ...]  # the scoring input: prompt, completion and exactly one EOS
    prompt_tokens: int = 0  # how many of them are the prompt: rule functions see the two apart
    label: str | None = None  # what a rule function compares with, such as the right answer
    row: str | None = None  # as of `Prompt`; JSON text, which travels between processes as it is
    messages: str | None = None  # as of `Prompt`


@dataclass
class Score:
    """What one scorer says of one completion: a value, or the reason why there is none (never an invented value)."""

    value: float | None
    error: str | None = None  # "code" or "code: detail", codes in contracts/scoring.py; never a part of a text
    raw: float | None = None  # before the normaliser
    version: str | None = None  # of the scorer: hash of everything that decides the value
    spread: float | None = None  # of an ensemble: standard deviation over its parts, in score units
    is_cached: bool = False
    is_truncated: bool = False
    parts: dict[str, float] | None = None  # what the value is made of, by name, as far as the scorer says

    @property
    def code(self) -> str | None:
        return self.error and self.error.split(":", 1)[0]


@dataclass
class Turn:
    """What the policy sampled at one go in a conversation."""

    end: int  # offset in the completion behind its last token
    finish_reason: str  # "stop" (EOS sampled) or "length"
    reward: float | None  # of the environment; None leaves the turn to the reward service
    score: Score | None = None  # of the reward service, for the conversation up to `end`; None where there is a reward


@dataclass
class Rollout:
    """One scored episode."""

    key: tuple[int, int, int]  # (epoch, prompt_id, sample_index)
    prompt: Prompt
    completion: Completion
    scores: dict[str, Score] = field(default_factory=dict)  # by scorer: "proxy" trains, "gold" only measures
    turns: list[Turn] = field(default_factory=list)  # of a conversation; none: the completion is one turn
    fault: str | None = None  # why the environment could not go on; such a rollout gets no score

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.token_ids) + len(self.completion.token_ids)

    @property
    def shown_fields(self) -> dict[str, Any]:
        """For a line of samples.jsonl: the columns of its row, and the parts of its scores by scorer, as far as there are
        any."""
        parts = {name: score.parts for name, score in self.scores.items() if score.parts}
        return ({"row": self.prompt.columns} if self.prompt.row else {}) | ({"parts": parts} if parts else {})

    @property
    def group(self) -> tuple[int, int]:
        """What the siblings of a rollout group share: epoch and prompt."""
        return self.key[:2]


@dataclass(frozen=True)
class Assignment:
    """A rollout that an actor is to make."""

    lease: int  # comes back with the rollout; the controller takes no rollout without its lease
    request: RolloutRequest
    scorers: tuple[str, ...]


@dataclass
class Delivery:
    """What an actor has finished, and how long it worked since the last time it was asked."""

    rollouts: list[tuple[int, Rollout]]  # with their leases
    generate_s: float = 0.0  # with a completion unfinished
    score_s: float = 0.0
    is_leaving: bool = False  # its process was asked to end, and gets nothing new


@dataclass
class Microbatch:
    """Sequences of one forward pass: prompt and completion contiguous, one sequence after another.

    All masks come from lengths and turns, never from token identity: with pad = eos a comparison would lose the EOS.
    """

    sequences: list[np.ndarray]  # B arrays of int64 [prompt + completion tokens]
    prompt_lens: np.ndarray  # int64 [B]
    completion_lens: np.ndarray  # int64 [B]
    behavior_logprobs: np.ndarray  # float32 [B, C], C = longest completion; 0 on padding
    scores: np.ndarray  # float32 [B, C], shaped scores where they are paid: on last tokens of turns; 0 elsewhere
    staleness: np.ndarray  # int32 [B, C], the learner's version minus the one that sampled the token; 0 on padding
    loss_mask: np.ndarray  # bool [B, C], sampled tokens: they train; false on observations and padding
    groups: np.ndarray  # int64 [B], which of the global batch's rollout groups each sequence belongs to, from 0 on
    rows: np.ndarray  # int64 [B], number of each sequence in the global batch, in the order of the rollouts' keys
    trains: np.ndarray  # bool [B], false for a sequence that counts in comparisons, but not in any loss

    @property
    def num_tokens(self) -> int:
        return int(self.prompt_lens.sum() + self.completion_lens.sum())


@dataclass
class TrainingBatch:
    """One rank's share of the rollouts of an update, cut into minibatches (one optimizer step each) of microbatches."""

    minibatches: list[list[Microbatch]]
    # Over all ranks, per minibatch: the denominators that make one gradient of any partition.
    global_loss_tokens: list[int]  # of sequences that train
    global_trained: list[int]  # these sequences
    global_sequences: list[int]  # all


@dataclass
class Example:
    """A supervised example: the loss counts where `loss_mask` is true."""

    token_ids: list[int]
    loss_mask: list[bool]  # same length; false on the prompt


@dataclass
class RatedText:
    """A text with the ratings of several people, or one (rating units are the data set's own)."""

    text: str
    token_ids: list[int]  # the scoring input: tokens and exactly one EOS at the end
    ratings: list[float]


@dataclass
class PreferencePair:
    """Two scoring inputs and the share of raters who prefer the first."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    preference: float = 1.0  # P(chosen beats rejected) in [0, 1]


@dataclass
class RatedExample:
    """A text that a policy could write, with the ratings of several people, or one."""

    example: Example
    ratings: list[float]

    @property
    def texts(self) -> list[Example]:
        return [self.example]


@dataclass
class ExamplePair:
    """Two completions, of one prompt as a rule, and the share of raters who prefer the first."""

    chosen: Example
    rejected: Example
    preference: float = 1.0  # P(chosen beats rejected) in [0, 1]

    @property
    def texts(self) -> list[Example]:
        return [self.chosen, self.rejected]


@dataclass
class StageResult:
    """What a stage leaves behind: a checkpoint directory and the numbers a reader wants first."""

    name: str
    path: str
    cached: bool
    metrics: dict[str, Any] = field(default_factory=dict)
