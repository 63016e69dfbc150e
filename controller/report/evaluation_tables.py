"""The verdict and the numbers behind it: what stands on top of a report, and its tables of models and pairs."""

from typing import Any

from markupsafe import Markup

from controller.alarms import rules
from controller.alarms.alarm import known_curve
from controller.record.evaluation import (
    against_sft,
    judged_model,
    judged_name,
    judged_title,
    measured_passes,
    pass_title,
    verdict_reason,
    verdict_state,
)
from controller.record.number_text import bounds, duration, num, number, percent
from controller.record.reader import Run
from controller.report import svg
from controller.report.curves import RUN, models_of

MEASURES = (  # (key, label, unit, digits, is a share)
    ("gold", "Gold judge", "score", 3, False),
    ("proxy", "Learned score (proxy)", "score", 3, False),
    ("vader", "VADER", "−1 to 1", 3, False),
    ("kl", "KL from the reference", "nats a sequence", 2, False),
    ("length", "Length", "tokens", 1, False),
    ("eos_share", "Ends with EOS", "", 1, True),
    ("distinct_2", "Distinct bigrams", "", 1, True),
    ("repeat_fraction", "Repeated 4-grams", "", 1, True),
)
RANKS = ("reward_model", "preference")  # how the names of the stages begin that rank pairs
Tile = tuple[str, str, str, str]  # label, value, its unit, note
Row = tuple[str, Any, int, bool, Markup]  # label, mean and interval, digits, whether it is a share, the interval drawn


def verdict(run: Run) -> Markup:
    found, alarms = (run.evaluation.get("verdict") or {}).get("checks") or [], rules.evaluate(run)[0]
    checks = [check for check in found if isinstance(check, dict)]
    return RUN.verdict(run, verdict_state(run.evaluation), verdict_reason(run.evaluation), checks, alarms)


def _span(values: Any, share: bool = False) -> str:
    _, low, high = bounds(values)
    if low is None or high is None:
        return ""
    times, digits = (100, 0) if share else (1, 2)
    return f"95%: {num(low * times, digits, not share)} to {num(high * times, digits, not share)}"


def key_numbers(run: Run) -> Markup | str:
    """What a run has of them."""
    against, model = against_sft(run.evaluation), judged_model(run.evaluation)
    gain, rate, kl = (bounds(v)[0] for v in (against.get("gold_gain"), against.get("win_rate"), model.get("kl")))
    kl = kl if kl is not None else svg.last(run.curve("ppo", "kl/ref_seq"))
    ratio = number(against.get("length_ratio"))
    tiles: list[tuple[Any, Tile]] = [
        (gain, ("Gold gain over SFT", num(gain, 2, signed=True), "", _span(against.get("gold_gain")))),
        (rate, ("Win rate against SFT", percent(rate), "", _span(against.get("win_rate"), share=True))),
        (kl, ("KL from reference", num(kl, 1), "nats", "a sequence")),
        (ratio, ("Length against SFT", f"× {num(ratio, 2)}", "", f"{percent(model.get('eos_share'))} end with EOS")),
    ]
    scores = run.curve("ppo", "reward/score_mean")
    known = [(step, value) for step, value in scores if value is not None]
    if known and not against:
        note = f"{num(known[-1][1] - known[0][1], 2, signed=True)} since version {known[0][0]:.0f}"
        tiles.append((known[-1][1], ("Score in training", num(known[-1][1]), "", note)))
    planned = number(run.setting("ppo.updates"))
    if scores:
        version = scores[-1][0]
        note = f"of {planned:.0f} planned" if planned and version < planned else "policy updates"
        tiles.append((version, ("Policy version", f"{version:.0f}", "", note)))
    speed = _tokens_per_s(run)
    note = f"{speed:.0f} tok/s sampled" if speed is not None else ""
    tiles.append((run.wall_s, ("Wall time", duration(run.wall_s), "", note)))
    shown = [tile for value, tile in tiles if number(value) is not None]
    return RUN.numbers(shown) if shown else ""


def _tokens_per_s(run: Run) -> float | None:
    """Tokens over seconds of all updates that have both."""
    times = dict(run.curve("ppo", "perf/generate_s"))
    pairs = [(times.get(version), speed) for version, speed in known_curve(run, "perf/gen_tokens_per_s")]
    known = [(time, speed) for time, speed in pairs if time]
    return sum(time * speed for time, speed in known) / sum(time for time, _ in known) if known else None


def models(run: Run) -> Markup:
    """The judged models on the held-out prompts, and the paired comparisons."""
    found, present = run.evaluation.get("models") or {}, models_of(run)
    passes = dict.fromkeys(key for name, _, _ in present for key in measured_passes(found[name]))
    rows = [*((key, pass_title(key), "", 1, True) for key in passes), *MEASURES]
    measured = [row for row in rows if any(row[0] in found[name] for name, _, _ in present)]
    prompts = {int(n) for name, _, _ in present if (n := number(found[name].get("prompts"))) is not None}
    return RUN.models(present, found, measured, sorted(prompts), _comparisons(run))


def _comparisons(run: Run) -> list[tuple[str, list[Row], float | None, int]]:
    """Of each pair of models: title, rows, ratio of lengths, pairs of equal length."""
    compared, name = run.evaluation.get("comparisons") or {}, judged_name(run.evaluation)
    out = []
    for key, title, css in (
        (f"{name}_vs_sft", f"{judged_title(run.evaluation)} against SFT", "ppo"),
        ("base_vs_sft", "Base against SFT", "base"),
    ):
        values = compared.get(key)
        if not isinstance(values, dict):
            continue
        matched = values.get("matched_length") or {}
        judge, known_as = ("proxy", "Learned-score") if values.get("judge") == "proxy" else ("gold", "Gold")
        gains = {
            **{f"{pass_title(k.removesuffix('_gain'))} gain": v for k, v in values.items() if k.startswith("pass_at_")},
            "Gold gain": values.get("gold_gain"),
            "Learned-score gain": values.get("proxy_gain"),
            "VADER gain": values.get("vader_gain"),
            f"{known_as} gain at matched length": matched.get(f"{judge}_gain"),
            f"{known_as} gain, length regressed out": values.get("length_adjusted_gain"),
        }
        rates = {"Win rate": values.get("win_rate"), "Win rate at matched length": matched.get("win_rate")}
        low, high = svg.shared_range(list(gains.values()), 0.0)
        rows: list[Row] = [(k, v, 3, False, svg.interval_bar([(v, css)], low, high, 0.0)) for k, v in gains.items()]
        rows += [(k, v, 1, True, svg.interval_bar([(v, css)], 0.0, 1.0, 0.5)) for k, v in rates.items()]
        rows = [row for row in rows if bounds(row[1])[0] is not None]
        out.append((title, rows, number(values.get("length_ratio")), int(number(matched.get("pairs")) or 0)))
    return out


def reward_models(run: Run) -> Markup:
    rows = []
    for stage in run.stages:
        name, metrics = str(stage.get("name", "")), stage.get("metrics") or {}
        if name.startswith(RANKS):
            own, vader = (
                {"mean": metrics.get(key), "low": metrics.get(f"{key}_low"), "high": metrics.get(f"{key}_high")}
                for key in ("accuracy", "vader_accuracy")
            )
            css = "gold" if "gold" in name else "proxy"
            bar = svg.interval_bar([(vader, "plain"), (own, css)], 0.5, 1.0, 0.5)
            rows.append((css, name.partition("/")[2] or name, own, vader, bar, metrics.get("pairs")))
    return RUN.reward_models(rows)
