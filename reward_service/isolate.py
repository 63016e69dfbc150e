"""A bad item costs only itself: what fails of a batch is tried in smaller ones until it is one item."""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from contracts.records import Score

KILLS = 2  # processes that an item may take down before nobody tries it again
REMEMBERED_ITEMS = 10_000
Item = TypeVar("Item")
Key = TypeVar("Key")


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


def isolate(score: Callable[[list[Item]], list[float]], items: list[Item]) -> list[Score]:
    """Scores of `items` in order, each as if it had been alone.

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
            return [Score(float(value), raw=float(value)) for value in values]
    if len(items) == 1:
        return [Score(None, problem)]
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    return [found for part in parts for found in isolate(score, part)]


def _problem(values: object, count: int) -> str | None:
    if not isinstance(values, list | tuple):
        return f"wrong_type: {type(values).__name__} instead of a list"
    if len(values) != count:
        return f"wrong_count: {len(values)} scores for {count} items"
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"wrong_type: {type(value).__name__} instead of a number"
        try:
            if not math.isfinite(value):
                return "non_finite"
        except OverflowError:
            return "non_finite: an integer beyond the range of float"
    return None


def finite(score: Score) -> Score:
    """The score, or `non_finite` in place of one that is infinite or no number: nothing may train on it, and JSON cannot
    carry it."""
    if all(math.isfinite(number) for number in (score.value, score.raw, score.spread) if number is not None):
        return score
    return Score(None, "non_finite", version=score.version)
