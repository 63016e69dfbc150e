"""How rollouts flowed: how old they were when they trained, what became of each, and which faults were tolerated."""

from controller.record.number_text import count, num
from controller.record.reader import Run, number
from controller.report.rendering import esc, section, table
from controller.report.svg import Series, line_chart

CHARTS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "Staleness",
        "updates between sampling and training",
        (("mean", "plain", "staleness/mean"), ("max", "soft", "staleness/max")),
    ),
    ("Effective sample size", "share of tokens", (("share", "plain", "off_policy/ess"),)),
    (
        "Rollouts under way",
        "rollouts",
        (("sampled", "plain", "ledger/in_flight"), ("waiting", "soft", "ledger/waiting")),
    ),
    (
        "Step and its waits",
        "s",
        (
            ("step", "plain", "perf/step_s"),
            ("rollouts", "proxy", "perf/rollout_s"),
            ("weights", "gold", "perf/sync_s"),
        ),
    ),
)
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


def rollouts(run: Run) -> str:
    """Nothing for a run without a ledger; curves only where something can be stale."""
    last = next((row for row in reversed(run.metrics) if "ledger/admitted" in row), None)
    if last is None:
        return ""
    rows = [
        [name, esc(text), num(last[f"ledger/{name}"], 0)]
        for name, text in FATES
        if number(last.get(f"ledger/{name}")) is not None
    ]
    body = table(("Rollouts", "", ""), rows, "short", text_columns=2) + _faults(run)
    if number(run.setting("ppo.max_staleness")) or any(v for _, v in run.curve("ppo", "staleness/max")):
        charts = [
            line_chart(title, [Series(name, css, run.curve("ppo", metric)) for name, css, metric in lines], unit=unit)
            for title, unit, lines in CHARTS
        ]
        body = f'<div class="charts">{"".join(charts)}</div>{body}'
        bound = number(run.setting("ppo.max_staleness"))
        intro = f"Actors and learner worked at the same time, at most {count(int(bound or 0), 'update')} apart."
    else:
        intro = "Actors and learner took turns, so every rollout trained at the version that sampled it."
    return section("rollouts", "Rollouts: how fresh, and what became of them", body, intro)


def _faults(run: Run) -> str:
    """Totals: counters of a step are summed, those that count from the start are taken at their end."""
    cumulative = ("fault/actors_lost", "fault/wandb")
    totals: dict[str, float] = {}
    for row in run.metrics:
        for name in FAULTS:
            value = number(row.get(name))
            if value:
                totals[name] = (
                    max(totals.get(name, 0.0), value) if name in cumulative else totals.get(name, 0.0) + value
                )
    if not totals:
        return '<p class="quiet">✓ No fault was met.</p>'
    rows = [[esc(FAULTS[name]), f"<code>{name}</code>", num(value, 0)] for name, value in totals.items()]
    return table(("Faults that were tolerated", "", ""), rows, "short", text_columns=2)
