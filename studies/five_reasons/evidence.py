"""The parts of the page that a sceptical reader goes to: equal KL, the task with a known optimum, negation, all runs,
tuning, and how to check."""

import datetime
import math
import os
from typing import Any

from controller.record.number_text import compact, count, num, percent
from controller.report.rendering import absent, esc, interval, section, table
from studies.five_reasons import negation, negation_rules
from studies.five_reasons.contrasts import VERDICTS
from studies.five_reasons.members import Member
from studies.five_reasons.registration import PREREGISTRATION
from studies.five_reasons.results import Study

EXAMPLES = 8
MEASURES = (
    ("cross_entropy", "cross-entropy a token (SFT model)"),
    ("cross_entropy_sum", "cross-entropy of the text"),
    ("cross_entropy_signed", "rise of the cross-entropy a token"),
    ("proxy", "reward model that PPO sees"),
    ("gold", "gold reward model"),
)


def ranking(study: Study) -> str:
    """How well whatever ranks texts does so, by stage and seed."""
    rows: dict[str, list[str]] = {}
    for member in study.members:
        for stage in member.run.stages:
            known, name = stage.get("metrics") or {}, str(stage.get("name"))
            if "accuracy" not in known:
                continue
            who = (
                f"{member.arm}, seed {member.seed}: its likelihoods" if name == "preference" else name.replace("_", " ")
            )
            values = {"mean": known["accuracy"], "low": known.get("accuracy_low"), "high": known.get("accuracy_high")}
            rows.setdefault(who, [esc(who), interval(values, 1, share=True), percent(known.get("sft_accuracy"), 1)])
    if not rows:
        return ""
    intro = (
        "Held-out pairs of human snippets on which the higher score, or likelihood, goes to the one that people rated "
        "higher. An arm can be good at this and no better at writing: that is claim 1."
    )
    body = table(("What ranks", "Pairs right", "The same by SFT"), list(rows.values()), "short")
    return section("ranking", "Ranking what others wrote", body, intro)


def matched(study: Study) -> str:
    if not study.matched:
        return section("matched", "At equal KL", absent("No arm has been judged yet."))
    rows = []
    for row in study.matched:
        if math.isnan(row.ppo_gain):
            at = "<small>PPO never was there</small>"
        else:
            at = f"{num(row.ppo_gain, 2, signed=True)} ± {num(1.96 * row.ppo_error, 2)}"
        rows.append([esc(row.arm), str(row.seed), num(row.kl, 1), num(row.gain, 2, signed=True), at])
    intro = (
        "How far had PPO come when it had drifted as far as each arm did in the end? PPO’s path is read from its "
        "training: gold score of the rollouts that were sampled for it, as a mean over 5 versions, since the first; ± "
        "is 1.96 standard errors of that. The arm’s own gain is on held-out prompts. PPO’s own row says how well the "
        "two agree."
    )
    head = ("Arm", "Seed", "Its KL, nats", "Its gold gain", "PPO’s gain at this KL")
    return section("matched", "At equal KL", table(head, rows, "short"), intro)


def mdp(study: Study) -> str:
    found = study.mdp
    rows = []
    for payment, seeds in found["payments"].items():
        noise = sum(s["noise_in_second"] for s in seeds) / len(seeds)
        rows.append(
            [
                f"<code>environment.reward={esc(payment)}</code>",
                ", ".join(num(s["worth"], 2) for s in seeds),
                ", ".join(num(s["first_action"], 2) for s in seeds),
                num(noise, 2),
            ]
        )
    intro = (
        "Can the machinery tell the ways of paying a conversation apart at all? Two turns of one token each; the "
        f"first answer that is paid best spoils the second. The best policy is worth {found['best']:g}, the one that "
        f"is greedy in each turn {found['greedy']:g}. A table learns it through the functions that train the language "
        "model (rewards, GAE, whitening, PPO loss), from scratch whenever this page is drawn. A turn that is an "
        "episode of its own must end at the greedy answer; the other two must find the best, and the one that is paid "
        f"at the end must carry the noise of turn 1 (variance {found['noise_variance']:g}) into the advantages of turn "
        "2."
    )
    head = ("Paid", "Worth of what was learnt, 3 seeds", "P(best first answer)", "Noise in turn 2")
    return section("mdp", "A task with a known optimum", table(head, rows, "short"), intro)


def negation_section(study: Study) -> str:
    found = study.negation
    if found is None:
        text = f"Not run: <code>python -m controller.study.negation {esc(study.directory)}</code>"
        return section("negation", "The negation test", absent(text))
    rows = []
    for name, title in MEASURES:
        area = study.areas[name]
        if not area.missing:
            negated, control = negation.changes(found["scored"], name)
            rows.append(
                [title, interval(area.as_dict(), 3), num(negated.mean(), 3), num(control.mean(), 3)]
            )  # fmt: skip
    head = ("Measure", "Area under the curve", "Mean change by the negation", "By the control")
    intro = (
        f"{count(len(found['triples']), 'held-out snippet')}, each with <q>{negation_rules.NEGATION}</q> and with "
        f"<q>{negation_rules.CONTROL}</q> after its first {', '.join(negation_rules.VERBS)}. The area is the "
        "probability that a measure changes more for a negation than for a control; 0.5 is blindness. 95% intervals "
        "over snippets."
    )
    left = "".join(f"<li>{number} {esc(reason)}</li>" for reason, number in found["left_out"].items())
    rules = (
        f'<p class="note">Of {found["texts"]} snippets the rules (<code>studies/five_reasons/negation_rules.py</code>) left '
        "out:</p>"
        f'<ul class="gaps">{left}</ul>'
    )
    return section("negation", "The negation test", table(head, rows) + rules + _examples(found), intro)


def _examples(found: dict[str, Any]) -> str:
    """The first triples, as they come: nobody has chosen them."""
    names = [name for name in ("cross_entropy", "proxy") if name in found["scored"]]
    rows = []
    for i, item in enumerate(found["triples"][:EXAMPLES]):
        shown = [esc(item["negated"]), num(item["rating"], 1, signed=True)]
        for name in names:
            text, negated, control = found["scored"][name][i]
            shown.append(f"{num(negated - text, 2, signed=True)} / {num(control - text, 2, signed=True)}")
        rows.append(shown)
    titles = {"cross_entropy": "Cross-entropy", "proxy": "Reward"}
    head = ("Negated snippet", "People’s rating", *(f"{titles[name]}: negation / control" for name in names))
    return (
        f"<details><summary>The first {len(rows)} snippets with the change of each measure</summary>"
        f"{table(head, rows)}</details>"
    )


def members(study: Study) -> str:
    rows = [_member_row(member, study) for member in study.members]
    intro = (
        "Every run that the study has started, failed and diverged ones included. A diverged run stays in every "
        "number above; a failed one has none to give, and its seed leaves the contrasts of its arm."
    )
    head = ("Arm", "Seed", "State", "Gold", "Gold of SFT", "KL, nats", "Length", "Ends")
    return section("members", "All runs", table(head, rows, "members", text_columns=3), intro)


def _member_row(member: Member, study: Study) -> list[str]:
    report = member.run.path / "report.html"
    name = esc(member.arm)
    if report.exists():
        name = f'<a href="{esc(os.path.relpath(report, study.directory.resolve()))}">{name}</a>'
    state = esc(member.state) + (f"<small>{esc(member.error[:160])}</small>" if member.error else "")
    diverged = member.divergence(study.plan.diverged)
    if diverged:
        state += f'<small class="no">diverged: {esc(", ".join(diverged))}</small>'
    state += "".join(f'<small class="no">{esc(text)}</small>' for text in member.missed_checks(study.plan.checks))
    if member.constraint:
        state += f"<small>{esc(member.constraint)}</small>"
    values = [num(member.mean("own", "gold"), 2, signed=True), num(member.mean("sft", "gold"), 2, signed=True)]
    ended = member.mean("own", "ended")
    values += [num(member.kl, 1), num(member.mean("own", "length"), 1), "–" if ended is None else f"{ended:.0%}"]
    return [name, str(member.seed), state, *values]


def tuning(study: Study) -> str:
    if not study.tuning:
        text = (
            "No tuning runs were found beside this study: every arm ran with the values of "
            "<code>studies/five_reasons/conf/arm</code> and "
            "<code>conf/config.yaml</code> as they are. An arm that lost may be one that nobody tuned. "
            "<code>python train.py -m +experiment=five_reasons_tuning</code> spends the same budget on every arm."
        )
        return section("tuning", "Tuning", absent(text))
    rows = []
    for row in study.tuning:
        state = esc(row.state) + "".join(f'<small class="no">{esc(text)}</small>' for text in row.missed)
        used = "–" if row.is_used is None else '<span class="yes">✓</span>' if row.is_used else ""
        value = f"<b>{esc(row.value)}</b> ✦" if row.is_best else esc(row.value)
        rows.append(
            [
                esc(row.arm),
                f"<code>{esc(row.key)}</code>",
                value,
                state,
                num(row.gain, 2, signed=True),
                num(row.drift, 1),
                num(row.objective, 2, signed=True),
                used,
                esc(row.source),
            ]
        )
    arms = list(dict.fromkeys(row.arm for row in study.tuning))
    runs = {arm: sum(row.arm == arm and row.objective is not None for row in study.tuning) for arm in arms}
    most = max(runs.values())
    few = ", ".join(f"{arm} {runs.get(arm, 0)}" for arm in [a.name for a in study.arms] if runs.get(arm, 0) < most)
    said = f"NOT every arm got {count(most, 'run')}: {few}" if few else f"Each arm got {count(most, 'run')}"
    intro = (
        f"{said}; another seed, and the training prompts, which no result is judged on. ✦ the best of an arm: gold gain "
        "less 0.1 for each nat of drift beyond evaluate.max_kl, of the settings that have not missed a check. Drift is "
        "counted from where the arm’s training starts. Used: the study ran with this value. From: the sweep that tried it, "
        "or an earlier study by its pre-registration."
    )
    head = ("Arm", "What was tried", "Value", "State", "Gold gain", "Drift", "Objective", "Used", "From")
    return section("tuning", "The same tuning for every arm", table(head, rows, text_columns=4), intro)


def check(study: Study) -> str:
    directory = esc(study.directory)
    rules = "".join(f"<li>{esc(rule)}</li>" for rule in [*study.plan.exclusions, study.plan.tuning] if rule)
    plan = study.plan
    body = (
        f"<p>Claims, contrasts, margins and exclusions: <code>studies/five_reasons/{PREREGISTRATION.name}</code>, SHA-256 "
        f"<code>{study.sha}</code>, written down in <code>registration.json</code> when the sweep began: "
        f"{_when(study.registered_at)}.</p>"
        f'<ul class="gaps">{rules}</ul>'
        f"<p>Verdicts: {', '.join(VERDICTS)}; computed by <code>studies/five_reasons/contrasts.py</code> from an interval "
        f"of {compact(plan.bootstrap.samples)} bootstrap draws of seeds and prompts (the same prompts in every seed "
        "drawn), or the t interval over seeds and prompts where that is wider, at the level that Holm’s correction leaves a "
        f"claim ({plan.alpha:g} for the family).</p><p>Every "
        "completion with every score: <code>samples.jsonl</code> of each run, lines with <code>stage: "
        "evaluate</code>. What was set: <code>config.yaml</code> beside it. All numbers of this page: "
        f"<code>study.json</code>.</p><pre>python -m controller.study {directory}\npython -m controller.study.negation "
        f"{directory}</pre><p>What this cannot say: one small model, one kind of text, and judges that are models "
        "themselves. A reward model of the same architecture as the policy shares its blind spots; VADER’s rules "
        "stand beside it for that reason. SFT and reward models are one set for all seeds, so that seeds vary the "
        "second half of the road alone.</p>"
    )
    return section("check", "How to check", body)


def _when(seconds: float | None) -> str:
    if seconds is None:
        return "in no record"
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
