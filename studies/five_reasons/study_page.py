"""The page of a study: a verdict for each claim, and under each number what it was computed from.

Study ──> verdicts, claims, arms, frontier, task, negation, members, tuning, how to check ──> study.html
"""

import datetime
import os
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from controller.record.number_text import count, num
from controller.report.rendering import macros
from studies.five_reasons import charts, negation, negation_rules
from studies.five_reasons.charts import TONES
from studies.five_reasons.contrasts import VERDICTS
from studies.five_reasons.members import Member
from studies.five_reasons.results import Finding, Study

TEMPLATES = Path(__file__).with_name("templates")
PAGE, STUDY = macros("page.html", TEMPLATES), macros("study.html", TEMPLATES)
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
EXAMPLES = 8
MEASURES = (
    ("cross_entropy", "cross-entropy a token (SFT model)"),
    ("cross_entropy_sum", "cross-entropy of the text"),
    ("cross_entropy_signed", "rise of the cross-entropy a token"),
    ("proxy", "reward model that PPO sees"),
    ("gold", "gold reward model"),
)


def study_page(study: Study) -> Markup:
    verdicts = [finding.verdict for finding in study.claims]
    said = ", ".join(f"{verdicts.count(v)} {v}" for v in TONES if v in verdicts)
    panels = [charts.frontier(study, "gold", "Gold judge"), charts.frontier(study, "proxy", "Learned score (proxy)")]
    when = study.registered_at
    registered = None if when is None else datetime.datetime.fromtimestamp(when, datetime.UTC)
    sections = (
        STUDY.banner(study, said, charts.forest(study)),
        STUDY.claims([(finding, _basis(finding)) for finding in study.claims], TONES),
        STUDY.arms(study.arms, [_mean_time(arm.members) for arm in study.arms]),
        STUDY.frontier([panel for panel in panels if panel]),
        STUDY.ranking(_rankings(study)),
        STUDY.matched(study.matched),
        STUDY.mdp(study.mdp),
        STUDY.negation(study.directory, study.negation, *_negations(study), negation_rules),
        STUDY.members([(member, _link(member, study)) for member in study.members], study.plan),
        STUDY.tuning(study.tuning, *_runs_of_the_tuning(study)),
        STUDY.check(study, VERDICTS, registered),
    )
    return PAGE.page(
        "Tandem study", study.directory.resolve().name, _facts(study), ANCHORS, sections,
        heading="Five reasons for RL after supervised learning", source="files of the run directories",
        styles=["study.css"],
    )  # fmt: skip


def _facts(study: Study) -> str:
    seeds = sorted({m.seed for m in study.members})
    done = sum(m.is_judged for m in study.members)
    parts = [
        count(len(study.arms), "arm"),
        f"{count(len(seeds), 'seed')} ({', '.join(map(str, seeds))})",
        f"{done} of {len(study.members)} runs judged",
        f"pre-registration {study.sha[:12]}",
    ]
    return " · ".join(parts)


def _basis(finding: Finding) -> str:
    """What the estimate comes from."""
    found = finding.estimate
    if finding.claim.metric == "negation_auc":
        return f"{count(found.prompts, 'triple')}; one SFT model, one pair of reward models"
    by_seed = ", ".join(f"seed {s}: {num(v, 2, signed=True)}" for s, v in zip(found.seeds, found.by_seed, strict=True))
    left = f", {count(found.left_out, 'prompt')} left out" if found.left_out else ""
    return f"{count(found.prompts, 'prompt')}{left} × {count(len(found.seeds), 'seed')}; {by_seed}"


def _mean_time(members: list[Member]) -> float | None:
    times = [m.run.wall_s for m in members if m.run.wall_s is not None]
    return fmean(times) if times else None


def _rankings(study: Study) -> dict[str, dict[str, Any]]:
    """The metrics of whatever ranks texts, by stage and seed."""
    rows: dict[str, dict[str, Any]] = {}
    for member in study.members:
        for stage in member.run.stages:
            known, name = stage.get("metrics") or {}, str(stage.get("name"))
            own = f"{member.arm}, seed {member.seed}: its likelihoods"
            if "accuracy" in known:
                rows.setdefault(own if name == "preference" else name.replace("_", " "), known)
    return rows


def _negations(study: Study) -> tuple[list[Any], list[str], list[Any]]:
    """Of each measure its title, area and mean changes by negation and control; the measures of the examples; and the first
    triples as they come, which nobody has chosen, with the two changes of each of those."""
    found = study.negation
    if found is None:
        return [], [], []
    scored = found["scored"]
    measures = [
        (title, study.areas[name].as_dict(), *(changes.mean() for changes in negation.changes(scored, name)))
        for name, title in MEASURES
        if not study.areas[name].missing
    ]
    names = {name: title for name, title in (("cross_entropy", "Cross-entropy"), ("proxy", "Reward")) if name in scored}
    examples = [
        (item, [(negated - text, control - text) for text, negated, control in (scored[name][i] for name in names)])
        for i, item in enumerate(found["triples"][:EXAMPLES])
    ]
    return measures, list(names.values()), examples


def _link(member: Member, study: Study) -> str:
    """To its report, where it has one."""
    report = member.run.path / "report.html"
    return os.path.relpath(report, study.directory.resolve()) if report.exists() else ""


def _runs_of_the_tuning(study: Study) -> tuple[int, str]:
    """Of the arm that has most, and the arms that have fewer with theirs."""
    runs = {row.arm: 0 for row in study.tuning}
    for row in study.tuning:
        runs[row.arm] += row.objective is not None
    most = max(runs.values(), default=0)
    return most, ", ".join(f"{arm.name} {runs.get(arm.name, 0)}" for arm in study.arms if runs.get(arm.name, 0) < most)
