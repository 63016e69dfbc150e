"""Rollouts that are written down instead of sampled."""

import numpy as np

from contracts.records import Completion, Prompt, Rollout


def rollout(number: int, prompt: list[int], completion: list[int], sample: int = 0) -> Rollout:
    """Of prompt `number` of the first epoch, with log-probabilities that tell its tokens apart."""
    count = len(completion)
    logprobs = -np.linspace(1, 9, count, dtype=np.float32)
    sampled = Completion(np.array(completion, dtype=np.int32), logprobs, np.zeros(count, dtype=np.int32), "length", "")
    return Rollout((0, number, sample), Prompt(number, "", tuple(prompt)), sampled)
