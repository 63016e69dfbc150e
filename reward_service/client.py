"""What actors hold: scores by handle, with retries. Scoring is pure, so a lost call can be repeated; Serve itself does
not repeat what it has already dispatched to a replica that died."""

import random
import time

from ray import serve
from ray.exceptions import RayError

from contracts.records import Score

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0


def application_name(scorer: str) -> str:
    return f"reward-{scorer}"


class HandleClient:
    """A `RewardClient` over Serve's deployment handles. Travels to actors by pickling."""

    def __init__(self, deadline_s: float):
        self.deadline_s = deadline_s

    def score(self, scorer: str, sequences: list[list[int]]) -> list[Score]:
        """Scores in the order given; after `deadline_s` seconds of failing calls every item carries the last error,
        since an invented score would corrupt the training signal."""
        if not sequences:
            return []
        end, pause = time.monotonic() + self.deadline_s, FIRST_PAUSE_S
        handle = serve.get_app_handle(application_name(scorer))
        while True:
            try:
                scores = handle.score.remote(sequences).result(timeout_s=max(0.1, end - time.monotonic()))
                if len(scores) == len(sequences):
                    return scores
                error: str = f"wrong count: {len(scores)} scores for {len(sequences)} sequences"
            except (RayError, TimeoutError) as fault:  # a replica died or hangs: another may answer
                error = f"{type(fault).__name__}: {fault}"
            if time.monotonic() + pause > end:
                return [Score(None, error)] * len(sequences)
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE_S)
