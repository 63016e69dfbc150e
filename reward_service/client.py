"""What callers hold: scores with retries. Scoring is pure, so a lost call can be repeated; only what failed is."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from contracts.records import Score
from contracts.scoring import RETRYABLE

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
FRONT = "reward"  # the Serve application that every call goes to


@dataclass(frozen=True)
class Reply:
    """What one attempt brought for some items; `retry_after_s` where the service asks for a pause."""

    scores: list[Score]
    retry_after_s: float = 0.0


def with_retries(count: int, attempt: Callable[[list[int], float], Reply], budget_s: float) -> list[Score]:
    """Scores of `count` items; `attempt(rows, left_s)` is called again for the rows whose errors are worth it.

    Pauses grow, with jitter, and are as long as the service asks. After `budget_s` seconds every item that has no score
    carries its last error, since an invented score would corrupt the training signal.
    """
    results: list[Score] = [Score(None, "unavailable: not tried")] * count
    rows, pause, end = list(range(count)), FIRST_PAUSE_S, time.monotonic() + budget_s
    while rows:
        reply = attempt(rows, max(0.1, end - time.monotonic()))
        for row, score in zip(rows, reply.scores, strict=True):
            results[row] = score
        rows = [row for row in rows if results[row].code in RETRYABLE]
        wait = max(reply.retry_after_s, pause * random.uniform(0.5, 1.0))
        if time.monotonic() + wait > end:
            break
        if rows:
            time.sleep(wait)
        pause = min(2 * pause, LONGEST_PAUSE_S)
    return results


@dataclass
class HandleClient:
    """A `RewardClient` over Serve's deployment handles. Travels to actors by pickling."""

    deadline_s: float
    versions: dict[str, str] = field(default_factory=dict)  # pins: another version is an error, not another scale
    call_items: int = 256

    def score(self, scorer: str, sequences: list[list[int]], prompt_tokens: list[int] | None = None) -> list[Score]:
        """Scores in the order given, for at most `deadline_s` seconds of failing calls.

        Args:
            prompt_tokens: how many tokens of each sequence are the prompt, for scorers that are rule functions.

        Raises:
            LookupError: where there is no such scorer, or not in the pinned version.
        """
        lengths = prompt_tokens or [0] * len(sequences)

        def attempt(rows: list[int], left_s: float) -> Reply:
            return self._attempt(scorer, [sequences[r] for r in rows], [lengths[r] for r in rows], left_s)

        return with_retries(len(sequences), attempt, self.deadline_s)

    def _attempt(self, scorer: str, sequences: list[list[int]], lengths: list[int], left_s: float) -> Reply:
        from ray import serve
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        end, size = time.monotonic() + left_s, self.call_items
        cuts = [slice(start, start + size) for start in range(0, len(sequences), size)]
        pin = self.versions.get(scorer)
        scores: list[Score] = []
        calls: list = []
        for cut in cuts:
            try:
                handle = serve.get_app_handle(FRONT)
                calls.append(handle.score.remote(scorer, sequences[cut], lengths[cut], pin, left_s))
            except RayServeException as fault:  # the service restarts, or its queue is full
                calls.append(fault)
        for cut, call in zip(cuts, calls, strict=True):
            count = len(sequences[cut])
            try:
                if isinstance(call, Exception):
                    raise call
                answer = call.result(timeout_s=max(0.1, end - time.monotonic()))
                problem = None if len(answer) == count else f"unavailable: {len(answer)} scores for {count} sequences"
            except (RayError, RayServeException, TimeoutError) as fault:  # the front died or hangs: Serve restarts it
                if isinstance(fault, RayTaskError) and isinstance(fault.cause, LookupError):
                    raise LookupError(f"scorer {scorer}: {fault.cause}") from None
                problem = f"unavailable: {type(fault).__name__}"
            scores += [Score(None, problem)] * count if problem else answer
        return Reply(scores)
