"""What callers hold: scores with retries. Scoring is pure, so a lost call can be repeated; only what failed is."""

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from contracts.records import Prompt, Score, ScoringItem
from contracts.scoring import RETRYABLE

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
CALLS = 8  # under way at a time, of one client
FRONT = "reward"  # the Serve application that every call goes to


@dataclass(frozen=True)
class Reply:
    """What one attempt brought for some items; `retry_after_s` where the service asks for a pause."""

    scores: list[Score]
    retry_after_s: float = 0.0


def wished_pause_s(retry_after: str) -> float:
    """Seconds of the header `Retry-After`; its other form, a date, is rare and counts as no wish."""
    return float(retry_after) if retry_after.isdecimal() else 0.0


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

    def score(
        self,
        scorer: str,
        sequences: list[list[int]],
        prompt_tokens: list[int] | None = None,
        prompts: list[Prompt] | None = None,
    ) -> list[Score]:
        """Scores in the order given, for at most `deadline_s` seconds of failing calls.

        Args:
            prompt_tokens: how many tokens of each sequence are the prompt, for scorers that are rule functions.
            prompts: what each answers, for scorers that see rows.

        Raises:
            LookupError: where there is no such scorer, or not in the pinned version.
        """
        lengths = prompt_tokens or [0] * len(sequences)
        texts = [(p.row, p.messages) for p in prompts] if prompts else [(None, None)] * len(sequences)
        items = [
            ScoringItem(tuple(ids), start, None, *given)
            for ids, start, given in zip(sequences, lengths, texts, strict=True)
        ]

        def attempt(rows: list[int], left_s: float) -> Reply:
            return self._attempt(scorer, [items[r] for r in rows], left_s)

        return with_retries(len(sequences), attempt, self.deadline_s)

    def _attempt(self, scorer: str, items: list[ScoringItem], left_s: float) -> Reply:
        from ray import serve
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        end, size = time.monotonic() + left_s, self.call_items
        pin = self.versions.get(scorer)
        scores: list[Score] = []
        under_way: deque[tuple[int, Any]] = deque()

        def answer() -> list[Score]:
            count, call = under_way.popleft()
            try:
                if isinstance(call, Exception):
                    raise call
                found = call.result(timeout_s=max(0.1, end - time.monotonic()))
                problem = f"{len(found)} scores for {count} items" if len(found) != count else None
            except (RayError, RayServeException, TimeoutError) as fault:  # the front died or hangs: Serve restarts it
                if isinstance(fault, TimeoutError):  # nobody waits for it any more
                    call.cancel()
                if isinstance(fault, RayTaskError) and isinstance(fault.cause, LookupError):
                    raise LookupError(f"scorer {scorer}: {fault.cause}") from None
                found, problem = [], type(fault).__name__
            return [Score(None, f"unavailable: {problem}")] * count if problem else found

        for start in range(0, len(items), size):
            cut = slice(start, start + size)
            try:
                handle = serve.get_app_handle(FRONT)
                call: Any = handle.score.remote(scorer, items[cut], pin, left_s)
            except RayServeException as fault:  # the service restarts, or its queue is full
                call = fault
            under_way.append((len(items[cut]), call))
            if len(under_way) == CALLS:
                scores += answer()
        while under_way:
            scores += answer()
        return Reply(scores)
