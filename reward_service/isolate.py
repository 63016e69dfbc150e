"""A bad item costs only itself: what fails of a batch is tried in smaller ones until it is one item."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Generic, TypeVar

from contracts.records import Score
from contracts.scoring import NOT_APPLICABLE

KILLS = 2  # processes that an item may take down before nobody tries it again
REMEMBERED_ITEMS = 10_000
Item = TypeVar("Item")
Key = TypeVar("Key")
Answer = float | dict[str, float] | None


class Quarantine(Generic[Key]):
    """Items that took down `KILLS` processes, of the last ones that took down any."""

    def __init__(self) -> None:
        self._kills: OrderedDict[Key, int] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return self._kills.get(key, 0) >= KILLS

    def count(self, key: Key) -> bool:
        """One process more; whether that is the last one."""
        self._kills[key] = self._kills.get(key, 0) + 1
        while len(self._kills) > REMEMBERED_ITEMS:
            self._kills.popitem(last=False)
        return self._kills[key] == KILLS

    def acquit(self, key: Key) -> None:
        self._kills.pop(key, None)


class Failed(RuntimeError):
    """Why a call brought no scores, in the words of an item's error: "code: detail", without any text of an item.

    `is_kill`: the process that computed it did not survive.
    """

    def __init__(self, error: str, is_kill: bool = False):
        super().__init__(error)
        self.is_kill = is_kill


def isolate(score: Callable[[list[Item]], Sequence[Answer]], items: list[Item]) -> list[Score]:
    """Scores of `items` in order, each as if it had been alone. An item that `score` has None for has none, and a dict is a
    score with named parts.

    A batch is halved where `score` raises, answers with another number of values, or with one that is not a finite number:
    the NaN of one sequence can reach its neighbours through padding. Where its process did not survive, the items are tried
    one by one: each half that has the bad one would cost a process, and the whole time-out, again. What is left of a
    failure is an error of its item, with the type of an exception and without its text, which may quote the completion.
    """
    size = (len(items) + 1) // 2
    try:
        values = score(items)
    except Failed as fault:
        problem: str | None = str(fault)
        size = 1 if fault.is_kill else size
    except Exception as fault:  # poison, tolerated on purpose: it is the item's error, and the service counts it
        problem = f"poison: {type(fault).__name__}"
    else:
        problem = _problem(values, len(items))
        if problem is None:
            return [_scored(value) for value in values]
    if len(items) == 1:
        return [Score(None, problem)]
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    return [found for part in parts for found in isolate(score, part)]


def _scored(answer: Answer) -> Score:
    if answer is None:
        return Score(None, f"{NOT_APPLICABLE}: None in place of a score")
    if not isinstance(answer, dict):
        return Score(float(answer), raw=float(answer))
    value = float(answer["score"])
    return Score(value, raw=value, parts={name: float(part) for name, part in answer.items() if name != "score"})


def _problem(values: object, count: int) -> str | None:
    if not isinstance(values, list | tuple):
        return f"wrong_type: {type(values).__name__} instead of a list"
    if len(values) != count:
        return f"wrong_count: {len(values)} scores for {count} items"
    if any(isinstance(value, dict) and "score" not in value for value in values):
        return "wrong_type: dict without a score"
    for value in chain.from_iterable(_numbers(value) for value in values):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"wrong_type: {type(value).__name__} instead of a number"
        try:
            if not math.isfinite(value):
                return "non_finite"
        except OverflowError:
            return "non_finite: an integer beyond the range of float"
    return None


def _numbers(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else () if value is None else (value,)


def finite(score: Score) -> Score:
    """The score, or `non_finite` in place of one that is infinite or no number: nothing may train on it, and JSON cannot
    carry it."""
    numbers = (score.value, score.raw, score.spread, *(score.parts or {}).values())
    if all(math.isfinite(number) for number in numbers if number is not None):
        return score
    return Score(None, "non_finite", version=score.version)
