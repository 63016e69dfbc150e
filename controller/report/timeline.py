"""Where the time of a run went: its phases on one axis, and the parts of a PPO update."""

from controller.record.number_text import duration, percent
from controller.record.reader import Run
from controller.report.rendering import absent, esc, section

UPDATE_PARTS = (
    ("perf/generate_s", "generate"),
    ("perf/score_s", "score"),
    ("perf/train_s", "train"),
    ("perf/drain_s", "wait for the actors"),
    ("perf/sync_s", "send weights"),
)


def time_spent(run: Run) -> str:
    """A lane for every kind of phase, on one time axis."""
    if not run.phases:
        missing = absent("<code>phases.jsonl</code> has no phases yet.")
        return section("time", "Where the time went", missing + _inside_an_update(run))
    lanes: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in sorted(run.phases, key=lambda row: row["start_s"]):
        key = str(row.get("stage", "")), str(row.get("phase", ""))
        lanes.setdefault(key, []).append((row["start_s"], row["end_s"]))
    begin = min(start for spans in lanes.values() for start, _ in spans)
    end = max(stop for spans in lanes.values() for _, stop in spans)
    whole = (end - begin) or 1.0
    rows, groups = [], list(dict.fromkeys(stage for stage, _ in lanes))
    colours = {phase: i % 6 for i, phase in enumerate(dict.fromkeys(phase for _, phase in lanes))}
    for stage in groups:
        rows.append(f'<h4 class="stage">{esc(stage)}</h4>')
        for (name, phase), spans in lanes.items():
            if name == stage:
                rows.append(_lane(phase, spans, begin, whole, colours[phase]))
    marks = "".join(
        f'<span style="left:{100 * mark / whole:.2f}%">{esc(duration(mark) if mark else "0")}</span>'
        for mark in _time_ticks(whole)
    )
    intro = (
        f"{duration(whole)} from the first phase to the last; each lane is one kind of phase. Shares are of the whole time "
        "and add up to less than 100% where nothing was recorded, to more where phases overlap."
    )
    axis = f'<div class="lane axis-row"><span></span><div class="marks">{marks}</div><b>total</b><b>share</b></div>'
    return section(
        "time", "Where the time went", f'<div class="lanes">{"".join(rows)}{axis}</div>{_inside_an_update(run)}', intro
    )


def _inside_an_update(run: Run) -> str:
    """How a mean PPO update divides, from the timers of the metrics."""
    steps = [v for _, v in run.curve("ppo", "perf/step_s") if v is not None]
    parts: list[tuple[str, float]] = []
    for metric, label in UPDATE_PARTS:
        known = [v for _, v in run.curve("ppo", metric) if v is not None]
        if known:
            parts.append((label, sum(known) / len(known)))
    if not steps or not parts:
        return ""
    step = sum(steps) / len(steps)
    rest = step - sum(seconds for _, seconds in parts)
    if rest > 0.005 * step:
        parts.append(("the rest", rest))
    whole = sum(seconds for _, seconds in parts) or 1.0
    pieces, keys, left = [], [], 0.0
    for i, (label, seconds) in enumerate(parts):
        width = 1000 * seconds / whole
        title = f"{label}\n{duration(seconds)}, {percent(seconds / whole)}"
        pieces.append(
            f'<rect class="p{i}" x="{left:.1f}" width="{width:.1f}" height="10"><title>{esc(title)}</title></rect>'
        )
        keys.append(
            f'<span><svg viewBox="0 0 10 10"><rect class="p{i}" width="10" height="10" rx="2"/></svg>{esc(label)} '
            f"<b>{duration(seconds)}</b> <small>{percent(seconds / whole)}</small></span>"
        )
        left += width
    return (
        f'<div class="lanes"><h4 class="stage">An update on average: {duration(step)}</h4><svg class="stack" '
        f'viewBox="0 0 1000 10" preserveAspectRatio="none" role="img" aria-label="parts of an update">{"".join(pieces)}'
        f'</svg><p class="keys">{"".join(keys)}</p></div>'
    )


def _time_ticks(whole: float) -> list[float]:
    step = next((s for s in (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200) if whole / s <= 5), whole / 4)
    return [i * step for i in range(int(whole / step) + 1) if i * step <= 0.97 * whole]


def _lane(phase: str, spans: list[tuple[float, float]], begin: float, whole: float, colour: int) -> str:
    total = sum(end - start for start, end in spans)
    rects = []
    for start, end in _merged(spans, whole):
        left, width = 1000 * (start - begin) / whole, max(1.5, 1000 * (end - start) / whole)
        title = f"{phase}\n{duration(end - start)}, from {duration(start - begin)}"
        rects.append(
            f'<rect class="p{colour}" x="{left:.1f}" width="{width:.1f}" height="10"><title>{esc(title)}</title></rect>'
        )
    times = f" <small>× {len(spans)}</small>" if len(spans) > 1 else ""
    return (
        f'<div class="lane"><span title="{esc(phase)}">{esc(phase)}{times}</span>'
        f'<svg viewBox="0 0 1000 10" preserveAspectRatio="none" role="img" aria-label="{esc(phase)}">'
        f"{''.join(rects)}</svg><b>{duration(total)}</b><b>{percent(total / whole)}</b></div>"
    )


def _merged(spans: list[tuple[float, float]], whole: float) -> list[tuple[float, float]]:
    """Joins neighbours that no screen could show apart, where there are very many."""
    if len(spans) <= 250:
        return spans
    out = [spans[0]]
    for start, end in spans[1:]:
        if start - out[-1][1] < whole / 500:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out
