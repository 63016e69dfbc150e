"""Numbers for people, in alarms and on pages."""

import math
from typing import Any

MISSING = "–"


def number(value: Any) -> float | None:
    """A finite number, or None for null, NaN, text and whatever else a broken run may have left."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # an integer beyond the range of float
        return None
    return found if math.isfinite(found) else None


def num(value: Any, digits: int = 2, signed: bool = False) -> str:
    """A number with a true minus sign, or a dash where there is none."""
    known = number(value)
    if known is None:
        return MISSING
    text = f"{known:{'+' if signed else ''},.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def compact(value: Any) -> str:
    """Three significant digits, for values whose size is not known beforehand."""
    known = number(value)
    if known is None:
        return MISSING
    if known and not 1e-3 <= abs(known) < 1e5:
        return f"{known:.1e}".replace("-", "−").replace("e−0", "e−").replace("e+0", "e")
    digits = 3 if abs(known) < 1 else 2 if abs(known) < 10 else 1 if abs(known) < 100 else 0
    return num(known, digits)


def percent(value: Any, digits: int = 0) -> str:
    known = number(value)
    return MISSING if known is None else f"{num(known * 100, digits)}%"


def duration(seconds: Any, whole_minutes: bool = False) -> str:
    known = number(seconds)
    if known is None:
        return MISSING
    if known < 89.5:
        return f"{known:.{1 if known < 9.95 else 0}f} s"
    if known >= 5400:
        return f"{known / 3600:.1f} h"
    return f"{known / 60:.{1 if known < 600 and known % 60 and not whole_minutes else 0}f} min"


def spoken(seconds: Any) -> str:
    """As a person would say it: "7.5 s", "31 s", "4 min", "2.5 h"."""
    return duration(seconds, whole_minutes=True)


def bounds(values: Any, times: float = 1.0) -> tuple[float | None, float | None, float | None]:
    """(mean, low, high) of {"mean", "low", "high"}, of a bare number, or of nothing; each so many times."""
    found = [values.get(name) for name in ("mean", "low", "high")] if isinstance(values, dict) else [values, None, None]
    mean, low, high = (None if (known := number(value)) is None else known * times for value in found)
    return mean, low, high


def count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
