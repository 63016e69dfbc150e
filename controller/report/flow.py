"""How rollouts flowed: how old they were when they trained, what became of each, and which faults were tolerated."""

from contracts.catalogue import catalogue
from contracts.metrics import declared
from controller.record.number_text import count, num
from controller.record.reader import Run, number
from controller.record.run_log import TRACKER_FAULTS
from controller.report.curves import Chart, described
from controller.report.markup import esc, section, table
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
FATES = ("admitted", "trained", "quarantined", "released", "fenced", "open")
FAULTS = ("fault/actors_lost", "fault/actors_without_update", "fault/unscored", "fault/no_sibling")


def rollouts(run: Run) -> str:
    """Nothing for a run without a ledger; curves only where something can be stale."""
    last = next((row for row in reversed(run.metrics) if "ledger/admitted" in row), None)
    if last is None:
        return ""
    rows = [
        [name, _meaning(f"ledger/{name}"), num(last[f"ledger/{name}"], 0)]
        for name in FATES
        if number(last.get(f"ledger/{name}")) is not None
    ]
    body = table(("Rollouts", "", ""), rows, "short", text_columns=2) + _faults(run)
    if number(run.setting("ppo.max_staleness")) or any(v for _, v in run.curve("ppo", "staleness/max")):
        charts = [
            line_chart(title, [Series(name, css, run.curve("ppo", metric)) for name, css, metric in lines], unit=unit)
            for title, unit, lines in (described(chart, catalogue()) for chart in CHARTS)
        ]
        body = f'<div class="charts">{"".join(charts)}</div>{body}'
        bound = number(run.setting("ppo.max_staleness"))
        intro = f"Actors and learner worked at the same time, at most {count(int(bound or 0), 'update')} apart."
    else:
        intro = "Actors and learner took turns, so every rollout trained at the version that sampled it."
    return section("rollouts", "Rollouts: how fresh, and what became of them", body, intro)


def _faults(run: Run) -> str:
    """Totals: counters of a step are summed, those that count from the start are taken at their end."""
    names, cumulative, totals = dict.fromkeys(FAULTS), {"fault/actors_lost"}, dict[str, float]()
    for row in run.metrics:
        if row["stage"] == TRACKER_FAULTS:
            of_trackers = [name for name in row if name.startswith("fault/")]
            names |= dict.fromkeys(of_trackers)
            cumulative.update(of_trackers)
        for name in names:
            value = number(row.get(name))
            if value:
                totals[name] = (
                    max(totals.get(name, 0.0), value) if name in cumulative else totals.get(name, 0.0) + value
                )
    if not totals:
        return '<p class="quiet">✓ No fault was met.</p>'
    rows = [[_meaning(name), f"<code>{esc(name)}</code>", num(value, 0)] for name, value in totals.items()]
    return table(("Faults that were tolerated", "", ""), rows, "short", text_columns=2)


def _meaning(name: str) -> str:
    metric = declared(name, catalogue())
    text = metric.meaning if metric else ""
    return esc(text[:1].lower() + text[1:].removesuffix("."))
