"""What a kind of scorer declares: the checks of its configuration, what its scores come from, and what computes them.

Ours are the modules of reward_service/kinds, each with a KIND; others are found by import path (docs/extending.md). They are
read where a configuration is checked, too: a module imports torch and Ray inside its functions.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.text.tokenizers import known_ids, load_decoder, text_start
from contracts import plugins
from contracts.checks.check import Check
from contracts.config import RewardServiceConfig, ScorerConfig
from contracts.records import Score, ScoringItem
from contracts.scorer_roles import CHECKPOINTS, ROLES, SCORER_KINDS
from contracts.scoring import RETRYABLE
from reward_service.isolate import Failed, finite, isolate

VERSION_LENGTH = 16  # hexadecimal digits


class Text(NamedTuple):
    """What a rule sees of an item."""

    prompt: str
    completion: str
    label: str | None = None
    row: str | None = None  # as of ScoringItem, as is
    messages: str | None = None
    completion_ids: tuple[int, ...] = ()  # without the EOS
    query: str = (
        ""  # prompt and completion, where it is asked for: decoders may leave out the space that each begins with
    )


def scorer_kind(name: str) -> "ScorerKind":
    """Raises UnknownPlugin, a ValueError."""
    return plugins.find(SCORER_KINDS, name)


def version_of(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:VERSION_LENGTH]


@dataclass(frozen=True)
class ScorerSpec:
    """What the front must know of one scorer."""

    name: str
    entry: ScorerConfig
    version: str  # a hash of everything that decides its values
    application: str | None = None  # the Serve application that scores; None of a composite
    max_tokens: int | None = None  # of a model
    calls: int = 4  # to its replicas at a time
    call_items: int = 32  # of one call
    call_s: float | None = None  # that a call should take at most, or it has fewer items; None: it may take its time
    parts: tuple[str, ...] = ()  # of a composite: names of scorers
    source: str | None = None  # checkpoint or function: another name under which clients may ask for it
    read_at: str | None = None  # of a model: eos or last
    needs_seam: bool = True  # its scores depend on where an item's prompt ends; those of a reward model never do

    @property
    def kind(self) -> "ScorerKind":
        return scorer_kind(self.entry.kind)


class Scorer:
    """What a replica scores with."""

    @property
    def busy_s(self) -> float:
        """For how long the batch that is being computed has been computed."""
        return 0.0

    async def score(self, items: list[ScoringItem], deadline_s: float) -> list[Score]:
        """One Score an item, in order. What cannot be scored is an error of its item."""
        raise NotImplementedError

    def take_counts(self) -> dict[str, int]:
        """What it has counted since it was last asked, by name, for `tandem_reward_judge_total`."""
        return {}

    async def close(self) -> None:
        """Connections, where it has some."""


class ThreadScorer(Scorer):
    """Calls a function of items in one thread. What it raises, or returns for a number, costs the one item that it is of."""

    def __init__(self, score: Callable[[list[ScoringItem]], list[float]]):
        self._score = score
        self._thread = ThreadPoolExecutor(1)
        self._since = 0.0

    @property
    def busy_s(self) -> float:
        return time.monotonic() - self._since if self._since else 0.0

    async def score(self, items: list[ScoringItem], deadline_s: float) -> list[Score]:
        def timed() -> list[Score]:
            self._since = time.monotonic()
            try:
                return isolate(self._score, items)
            finally:
                self._since = 0.0

        return await asyncio.get_running_loop().run_in_executor(self._thread, timed)


class ScorerKind:
    """A kind with replicas of its own."""

    is_composite = False
    routes = False  # a composite whose score of an item is that of one part, which its row tells: it does not combine
    # `path` is a checkpoint with one label, proved before anything starts; its scores depend on token ids alone.
    is_reward_model = False
    takes_place = False  # a replica computes a model: it has a place of its own, with cluster.gpus_per_reward_replica

    def has_place(self, entry: ScorerConfig) -> bool:
        """Whether this one's replicas do, where that is for its configuration to say."""
        return self.takes_place

    def checks(self, key: str, entry: ScorerConfig, service: RewardServiceConfig) -> list[Check]:
        """The rules on its configuration, which is `entry`; `key` leads there."""
        return []

    def problems(self, key: str, entry: ScorerConfig) -> list[str]:
        """What else can be said against it before anything starts, without a run of code that is not ours."""
        return []

    def needs_rows(self, entry: ScorerConfig) -> Callable[[dict[str, Any]], str | None] | None:
        """Says of a row's columns what its scores need and they do not have, None where nothing; None in its place where it
        needs nothing of a row, or that is not known without a run of code that is not ours."""
        return None

    def row_check(self, entry: ScorerConfig) -> Callable[[dict[str, Any]], str | None] | None:
        """What says why completions of a prompt cannot be scored, from the kept columns of its row; it is asked of every
        prompt before anything starts."""
        return None

    def named_code(self, entry: ScorerConfig) -> list[tuple[plugins.Kind, str]]:
        """The code beside the kind's that its configuration names. What Tandem has of it is code of the stage that
        samples."""
        return []

    def content(self, entry: ScorerConfig, memory: Path | None = None) -> str:
        """A digest of the files that its scores come from, beside the source of the kind and Tandem's; empty where there are
        none.

        Args:
            memory: as of `checkpoint_fingerprint`.

        Raises:
            OSError, ValueError: something is not there.
        """
        return ""

    def spec(self, name: str, entry: ScorerConfig, service: RewardServiceConfig, tokenizer: str | None) -> ScorerSpec:
        """What the front must know; where it is served is not for the kind to say. Raises OSError, ValueError.

        Args:
            tokenizer: the checkpoint whose token ids are scored; None: not known yet.
        """
        return ScorerSpec(name, entry, version_of(self.content(entry)), calls=service.most_replicas)

    def make(self, entry: ScorerConfig, service: RewardServiceConfig, tokenizer: str) -> Scorer:
        """Load what scores, within a replica; what it raises is why the service does not start."""
        raise NotImplementedError

    def parts_of(self, entry: ScorerConfig, row: str | None) -> list[str]:
        """Of a composite: its parts that score an item with this row."""
        return entry.parts

    def unroutable(self, entry: ScorerConfig, row: str | None) -> str | None:
        """Of a composite that `routes`: why an item with this row has no part; None where it has one."""
        return None

    def combine(self, entry: ScorerConfig, parts: dict[str, list[Score]]) -> list[Score]:
        """Of a composite: scores from those of its parts, within the front."""
        raise NotImplementedError


class CompositeKind(ScorerKind):
    """A kind whose scores are made of those of other scorers, `entry.parts`."""

    is_composite = True
    least = 1  # parts

    def formula(self, entry: ScorerConfig, values: list[float]) -> float:
        """Of one item, with a value for each part, in order."""
        raise NotImplementedError

    def spread(self, values: list[float]) -> float | None:
        """How far the parts disagree, in score units, where that says something."""
        return None

    def checks(self, key: str, entry: ScorerConfig, service: RewardServiceConfig) -> list[Check]:
        names = sorted({*service.scorers, *ROLES, *CHECKPOINTS})
        unknown = [part for part in entry.parts if part not in names]
        parts = f"{key}.parts"
        return [
            Check(not unknown, parts, f"names among {', '.join(names)}", ", ".join(unknown), "one of them"),
            Check(len(entry.parts) >= self.least, parts, f"{self.least} scorers or more", entry.parts, "more names"),
            Check(len(set(entry.parts)) == len(entry.parts), parts, "different scorers", entry.parts, "each name once"),
        ]

    def combine(self, entry: ScorerConfig, parts: dict[str, list[Score]]) -> list[Score]:
        """By the formula. A part without a score leaves the whole without one."""
        columns = zip(*parts.values(), strict=True)
        return [self._combined(entry, dict(zip(parts, scores, strict=True))) for scores in columns]

    def _combined(self, entry: ScorerConfig, scores: dict[str, Score]) -> Score:
        failed = [(name, s) for name, s in scores.items() if s.value is None]
        if failed:  # a final error first, since no retry helps against it
            name, score = min(failed, key=lambda failure: failure[1].code in RETRYABLE)
            code, _, detail = (score.error or "unavailable").partition(": ")
            return Score(None, f"{code}: {name}: {detail}" if detail else f"{code}: {name}")
        values = [s.value for s in scores.values() if s.value is not None]
        try:
            value, spread = float(self.formula(entry, values)), self.spread(values)
        except OverflowError:  # of a square, or within a sum, though every part is finite
            return Score(None, "non_finite")
        except Exception as fault:  # poison, tolerated on purpose, as what a rule function raises: it is this item's
            return Score(None, f"poison: {type(fault).__name__}")
        score = Score(
            value,
            raw=value,
            spread=spread,
            parts=_parts(scores),
            is_cached=all(s.is_cached for s in scores.values()),
            is_truncated=any(s.is_truncated for s in scores.values()),
        )
        return finite(score)


def _parts(scores: dict[str, Score]) -> dict[str, float]:
    """The values of a composite's parts, and as NAME.PART what those are made of."""
    own = {name: s.value for name, s in scores.items() if s.value is not None}
    return own | {f"{name}.{part}": value for name, s in scores.items() for part, value in (s.parts or {}).items()}


def text_reader(
    tokenizer: str, with_controls: bool = True, with_query: bool = False
) -> Callable[[list[ScoringItem]], list[Text]]:
    """From scoring items to what a rule sees of them, by the tokenizer of a checkpoint, with its control tokens or without.

    Args:
        with_query: for functions that read prompt and completion in one; it decodes each item a second time.

    The function raises Failed where an item has a token id that is no token: no text says what it was.
    """
    decode, known, bos = load_decoder(tokenizer, with_controls), known_ids(tokenizer), text_start(tokenizer)

    def texts(items: list[ScoringItem]) -> list[Text]:
        if not all(known.issuperset(item.token_ids) for item in items):
            raise Failed("out_of_vocabulary")
        found = []
        for item in items:
            # Without its EOS, which every scoring input has, and the BOS that is written before a text without a prompt.
            start = item.prompt_tokens or int(item.token_ids[0] == bos)
            said = item.token_ids[start:-1]
            prompt = decode(item.token_ids[: item.prompt_tokens])
            query = decode(item.token_ids[:-1] if item.prompt_tokens else said) if with_query else ""
            found.append(Text(prompt, decode(said), item.label, item.row, item.messages, said, query))
        return found

    return texts
