"""Charts drawn by hand as inline SVG. Colours come from CSS classes and variables, so that they follow light and dark.

There is no script in the page: a tooltip is a `<title>`, a highlight is `:hover`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from controller.record.number_text import bounds, compact
from controller.record.reader import Curve
from controller.report.rendering import esc, macros

WIDTH, HEIGHT = 340.0, 190.0  # of a small multiple, in px at its natural size
LEFT, RIGHT, TOP, BOTTOM = 44.0, 10.0, 24.0, 32.0
MAX_POINTS = 300  # of one line; beyond that only the extremes of each stretch are drawn
MAX_HOVERS = 60
JUDGES = (  # of the frontier's two panels: title, key in evaluation.json, metric
    ("Gold judge", "gold", "reward/gold_mean"),
    ("Learned score (proxy)", "proxy", "reward/score_mean"),
)
FEW = 3  # points that are marked: a line says too little of where they lie
SMOOTH_FROM = 20  # points from which on a moving mean is drawn over the raw line

PARTS = macros("parts.html")
Point = tuple[float, float]


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


# ---- elements


def element(name: str, css: str = "", *inside: Any, **attributes: Any) -> Markup:
    """`<name class="css" ...>inside</name>`. Text in it is escaped, markup is not; fractions have one digit, in attributes
    of which `_` stands for `-`."""
    written = [f' class="{css}"' if css else ""]
    for key, value in attributes.items():
        written.append(f' {key.replace("_", "-")}="{f"{value:.1f}" if isinstance(value, float) else esc(value)}"')
    opened = f"<{name}{''.join(written)}"
    return Markup(f"{opened}>{joined(inside)}</{name}>" if inside else f"{opened}/>")


def joined(parts: Iterable[Any]) -> Markup:
    return Markup("".join(map(esc, parts)))


def text(css: str, x: float, y: float, content: str, anchor: str = "middle") -> Markup:
    return element("text", css, content, x=x, y=y, text_anchor=anchor)


def across(css: str, x1: float, x2: float, y: float) -> Markup:
    return element("line", css, x1=x1, x2=x2, y1=y, y2=y)


def upright(css: str, x: float, y1: float, y2: float) -> Markup:
    return element("line", css, x1=x, x2=x, y1=y1, y2=y2)


def line(css: str, points: Iterable[Point]) -> Markup:
    return element("polyline", css, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points))


def numbered_mark(place: int, tooltip: str, at: Point, *under: Markup) -> Markup:
    """A disc with a number, from 1 on, that stands for a row of a table."""
    x, y = at
    disc = element("circle", "mark", cx=x, cy=y, r=8.5)
    number = text("place", x, y + 3.6, str(place))
    return element("g", colour(place - 1), element("title", "", tooltip), *under, disc, number)


MOST_COLOURS = 8


def colour(place: int) -> str:
    """The class of a row, from 0 on."""
    return f"m{place % MOST_COLOURS}"


# ---- scales


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


def axes(x: Scale, y: Scale, x_label: str, y_label: str, whole_x: bool = False) -> Markup:
    """Grid, tick labels and axis labels."""
    out = []
    marks = ticks(y.low, y.high)
    step = _step(marks)
    for mark in marks:
        out.append(across("grid", x.start, x.end, y(mark)))
        out.append(text("tick", x.start - 6, y(mark) + 3.5, tick_text(mark, step), "end"))
    marks = [mark for mark in ticks(x.low, x.high, 5) if not whole_x or mark == int(mark)]
    step = _step(marks)
    out += [text("tick", x(mark), y.start + 14, tick_text(mark, step)) for mark in marks]
    out.append(across("axis", x.start, x.end, y.start))
    out.append(text("label", x.end, y.start + 27, x_label, "end"))
    if y_label:
        out.append(text("label", 2.0, y.end - 12, y_label, "start"))
    return joined(out)


def _step(marks: Sequence[float]) -> float:
    return (marks[1] - marks[0]) if len(marks) > 1 else 1.0


# ---- curves


def thinned(curve: Curve) -> Curve:
    """At most about `MAX_POINTS`: of each stretch its lowest and its highest, so that no spike is lost."""
    if len(curve) <= MAX_POINTS:
        return curve
    width = math.ceil(2 * len(curve) / MAX_POINTS)
    kept: Curve = []
    for start in range(0, len(curve), width):
        known = [point for point in curve[start : start + width] if point[1] is not None]
        if not known:
            kept.append(curve[start])
            continue
        kept += sorted({min(known, key=lambda p: p[1] or 0.0), max(known, key=lambda p: p[1] or 0.0)})
    return kept


def smoothed(curve: Curve, width: int, narrows: bool = False) -> Curve:
    """Centred moving mean over `width` points. At an end it has one side alone, or none if it `narrows`: then a curve ends
    with the noise of its last point, and begins with its first as it is."""
    out: Curve = []
    for i, (step, value) in enumerate(curve):
        half = min(width // 2, i, len(curve) - 1 - i) if narrows else width // 2
        near = [v for _, v in curve[max(0, i - half) : i + half + 1] if v is not None]
        out.append((step, sum(near) / len(near) if near and value is not None else None))
    return out


def path(curve: Curve, x: Scale, y: Scale, css: str) -> Markup:
    """A line that breaks where a value is missing; a value between two gaps is a dot, and so are few values."""
    stretches: list[list[Point]] = [[]]
    for step, value in curve:
        if value is None:
            stretches.append([])
        else:
            stretches[-1].append((x(step), y(value)))
    out = []
    for stretch in stretches:
        if len(stretch) == 1 or len(curve) <= FEW:
            out += [element("circle", f"dot {css}", cx=px, cy=py, r=2.2) for px, py in stretch]
        if len(stretch) > 1:
            out.append(line(f"line {css}", stretch))
    return joined(out)


def last(curve: Curve) -> float | None:
    return next((value for _, value in reversed(curve) if value is not None), None)


# ---- whole drawings


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    x_label: str = "version",
    limits: Sequence[tuple[float, str]] = (),
    keys: bool = True,
) -> Markup:
    """One small multiple with title, last values (`keys`), axes, limits (dashed, where near the data) and tooltips."""
    series = [s for s in series if any(v is not None for _, v in s.curve)]
    if not series:
        return PARTS.empty_figure(title)
    values = [v for s in series for _, v in s.curve if v is not None]
    steps = sorted({step for s in series for step, _ in s.curve})
    spread = (max(values) - min(values)) or abs(max(values)) or 1.0
    near = [(at, name) for at, name in limits if min(values) - 0.7 * spread <= at <= max(values) + 0.7 * spread]
    aside = 1 if len(steps) == 1 else 0
    x = Scale(steps[0] - aside, steps[-1] + aside, LEFT, WIDTH - RIGHT)
    y = Scale(*padded([*values, *(at for at, _ in near)]), HEIGHT - BOTTOM, TOP)
    body = [axes(x, y, x_label, unit, whole_x=True)]
    for at, name in near:
        body.append(across("limit", x.start, x.end, y(at)))
        body.append(text("limit-text", x.end, y(at) + (-4 if y(at) > TOP + 12 else 11), name, "end"))
    for s in series:
        if len(s.curve) >= SMOOTH_FROM:
            body.append(path(thinned(s.curve), x, y, f"{s.css} raw"))
            body.append(path(thinned(smoothed(s.curve, max(3, len(s.curve) // 10))), x, y, s.css))
        else:
            body.append(path(s.curve, x, y, s.css))
    body.append(_hovers(series, steps, x, y, x_label))
    ends = [(s.css, s.name, last(s.curve)) for s in series]
    label = f"{title}: " + ", ".join(f"{name} {compact(value)}" for _, name, value in ends)
    return PARTS.figure(title, label, f"{WIDTH:.0f}", f"{HEIGHT:.0f}", joined(body), ends if keys else ())


def _hovers(series: Sequence[Series], steps: list[float], x: Scale, y: Scale, x_label: str) -> Markup:
    chosen = steps[:: math.ceil(len(steps) / MAX_HOVERS)]
    width = (x.end - x.start) / max(1, len(chosen))
    values = [(s, dict(s.curve)) for s in series]
    out = []
    for step in chosen:
        known = [(s, value) for s, found in values if (value := found.get(step)) is not None]
        told = [f"{x_label} {step:g}", *(f"{s.name}: {compact(value)}" for s, value in known)]
        dots = [element("circle", s.css, cx=x(step), cy=y(v), r=3) for s, v in known]
        left = min(max(x(step) - width / 2, x.start), x.end - width)
        area = element("rect", x=left, y=y.end, width=width, height=y.start - y.end)
        out.append(element("g", "hover", element("title", "", "\n".join(told)), area, *dots))
    return joined(out)


@dataclass
class Plane:
    """A drawing of scores (upwards) against KL (to the right); its parts are added to `body`."""

    x: Scale
    y: Scale
    width: float
    height: float
    body: list[Markup]

    def at(self, points: Iterable[Point]) -> list[Point]:
        """In pixels."""
        return [(self.x(kl), self.y(value)) for kl, value in points]

    def figure(self, title: str, label: str) -> Markup:
        return PARTS.figure(title, label, f"{self.width:.0f}", f"{self.height:.0f}", joined(self.body))


def plane(
    kls: Sequence[float], scores: Sequence[float], labels: tuple[str, str], size: tuple[float, float] = (480.0, 320.0)
) -> Plane:
    """With room for all of the values. Scores have no natural zero to stop at, as `padded` does."""
    width, height = size
    room = (max(scores) - min(scores)) * 0.1 or 1.0
    x = Scale(*padded([0.0, *kls], 0.06), 48.0, width - 14.0)
    y = Scale(min(scores) - room, max(scores) + room, height - 36.0, 26.0)
    return Plane(x, y, width, height, [axes(x, y, *labels)])


def interval_bar(intervals: Sequence[tuple[object, str]], low: float, high: float, null: float) -> Markup:
    """Means with their intervals, each with a colour class, on a short axis with a mark at `null` (no effect)."""
    x = Scale(low, high, 4.0, 136.0)

    def at(value: float) -> float:
        return min(138.0, max(2.0, x(value)))

    body = [across("axis", 0, 140, 9), upright("null", at(null), 2, 16)]
    for values, css in intervals:
        mean, lower, upper = bounds(values)
        if lower is not None and upper is not None:
            body.append(across(f"whisker {css}", at(lower), at(upper), 9))
        if mean is not None:
            body.append(element("circle", css, cx=at(mean), cy=9, r=3.6))
    return element("svg", "bar", *body, viewBox="0 0 140 18", aria_hidden="true")


def shared_range(rows: Sequence[object], null: float) -> tuple[float, float]:
    """A range around `null` that holds all the intervals of a table, so that rows can be compared by eye."""
    reach = max((abs(v - null) for row in rows for v in bounds(row) if v is not None), default=1.0) or 1.0
    return null - reach * 1.08, null + reach * 1.08
