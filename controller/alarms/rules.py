"""The alarms, evaluated on a finished or a running run, each with what it means and what to try.

A threshold on one metric is a row of limits.yaml; whatever compares two metrics or two moments is a function. All of them
are first guesses from the literature and from runs of this project, not laws.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise

from controller.alarms.alarm import WINDOW, Alarm, Limit, NotMeasured, Rule, beyond_setting, known_curve, known_values
from controller.alarms.limits import LIMITS
from controller.alarms.speed_rules import someone_waits, speed_falls, staleness_over_bound, sync_is_slow
from controller.record.evaluation import against_sft, judged_title
from controller.record.number_text import bounds, compact, number, percent
from controller.record.reader import Run
from controller.record.run_log import TRACKER_FAULTS

LEAST = 3 * WINDOW  # versions from which on their noise is known
FALSE_ALARMS = 0.05  # share of the flat runs in which a trend is told at some time, at most
NORMAL = statistics.NormalDist()


def evaluate(run: Run) -> tuple[list[Alarm], list[str], list[str]]:
    """(alarms, what was checked without a finding, what could not be checked for lack of a metric)."""
    alarms, silent, unknown = list[Alarm](), list[str](), list[str]()
    rules: list[tuple[str, Rule]] = [*((limit.metric, limit) for limit in LIMITS), *CHECKS]
    for name, rule in rules:
        try:
            found = list(rule(run))
        except NotMeasured:
            unknown.append(name)
            continue
        alarms += found
        silent += [] if found else [name]
    alarms.sort(key=lambda alarm: alarm.severity != "alarm")
    return alarms, silent, unknown


def _windows(values: Sequence[float], size: int = WINDOW) -> list[float]:
    """Means over `size` neighbouring versions."""
    return [statistics.fmean(values[i : i + size]) for i in range(len(values) - size + 1)]


def _sizes(versions: int) -> list[int]:
    """The windows that a trend is looked for in: short ones see a jump soon, long ones see what moves slowly."""
    return [WINDOW << k for k in range((versions // LEAST).bit_length())]


def _error(values: Sequence[float], size: int) -> float:
    """Standard error of the difference of the means of two windows of `size` versions.

    Noise makes a step undo the one before it, which a trend or a jump does not: its variance is the mean product of
    neighbouring steps, with the sign turned. That is rough in a short run; the median step is less so. The larger of both
    counts. Where most versions are equal, as where successes are rare, the median is 0, and what no later step undoes may be
    the first of them: there every step counts as noise.
    """
    steps = [b - a for a, b in pairwise(values)]
    undone = -statistics.fmean(a * b for a, b in pairwise(steps))
    typical = statistics.median(map(abs, steps)) / (math.sqrt(2) * NORMAL.inv_cdf(0.75))
    typical = typical or math.sqrt(statistics.fmean(step**2 for step in steps) / 2)
    return max(math.sqrt(max(undone, 0.0)), typical) * math.sqrt(2 / size)


def _chance(values: Sequence[float], size: int = WINDOW) -> float:
    """What two window means differ by at most in all but a few of all flat runs, whichever two they are, of whichever size,
    and however often one looks: of w windows there are w² / 2 pairs, and one looks again with every line (a union bound)."""
    windows = len(values) - size + 1
    return -NORMAL.inv_cdf(FALSE_ALARMS / len(_sizes(len(values))) / windows**3) * _error(values, size)


def score_falls(run: Run) -> Iterator[Alarm]:
    """The score lost over 20% of what it had gained. A share of the score itself would mean nothing around zero."""
    values = known_values(run, "reward/score_mean", LEAST)
    gain = max(_windows(values)) - _windows(values)[0]
    for size in _sizes(len(values)):
        means = _windows(values, size)
        best, loss = max(means), max(means) - means[-1]
        if gain > 0 and loss > 0.2 * gain and loss > _chance(values, size):
            yield Alarm(
                "alarm", "The score falls from its best",
                f"The mean score of {size} versions was {compact(best)} at its best and is {compact(means[-1])} at the end.",
                "More than a fifth of the gain is lost again: learning has become unstable, or the KL penalty has grown.",
                "Take the checkpoint before the fall, and lower the learning rate.",
            )  # fmt: skip
            return


def spread_collapses(run: Run) -> Iterator[Alarm]:
    values = known_values(run, "reward/score_std", 2)
    if not any(values):
        yield Alarm(
            "alarm", "All completions score the same",
            f"reward/score_std has been 0 in all {len(values)} versions.",
            "Without differences between completions their scores teach nothing: the scorer says one thing of all.",
            "Read the samples; look at the scorer, or give it prompts of which some succeed.",
        )  # fmt: skip
    elif len(values) >= 2 * WINDOW and (means := _windows(values))[-1] <= 0.05 * means[0] and means[0] > 0:
        yield Alarm(
            "alarm", "All completions score the same",
            f"reward/score_std fell from {compact(means[0])} to {compact(means[-1])} (means of {WINDOW} versions), "
            "under 5% of its start.",
            "Without differences between completions their scores teach nothing; the policy has likely collapsed.",
            "Read the samples; raise ppo.kl.coef or the temperature, and go back to an earlier checkpoint.",
        )  # fmt: skip


def _score_and_gold(run: Run) -> list[tuple[float, float]]:
    """Both means of the versions that have them. Raises NotMeasured where those are few."""
    gold = dict(run.curve("ppo", "reward/gold_mean"))
    pairs = [(score, gold.get(step)) for step, score in run.curve("ppo", "reward/score_mean")]
    known = [(s, g) for s, g in pairs if s is not None and g is not None]
    if len(known) < LEAST:
        raise NotMeasured("reward/gold_mean")
    return known


def over_optimised(run: Run) -> Iterator[Alarm]:
    """Gold below its best by more than noise while the score it should follow went on rising (Gao et al. 2022)."""
    known = _score_and_gold(run)
    scores, golds = [s for s, _ in known], [g for _, g in known]
    for size in _sizes(len(known)):
        score, gold = _windows(scores, size), _windows(golds, size)
        peak = gold.index(max(gold))
        fall = gold[peak] - gold[-1]
        if fall > _chance(golds, size) and score[-1] > score[peak]:
            yield Alarm(
                "alarm", "Over-optimisation: gold falls while the score rises",
                f"From its best the gold score fell by {compact(fall)} (means of {size} versions), while the learned score "
                f"rose by {compact(score[-1] - score[peak])}.",
                "The policy learns the faults of the reward model instead of what people like.",
                "Stop earlier, raise ppo.kl.coef, or train the reward model on more data.",
            )  # fmt: skip
            return


def gold_stays(run: Run) -> Iterator[Alarm]:
    """From first to last the score rose by more than noise and gold did not, without the fall of `over_optimised`. By the
    longest windows, which would see gold follow slowly."""
    known = _score_and_gold(run)
    scores, golds, size = [s for s, _ in known], [g for _, g in known], _sizes(len(known))[-1]
    score, gold = _windows(scores, size), _windows(golds, size)
    rise, followed = score[-1] - score[0], gold[-1] - gold[0]
    if rise > _chance(scores, size) and followed <= 2 * _error(golds, size) and not any(over_optimised(run)):
        yield Alarm(
            "alarm", "The score rises and gold does not follow",
            f"From the first to the last {size} versions the learned score rose by {compact(rise)}; the gold score "
            f"changed by {compact(followed)}, which is within noise or a loss.",
            "The score can be had without what the gold judge asks for.",
            "Read the samples of the last versions, and mend the scorer: it should pay for the answer alone.",
        )  # fmt: skip


kl_too_far = beyond_setting(
    "ppo.kl.target",
    3,
    Limit(
        "kl/ref_seq", "above", 0, "The policy left its reference far behind",
        "The KL per sequence is over three times ppo.kl.target ({setting} nats): the reward model is judging text "
        "unlike any that it was trained on.",
        "Raise ppo.kl.coef, use the adaptive controller, or make fewer updates.",
    ),
)  # fmt: skip


def entropy_collapses(run: Run) -> Iterator[Alarm]:
    first = known_values(run, "policy/entropy", 2)[0]
    limit = Limit(
        "policy/entropy", "below", 0.2 * first, "Entropy collapsed",
        f"The policy is nearly deterministic: its entropy is under 20% of the initial {compact(first)} nats.",
        "Raise ppo.kl.coef or lower the learning rate; a higher temperature helps only for a while.",
    )  # fmt: skip
    return limit(run)


def length_moves(run: Run) -> Iterator[Alarm]:
    """Mean length changed by over half, and by more than noise, within 50 versions."""
    curve = [(step, value) for step, value in known_curve(run, "completion/len_mean") if value]
    if len(curve) < LEAST:
        raise NotMeasured("completion/len_mean")
    values = [value for _, value in curve]
    chance = _chance(values)
    means = [(step, mean) for (step, _), mean in zip(curve[WINDOW - 1 :], _windows(values), strict=True)]
    moves = []
    for i, (step, mean) in enumerate(means):
        before = next(m for s, m in means[: i + 1] if s >= step - 50)
        moves.append((mean / before - 1 if abs(mean - before) > chance else 0.0, step))
    change, step = max(moves, key=lambda move: abs(move[0]))
    if abs(change) > 0.5:
        yield Alarm(
            "alarm", f"Completions got much {'longer' if change > 0 else 'shorter'}",
            f"completion/len_mean changed by {percent(change)} within 50 versions (version {step:.0f}).",
            "Length is the easiest way to please a reward model. A gain may be one of length alone.",
            "Compare at matched length (table above); raise ppo.kl.coef or train the reward model with balanced lengths.",
        )  # fmt: skip


def loses_to_sft(run: Run) -> Iterator[Alarm]:
    mean, low, high = bounds(against_sft(run.evaluation).get("win_rate"))
    name = judged_title(run.evaluation)
    if mean is None:
        raise NotMeasured("win rate")
    sure = high is not None and high < 0.5
    shown = f" [{percent(low)}, {percent(high)}]" if low is not None and high is not None else ""
    if mean < 0.5:
        yield Alarm(
            "alarm" if sure else "note", f"{name} loses to SFT" if sure else f"{name} may lose to SFT",
            f"Its completion is the better one on {percent(mean)}{shown} of the evaluation prompts.",
            f"{name} did not improve the model by this judge" + ("." if sure else ", though chance may explain it."),
            "See the curves: if gold rose and fell again, stop earlier; if it never rose, improve the reward model.",
        )  # fmt: skip


def not_finite(run: Run) -> Iterator[Alarm]:
    gaps: dict[str, list[float]] = {}
    for row in run.metrics:
        for name, value in row.items():
            step = number(row.get("step"))
            if step is not None and number(value) is None and name != "stage":
                gaps.setdefault(f"{row.get('stage')}: {name}", []).append(step)
    training = {name: steps for name, steps in gaps.items() if "loss" in name or "grad" in name}
    others = {name: steps for name, steps in gaps.items() if name not in training}
    if training:
        yield Alarm(
            "alarm", "A loss or a gradient was not a finite number", _listed(training),
            "A NaN or an infinity: what that step did to the weights is unknown.",
            "Look at the gradient norm before it; lower the learning rate.",
        )  # fmt: skip
    if others:
        yield Alarm(
            "note", "A metric has gaps", _listed(others),
            "The value was a NaN or an infinity, or was not measured.",
            "Harmless where there was nothing to measure, such as a share of nothing.",
        )  # fmt: skip


def _listed(gaps: dict[str, list[float]], most: int = 6) -> str:
    shown = []
    for name, steps in list(gaps.items())[:most]:
        some = ", ".join(f"{step:.0f}" for step in steps[:most]) + (" …" if len(steps) > most else "")
        shown.append(f"{name} at step {some}")
    more = f"; and {len(gaps) - most} other metrics" if len(gaps) > most else ""
    return "; ".join(shown) + more + "."


def faults(run: Run) -> Iterator[Alarm]:
    worst: dict[str, float] = {}
    trackers: dict[str, str] = {}
    for row in run.metrics:
        for name, value in row.items():
            known = number(value)
            if name.startswith("fault/") and known:
                worst[name] = max(worst.get(name, 0.0), known)
                if row["stage"] == TRACKER_FAULTS:
                    trackers[name] = name.removeprefix("fault/")
    for name, value in worst.items():
        yield Alarm(
            "note", "A fault was tolerated", f"{name} reached {value:g}.",
            f"The copy of the run in {trackers[name]} is incomplete." if name in trackers
            else "The run went on without what failed.",
            "Nothing: metrics.jsonl has everything." if name in trackers else "See the log of the driver.",
        )  # fmt: skip


CHECKS: tuple[tuple[str, Rule], ...] = (
    ("over-optimisation", over_optimised),
    ("gold that follows the score", gold_stays),
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
