"""Charts drawn by hand as inline SVG. Colours come from CSS classes and variables, so that they follow light and dark.

There is no script in the page: a tooltip is a `<title>`, a highlight is `:hover`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from controller.record.number_text import bounds, compact
from controller.record.reader import Curve, number
from controller.report.rendering import esc

WIDTH, HEIGHT = 340.0, 190.0  # of a small multiple, in px at its natural size
LEFT, RIGHT, TOP, BOTTOM = 44.0, 10.0, 24.0, 32.0
MAX_POINTS = 300  # of one line; beyond that only the extremes of each stretch are drawn
MAX_HOVERS = 60
FEW = 3  # points that are marked: a line says too little of where they lie
SMOOTH_FROM = 20  # points from which on a moving mean is drawn over the raw line


@dataclass
class Series:
    name: str
    css: str  # class that sets the colour: proxy, gold, base, sft, ppo, plain
    curve: Curve


@dataclass
class Scale:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / ((self.high - self.low) or 1.0) * (self.end - self.start)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float, step: float) -> str:
    if value == 0 and step < 1e-4:
        return "0"
    if value and (abs(value) >= 1e5 or step < 1e-4):
        return f"{value:.1e}".replace(".0e", "e").replace("-", "−").replace("e−0", "e−").replace("e+0", "e")
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 2
    return f"{value:,.{digits}f}".replace("-", "−")


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """A range with some room around the values."""
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * 0.1 or 1.0
    # A quantity that is never negative does not get an axis that suggests it could be.
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def axes(x: Scale, y: Scale, x_label: str, y_label: str, whole_x: bool = False) -> str:
    """Grid, tick labels and axis labels."""
    out = []
    marks = ticks(y.low, y.high)
    for mark in marks:
        at, step = y(mark), (marks[1] - marks[0]) if len(marks) > 1 else 1.0
        out.append(f'<line class="grid" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        out.append(
            f'<text class="tick" x="{x.start - 6:.1f}" y="{at + 3.5:.1f}" text-anchor="end">{tick_text(mark, step)}</text>'
        )
    marks = [mark for mark in ticks(x.low, x.high, 5) if not whole_x or mark == int(mark)]
    for mark in marks:
        step = (marks[1] - marks[0]) if len(marks) > 1 else 1.0
        out.append(
            f'<text class="tick" x="{x(mark):.1f}" y="{y.start + 14:.1f}" text-anchor="middle">'
            f"{tick_text(mark, step)}</text>"
        )
    out.append(f'<line class="axis" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{y.start:.1f}" y2="{y.start:.1f}"/>')
    out.append(f'<text class="label" x="{x.end:.1f}" y="{y.start + 27:.1f}" text-anchor="end">{esc(x_label)}</text>')
    if y_label:
        out.append(f'<text class="label" x="2" y="{y.end - 12:.1f}">{esc(y_label)}</text>')
    return "".join(out)


def thinned(curve: Curve, limit: int = MAX_POINTS) -> Curve:
    """At most about `limit` points: of each stretch its lowest and its highest, so that no spike is lost."""
    if len(curve) <= limit:
        return curve
    width = math.ceil(2 * len(curve) / limit)
    kept: Curve = []
    for start in range(0, len(curve), width):
        known = [point for point in curve[start : start + width] if point[1] is not None]
        if not known:
            kept.append(curve[start])
            continue
        kept += sorted({min(known, key=lambda p: p[1] or 0.0), max(known, key=lambda p: p[1] or 0.0)})
    return kept


def smoothed(curve: Curve, width: int) -> Curve:
    """Centred moving mean over `width` points. At an end it has one side alone: a mean that narrowed to the last point would
    let every curve end with that point's noise."""
    out: Curve = []
    half = width // 2
    for i, (step, value) in enumerate(curve):
        near = [v for _, v in curve[max(0, i - half) : i + half + 1] if v is not None]
        out.append((step, sum(near) / len(near) if near and value is not None else None))
    return out


def path(curve: Curve, x: Scale, y: Scale, css: str) -> str:
    """A line that breaks where a value is missing; a value between two gaps is a dot, and so are few values."""
    parts: list[tuple[float, float]] = []
    runs: list[list[tuple[float, float]]] = []
    for step, value in curve:
        if value is None:
            runs.append(parts)
            parts = []
        else:
            parts.append((x(step), y(value)))
    runs.append(parts)
    out = []
    for run in runs:
        if len(run) == 1:
            out.append(f'<circle class="dot {css}" cx="{run[0][0]:.1f}" cy="{run[0][1]:.1f}" r="2.2"/>')
        elif run:
            if len(curve) <= FEW:
                out += [f'<circle class="dot {css}" cx="{px:.1f}" cy="{py:.1f}" r="2.2"/>' for px, py in run]
            points = " ".join(f"{px:.1f},{py:.1f}" for px, py in run)
            out.append(f'<polyline class="line {css}" points="{points}"/>')
    return "".join(out)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    x_label: str = "version",
    limits: Sequence[tuple[float, str]] = (),
    keys: bool = True,
) -> str:
    """One small multiple with title, last values (`keys`), axes, limits (dashed, where near the data) and tooltips."""
    series = [s for s in series if any(v is not None for _, v in s.curve)]
    if not series:
        return (
            f'<figure class="chart empty"><figcaption><b>{esc(title)}</b></figcaption><p>not in this run</p></figure>'
        )
    values = [v for s in series for _, v in s.curve if v is not None]
    steps = sorted({step for s in series for step, _ in s.curve})
    spread = (max(values) - min(values)) or abs(max(values)) or 1.0
    near = [(at, text) for at, text in limits if min(values) - 0.7 * spread <= at <= max(values) + 0.7 * spread]
    low, high = padded([*values, *(at for at, _ in near)])
    x = Scale(steps[0], steps[-1], LEFT, WIDTH - RIGHT)
    if len(steps) == 1:
        x = Scale(steps[0] - 1, steps[0] + 1, LEFT, WIDTH - RIGHT)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP)
    body = [axes(x, y, x_label, unit, whole_x=True)]
    for at, text in near:
        body.append(f'<line class="limit" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{y(at):.1f}" y2="{y(at):.1f}"/>')
        above = y(at) > TOP + 12
        body.append(
            f'<text class="limit-text" x="{x.end:.1f}" y="{y(at) + (-4 if above else 11):.1f}" text-anchor="end">'
            f"{esc(text)}</text>"
        )
    for s in series:
        if len(s.curve) >= SMOOTH_FROM:
            body.append(path(thinned(s.curve), x, y, f"{s.css} raw"))
            body.append(path(thinned(smoothed(s.curve, max(3, len(s.curve) // 10))), x, y, s.css))
        else:
            body.append(path(s.curve, x, y, s.css))
    body.append(_hovers(series, steps, x, y, x_label))
    label = f"{title}: " + ", ".join(f"{s.name} {compact(last(s.curve))}" for s in series)
    return (
        f'<figure class="chart">{_caption(title, series if keys else ())}<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" '
        f'role="img" aria-label="{esc(label)}">{"".join(body)}</svg></figure>'
    )


def last(curve: Curve) -> float | None:
    return next((value for _, value in reversed(curve) if value is not None), None)


def _caption(title: str, series: Sequence[Series]) -> str:
    if not series:
        shown = ""
    elif len(series) == 1:
        shown = f'<span class="last">{compact(last(series[0].curve))}</span>'
    else:
        shown = "".join(
            f'<span class="key"><i class="swatch {s.css}"></i>{esc(s.name)} '
            f'<span class="last">{compact(last(s.curve))}</span></span>'
            for s in series
        )
    return f'<figcaption><b>{esc(title)}</b><span class="values">{shown}</span></figcaption>'


def _hovers(series: Sequence[Series], steps: list[float], x: Scale, y: Scale, x_label: str) -> str:
    chosen = steps[:: math.ceil(len(steps) / MAX_HOVERS)]
    width = (x.end - x.start) / max(1, len(chosen))
    values = [(s, dict(s.curve)) for s in series]
    out = []
    for step in chosen:
        known = [(s, value) for s, found in values if (value := found.get(step)) is not None]
        text = f"{x_label} {step:g}\n" + "\n".join(f"{s.name}: {compact(value)}" for s, value in known)
        dots = "".join(f'<circle class="{s.css}" cx="{x(step):.1f}" cy="{y(v):.1f}" r="3"/>' for s, v in known)
        left = min(max(x(step) - width / 2, x.start), x.end - width)
        out.append(
            f'<g class="hover"><title>{esc(text)}</title><rect x="{left:.1f}" y="{y.end:.1f}" width="{width:.1f}" '
            f'height="{y.start - y.end:.1f}"/>{dots}</g>'
        )
    return "".join(out)


def interval_bar(intervals: Sequence[tuple[object, str]], low: float, high: float, null: float) -> str:
    """Means with their intervals, each with a colour class, on a short axis with a mark at `null` (no effect)."""
    x = Scale(low, high, 4.0, 136.0)

    def at(value: float) -> float:
        return min(138.0, max(2.0, x(value)))

    body = '<line class="axis" x1="0" x2="140" y1="9" y2="9"/>'
    body += f'<line class="null" x1="{at(null):.1f}" x2="{at(null):.1f}" y1="2" y2="16"/>'
    for values, css in intervals:
        mean, lower, upper = bounds(values)
        if lower is not None and upper is not None:
            body += f'<line class="whisker {css}" x1="{at(lower):.1f}" x2="{at(upper):.1f}" y1="9" y2="9"/>'
        if mean is not None:
            body += f'<circle class="{css}" cx="{at(mean):.1f}" cy="9" r="3.6"/>'
    return f'<svg class="bar" viewBox="0 0 140 18" aria-hidden="true">{body}</svg>'


def shared_range(rows: Sequence[object], null: float) -> tuple[float, float]:
    """A range around `null` that holds all the intervals of a table, so that rows can be compared by eye."""
    known = [v for row in rows for v in bounds(row) if number(v) is not None]
    reach = max((abs(v - null) for v in known if v is not None), default=1.0) or 1.0
    return null - reach * 1.08, null + reach * 1.08
