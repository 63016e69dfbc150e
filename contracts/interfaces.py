"""What the components expect of each other. Structural types: an implementation need not import this module."""

from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Protocol

from contracts.config import SamplingConfig
from contracts.records import Completion, Prompt, Score
from contracts.weights import LoadReport, PublishReport, SegmentAddress, WeightUpdate


class EngineLostError(RuntimeError):
    """The engine cannot go on: no request of it will be answered any more."""


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite; no optimizer step was taken with it."""


class CollectiveError(RuntimeError):
    """Ranks cannot reach each other: one is gone, or a collective has not ended in time."""


class ActorLostError(RuntimeError):
    """More actors are lost than may be replaced."""


class LearnerLostError(RuntimeError):
    """A learner rank is gone or hangs: its state is lost, and all ranks have to go back to the last commit."""


class Engine(Protocol):
    """A generation engine whose weights can be replaced between two decoding steps."""

    def submit(self, token_ids: list[int], sampling: SamplingConfig, seed: int) -> Future[Completion]:
        """Queue one prompt. The future fails with ValueError where the prompt leaves no room for a completion."""

    def together(self) -> AbstractContextManager[None]:
        """What is submitted within starts at the same time, so that the time does not decide on its neighbours."""

    def token_logprobs(self, sequences: list[tuple[list[int], int]]) -> list[list[float]]:
        """log p of the tokens from `start` on, for each (token_ids, start), under the current weights at temperature 1."""

    def pulse(self) -> int:
        """Decoding steps so far; an idle engine makes one, so that the number grows as long as it can generate."""

    def control(self, method: str, argument: dict[str, Any] | None = None) -> None:
        """Run one call of vLLM's weight-transfer protocol between two decoding steps."""

    def connect_weights(self, publisher: str, address: SegmentAddress | None) -> bool:
        """From now on take the weights of `publisher` alone. Returns whether its shared memory can be read from here."""

    def load_weights(self, update: WeightUpdate) -> LoadReport:
        """Exchange all weights between two decoding steps; they are fetched and checked while steps run.

        Raises:
            WeightsRefused: nothing has changed.
        """


class RewardClient(Protocol):
    """Scores token sequences. Errors are results, so that one bad item costs only itself."""

    def score(
        self,
        scorer: str,
        sequences: list[list[int]],
        prompt_tokens: list[int] | None = None,
        prompts: list[Prompt] | None = None,
    ) -> list[Score]:
        """`prompt_tokens`: how many tokens of each sequence are the prompt, for scorers that see the two apart; `prompts`:
        what each answers, whose rows go with it."""


class WeightTransfer(Protocol):
    """Moves the learner's weights into every rollout engine. All learner ranks call `send` together."""

    def send(self, policy_version: int) -> PublishReport | None:
        """What became of it, on rank 0; None on the others."""

    def shutdown(self) -> None: ...
