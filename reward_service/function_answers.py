"""What a rule function answered, as numbers that JSON can carry: of each item a number, None, or a score with its parts.

    [1.0, None]                               a score, and an item that the function has none for
    [{"score": 1.0, "format": 0.2}, ...]      with parts, as verl's do
    {"score": [1.0, 0.0], "format": [...]}    the same by columns
    {"rewards": ..., "scores": ..., "extra_logs": {...}}   OpenRLHF's: what is beside the rewards are parts

A part is a finite number under a name of letters, digits, `_`, `-` and `.`; anything else in its name becomes `_`, and of
two with one name the later counts. What is beside a score and no number, as verl's
`pred`, is none.
"""

import inspect
import re
from collections.abc import Iterator
from typing import Any

Plain = int | float | dict[str, int | float] | None


class Refused(ValueError):
    """What a function returned is no list of scores; the text is an item's error, "code: detail"."""


def plain_scores(value: Any, count: int, logged: dict[str, list]) -> list[Plain]:
    """Scores in the order of the items, numbers of numpy and torch as Python's.

    Args:
        count: of items.
        logged: what the function has logged beside them, a list of values for all items by name.

    Raises:
        Refused: where it is something else.
    """
    value, columns = _plain(value), dict(logged)
    if isinstance(value, dict) and (name := next((n for n in ("rewards", "score") if n in value), None)):
        columns |= {key: found for key, found in value.items() if key not in (name, "extra_logs")}
        columns |= value["extra_logs"] if isinstance(value.get("extra_logs"), dict) else {}
        value = _plain(value[name])
        if count == 1 and isinstance(value, int | float):  # OpenRLHF calls with one item at a time
            value = [value]
    if not isinstance(value, list | tuple):
        raise Refused(_wrong_type(value, "a list"))
    scores = [_score(item) for item in value]
    return _with_columns(scores, columns) if columns else scores


def _with_columns(scores: list[Plain], columns: dict[str, Any]) -> list[Plain]:
    parts: list[dict[str, int | float]] = [{} for _ in scores]
    for name, column in columns.items():
        values = _plain(column)
        values = values if isinstance(values, list | tuple) else [values] * len(scores)  # one for the whole call
        if len(values) != len(scores):
            raise Refused(f"wrong_count: {len(values)} values of a part for {len(scores)} scores")
        for own, value in zip(parts, values, strict=True):
            _add_part(own, name, value)
    for own, score in zip(parts, scores, strict=True):
        own |= score if isinstance(score, dict) else {} if score is None else {"score": score}
    return [None if score is None else own for own, score in zip(parts, scores, strict=True)]


def _score(item: Any) -> Plain:
    item = _plain(item)
    if item is None:
        return None
    if not isinstance(item, dict):
        return _number(item)
    if "score" not in item:
        raise Refused("wrong_type: dict without a score")
    if _plain(item["score"]) is None:
        return None
    result = {"score": _number(item["score"])}
    for name, value in item.items():
        if name != "score":
            _add_part(result, name, value)
    return result


def _add_part(parts: dict[str, int | float], name: Any, value: Any) -> None:
    value = _plain(value)
    if not isinstance(value, int | float):
        return
    parts[re.sub(r"[^\w.-]", "_", str(name)) or "_"] = _number(value)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _number(value: Any) -> int | float:
    value = _plain(value)
    if not isinstance(value, int | float):
        raise Refused(_wrong_type(value, "a number"))
    try:
        float(value)
    except OverflowError:
        raise Refused("non_finite: an integer beyond the range of float") from None
    return float(value) if isinstance(value, bool) else value


def _wrong_type(value: Any, wanted: str) -> str:
    hint = ""
    if inspect.isawaitable(value) or inspect.isasyncgen(value):
        hint = ": nobody awaits it, await it in the function"
    elif isinstance(value, Iterator):
        hint = ": nobody runs through it, return list(...) of it"
    return f"wrong_type: {type(value).__name__} instead of {wanted}{hint}"
