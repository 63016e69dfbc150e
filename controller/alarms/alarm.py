"""What an alarm is, and the rule that most of them follow: one metric beyond one limit.

A rule is a function of a run that yields its alarms, and raises NotMeasured where the run lacks what it is about.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from controller.record.number_text import compact, number
from controller.record.reader import Run

WINDOW = 5  # versions whose mean stands for "now", "best" and "at the start"


class NotMeasured(Exception):
    """The run has no metric, or no setting, that a rule is about."""


@dataclass
class Alarm:
    severity: str  # "alarm" | "note"
    title: str
    finding: str  # the numbers
    meaning: str
    advice: str


Rule = Callable[[Run], Iterator[Alarm]]


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

    def __call__(self, run: Run) -> Iterator[Alarm]:
        curve = known_curve(run, self.metric, 1)
        counted = [(step, value) for step, value in curve if step > self.after]
        out = [(s, v) for s, v in counted if (v > self.limit if self.side == "above" else v < self.limit)]
        if not out:
            return
        worst = (max if self.side == "above" else min)(value for _, value in out)
        has_passed = out[-1][0] != counted[-1][0]
        ended = f"last at version {out[-1][0]:.0f}" if has_passed else "still so at the end"
        finding = (
            f"{self.metric} {self.side} {self.limit:g} in {len(out)} of {len(counted)} versions, first at version "
            f"{out[0][0]:.0f}, {ended}; worst {compact(worst)}."
        )
        is_rare = len(out) < 0.05 * len(counted)
        severity = "note" if is_rare and has_passed else "alarm"
        yield Alarm(severity, self.title, finding, self.meaning, self.advice)


def beyond_setting(key: str, times: float, limit: Limit) -> Rule:
    """`limit` at so many times the number that the configuration has at `key`, which its meaning may name: {setting}."""

    def rule(run: Run) -> Iterator[Alarm]:
        setting = number(run.setting(key))
        if setting is None:
            raise NotMeasured(key)
        yield from replace(limit, limit=times * setting, meaning=limit.meaning.format(setting=f"{setting:g}"))(run)

    return rule


def known_curve(run: Run, metric: str, least: int = 0) -> list[tuple[float, float]]:
    """(version, value) of a metric of the loop where it is known. Raises NotMeasured where fewer than `least` are."""
    known = [(version, value) for version, value in run.curve("ppo", metric) if value is not None]
    if len(known) < least:
        raise NotMeasured(metric)
    return known


def known_values(run: Run, metric: str, least: int = 0) -> list[float]:
    """The same without the versions."""
    return [value for _, value in known_curve(run, metric, least)]
