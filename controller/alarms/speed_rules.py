"""Alarms on time and on freshness: what slows down, who waits for whom, and how old the rollouts are."""

import statistics

from controller.alarms.alarm import WINDOW, Alarm, Limit, beyond, known_values
from controller.record.number_text import compact, number, percent
from controller.record.reader import Run


def speed_falls(run: Run) -> list[Alarm] | None:
    alarms = []
    seen = False
    for metric, what in (("perf/gen_tokens_per_s", "Generation"), ("perf/train_tokens_per_s", "Training")):
        values = known_values(run, metric)
        if len(values) < 2 * WINDOW:
            continue
        seen = True
        median, now = statistics.median(values), statistics.fmean(values[-WINDOW:])
        if now < 0.7 * median:
            alarms.append(
                Alarm(
                    "note", f"{what} slowed down",
                    f"{metric} is {compact(now)} over the last {WINDOW} versions; the median is {compact(median)}.",
                    "Something else uses the machine, memory is short, or completions changed their length.",
                    "Look at the other processes and at the length curve.",
                )
            )  # fmt: skip
    return alarms if seen else None


def sync_is_slow(run: Run) -> list[Alarm] | None:
    steps = dict(run.curve("ppo", "perf/step_s"))
    shares = [
        sync / whole for at, sync in run.curve("ppo", "perf/sync_s") if sync is not None and (whole := steps.get(at))
    ]
    if not shares:
        return None
    share = statistics.median(shares)
    if share <= 0.1:
        return []
    return [
        Alarm(
            "note", "Weight transfer takes long",
            f"In the median version it takes {percent(share)} of the time (perf/sync_s of perf/step_s).",
            "Actors stand still while weights arrive.",
            "Use another learner.weight_transfer, or more rollouts an update.",
        )
    ]  # fmt: skip


def staleness_over_bound(run: Run) -> list[Alarm] | None:
    bound, curve = number(run.setting("ppo.max_staleness")), run.curve("ppo", "staleness/max")
    if bound is None or not any(value is not None for _, value in curve):
        return None
    limit = Limit(
        "staleness/max", "above", bound, "Rollouts older than the bound trained",
        f"Some rollout was sampled more than ppo.max_staleness ({bound:g}) updates before it trained.",
        "A fault of the ledger: `python -m controller.ledger RUN` audits it.",
    )  # fmt: skip
    return beyond(limit, curve)


def someone_waits(run: Run) -> list[Alarm] | None:
    """Actors or learner stand idle in a run that overlaps them; in one that takes turns they must."""
    if not number(run.setting("ppo.max_staleness")):
        return None
    alarms, seen = [], False
    steps = dict(run.curve("ppo", "perf/step_s"))
    for metric, who, advice in WAITS:
        shares = [
            (v if metric == "perf/rollout_s" else whole - v) / whole
            for at, v in run.curve("ppo", metric)
            if v is not None and (whole := steps.get(at))
        ]
        if not shares:
            continue
        seen = True
        share = statistics.median(shares)
        if share > 0.3:
            finding = (
                f"In the median version it stands idle for {percent(share)} of the time ({metric} of perf/step_s)."
            )
            meaning = "Both sides should work all the time; the faster one waits for the other."
            alarms.append(Alarm("note", f"The {who} waits", finding, meaning, advice))
    return alarms if seen else None


WAITS = (
    ("perf/rollout_s", "learner", "More or faster actors: cluster.num_actors, engine.max_num_seqs."),
    ("perf/generate_s", "busiest actor", "More learner ranks, fewer actors, or a larger ppo.max_staleness."),
)
