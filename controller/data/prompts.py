"""The order in which PPO asks for completions of its prompts, and how a text is cut into a prompt and the rest."""

import hashlib
import re
from typing import Any

from common.text.encoding import LeftOut
from contracts.config import CurriculumConfig
from contracts.records import SOURCE, Prompt, Rollout, RolloutRequest
from controller.data.mixture import exact_shares, next_turn

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


class Success:
    """How often each prompt was solved, the last time that it was asked. One of intermediate difficulty teaches most: where
    all samples have the same score nothing is learnt (Florensa et al. 2018, arXiv 1705.06366, goals of that kind)."""

    def __init__(self, threshold: float | None) -> None:
        self.threshold = threshold
        self._counts: dict[int, list[int]] = {}  # by prompt id: epoch, solved, samples

    def measure(self, rollouts: list[Rollout]) -> None:
        """Take in the scores of a batch; a score of at least the threshold is a success."""
        if self.threshold is None:
            return
        for rollout in rollouts:
            score = rollout.scores.get("proxy")
            if score is None or score.value is None:
                continue
            epoch, prompt_id, _ = rollout.key
            counts = self._counts.get(prompt_id, [-1, 0, 0])
            if epoch > counts[0]:
                counts = self._counts[prompt_id] = [epoch, 0, 0]
            if epoch == counts[0]:  # with `max_staleness` one of before may come late
                counts[1] += score.value >= self.threshold
                counts[2] += 1

    def distances(self, prompts: list[Prompt]) -> dict[int, float]:
        """By prompt id, of its share of successes from a half; none of a prompt that has not been measured."""
        counts = {p.prompt_id: self._counts[p.prompt_id] for p in prompts if p.prompt_id in self._counts}
        return {prompt_id: abs(solved / samples - 0.5) for prompt_id, (_, solved, samples) in counts.items()}

    def state_dict(self) -> dict[str, list[int]]:
        return {str(prompt_id): [*counts] for prompt_id, counts in self._counts.items()}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        self._counts = {int(prompt_id): [*counts] for prompt_id, counts in state.items()}


class Passes:
    """The prompts of one source, again and again, each pass in an order of its own; its state is how many were drawn, and
    what a curriculum by success knew at the start of this pass.

    Prompts are ordered by a hash instead of a library's shuffle: a resumed run keeps its order under another version of
    Python or NumPy, and in a file whose rows were moved only the prompt ids decide.
    """

    def __init__(self, prompts: list[Prompt], seed: int, curriculum: CurriculumConfig, success: Success) -> None:
        self._prompts = prompts
        self._seed = seed
        self._curriculum = curriculum
        self._success = success
        self._ordered: tuple[int, list[Prompt]] = (-1, [])  # the pass whose order it is
        self._distances: dict[int, float] = {}
        self.drawn = 0

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def begun(self) -> int:
        """Passes that have begun, after the first."""
        return max(0, self.drawn - 1) // len(self)

    def draw(self) -> Prompt:
        number, position = divmod(self.drawn, len(self))
        if number != self._ordered[0]:
            if position == 0:  # else it was resumed, with what it began with
                self._distances = self._success.distances(self._prompts)
            self._ordered = number, self._order(number)
        self.drawn += 1
        return self._ordered[1][position]

    def _order(self, number: int) -> list[Prompt]:
        order = sorted(self._prompts, key=lambda p: _hash(self._seed, number, p.prompt_id))
        column = self._curriculum.column
        if number:
            return sorted(order, key=lambda p: self._distances.get(p.prompt_id, 0.0))  # not measured: may be the best
        if column is None:
            return order
        return sorted(order, key=lambda p: p.columns[column], reverse=self._curriculum.order == "descending")

    def resume(self, drawn: int, distances: dict[str, float]) -> None:
        self.drawn, self._ordered = drawn, (-1, [])
        self._distances = {int(prompt_id): distance for prompt_id, distance in distances.items()}

    def distances(self) -> dict[str, float]:
        """From a half, of what was measured before this pass began, by prompt id."""
        return {str(prompt_id): distance for prompt_id, distance in self._distances.items()}


class PromptStream:
    """Endless rollout requests. Their order follows from the seed, so that its state is how many there were, and with a
    curriculum by success how often each prompt was solved.

    Prompts of several sources come by turns, each source in passes of its own. A new epoch begins with every pass that does:
    of a single source it is a permutation of the prompts, of several it has no prompt twice.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        samples_per_prompt: int,
        seed: int,
        weights: dict[str, float] | None = None,
        curriculum: CurriculumConfig | None = None,
    ) -> None:
        """
        Args:
            weights: of each source, as the column `source` of the prompts names it; without any all prompts are one source.
        """
        if not prompts:
            raise ValueError("a prompt stream needs at least one prompt; found none")
        if samples_per_prompt < 1:
            raise ValueError(f"samples_per_prompt must be at least 1; found {samples_per_prompt}")
        if len({prompt.prompt_id for prompt in prompts}) != len(prompts):
            raise ValueError("prompt ids must be unique: with epoch and sample index they are the key of a rollout")
        self._samples_per_prompt = samples_per_prompt
        self._seed = seed
        by_source: dict[str, list[Prompt]] = {name: [] for name in sorted(weights or {"": 1.0})}
        for prompt in prompts:
            by_source[prompt.columns[SOURCE] if weights else ""].append(prompt)
        curriculum = curriculum or CurriculumConfig()
        self._success = Success(curriculum.success)
        self._passes = {name: Passes(own, seed, curriculum, self._success) for name, own in by_source.items()}
        self._shares = exact_shares([(weights or {"": 1.0})[name] for name in by_source])

    def next_requests(self, n_prompts: int) -> list[RolloutRequest]:
        """The next `n_prompts * samples_per_prompt` requests, siblings side by side; may span epochs."""
        requests, passes = [], [*self._passes.values()]
        for _ in range(n_prompts):
            prompt = passes[next_turn([one.drawn for one in passes], self._shares)].draw()
            epoch = sum(one.begun for one in passes)
            for index in range(self._samples_per_prompt):
                seed = sampling_seed(self._seed, epoch, prompt.prompt_id, index)
                requests.append(RolloutRequest(epoch, index, prompt, seed))
        return requests

    def measure(self, rollouts: list[Rollout]) -> None:
        """Their scores decide the order of the passes that begin from now on, where the curriculum is by success."""
        self._success.measure(rollouts)

    def state_dict(self) -> dict[str, Any]:
        success = {}
        if self._success.threshold is not None:
            begun_with = {name: one.distances() for name, one in self._passes.items()}
            success = {"success": self._success.state_dict(), "begun_with": begun_with}
        if len(self._passes) > 1:
            return {"drawn": {name: one.drawn for name, one in self._passes.items()}} | success
        (one,) = self._passes.values()
        return {"epoch": one.begun, "position": one.drawn - one.begun * len(one)} | success

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises ValueError where it cannot belong to these prompts."""
        self._success.load_state_dict(state.get("success", {}))
        begun_with = state.get("begun_with", {})
        if len(self._passes) > 1:
            drawn = state.get("drawn", {})
            if drawn.keys() != self._passes.keys():
                raise ValueError(
                    f"the state of the prompt stream is of the sources {', '.join(drawn) or 'of no mixture'}, but there are "
                    f"{', '.join(self._passes)}: resume with the sources that the run began with"
                )
            for name, one in self._passes.items():
                one.resume(int(drawn[name]), begun_with.get(name, {}))
            return
        (one,) = self._passes.values()
        epoch, position = int(state.get("epoch", -1)), int(state.get("position", 0))
        if epoch < 0 or not 0 <= position <= len(one):
            raise ValueError(
                f"the state of the prompt stream is at position {position} of epoch {epoch}, but there are "
                f"{len(one)} prompts: resume with the data set that the run began with"
            )
        one.resume(epoch * len(one) + position, begun_with.get("", {}))


def curriculum_problems(prompts: list[Prompt], curriculum: CurriculumConfig) -> list[str]:
    """Why the prompts cannot be put in that order."""
    column = curriculum.column
    if column is None:
        return []
    kinds: dict[str, Prompt] = {}
    for prompt in prompts:
        value = prompt.columns.get(column)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        kind = "number" if is_number else "text" if isinstance(value, str) else "neither"
        kinds.setdefault(kind, prompt)
    if kinds.keys() <= {"number"} or kinds.keys() <= {"text"}:
        return []
    places = ", ".join(f"{p.columns.get(column)!r} in {p.place}" for p in kinds.values())
    return [
        f"data.curriculum.column must name a column that travels with the prompts and has numbers, or texts, in every row; "
        f"found {column!r} with {places}; there are {', '.join(prompts[0].columns) or 'no columns'}"
    ]
