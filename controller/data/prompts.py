"""The order in which PPO asks for completions of its prompts, and how a text is cut into a prompt and the rest."""

import hashlib
import re
from typing import Any

from common.text.encoding import LeftOut
from contracts.records import Prompt, RolloutRequest

MIN_REST_WORDS = 3  # of a text that `prompt_words` cuts: below it there is next to nothing to complete


def first_words(text: str, words: int | None) -> tuple[str, str]:
    """(first `words` words, the rest with its leading space); without `words` everything is the rest."""
    if words is None:
        return "", text
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    if len(ends) < words + MIN_REST_WORDS:
        raise LeftOut(f"fewer than {words + MIN_REST_WORDS} words", bad=False)
    return text[: ends[words - 1]], text[ends[words - 1] :]


def _hash(*key: int) -> bytes:
    return hashlib.sha256(":".join(map(str, key)).encode()).digest()


def sampling_seed(run_seed: int, epoch: int, prompt_id: int, sample_index: int) -> int:
    """Seed in [0, 2**31) that depends on nothing but its key: not on the batch, the actor or the time."""
    return int.from_bytes(_hash(run_seed, epoch, prompt_id, sample_index)[:4]) >> 1


class PromptStream:
    """Endless rollout requests. Each epoch is a permutation derived from (seed, epoch), so its state is two numbers.

    Prompts are ordered by a hash instead of a library's shuffle: a resumed run keeps its order under another version of
    Python or NumPy, and in a file whose rows were moved only the prompt ids decide.
    """

    def __init__(self, prompts: list[Prompt], samples_per_prompt: int, seed: int) -> None:
        if not prompts:
            raise ValueError("a prompt stream needs at least one prompt; found none")
        if samples_per_prompt < 1:
            raise ValueError(f"samples_per_prompt must be at least 1; found {samples_per_prompt}")
        if len({prompt.prompt_id for prompt in prompts}) != len(prompts):
            raise ValueError("prompt ids must be unique: with epoch and sample index they are the key of a rollout")
        self._prompts = prompts
        self._samples_per_prompt = samples_per_prompt
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._order = self._permutation(0)

    def _permutation(self, epoch: int) -> list[Prompt]:
        return sorted(self._prompts, key=lambda prompt: _hash(self._seed, epoch, prompt.prompt_id))

    def next_requests(self, n_prompts: int) -> list[RolloutRequest]:
        """The next `n_prompts * samples_per_prompt` requests, siblings side by side; may span epochs."""
        requests = []
        for _ in range(n_prompts):
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._permutation(self._epoch)
            prompt = self._order[self._position]
            self._position += 1
            for index in range(self._samples_per_prompt):
                seed = sampling_seed(self._seed, self._epoch, prompt.prompt_id, index)
                requests.append(RolloutRequest(self._epoch, index, prompt, seed))
        return requests

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises ValueError where it cannot belong to these prompts."""
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position <= len(self._prompts):
            raise ValueError(
                f"the state of the prompt stream is at position {position} of epoch {epoch}, but there are "
                f"{len(self._prompts)} prompts: resume with the data set that the run began with"
            )
        self._epoch, self._position = epoch, position
        self._order = self._permutation(epoch)
