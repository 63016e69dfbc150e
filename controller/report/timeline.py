"""Where the time of a run went: its phases on one axis, and the parts of a PPO update."""

from statistics import fmean

from markupsafe import Markup

from controller.alarms.alarm import known_values
from controller.record.number_text import duration, percent
from controller.record.reader import Run
from controller.report.curves import RUN
from controller.report.svg import element, joined

UPDATE_PARTS = (
    ("perf/generate_s", "generate"),
    ("perf/score_s", "score"),
    ("perf/train_s", "train"),
    ("perf/drain_s", "wait for the actors"),
    ("perf/sync_s", "send weights"),
)
Span = tuple[float, float]  # start, end in seconds
STEPS = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)  # seconds between marks of the axis


def time_spent(run: Run) -> Markup:
    """A lane for every kind of phase, on one time axis."""
    lanes: dict[str, dict[str, list[Span]]] = {}
    for row in sorted(run.phases, key=lambda row: row["start_s"]):
        stage = lanes.setdefault(str(row.get("stage", "")), {})
        stage.setdefault(str(row.get("phase", "")), []).append((row["start_s"], row["end_s"]))
    begin = min((row["start_s"] for row in run.phases), default=0.0)
    whole = (max((row["end_s"] for row in run.phases), default=0.0) - begin) or 1.0
    names = dict.fromkeys(phase for phases in lanes.values() for phase in phases)
    colours = {phase: f"p{i % 6}" for i, phase in enumerate(names)}

    def lane(phase: str, spans: list[Span]) -> tuple[str, int, float, Markup]:
        took = sum(end - start for start, end in spans)
        return phase, len(spans), took, _lane(phase, spans, begin, whole, colours[phase])

    stages = {stage: [lane(*named) for named in phases.items()] for stage, phases in lanes.items()}
    return RUN.time(stages, whole, _time_ticks(whole), _parts_of_an_update(run))


def _parts_of_an_update(run: Run) -> tuple[float, list[tuple[str, str, float, float]], Markup] | None:
    """How a mean PPO update divides, by the timers of the metrics: its seconds; colour, name, seconds and share of each
    part; and these as bars."""
    steps = known_values(run, "perf/step_s")
    known = [(label, fmean(values)) for metric, label in UPDATE_PARTS if (values := known_values(run, metric))]
    if not steps or not known:
        return None
    step = fmean(steps)
    rest = step - sum(seconds for _, seconds in known)
    if rest > 0.005 * step:
        known.append(("the rest", rest))
    whole = sum(seconds for _, seconds in known) or 1.0
    parts = [(f"p{i}", label, seconds, seconds / whole) for i, (label, seconds) in enumerate(known)]
    bars, left = [], 0.0
    for colour, label, seconds, share in parts:
        bars.append(_bar(colour, left, 1000 * share, f"{label}\n{duration(seconds)}, {percent(share)}"))
        left += 1000 * share
    return step, parts, joined(bars)


def _bar(colour: str, left: float, width: float, tooltip: str) -> Markup:
    return element("rect", colour, element("title", "", tooltip), x=left, width=width, height=10)


def _time_ticks(whole: float) -> list[float]:
    step = next((s for s in STEPS if whole / s <= 5), whole / 4)
    return [i * step for i in range(int(whole / step) + 1) if i * step <= 0.97 * whole]


def _lane(phase: str, spans: list[Span], begin: float, whole: float, colour: str) -> Markup:
    return joined(
        _bar(
            colour,
            1000 * (start - begin) / whole,
            max(1.5, 1000 * (end - start) / whole),
            f"{phase}\n{duration(end - start)}, from {duration(start - begin)}",
        )
        for start, end in _merged(spans, whole)
    )


def _merged(spans: list[Span], whole: float) -> list[Span]:
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
