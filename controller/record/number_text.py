"""Numbers for people, in alarms and on pages."""

from typing import Any

from controller.record.reader import number

MISSING = "–"


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


def duration(seconds: Any) -> str:
    known = number(seconds)
    if known is None:
        return MISSING
    if known < 9.95:
        return f"{known:.1f} s"
    if known < 89.5:
        return f"{known:.0f} s"
    if known < 5400:
        return f"{known / 60:.{1 if known < 600 and known % 60 else 0}f} min"
    return f"{known / 3600:.1f} h"


def bounds(values: Any) -> tuple[float | None, float | None, float | None]:
    """(mean, low, high) of {"mean", "low", "high"}, of a bare number, or of nothing."""
    if isinstance(values, dict):
        return number(values.get("mean")), number(values.get("low")), number(values.get("high"))
    return number(values), None, None


def count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
