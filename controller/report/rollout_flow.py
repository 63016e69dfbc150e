"""How rollouts flowed: how old they were when they trained, what became of each, and which faults were tolerated."""

from markupsafe import Markup

from contracts.catalogue import catalogue
from contracts.metrics import declared
from controller.record.number_text import number
from controller.record.reader import Run
from controller.record.run_log import TRACKER_FAULTS
from controller.report.curves import RUN, Chart, described
from controller.report.svg import Series, line_chart

CHARTS: tuple[Chart, ...] = (
    ("Staleness", (("mean", "plain", "staleness/mean"), ("max", "soft", "staleness/max"))),
    "off_policy/ess",
    ("Rollouts under way", (("sampled", "plain", "ledger/in_flight"), ("waiting", "soft", "ledger/waiting"))),
    (
        "Step and its waits",
        (("step", "plain", "perf/step_s"), ("rollouts", "proxy", "perf/rollout_s"), ("weights", "gold", "perf/sync_s")),
    ),
)
FATES = ("admitted", "trained", "quarantined", "filtered", "released", "fenced", "open")
OF_A_STEP = ("fault/actors_without_update", "fault/unscored", "fault/no_sibling")  # the others count from some start on


def rollouts(run: Run) -> Markup | str:
    """Nothing for a run without a ledger; curves only where something can be stale."""
    last = next((row for row in reversed(run.metrics) if "ledger/admitted" in row), None)
    if last is None:
        return ""
    counts = {name: number(last.get(f"ledger/{name}")) for name in FATES}
    fates = [(name, _meaning(f"ledger/{name}"), count) for name, count in counts.items() if count is not None]
    bound, charts = number(run.setting("ppo.max_staleness")), []
    if bound or any(v for _, v in run.curve("ppo", "staleness/max")):
        for title, unit, lines in (described(chart, catalogue()) for chart in CHARTS):
            series = [Series(name, css, run.curve("ppo", metric)) for name, css, metric in lines]
            charts.append(line_chart(title, series, unit=unit))
    return RUN.rollouts(charts, int(bound or 0), fates, [(name, _meaning(name), n) for name, n in _faults(run).items()])


def _faults(run: Run) -> dict[str, float]:
    """Totals of every fault that was met. What counts from the start of a driver begins anew with the next one; of trackers
    each line is one fault, since drivers that meet equally many could not be told apart by their counts."""
    totals, last = dict[str, float](), dict[str, float]()
    for row in run.metrics:
        for name in row:
            value = number(row[name]) if name.startswith("fault/") else None
            if value is None:
                continue
            if row.get("stage") == TRACKER_FAULTS:
                totals[name] = totals.get(name, 0.0) + 1
                continue
            before = last.get(name, 0.0) if name not in OF_A_STEP else 0.0
            totals[name] = totals.get(name, 0.0) + (value - before if value >= before else value)
            last[name] = value
    return {name: total for name, total in totals.items() if total}


def _meaning(name: str) -> str:
    metric = declared(name, catalogue())
    text = metric.meaning if metric else ""
    return text[:1].lower() + text[1:].removesuffix(".")
