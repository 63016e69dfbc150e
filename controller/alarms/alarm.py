"""What an alarm is, and the rule that most of them follow: one metric beyond one limit."""

from dataclasses import dataclass

from controller.record.number_text import compact
from controller.record.reader import Curve, Run

WINDOW = 5  # versions whose mean stands for "now", "best" and "at the start"


@dataclass
class Alarm:
    severity: str  # "alarm" | "note"
    title: str
    finding: str  # the numbers
    meaning: str
    advice: str


@dataclass(frozen=True)
class Limit:
    """Fires at every version where `metric` lies strictly beyond `limit`; a note where that was rare and has passed."""

    metric: str
    side: str  # "above" | "below"
    limit: float
    title: str
    meaning: str
    advice: str
    after: int = 0  # versions up to this one do not count


def beyond(limit: Limit, curve: Curve) -> list[Alarm]:
    """The alarm, if it fires."""
    known = [(step, value) for step, value in curve if value is not None and step > limit.after]
    out = [(s, v) for s, v in known if (v > limit.limit if limit.side == "above" else v < limit.limit)]
    if not out:
        return []
    worst = (max if limit.side == "above" else min)(value for _, value in out)
    ended = "still so at the end" if out[-1][0] == known[-1][0] else f"last at version {out[-1][0]:.0f}"
    finding = (
        f"{limit.metric} {limit.side} {limit.limit:g} in {len(out)} of {len(known)} versions, first at version "
        f"{out[0][0]:.0f}, {ended}; worst {compact(worst)}."
    )
    passing = len(out) < 0.05 * len(known) and out[-1][0] != known[-1][0]
    return [Alarm("note" if passing else "alarm", limit.title, finding, limit.meaning, limit.advice)]


def known_values(run: Run, metric: str) -> list[float]:
    return [value for _, value in run.curve("ppo", metric) if value is not None]
