"""The page of a study: a verdict for each claim, and under each number what it was computed from.

Study ──> verdicts, claims, arms, frontier, task, negation, members, tuning, how to check ──> study.html
"""

from controller.report.style import CSS

from controller.record.number_text import compact, count, duration, num, percent
from controller.report.rendering import absent, esc, interval, section, table
from studies.five_reasons import charts, evidence
from studies.five_reasons.charts import TONES
from studies.five_reasons.contrasts import NOT_JUDGED, Estimate
from studies.five_reasons.registration import Contrast
from studies.five_reasons.results import Arm, Judged, Study

OWN_CSS = (
    ".forest{display:block;width:100%;min-width:660px;height:auto;margin-top:12px}"
    ".forest .name{fill:var(--ink);font-size:12.5px}"
    ".forest .said{fill:var(--tone);font-size:12.5px;font-weight:680}.forest .band{fill:var(--rule)}"
    ".forest .mark{fill:var(--tone);stroke:var(--card)}.forest .whisker{stroke:var(--tone);stroke-width:3.2}"
    ".good{--tone:var(--good)}.bad{--tone:var(--bad)}.unsure{--tone:var(--unsure)}.none{--tone:var(--none)}"
    ".chip{display:inline-block;padding:1px 10px;border-radius:20px;border:1px solid var(--tone);color:var(--tone);"
    "font-weight:650;font-size:13px}.claim{margin-top:22px}.claim h3{font-size:18px;margin:0 0 8px}"
    ".claim dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 18px;margin:14px 0}.claim dt{color:var(--faint)}"
    ".claim dd{margin:0;max-width:80ch}.whisker.thin{stroke-width:1.4;opacity:.7}.formula{font-size:13px}"
    ".problem{--tone:var(--bad)}code{overflow-wrap:anywhere}td small{display:block}"
    "@media(max-width:640px){.claim dl{grid-template-columns:1fr}.claim dd{margin-bottom:8px}}"
)
ANCHORS = (
    ("claims", "Claims"),
    ("arms", "Arms"),
    ("frontier", "Frontier"),
    ("ranking", "Ranking"),
    ("matched", "Equal KL"),
    ("mdp", "Known optimum"),
    ("negation", "Negation"),
    ("members", "All runs"),
    ("tuning", "Tuning"),
    ("check", "How to check"),
)
MEANING = {
    "reproduced": "The whole interval is on the side of the claim.",
    "opposite": "The whole interval is on the other side.",
    "equivalent": "The whole interval is closer to zero than the margin: whatever there is is too small to matter.",
    "inconclusive": "The interval allows for more than one of the other three. That is not evidence of no effect.",
    NOT_JUDGED: "What the contrast needs is not there.",
}


def page(study: Study) -> str:
    body = "".join(
        (
            _banner(study),
            _claims(study),
            _arms(study),
            _frontier(study),
            evidence.ranking(study),
            evidence.matched(study),
            evidence.mdp(study),
            evidence.negation_section(study),
            evidence.members(study),
            evidence.tuning(study),
            evidence.check(study),
        )
    )
    links = "".join(f'<a href="#{anchor}">{text}</a>' for anchor, text in ANCHORS if f'id="{anchor}"' in body)
    title = study.directory.resolve().name
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(title)} – Tandem</title><style>{CSS}{OWN_CSS}</style></head><body><main>"
        f'<header><p class="over">Tandem study</p><h1>Five reasons for RL after supervised learning</h1>'
        f'<p class="facts">{_facts(study)}</p><nav>{links}</nav></header>{body}'
        "<footer>Drawn from the files of the run directories; nothing was fetched, nothing was sent.</footer>"
        "</main></body></html>\n"
    )


def _facts(study: Study) -> str:
    seeds = sorted({m.seed for m in study.members})
    done = sum(m.is_judged for m in study.members)
    parts = [
        count(len(study.arms), "arm"),
        f"{count(len(seeds), 'seed')} ({', '.join(map(str, seeds))})",
        f"{done} of {len(study.members)} runs judged",
        f"pre-registration {study.sha[:12]}",
    ]
    return esc(" · ".join(parts))


def _banner(study: Study) -> str:
    found = [judged.verdict for judged in study.claims]
    said = ", ".join(f"{found.count(v)} {v}" for v in TONES if v in found)
    kind = "bad" if study.problems else "none"
    few = any(judged.is_preliminary for judged in study.claims)
    problems = "".join(f"<li>{esc(text)}</li>" for text in study.problems)
    note = f"* preliminary: fewer than {study.plan.seeds} seeds; the interval is about other prompts, not about other runs."
    return (
        f'<section id="verdict" class="verdict {kind}"><p class="word">Of {len(found)} claims</p><p class="sentence">'
        f"{esc(said)}</p><div class='scroll'>{charts.forest(study)}</div>"
        '<p class="note">Dots: estimates. Bars: intervals at the levels of Holm’s correction, '
        f"{1 - study.plan.alpha:.0%} for the "
        "family. Grey bands: differences that were called too small to matter before the runs. "
        f"{esc(note) if few else ''}</p>" + (f'<ul class="gaps">{problems}</ul>' if problems else "") + "</section>"
    )


def _claims(study: Study) -> str:
    intro = (
        "What the article says, what was done about it, and what came of it. A score is that of the gold judge, a "
        "reward model trained on human ratings that no arm has seen, in standard deviations over human snippets. "
        "Every contrast is paired: the same prompts, the same sampling seeds."
    )
    return section("claims", "Claims", "".join(_claim(judged, study) for judged in study.claims), intro)


def _claim(judged: Judged, study: Study) -> str:
    claim, found = judged.claim, judged.estimate
    area = claim.metric == "negation_auc"
    chip = f'<span class="chip {TONES[judged.verdict]}">{judged.verdict}{" *" if judged.is_preliminary else ""}</span>'
    rows = [("Claim", esc(claim.claim)), ("Test", esc(claim.test)), ("Contrast", formula(claim))]
    if found.missing:
        rows.append(("Result", f"not judged: {esc(found.missing)}"))
    else:
        known = interval(found.as_dict(1 - judged.level), 3 if area else 2, signed=True)
        rows.append(
            (
                "Result",
                f"{known} {percent(1 - judged.level, 1)} interval, p = {compact(found.p_value)}; margin ±{claim.margin:g}",
            )
        )
        rows.append(("From", _basis(judged)))
    rows.append(("Conclusion", f"{chip} {MEANING[judged.verdict]}"))
    items = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows)
    return (
        f'<div class="card claim" id="claim-{claim.number}"><h3>{claim.number}. {esc(claim.title)} {chip}</h3>'
        f"<dl>{items}</dl>{_secondary(judged)}</div>"
    )


def formula(contrast: Contrast) -> str:
    """`ppo − rank`, with `arm (SFT)` for the model before an arm."""
    parts = []
    for cell, weight in contrast.contrast.items():
        arm, _, model = cell.partition(":")
        name = f"{arm} ({model.upper() if model == 'sft' else model})" if model else arm
        size = "" if abs(weight) == 1 else f"{abs(weight):g} × "
        parts.append(f"{'−' if weight < 0 else '+'} {size}{name}")
    text = " ".join(parts).removeprefix("+ ")
    return f'<code class="formula">{esc(contrast.metric)}: {esc(text)}</code>'


def _basis(judged: Judged) -> str:
    found = judged.estimate
    if judged.claim.metric == "negation_auc":
        return f"{count(found.prompts, 'triple')}; one SFT model, one pair of reward models"
    by_seed = ", ".join(f"seed {s}: {num(v, 2, signed=True)}" for s, v in zip(found.seeds, found.by_seed, strict=True))
    left = f", {count(found.left_out, 'prompt')} left out" if found.left_out else ""
    return f"{count(found.prompts, 'prompt')}{left} × {count(len(found.seeds), 'seed')}; {by_seed}"


def _secondary(judged: Judged) -> str:
    digits = 3 if judged.claim.metric == "negation_auc" else 2
    rows = [[esc(c.title), formula(c), _shown(e, digits)] for c, e in judged.secondary]
    if judged.wins is not None:
        pairs = f"{count(judged.wins.prompts, 'pair')} of equal length" if not judged.wins.missing else ""
        wins = esc(judged.wins.missing) if judged.wins.missing else interval(judged.wins.as_dict(), 0, share=True)
        rows.append(["wins at equal length", f"<code class='formula'>{esc(pairs)}</code>", wins])
    note = '<p class="note">Not part of the verdict, without correction for their number; 95% intervals.</p>'
    return table(("Beside it", "Contrast", "Result"), rows, text_columns=2) + note if rows else ""


def _shown(found: Estimate, digits: int) -> str:
    return f"<small>{esc(found.missing)}</small>" if found.missing else interval(found.as_dict(), digits, signed=True)


def _arms(study: Study) -> str:
    rows = [_arm_row(i + 1, arm) for i, arm in enumerate(study.arms)]
    head = ("Arm", "Seeds", "Gold gain", "Learned gain", "KL", "Length", "Ends", "Distinct 1, 2", "Sampled", "Time")
    intro = (
        "Every arm against the SFT model of the same run: gains in score units with 95% intervals over seeds and "
        "prompts, KL from SFT in nats a sequence, length as a share of SFT’s, completions that end by themselves, "
        "distinct 1- and 2-grams, completions sampled to train on, and the mean time of a run. A gain with another "
        "length may be a gain of length. The learned gain of a conversation is the sum over its answers, which the arm is "
        "paid; its gold gain is the mean."
    )
    return section("arms", "Arms", table(head, rows, "members"), intro)


def _arm_row(place: int, arm: Arm) -> list[str]:
    judged = sum(m.is_judged for m in arm.members)
    times = [m.run.phases[-1]["end_s"] for m in arm.members if m.run.phases]
    ratio, episodes = arm.length_ratio, arm.members[0].episodes
    return [
        f'<i class="swatch m{(place - 1) % 8}"></i><b>{place}</b> {esc(arm.name)}',
        f"{judged} of {len(arm.members)}",
        _shown(arm.gain, 2),
        _shown(arm.proxy_gain, 2),
        num(arm.kl, 1),
        "–" if ratio is None else f"× {num(ratio, 2)}",
        percent(arm.mean("ended")),
        f"{num(arm.evaluated('distinct_1'), 2)}, {num(arm.evaluated('distinct_2'), 2)}",
        num(episodes, 0),
        duration(sum(times) / len(times) if times else None),
    ]


def _frontier(study: Study) -> str:
    panels = charts.frontier(study, "gold", "Gold judge") + charts.frontier(study, "proxy", "Learned score (proxy)")
    if not panels:
        return section("frontier", "Frontier", absent("No arm has been judged yet."))
    intro = (
        "Gain over SFT against drift on the held-out prompts, numbered as in the table of arms; bars are 95% "
        "intervals. Lines: PPO on its way, in training, and the best of 1, 2, 4, … n, at log n − (n − 1)/n nats, the "
        "most that choosing costs. Where the learned score rises and the gold one does not, an arm has learnt the "
        "faults of its reward model."
    )
    return section("frontier", "Gain against drift", f'<div class="pair">{panels}</div>', intro)
