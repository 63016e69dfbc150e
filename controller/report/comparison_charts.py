"""The charts that compare runs: the frontier of all, parallel coordinates, and their curves over each other."""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from contracts.catalogue import catalogue
from controller.record.number_text import bounds, compact, number
from controller.report import svg
from controller.report.members import Member, settings_that_differ
from controller.report.rendering import macros
from controller.report.svg import JUDGES, Scale, Series, colour, element, joined, line, line_chart, text, upright

COMPARISON = macros("comparison.html")
TRAIL = 7  # versions in the moving mean of a trail; single ones make a knot of several members
MOST_LINES = svg.MOST_COLOURS  # members whose curves are drawn: the best; more cannot be told apart
CURVES = (
    "reward/gold_mean", "reward/score_mean", "kl/ref_seq", "completion/len_mean", "completion/eos_frac", "policy/entropy",
)  # fmt: skip
Axis = tuple[str, list[float | None], list[tuple[float, str]]]  # title, place of each member in [0, 1], tick marks


def frontier(members: Sequence[Member]) -> Markup:
    panels = [panel for judge in JUDGES if (panel := _frontier_panel(members, *judge))]
    return COMPARISON.frontier(panels)


def _frontier_panel(members: Sequence[Member], title: str, measure: str, metric: str) -> Markup | None:
    trails: list[list[svg.Point]] = []
    marks: list[tuple[int, svg.Point]] = []
    for place, member in enumerate(members):
        kl, score = (svg.smoothed(member.run.curve("ppo", name), TRAIL) for name in ("kl/ref_seq", metric))
        at_step = dict(kl)
        points = [(at_step.get(step), value) for step, value in score]
        trails.append([(x, y) for x, y in points if x is not None and y is not None])
        at, value = bounds(member.evaluated("kl"))[0], bounds(member.evaluated(measure))[0]
        if at is not None and value is not None:
            marks.append((place, (at, value)))
    known = [point for trail in trails for point in trail] + [point for _, point in marks]
    if not known:
        return None
    plane = svg.plane([x for x, _ in known], [y for _, y in known], ("KL from the reference, nats a sequence", "score"))
    plane.body += [line(f"line thin {colour(i)}", plane.at(trail)) for i, trail in enumerate(trails[:MOST_LINES])]
    edge = unbeaten([point for _, point in marks])
    if len(edge) > 1:
        plane.body.append(line("edge", plane.at(edge)))
    for (place, (at, value)), spot in zip(marks, plane.at(point for _, point in marks), strict=True):
        tooltip = f"{members[place].label}\nKL {compact(at)} nats\n{title.lower()} {compact(value)}"
        plane.body.append(svg.numbered_mark(place + 1, tooltip, spot))
    return plane.figure(title, f"{title} against KL, all members")


def unbeaten(points: Sequence[svg.Point]) -> list[svg.Point]:
    """Of (KL, score) the points that no other beats: none has at most the KL and a higher score. Sorted by KL."""
    kept: list[svg.Point] = []
    for kl, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or score > kept[-1][1]:
            kept.append((kl, score))
    return kept


def parallel(members: Sequence[Member]) -> Markup:
    """One vertical axis for each key that differs and for what came of it, one line a member."""
    known = [(place, m) for place, m in enumerate(members) if m.settings or m.objective is not None]
    axes = [_axis(key, [m.settings.get(key) for _, m in known]) for key in settings_that_differ(m for _, m in known)]
    results: dict[str, list[float | None]] = {
        "KL": [bounds(m.evaluated("kl"))[0] for _, m in known],
        "gold gain": [bounds(m.comparison("gold_gain"))[0] for _, m in known],
        "objective": [m.objective for _, m in known],
    }
    axes += [_axis(title, values) for title, values in results.items() if set(values) != {None}]
    if len(axes) < 2 or len(known) < 2:
        return COMPARISON.parallel(None, 0, 0)
    side, top, bottom = 54.0, 34.0, 236.0
    width = max(480.0, 2 * side + 132.0 * (len(axes) - 1))
    at = [side + i * (width - 2 * side) / (len(axes) - 1) for i in range(len(axes))]
    scale = Scale(0.0, 1.0, bottom, top)
    body = []
    for i, (place, member) in reversed(list(enumerate(known))):  # the best is drawn last, over the others
        places = [(x, shares[i]) for x, (_, shares, _) in zip(at, axes, strict=True)]
        points = [(x, scale(share)) for x, share in places if share is not None]
        css = f"line {colour(place)}" + (" first" if place == 0 else "")
        body.append(element("g", "thread", element("title", "", member.label), line(css, points)))
    for x, (title, _, marks) in zip(at, axes, strict=True):
        body.append(upright("axis strong", x, top, bottom))
        body.append(text("label", x, top - 14, title))
        body += [text("tick halo", x - 5, scale(share) + 3.5, name, "end") for share, name in marks]
    return COMPARISON.parallel(joined(body), f"{width:.0f}", f"{width * 0.9:.0f}")


def _axis(title: str, values: Sequence[Any]) -> Axis:
    """Numbers on a linear axis, on a logarithmic one where they span a factor of 20; anything else side by side."""
    numbers = [number(value) for value in values]
    there = [value for value in values if value is not None]
    known = [value for value in numbers if value is not None]
    short = title.split(".", 1)[-1] if title.count(".") > 1 else title
    if there and len(known) == len(there):
        log = min(known) > 0 and max(known) / min(known) >= 20
        move = math.log10 if log else float
        low, high = move(min(known)), move(max(known))
        span = (high - low) or 1.0
        shares = [None if value is None else (move(value) - low) / span for value in numbers]
        distinct = sorted(set(known))
        shown = distinct if len(distinct) <= 6 else [distinct[0], distinct[-1]]
        marks = [((move(value) - low) / span, compact(value) if value % 1 else f"{value:.0f}") for value in shown]
        return short + (" (log)" if log else ""), shares, marks
    names = sorted({str(value) for value in values})
    step = {name: i / max(1, len(names) - 1) for i, name in enumerate(names)}
    return short, [step[str(value)] for value in values], [(share, name[:14]) for name, share in step.items()]


def curves(members: Sequence[Member]) -> Markup:
    drawn = [(place, m) for place, m in enumerate(members) if m.run.curve("ppo", "kl/ref_seq")][:MOST_LINES]
    charts = []
    for metric in CURVES:
        series = [Series(f"{place + 1}", colour(place), m.run.curve("ppo", metric)) for place, m in drawn]
        if any(s.curve for s in series):
            declaration = catalogue()[metric]
            charts.append(line_chart(declaration.title, series, unit=declaration.unit, keys=False))
    keys = [(colour(place), place + 1, m.name) for place, m in drawn]
    return COMPARISON.curves(keys, charts, MOST_LINES, len(members))
