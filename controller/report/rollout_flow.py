"""How rollouts flowed: how old they were when they trained, what became of each, and which faults were tolerated."""

from markupsafe import Markup

from controller.record.number_text import number
from controller.record.reader import Run
from controller.report.curves import RUN, Chart
from controller.report.svg import Series, line_chart

CHARTS: tuple[Chart, ...] = (
    (
        "Staleness", "updates between sampling and training",
        (("mean", "plain", "staleness/mean"), ("max", "soft", "staleness/max")),
    ),
    ("Effective sample size", "share of tokens", (("share", "plain", "off_policy/ess"),)),
    (
        "Rollouts under way", "rollouts",
        (("sampled", "plain", "ledger/in_flight"), ("waiting", "soft", "ledger/waiting")),
    ),
    (
        "Step and its waits", "s",
        (("step", "plain", "perf/step_s"), ("rollouts", "proxy", "perf/rollout_s"), ("weights", "gold", "perf/sync_s")),
    ),
)  # fmt: skip
FATES = (
    ("admitted", "handed out by the ledger"),
    ("trained", "went into exactly one update"),
    ("quarantined", "set aside with its reason: no score, no sibling, too old"),
    ("released", "sampled again after an actor was lost"),
    ("fenced", "arrived from an actor that had been given up, and refused"),
    ("open", "not finished at the last line of the log"),
)
FAULTS = {
    "fault/actors_lost": "actors lost and replaced",
    "fault/actors_without_update": "actors that new weights did not reach",
    "fault/unscored": "rollouts without a score",
    "fault/no_sibling": "rollouts without a scored sibling",
    "fault/wandb": "faults of wandb",
}
FROM_THE_START = ("fault/actors_lost", "fault/wandb")  # their last value is the total; the others count one step each


def rollouts(run: Run) -> Markup | str:
    """Nothing for a run without a ledger; curves only where something can be stale."""
    last = next((row for row in reversed(run.metrics) if "ledger/admitted" in row), None)
    if last is None:
        return ""
    fates = [(name, text, known) for name, text in FATES if (known := number(last.get(f"ledger/{name}"))) is not None]
    bound, charts = number(run.setting("ppo.max_staleness")), []
    if bound or any(v for _, v in run.curve("ppo", "staleness/max")):
        for title, unit, lines in CHARTS:
            series = [Series(name, css, run.curve("ppo", metric)) for name, css, metric in lines]
            charts.append(line_chart(title, series, unit=unit))
    return RUN.rollouts(charts, int(bound or 0), fates, [(name, FAULTS[name], n) for name, n in _faults(run).items()])


def _faults(run: Run) -> dict[str, float]:
    """Totals of the run."""
    totals: dict[str, float] = {}
    for row in run.metrics:
        for name in FAULTS:
            if value := number(row.get(name)):
                before = totals.get(name, 0.0)
                totals[name] = max(before, value) if name in FROM_THE_START else before + value
    return totals
