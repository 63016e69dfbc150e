"""What a simulation has found, as tables and a timeline: in a terminal, and as a page."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.files.durable import replace_text
from controller.plan.schedule.calibration import Calibration
from controller.plan.schedule.recommendation import Choice
from controller.plan.schedule.simulation import FILLING, SIDES, Forecast
from controller.plan.schedule.spans import ACTOR, GENERATE, LEARNER, LOAD, PUBLISH, REWARD, SCORE, TRAIN, Lane
from controller.record.number_text import duration, percent
from controller.record.reader import Run
from controller.report.rendering import links
from controller.report.run_page import PAGE
from controller.report.svg import element
from controller.report.timeline import time_spent

COLUMNS = 84  # of the timeline
UPDATES = 3  # that it shows, the last ones
MOST_LANES = {ACTOR: 4, LEARNER: 2, REWARD: 2}
MARKS = {
    GENERATE: ("▆", "cyan"),
    LOAD: ("╎", "magenta"),
    TRAIN: ("█", "green"),
    PUBLISH: ("▓", "magenta"),
    SCORE: ("▒", "yellow"),
}
MOST_CHOICES = 12


def summary_rows(found: Forecast) -> list[tuple[str, str]]:
    """Of the updates that count."""
    return [
        ("an update", f"{found.step_s:.2f} s"),
        ("rollouts a second", f"{found.rollouts_per_s:.2f}"),
        *((f"{side}s work", percent(found.busy(side))) for side in SIDES),
        ("the controller computes", percent(found.driver_busy)),
        ("staleness, mean and largest", f"{found.mean_staleness:.2f}, {found.most_stale:.0f} updates"),
    ]


def draw(found: Forecast, calibration: Calibration, console: Console) -> None:
    console.print(Text(_title(calibration), style="bold"))
    table = Table("predicted", "")
    for name, value in summary_rows(found):
        table.add_row(name, value)
    console.print(table)
    for line in timeline(found):
        console.print(line, no_wrap=True, crop=True)


def _title(calibration: Calibration) -> str:
    where = f" on {calibration.machine}" if calibration.machine else ""
    return f"PPO's updates, by speeds that are {calibration.source}{where}"


def draw_choices(best: Choice, tried: list[Choice], devices: int, console: Console) -> None:
    columns = ("actors", "ranks", "max_staleness", "rollouts an update", "update s", "rollouts/s")
    title = Text(f"{devices} devices: the fastest of {len(tried)} that were tried", style="bold")
    table = Table(*columns, *(f"{side}s" for side in SIDES), "staleness", title=title, title_justify="left")
    for choice in [*tried[:MOST_CHOICES], *([best] if best not in tried[:MOST_CHOICES] else [])]:
        found = choice.forecast
        numbers = (choice.actors, choice.ranks, choice.max_staleness, choice.rollouts_per_update)
        table.add_row(
            *map(str, numbers),
            f"{found.step_s:.2f}",
            f"{found.rollouts_per_s:.2f}",
            *(percent(found.busy(side)) for side in SIDES),
            f"{found.mean_staleness:.2f}",
            style="bold green" if choice is best else None,
        )
    console.print(table)
    console.print(Text(f"Take {best.overrides}", style="bold"))
    console.print(
        "(within 3% of the fastest: the least stale, then the smallest update. Whether it fits says the plan of memory.)"
    )


def lanes(found: Forecast) -> Iterator[tuple[Lane, list[tuple[str, float, float]]]]:
    """Those that are drawn, in the order of the sides."""
    for side in SIDES:
        of_side = sorted((lane for lane in found.spans.lanes if lane.side == side), key=lambda lane: lane.number)
        yield from ((lane, found.spans.lanes[lane]) for lane in of_side[: MOST_LANES[side]])


def timeline(found: Forecast) -> list[Text]:
    """The last updates: a line for each process, of which a column shows what filled most of it."""
    first = max(0, len(found.ends) - UPDATES - 1)
    begin_s, end_s = found.ends[first], found.ends[-1]
    width_s = (end_s - begin_s) / COLUMNS
    lines = []
    for lane, spans in lanes(found):
        line = Text(f"{lane!s:<16} ")
        for column in range(COLUMNS):
            a, b = begin_s + column * width_s, begin_s + (column + 1) * width_s
            filled = [(max(0.0, min(b, end) - max(a, start)), kind) for kind, start, end in spans]
            most, kind = max(filled, default=(0.0, ""))
            mark, style = MARKS[kind] if most > 0.25 * width_s else (" ", "")
            line.append(mark, style)
        lines.append(line)
    ticks = [" "] * COLUMNS
    for end in found.ends[first:-1]:
        ticks[min(COLUMNS - 1, int((end - begin_s) / width_s))] = "|"
    lines.append(Text(f"{'updates begin':<16} {''.join(ticks)} {duration(end_s - begin_s)}"))
    lines.append(Text("   ".join(f"{mark} {kind}" for kind, (mark, _) in MARKS.items()), style="dim"))
    hidden = sum(len([x for x in found.spans.lanes if x.side == side]) > MOST_LANES[side] for side in SIDES)
    return [*lines, Text("(the first of each kind)", style="dim")] if hidden else lines


def write_page(found: Forecast, calibration: Calibration, file: Path) -> None:
    """The same as HTML, with the timeline of all updates that count."""
    begin_s = found.ends[FILLING - 1]
    phases: list[dict[str, Any]] = [
        {"stage": str(lane), "phase": kind, "start_s": max(start, begin_s), "end_s": end}
        for lane, spans in lanes(found)
        for kind, start, end in spans
        if end > begin_s
    ]
    rows = [
        element("tr", "", element("td", "", name), element("td", "num", value)) for name, value in summary_rows(found)
    ]
    table = element("section", "", element("h2", "", "Predicted"), element("table", "", *rows), id="predicted")
    sections: list[Markup] = [table, time_spent(Run(file, phases=phases))]
    contents = links("predicted", "time")
    source = "simulation's schedule"
    replace_text(
        file, PAGE.page("Tandem plan", "A run in time", _title(calibration), contents, sections, source=source)
    )


def as_dict(found: Forecast) -> dict[str, Any]:
    return {
        "step_s": found.step_s,
        "rollouts_per_s": found.rollouts_per_s,
        "busy": {side: found.busy(side) for side in SIDES} | {"controller": found.driver_busy},
        "staleness_mean": found.mean_staleness,
        "staleness_max": found.most_stale,
        "steps_s": found.steps,
    }
