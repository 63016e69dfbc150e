"""The answers that a judge may give, what each is worth, and what is read off the probabilities or the text of one."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from contracts.config import JudgeConfig
from reward_service.isolate import Failed

ROUNDING = 1e-3  # by which probabilities may add up to more than 1


class Reading(NamedTuple):
    """Of one question."""

    value: float  # in units of the scale's values
    off_scale: float | None = None  # probability of what is no answer; None where a text was read


class Scale(NamedTuple):
    answers: tuple[str, ...]
    values: tuple[float, ...]

    @property
    def cue(self) -> str:
        """Asks for an answer alone, behind a text of the judge."""
        return f"Answer with one of these and nothing else: {', '.join(answer.strip() for answer in self.answers)}"

    @property
    def longest(self) -> int:
        """Bytes, of which a token has one or more."""
        return max(len(answer.encode()) for answer in self.answers)


def scale_of(judge: JudgeConfig) -> Scale:
    """With what is empty filled in. Raises ValueError where an answer without a value is no number."""
    is_pair = judge.mode == "pairwise"
    answers = tuple(judge.scale or (("A", "B") if is_pair else ("1", "2", "3", "4", "5")))
    if judge.values or (is_pair and len(answers) == 2):
        return Scale(answers, tuple(judge.values or (1.0, 0.0)))
    if is_pair:
        raise ValueError(f"{len(answers)} answers")
    return Scale(answers, tuple(map(float, answers)))


def expected(scale: Scale, probabilities: Sequence[float], least: float) -> Reading:
    """sum_i p_i v_i / sum_i p_i over the answers: the score weighted by the probabilities of its tokens (G-Eval, Liu 2023,
    arXiv 2303.16634, section 2.3), with what the judge would say beside the scale left out. A score of one token in five is
    coarse and often the same; the expectation tells more completions apart.

    Args:
        probabilities: [answers], of the first token of each.
        least: of their sum.

    Raises:
        Failed: where their sum is below, or they are no probabilities.
    """
    total = math.fsum(probabilities)
    if not all(0 <= p <= 1 + ROUNDING for p in probabilities) or total > 1 + ROUNDING:  # NaN is none either
        raise Failed("unreadable: the judge's log-probabilities are none")
    if total < least or total == 0:
        raise Failed(f"unreadable: the judge puts {total:.2g} on its scale, below judge.min_on_scale={least:g}")
    value = math.fsum(p * v for p, v in zip(probabilities, scale.values, strict=True)) / total
    return Reading(value, max(0.0, 1 - total))


def of_tokens(scale: Scale, top: Iterable[tuple[str, float]]) -> list[float]:
    """Probabilities [answers] from the likeliest first tokens, as texts, with their log-probabilities. A token counts for
    the answer that it begins, with or without a space before it; answers differ in their first character."""
    found = [0.0] * len(scale.answers)
    for token, logprob in top:
        said = token.strip()
        for row, answer in enumerate(scale.answers):
            if said and answer.strip().startswith(said):
                found[row] += math.exp(min(logprob, 1.0))  # above 0 it is none, which `expected` says
    return found


def written(scale: Scale, text: str) -> Reading:
    """Raises Failed where the text is anything else than an answer."""
    for answer, value in zip(scale.answers, scale.values, strict=True):
        if text.strip() == answer.strip():
            return Reading(value)
    raise Failed("unreadable: the judge's text is no answer of judge.scale")
