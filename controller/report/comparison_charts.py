"""The charts that compare runs: the frontier of all, parallel coordinates, and their curves over each other."""

import math
from collections.abc import Sequence
from typing import Any

from controller.record.number_text import bounds, compact
from controller.record.reader import number
from controller.report import svg
from controller.report.curves import room
from controller.report.members import Member
from controller.report.rendering import absent, esc, section
from controller.report.svg import Scale, Series, line_chart

TRAIL = 7  # versions in the moving mean of a trail; single ones make a knot of several members
MOST_LINES = 8  # members whose curves are drawn: the best; more cannot be told apart
CURVES = (
    ("Gold score", "score", "reward/gold_mean"),
    ("Learned score", "score", "reward/score_mean"),
    ("KL from reference", "nats a sequence", "kl/ref_seq"),
    ("Length", "tokens", "completion/len_mean"),
    ("Ends with EOS", "share of completions", "completion/eos_frac"),
    ("Entropy", "nats a token", "policy/entropy"),
)
Axis = tuple[str, list[float | None], list[tuple[float, str]]]  # title, place of each member in [0, 1], tick marks


def colour(place: int) -> str:
    return f"m{place % MOST_LINES}"


def frontier(members: Sequence[Member]) -> str:
    panels = [
        _frontier_panel(members, "Gold judge", "gold", "reward/gold_mean"),
        _frontier_panel(members, "Learned score (proxy)", "proxy", "reward/score_mean"),
    ]
    drawn = "".join(panels)
    if not drawn:
        return section("frontier", "Frontier", absent("No member has a KL and a score yet."))
    intro = (
        "How much each member gained for how much drift. Lines: rollouts in training, a moving mean over versions. Numbered "
        "marks: the held-out evaluation, by the place in the table. The frontier is the upper left edge of the marks; "
        "dashed: members that no other beats in both."
    )
    return section("frontier", "Frontier: score against KL", f'<div class="pair">{drawn}</div>', intro)


def _frontier_panel(members: Sequence[Member], title: str, measure: str, metric: str) -> str:
    trails: list[tuple[int, list[tuple[float, float]]]] = []
    marks: list[tuple[int, float, float]] = []
    for place, member in enumerate(members):
        kl, score = (svg.smoothed(member.run.curve("ppo", name), TRAIL) for name in ("kl/ref_seq", metric))
        at_step = dict(kl)
        points = [(at_step.get(step), value) for step, value in score]
        trails.append((place, [(x, y) for x, y in points if x is not None and y is not None]))
        at, value = bounds(member.evaluated("kl"))[0], bounds(member.evaluated(measure))[0]
        if at is not None and value is not None:
            marks.append((place, at, value))
    xs = [x for _, trail in trails for x, _ in trail] + [x for _, x, _ in marks]
    ys = [y for _, trail in trails for _, y in trail] + [y for _, _, y in marks]
    if not xs:
        return ""
    width, height = 480.0, 320.0
    x = Scale(*svg.padded([0.0, *xs], 0.06), 48.0, width - 14.0)
    y = Scale(*room(ys), height - 36.0, 26.0)
    body = [svg.axes(x, y, "KL from the reference, nats a sequence", "score")]
    for place, trail in trails[:MOST_LINES]:
        line = " ".join(f"{x(kx):.1f},{y(v):.1f}" for kx, v in trail)
        body.append(f'<polyline class="line thin {colour(place)}" points="{line}"/>')
    edge = unbeaten([(at, value) for _, at, value in marks])
    if len(edge) > 1:
        line = " ".join(f"{x(kx):.1f},{y(v):.1f}" for kx, v in edge)
        body.append(f'<polyline class="edge" points="{line}"/>')
    for place, at, value in marks:
        text = f"{members[place].label}\nKL {compact(at)} nats\n{title.lower()} {compact(value)}"
        body.append(
            f'<g class="{colour(place)}"><title>{esc(text)}</title><circle class="mark" cx="{x(at):.1f}" '
            f'cy="{y(value):.1f}" r="8.5"/><text class="place" x="{x(at):.1f}" y="{y(value) + 3.6:.1f}" '
            f'text-anchor="middle">{place + 1}</text></g>'
        )
    return (
        f'<figure class="chart wide"><figcaption><b>{esc(title)}</b></figcaption><svg viewBox="0 0 {width:.0f} '
        f'{height:.0f}" role="img" aria-label="{esc(title)} against KL, all members">{"".join(body)}</svg></figure>'
    )


def unbeaten(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (KL, score) the points that no other beats: none has at most the KL and a higher score. Sorted by KL."""
    kept: list[tuple[float, float]] = []
    for kl, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or score > kept[-1][1]:
            kept.append((kl, score))
    return kept


def parallel(members: Sequence[Member]) -> str:
    """One vertical axis for each key that differs and for what came of it, one line a member."""
    known = [member for member in members if member.settings or member.objective is not None]
    axes = [_axis(key, [member.settings.get(key) for member in known]) for key in _keys(known)]
    for title, values in (
        ("KL", [bounds(member.evaluated("kl"))[0] for member in known]),
        ("gold gain", [bounds(member.comparison("gold_gain"))[0] for member in known]),
        ("objective", [member.objective for member in known]),
    ):
        if any(value is not None for value in values):
            axes.append(_axis(title, values))
    if len(axes) < 2 or len(known) < 2:
        return section(
            "parallel", "Parallel coordinates", absent("Needs two members that differ and have been evaluated.")
        )
    left, right, top, bottom = 54.0, 54.0, 34.0, 236.0
    width = max(480.0, left + right + 132.0 * (len(axes) - 1))
    at = [left + i * (width - left - right) / (len(axes) - 1) for i in range(len(axes))]
    scale = Scale(0.0, 1.0, bottom, top)
    body = []
    order = sorted(range(len(known)), key=lambda i: -i)  # the best is drawn last, over the others
    places = {id(member): place for place, member in enumerate(members)}
    for i in order:
        place = places[id(known[i])]
        points = [
            (x, scale(share)) for x, (_, shares, _) in zip(at, axes, strict=True) if (share := shares[i]) is not None
        ]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        css = f"line {colour(place)}" + (" first" if place == 0 else "")
        body.append(
            f'<g class="thread"><title>{esc(known[i].label)}</title><polyline class="{css}" points="{line}"/></g>'
        )
    for x, (title, _, marks) in zip(at, axes, strict=True):
        body.append(f'<line class="axis strong" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        body.append(f'<text class="label" x="{x:.1f}" y="{top - 14}" text-anchor="middle">{esc(title)}</text>')
        for share, text in marks:
            body.append(
                f'<text class="tick halo" x="{x - 5:.1f}" y="{scale(share) + 3.5:.1f}" text-anchor="end">{esc(text)}</text>'
            )
    intro = (
        "From left to right: what was set, and what came of it. Hover a line for its member; the thick one is the best."
    )
    return section(
        "parallel",
        "Parallel coordinates",
        f'<figure class="chart wide"><div class="scroll"><svg class="parallel" style="min-width:{width * 0.9:.0f}px" '
        f'viewBox="0 0 {width:.0f} 256" role="img" aria-label="parallel coordinates of the members">{"".join(body)}'
        "</svg></div></figure>",
        intro,
    )


def _keys(members: Sequence[Member]) -> list[str]:
    return sorted({key for member in members for key in member.settings})


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


def curves(members: Sequence[Member]) -> str:
    shown = [(place, member) for place, member in enumerate(members) if member.run.curve("ppo", "kl/ref_seq")][
        :MOST_LINES
    ]
    if not shown:
        return section("curves", "Curves", absent("No member has PPO metrics yet."))
    keys = "".join(
        f'<span><i class="swatch {colour(place)}"></i>{place + 1} {esc(m.name)}</span>' for place, m in shown
    )
    charts = []
    for title, unit, metric in CURVES:
        series = [Series(f"{place + 1}", colour(place), member.run.curve("ppo", metric)) for place, member in shown]
        if any(s.curve for s in series):
            charts.append(line_chart(title, series, unit=unit, keys=False))
    intro = "One line a member, by its place in the table."
    if len(members) > MOST_LINES:
        intro += f" The best {MOST_LINES} of {len(members)}."
    return section("curves", "Curves", f'<p class="keys">{keys}</p><div class="charts">{"".join(charts)}</div>', intro)
