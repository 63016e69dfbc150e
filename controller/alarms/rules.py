"""The alarms, evaluated on a finished or a running run, each with what it means and what to try.

A threshold on one metric is a row of `LIMITS`; whatever compares two metrics or two moments is a function. All of them
are first guesses from the literature and from runs of this project, not laws.
"""

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

from controller.alarms.alarm import WINDOW, Alarm, Limit, beyond, known_values
from controller.alarms.limits import LIMITS
from controller.alarms.speed_rules import someone_waits, speed_falls, staleness_over_bound, sync_is_slow
from controller.record.evaluation import against_sft, judged_title
from controller.record.number_text import bounds, compact, number, percent
from controller.record.reader import Run
from controller.record.run_log import TRACKER_FAULTS


def evaluate(run: Run) -> tuple[list[Alarm], list[str], list[str]]:
    """(alarms, what was checked without a finding, what could not be checked for lack of a metric)."""
    alarms: list[Alarm] = []
    silent: list[str] = []
    unknown: list[str] = []
    for limit in LIMITS:
        curve = run.curve("ppo", limit.metric)
        if not any(value is not None for _, value in curve):
            unknown.append(limit.metric)
        elif fired := beyond(limit, curve):
            alarms += fired
        else:
            silent.append(limit.metric)
    for name, check in CHECKS:
        found = check(run)
        if found is None:
            unknown.append(name)
        elif found:
            alarms += found
        else:
            silent.append(name)
    alarms.sort(key=lambda alarm: alarm.severity != "alarm")
    return alarms, silent, unknown


def _windows(values: Sequence[float]) -> list[float]:
    """Means over `WINDOW` neighbouring versions."""
    return [statistics.fmean(values[i : i + WINDOW]) for i in range(len(values) - WINDOW + 1)]


def _noise(values: Sequence[float]) -> float:
    """Two standard errors of the difference of two window means, judged by how much neighbours differ."""
    steps = [b - a for a, b in pairwise(values)]
    return 2 * statistics.pstdev(steps) / WINDOW**0.5


def score_falls(run: Run) -> list[Alarm] | None:
    """The score lost over 20% of what it had gained. A share of the score itself would mean nothing around zero."""
    values = known_values(run, "reward/score_mean")
    if len(values) < 2 * WINDOW:
        return None
    means = _windows(values)
    best, gain, loss = max(means), max(means) - means[0], max(means) - means[-1]
    if gain <= 0 or loss <= 0.2 * gain or loss <= _noise(values):
        return []
    finding = (
        f"The mean score of {WINDOW} versions was {compact(best)} at its best and is {compact(means[-1])} at the end."
    )
    return [
        Alarm(
            "alarm", "The score falls from its best", finding,
            "More than a fifth of the gain is lost again: learning has become unstable, or the KL penalty has grown.",
            "Take the checkpoint before the fall, and lower the learning rate.",
        )
    ]  # fmt: skip


def spread_collapses(run: Run) -> list[Alarm] | None:
    values = known_values(run, "reward/score_std")
    if len(values) < 2:
        return None
    if values[-1] > 0.05 * values[0]:
        return []
    if not any(values):
        return [
            Alarm(
                "alarm", "All completions score the same",
                f"reward/score_std has been 0 in all {len(values)} versions.",
                "Without differences between completions there is nothing to learn from: the scorer says one thing of all.",
                "Read the samples; look at the scorer, or give it prompts of which some succeed.",
            )
        ]  # fmt: skip
    return [
        Alarm(
            "alarm", "All completions score the same",
            f"reward/score_std fell from {compact(values[0])} to {compact(values[-1])}, under 5% of its start.",
            "Without differences between completions there is nothing to learn from; the policy has likely collapsed.",
            "Read the samples; raise ppo.kl.coef or the temperature, and go back to an earlier checkpoint.",
        )
    ]  # fmt: skip


def over_optimised(run: Run) -> list[Alarm] | None:
    """Gold below its best by more than noise while the score it should follow went on rising (Gao et al. 2022)."""
    both = dict(run.curve("ppo", "reward/gold_mean"))
    pairs = [(s, both.get(step)) for step, s in run.curve("ppo", "reward/score_mean")]
    known = [(s, g) for s, g in pairs if s is not None and g is not None]
    if len(known) < 2 * WINDOW:
        return None
    score, gold = _windows([s for s, _ in known]), _windows([g for _, g in known])
    peak = gold.index(max(gold))
    fall = gold[peak] - gold[-1]
    if fall <= _noise([g for _, g in known]) or score[-1] <= score[peak]:
        return []
    return [
        Alarm(
            "alarm", "Over-optimisation: gold falls while the score rises",
            f"From its best the gold score fell by {compact(fall)}, while the learned score rose by "
            f"{compact(score[-1] - score[peak])}.",
            "The policy learns the faults of the reward model instead of what people like.",
            "Stop earlier, raise ppo.kl.coef, or train the reward model on more data.",
        )
    ]  # fmt: skip


def kl_too_far(run: Run) -> list[Alarm] | None:
    target, curve = number(run.setting("ppo.kl.target")), run.curve("ppo", "kl/ref_seq")
    if target is None or not any(value is not None for _, value in curve):
        return None
    limit = Limit(
        "kl/ref_seq", "above", 3 * target, "The policy left its reference far behind",
        f"The KL per sequence is over three times ppo.kl.target ({target:g} nats): the reward model is judging text "
        "unlike any that it was trained on.",
        "Raise ppo.kl.coef, use the adaptive controller, or make fewer updates.",
    )  # fmt: skip
    return beyond(limit, curve)


def entropy_collapses(run: Run) -> list[Alarm] | None:
    curve = [(step, value) for step, value in run.curve("ppo", "policy/entropy") if value is not None]
    if len(curve) < 2:
        return None
    first = curve[0][1]
    limit = Limit(
        "policy/entropy", "below", 0.2 * first, "Entropy collapsed",
        f"The policy is nearly deterministic: its entropy is under 20% of the initial {compact(first)} nats.",
        "Raise ppo.kl.coef or lower the learning rate; a higher temperature helps only for a while.",
    )  # fmt: skip
    return beyond(limit, [*curve])


def length_moves(run: Run) -> list[Alarm] | None:
    """Mean length changed by over half within 50 versions."""
    curve = [(step, value) for step, value in run.curve("ppo", "completion/len_mean") if value]
    if len(curve) < 2:
        return None
    moves = []
    for i, (step, value) in enumerate(curve):
        before = next(v for s, v in curve[: i + 1] if s >= step - 50)
        moves.append((value / before - 1, step))
    change, step = max(moves, key=lambda move: abs(move[0]))
    if abs(change) <= 0.5:
        return []
    way = "longer" if change > 0 else "shorter"
    return [
        Alarm(
            "alarm", f"Completions got much {way}",
            f"completion/len_mean changed by {percent(change)} within 50 versions (version {step:.0f}).",
            "Length is the easiest way to please a reward model. A gain may be one of length alone.",
            "Compare at matched length (table above); raise ppo.kl.coef or train the reward model with balanced lengths.",
        )
    ]  # fmt: skip


def loses_to_sft(run: Run) -> list[Alarm] | None:
    mean, low, high = bounds(against_sft(run.evaluation).get("win_rate"))
    name = judged_title(run.evaluation)
    if mean is None:
        return None
    if mean >= 0.5:
        return []
    sure = high is not None and high < 0.5
    shown = f" [{percent(low)}, {percent(high)}]" if low is not None and high is not None else ""
    return [
        Alarm(
            "alarm" if sure else "note", f"{name} loses to SFT" if sure else f"{name} may lose to SFT",
            f"Its completion is the better one on {percent(mean)}{shown} of the evaluation prompts.",
            f"{name} did not improve the model by this judge" + ("." if sure else ", though chance may explain it."),
            "See the curves: if gold rose and fell again, stop earlier; if it never rose, improve the reward model.",
        )
    ]  # fmt: skip


def not_finite(run: Run) -> list[Alarm] | None:
    gaps: dict[str, list[float]] = {}
    for row in run.metrics:
        for name, value in row.items():
            step = number(row.get("step"))
            if step is not None and number(value) is None and name != "stage":
                gaps.setdefault(f"{row.get('stage')}: {name}", []).append(step)
    training = {name: steps for name, steps in gaps.items() if "loss" in name or "grad" in name}
    others = {name: steps for name, steps in gaps.items() if name not in training}
    alarms = []
    if training:
        alarms.append(
            Alarm(
                "alarm", "A loss or a gradient was not a finite number", _listed(training),
                "A NaN or an infinity: what that step did to the weights is unknown.",
                "Look at the gradient norm before it; lower the learning rate.",
            )
        )  # fmt: skip
    if others:
        alarms.append(
            Alarm(
                "note", "A metric has gaps", _listed(others),
                "The value was a NaN or an infinity, or was not measured.",
                "Harmless where there was nothing to measure, such as a share of nothing.",
            )
        )  # fmt: skip
    return alarms


def _listed(gaps: dict[str, list[float]], most: int = 6) -> str:
    shown = []
    for name, steps in list(gaps.items())[:most]:
        some = ", ".join(f"{step:.0f}" for step in steps[:most]) + (" …" if len(steps) > most else "")
        shown.append(f"{name} at step {some}")
    more = f"; and {len(gaps) - most} other metrics" if len(gaps) > most else ""
    return "; ".join(shown) + more + "."


def faults(run: Run) -> list[Alarm] | None:
    worst: dict[str, float] = {}
    trackers: dict[str, str] = {}
    for row in run.metrics:
        for name, value in row.items():
            known = number(value)
            if name.startswith("fault/") and known:
                worst[name] = max(worst.get(name, 0.0), known)
                if row["stage"] == TRACKER_FAULTS:
                    trackers[name] = name.removeprefix("fault/")
    return [
        Alarm(
            "note", "A fault was tolerated", f"{name} reached {value:g}.",
            f"The copy of the run in {trackers[name]} is incomplete." if name in trackers
            else "The run went on without what failed.",
            "Nothing: metrics.jsonl has everything." if name in trackers else "See the log of the driver.",
        )
        for name, value in worst.items()
    ]  # fmt: skip


CHECKS: tuple[tuple[str, Callable[[Run], list[Alarm] | None]], ...] = (
    ("over-optimisation", over_optimised),
    ("score against its best", score_falls),
    ("spread of scores", spread_collapses),
    ("win rate against SFT", loses_to_sft),
    ("kl/ref_seq against 3 × target", kl_too_far),
    ("policy/entropy", entropy_collapses),
    ("completion length", length_moves),
    ("speed", speed_falls),
    ("weight transfer", sync_is_slow),
    ("staleness against its bound", staleness_over_bound),
    ("idle actors and learner", someone_waits),
    ("finite values", not_finite),
    ("faults", faults),
)
