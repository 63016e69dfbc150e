"""The verdict, the tables, the alarms and the facts about a run."""

import shlex
from typing import Any

import yaml

from controller.alarms import rules
from controller.record.evaluation import against_sft, judged_model, judged_name, judged_title
from controller.record.number_text import bounds, compact, count, duration, num, percent
from controller.record.reader import Run, number
from controller.report import svg
from controller.report.curves import models_of
from controller.report.rendering import absent, esc, interval, section, table

STATUS = {  # word and icon, so that the verdict does not hang on colour
    "good": ("Passed", '<path d="M6 12.5l4 4 8-9"/>'),
    "unsure": ("Inconclusive", '<path d="M9 9.3a3 3 0 1 1 4.6 2.5c-1 .6-1.6 1.2-1.6 2.2M12 17.3v.2"/>'),
    "none": ("No verdict yet", '<path d="M7 12h.2M12 12h.2M17 12h.2"/>'),
    "bad": ("Not passed", '<path d="M7.5 7.5l9 9m0-9l-9 9"/>'),
}
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


def verdict(run: Run) -> str:
    found = run.evaluation.get("verdict") or {}
    text = str(found.get("text") or "").strip()
    if not found:
        kind = "none"
        text = "This run has not been evaluated, so nothing here says whether it helped."
        if run.evaluation:
            text = (
                "This run was evaluated without a trained model or without a gold judge, so no limit says what helped."
            )
    else:
        kind = "good" if found.get("passed") else "unsure" if text.lower().startswith("inconclusive") else "bad"
        for word in ("Passed: ", "Not passed: ", "Inconclusive: "):
            text = text.removeprefix(word)
        text = text[:1].upper() + text[1:]
    word, icon = STATUS[kind]
    rows = [_check(check) for check in found.get("checks") or [] if isinstance(check, dict)]
    checks = table(("", "Check", "Value", "Limit"), rows, "checks", text_columns=2) if rows else ""
    return (
        f'<section id="verdict" class="verdict {kind}"><div class="headline"><svg class="icon" viewBox="0 0 24 24" '
        f'aria-hidden="true"><circle cx="12" cy="12" r="11"/>{icon}</svg><div><p class="word">{word}</p>'
        f'<p class="sentence">{esc(text)}</p></div></div>{checks}{_alarm_count(run)}{_gaps(run)}</section>'
    )


def _check(check: dict[str, Any]) -> list[str]:
    passed = bool(check.get("passed"))
    mark = '<span class="yes" title="passed">✓</span>' if passed else '<span class="no" title="not passed">✗</span>'
    limit = f'<span class="ci">{esc(check.get("side", ""))}</span> {compact(check.get("limit"))}'
    return [mark, esc(check.get("name", "")), compact(check.get("value")), limit]


def _alarm_count(run: Run) -> str:
    found, _, _ = rules.evaluate(run)
    serious = sum(alarm.severity == "alarm" for alarm in found)
    words = [count(n, noun) for n, noun in ((serious, "alarm"), (len(found) - serious, "note")) if n]
    return f'<p class="pointer"><a href="#alarms">⚠ {" and ".join(words)} on how it ran</a></p>' if words else ""


def _gaps(run: Run) -> str:
    """What is missing or broken, said on top: a reader must not take half a run for a whole one."""
    what = {
        "evaluation.json": "no evaluation: the models have not been compared",
        "metrics.jsonl": "no curves",
        "stages.json": "no stage has finished, or the reward models’ accuracy is not recorded",
        "samples.jsonl": "no sample completions",
        "phases.jsonl": "no timeline",
        "config.yaml": "no configuration",
    }
    lines = [f"<li><code>{esc(name)}</code> is missing: {what[name]}.</li>" for name in run.missing]
    lines += [f"<li>{esc(problem)}.</li>" for problem in run.problems]
    return f'<ul class="gaps">{"".join(lines)}</ul>' if lines else ""


def key_numbers(run: Run) -> str:
    against, model = against_sft(run.evaluation), judged_model(run.evaluation)
    tiles: list[tuple[str, str, str]] = []

    def add(label: str, value: Any, shown: str, note: str = "") -> None:
        if number(value) is not None:
            tiles.append((label, shown, note))

    def span(low: float | None, high: float | None, share: bool = False) -> str:
        if low is None or high is None:
            return ""
        times, digits = (100, 0) if share else (1, 2)
        return f"95%: {num(low * times, digits, not share)} to {num(high * times, digits, not share)}"

    mean, low, high = bounds(against.get("gold_gain"))
    add("Gold gain over SFT", mean, num(mean, 2, signed=True), span(low, high))
    mean, low, high = bounds(against.get("win_rate"))
    add("Win rate against SFT", mean, percent(mean), span(low, high, share=True))
    mean, low, high = bounds(model.get("kl"))
    mean = mean if mean is not None else svg.last(run.curve("ppo", "kl/ref_seq"))
    add("KL from reference", mean, f"{num(mean, 1)} <small>nats</small>", "a sequence")
    ratio = number(against.get("length_ratio"))
    add("Length against SFT", ratio, f"× {num(ratio, 2)}", f"{percent(model.get('eos_share'))} end with EOS")
    if not against:
        curve = [(step, value) for step, value in run.curve("ppo", "reward/score_mean") if value is not None]
        if curve:
            note = f"{num(curve[-1][1] - curve[0][1], 2, signed=True)} since version {curve[0][0]:.0f}"
            add("Score in training", curve[-1][1], num(curve[-1][1]), note)
    steps = [step for step, _ in run.curve("ppo", "reward/score_mean")]
    planned = number(run.setting("ppo.updates"))
    if steps:
        note = f"of {planned:.0f} planned" if planned and steps[-1] < planned else "policy updates"
        add("Policy version", steps[-1], f"{steps[-1]:.0f}", note)
    wall = max((row["end_s"] for row in run.phases), default=None)
    wall = wall or max((number(row.get("wall_s")) or 0.0 for row in run.metrics), default=None)
    speed = [v for _, v in run.curve("ppo", "perf/gen_tokens_per_s") if v is not None]
    note = f"{sum(speed) / len(speed):.0f} tok/s sampled" if speed else ""
    add("Wall time", wall, duration(wall), note)
    cells = "".join(
        f'<div class="tile"><span>{esc(label)}</span><b>{value}</b><em>{esc(note)}</em></div>'
        for label, value, note in tiles
    )
    return f'<section id="numbers" class="tiles">{cells}</section>' if tiles else ""


def models(run: Run) -> str:
    """The judged models on the held-out prompts, and the paired comparisons."""
    found = run.evaluation.get("models") or {}
    judged = models_of(run)
    present = [model for model, _, _ in judged]
    title = (
        f"{', '.join(name for _, name, _ in judged)} on held-out prompts" if judged else "Models on held-out prompts"
    )
    if not present:
        return section("models", title, absent("<code>evaluation.json</code> is missing: run the stage “evaluate”."))
    rows = []
    for key, label, unit, digits, share in MEASURES:
        if any(found[model].get(key) is not None for model in present):
            name = f"{label}" + (f" <small>{unit}</small>" if unit else "")
            rows.append([name, *(interval(found[model].get(key), digits, share=share) for model in present)])
    head = ["", *(f'<span class="{css}">{esc(name)}</span>' for _, name, css in judged)]
    prompts = sorted({int(n) for model in present if (n := number(found[model].get("prompts"))) is not None})
    many = " / ".join(f"{n:,}" for n in prompts)
    intro = f"Means over {many} prompts; brackets are 95% bootstrap intervals over prompts."
    return section("models", title, table(head, rows, "models") + _comparisons(run), intro if many else "")


def _comparisons(run: Run) -> str:
    compared = run.evaluation.get("comparisons") or {}
    out = []
    pairs_of = [(judged_name(run.evaluation), judged_title(run.evaluation), "ppo"), ("base", "Base", "base")]
    for key, title, css in [
        *((f"{model}_vs_sft", f"{name} against SFT", css) for model, name, css in pairs_of),
        ("sft_vs_base", "SFT against base", "sft"),
    ]:
        values = compared.get(key)
        if not isinstance(values, dict):
            continue
        matched = values.get("matched_length") or {}
        gains = [("Gold gain", values.get("gold_gain")), ("Learned-score gain", values.get("proxy_gain"))]
        gains.append(("VADER gain", values.get("vader_gain")))
        key, judge = ("proxy", "Learned-score") if values.get("judge") == "proxy" else ("gold", "Gold")
        gains.append((f"{judge} gain at matched length", matched.get(f"{key}_gain")))
        gains.append((f"{judge} gain, length regressed out", values.get("length_adjusted_gain")))
        rates = [("Win rate", values.get("win_rate")), ("Win rate at matched length", matched.get("win_rate"))]
        low, high = svg.shared_range([value for _, value in gains], 0.0)
        rows = [
            [esc(label), interval(value, 3, signed=True), svg.interval_bar([(value, css)], low, high, 0.0)]
            for label, value in gains
            if bounds(value)[0] is not None
        ]
        rows += [
            [esc(label), interval(value, 1, share=True), svg.interval_bar([(value, css)], 0.0, 1.0, 0.5)]
            for label, value in rates
            if bounds(value)[0] is not None
        ]
        if number(values.get("length_ratio")) is not None:
            rows.append(["Length ratio", f'<span class="mean">× {num(values["length_ratio"], 3)}</span>', ""])
        pairs = number(matched.get("pairs"))
        note = (
            f'<p class="note">Matched length: the {count(int(pairs), "pair")} of nearly equal length.</p>'
            if pairs
            else ""
        )
        out.append(f"<div><h3>{esc(title)}</h3>{table(('', 'Mean', ''), rows, 'gains')}{note}</div>")
    return f'<div class="pair">{"".join(out)}</div>' if out else ""


def reward_models(run: Run) -> str:
    ranks = ("reward_model", "preference")
    found = [stage for stage in run.stages if str(stage.get("name", "")).startswith(ranks)]
    title = "Held-out pairs"
    if not found:
        return section("reward-models", title, absent("No finished reward model in <code>stages.json</code> yet."))
    rows = []
    for stage in found:
        metrics = stage.get("metrics") or {}
        mine, theirs = ({n: metrics.get(p + s) for n, s in SUFFIXES} for p in ("accuracy", "vader_accuracy"))
        css = "gold" if "gold" in str(stage["name"]) else "proxy"
        rows.append(
            [
                f'<i class="swatch {css}"></i>{esc(str(stage["name"]).partition("/")[2] or stage["name"])}',
                interval(mine, 1, share=True),
                interval(theirs, 1, share=True),
                svg.interval_bar([(theirs, "plain"), (mine, css)], 0.5, 1.0, 0.5),
                num(metrics.get("pairs"), 0),
            ]
        )
    head = ("", "Accuracy", "VADER’s", "50 to 100%", "Pairs")
    intro = (
        "How often the model prefers the text that people preferred, beside VADER, a word list without learning, on the "
        "same pairs. “proxy” trains PPO; “gold” only judges; “preference” is a policy, by its own likelihoods."
    )
    return section("reward-models", title, table(head, rows, "gains"), intro)


SUFFIXES = (("mean", ""), ("low", "_low"), ("high", "_high"))


def alarm_list(run: Run) -> str:
    found, silent, unknown = rules.evaluate(run)
    cards = "".join(
        f'<article class="alarm {alarm.severity}"><h3><span>{"⚠ Alarm" if alarm.severity == "alarm" else "ℹ Note"}</span>'
        f"{esc(alarm.title)}</h3><p>{esc(alarm.finding)}</p><dl><dt>Means</dt><dd>{esc(alarm.meaning)}</dd>"
        f"<dt>Try</dt><dd>{esc(alarm.advice)}</dd></dl></article>"
        for alarm in found
    )
    body = f'<div class="alarms">{cards}</div>' if cards else '<p class="quiet">✓ No alarm.</p>'
    lists = ""
    if silent:
        lists += f'<p class="note">Checked without a finding: {esc(", ".join(silent))}.</p>'
    if unknown:
        lists += f'<p class="note">Not checked, for lack of data: {esc(", ".join(unknown))}.</p>'
    return section("alarms", "Alarms", body + lists)


def stages(run: Run) -> str:
    rows = [
        [
            esc(stage.get("name", "")),
            "from the cache" if stage.get("cached") else "made in this run",
            f"<code>{esc(stage.get('path') or '')}</code>",
            duration(stage.get("seconds")),
        ]
        for stage in run.stages
    ]
    return table(("Stage", "", "Result", "Time"), rows, "stages", text_columns=3) if rows else ""


def configuration(run: Run) -> str:
    if not run.config:
        return section("configuration", "Configuration", absent("<code>config.yaml</code> is missing."))
    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=100)
    lines = count(text.count("\n"), "line")
    body = f"<details><summary>{lines}, resolved</summary><pre>{esc(text)}</pre></details>"
    return section("configuration", "Configuration", body)


def reproduce(run: Run) -> str:
    if run.overrides is not None:
        again = f"<p>The same run again:</p><pre>{esc(shlex.join(['python', 'train.py', *run.overrides]))}</pre>"
    else:
        again = (
            "<p>The command line was not recorded. The configuration above holds every value; "
            "<code>python train.py --cfg job</code> prints the defaults to compare it with.</p>"
        )
    report = f"python -m controller.report {shlex.quote(str(run.path))}"
    body = f"{stages(run)}{again}<p>This page again, from the files of the run:</p><pre>{esc(report)}</pre>"
    return section("reproduce", "How to reproduce", body)
