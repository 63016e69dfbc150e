"""Alarms on time and on freshness: what slows down, who waits for whom, and how old the rollouts are."""

import statistics
from collections.abc import Iterator

from controller.alarms.alarm import WINDOW, Alarm, Limit, NotMeasured, beyond_setting, known_values
from controller.record.number_text import compact, number, percent
from controller.record.reader import Run

WAITS = (
    ("perf/rollout_s", "learner", "More or faster actors: cluster.num_actors, engine.max_num_seqs."),
    ("perf/generate_s", "busiest actor", "More learner ranks, fewer actors, or a larger ppo.max_staleness."),
)


def speed_falls(run: Run) -> Iterator[Alarm]:
    speeds = {"Generation": "perf/gen_tokens_per_s", "Training": "perf/train_tokens_per_s"}
    curves = {what: known_values(run, metric) for what, metric in speeds.items()}
    known = {what: values for what, values in curves.items() if len(values) >= 2 * WINDOW}
    if not known:
        raise NotMeasured("speed")
    for what, values in known.items():
        median, now = statistics.median(values), statistics.fmean(values[-WINDOW:])
        if now < 0.7 * median:
            yield Alarm(
                "note", f"{what} slowed down",
                f"{speeds[what]} is {compact(now)} over the last {WINDOW} versions; the median is {compact(median)}.",
                "Something else uses the machine, memory is short, or completions changed their length.",
                "Look at the other processes and at the length curve.",
            )  # fmt: skip


def _share_of_step(run: Run, metric: str, rest: bool = False) -> float | None:
    """Median over versions of a time, or the `rest`, over `perf/step_s`; None where no version has both."""
    steps = dict(run.curve("ppo", "perf/step_s"))
    timed = [(time, steps.get(version)) for version, time in run.curve("ppo", metric)]
    shares = [(whole - time if rest else time) / whole for time, whole in timed if time is not None and whole]
    return statistics.median(shares) if shares else None


def sync_is_slow(run: Run) -> Iterator[Alarm]:
    share = _share_of_step(run, "perf/sync_s")
    if share is None:
        raise NotMeasured("perf/sync_s")
    if share > 0.1:
        yield Alarm(
            "note", "Weight transfer takes long",
            f"In the median version it takes {percent(share)} of the time (perf/sync_s of perf/step_s).",
            "Actors stand still while weights arrive.",
            "Use another learner.weight_transfer, or more rollouts an update.",
        )  # fmt: skip


staleness_over_bound = beyond_setting(
    "ppo.max_staleness",
    1,
    Limit(
        "staleness/max", "above", 0, "Rollouts older than the bound trained",
        "Some rollout was sampled more than ppo.max_staleness ({setting}) updates before it trained.",
        "A fault of the ledger: `python -m controller.ledger RUN` audits it.",
    ),
)  # fmt: skip


def someone_waits(run: Run) -> Iterator[Alarm]:
    """Actors or learner stand idle in a run that overlaps them; in one that takes turns they must."""
    shares = {metric: _share_of_step(run, metric, rest=metric == "perf/generate_s") for metric, _, _ in WAITS}
    if not number(run.setting("ppo.max_staleness")) or set(shares.values()) == {None}:
        raise NotMeasured("idle time")
    for metric, who, advice in WAITS:
        share = shares[metric]
        if share is not None and share > 0.3:
            yield Alarm(
                "note", f"The {who} waits",
                f"In the median version it stands idle for {percent(share)} of the time ({metric} of perf/step_s).",
                "Both sides should work all the time; the faster one waits for the other.",
                advice,
            )  # fmt: skip
