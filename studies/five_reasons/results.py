"""The results of a study, all of them computed: verdicts, arms, tuning. `study.json` is what this module writes."""

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from common.flatten import flat
from controller.record.number_text import number
from studies.five_reasons import negation, two_turn_mdp
from studies.five_reasons.contrasts import Estimate, absent, estimate, holm_levels, length_matched_wins, verdict
from studies.five_reasons.frontier import Matched, matched_kl
from studies.five_reasons.kept import kept_members
from studies.five_reasons.members import Member, members_of_study
from studies.five_reasons.registration import (
    MEASURES,
    PREREGISTRATION,
    RECORD,
    Claim,
    Contrast,
    Preregistration,
    StudyError,
    parse,
    recorded,
    sha256,
)
from studies.five_reasons.tuning import Tried, tuned

NAME = "study.json"
OF_A_MEMBER = ("ppo.seed", "evaluate.seed", "run_dir")  # settings in which the seeds of an arm differ


@dataclass
class Finding:
    """A claim with what was found."""

    claim: Claim
    estimate: Estimate
    level: float  # Holm's, two-sided
    verdict: str
    secondary: list[tuple[Contrast, Estimate]]
    wins: Estimate | None  # at equal length, where the contrast is of two arms
    is_preliminary: bool

    @property
    def interval(self) -> tuple[float, float]:
        return self.estimate.interval(1 - self.level)


@dataclass
class Arm:
    """An arm over its seeds; means over seeds and prompts."""

    name: str
    members: list[Member]
    gain: Estimate  # gold, over SFT
    proxy_gain: Estimate

    def mean(self, metric: str, model: str = "own") -> float | None:
        return _mean([m.mean(model, metric) for m in self.members])

    def evaluated(self, name: str) -> float | None:
        return _mean([m.evaluated("own", name) for m in self.members])

    @property
    def kl(self) -> float | None:
        return _mean([m.kl for m in self.members if m.is_judged])

    @property
    def length_ratio(self) -> float | None:
        own, sft = self.mean("length"), self.mean("length", "sft")
        return own / sft if own is not None and sft else None


@dataclass
class Study:
    directory: Path
    plan: Preregistration
    file: str  # of the pre-registration
    sha: str
    registered_at: float | None
    problems: list[str]  # what a reader must know before any number
    members: list[Member]
    claims: list[Finding]
    arms: list[Arm]
    matched: list[Matched]
    negation: dict[str, Any] | None
    areas: dict[str, Estimate]  # under the curve, of each measure of the negation test; empty where it has not run
    tuning: list[Tried]
    mdp: dict[str, Any]


def study_of(directory: str | Path, tuning: Sequence[Path] = ()) -> Study:
    """Everything that the directory of a sweep says about the claims.

    Args:
        tuning: where the tuning is (`tuned`); by default in the directory beside the study's.

    Raises:
        StudyError: no member of a study is there, one is there twice, or its registration or tuning cannot be read.
    """
    root = Path(directory)
    members = kept_members(root) or members_of_study(root)
    _refuse_twins(members)
    plan, file, sha, registered_at, problems = _registered(root, members)
    problems += _unlike(members)
    found = _negation(root, sha, problems)
    claims = judge_claims(members, found, plan)
    arms = [_arm(name, members, plan) for name in dict.fromkeys(m.arm for m in members)]
    tried = tuned(tuning or [_tuning_of(root)], members, plan)
    areas = {name: negation.auc(found["scored"], {name: 1.0}, plan.bootstrap) for name in MEASURES} if found else {}
    path, mdp = matched_kl(members), two_turn_mdp.results()
    return Study(
        directory=root,
        plan=plan,
        file=file,
        sha=sha,
        registered_at=registered_at,
        problems=problems,
        members=members,
        claims=claims,
        arms=arms,
        matched=path,
        negation=found,
        areas=areas,
        tuning=tried,
        mdp=mdp,
    )


def _tuning_of(root: Path) -> Path:
    """Beside the study's directory: its own, else that of the first study."""
    own = root.resolve().with_name(f"{root.resolve().name}_tuning")
    return own if own.is_dir() else own.with_name("five_reasons_tuning")


def judge_claims(members: Sequence[Member], found: dict[str, Any] | None, plan: Preregistration) -> list[Finding]:
    """Verdicts on all claims, at the levels of `verdict`."""

    def of(contrast: Contrast, claim: Claim) -> Estimate:
        if contrast.metric != "negation_auc":
            return estimate(members, contrast, plan, plan.seeds_of(claim))
        if found is None:
            return absent("python -m controller.study.negation has not run")
        return negation.auc(found["scored"], contrast.contrast, plan.bootstrap)

    estimates = [of(claim, claim) for claim in plan.claims]
    levels = holm_levels([e.p_value for e in estimates], plan.alpha)
    findings = []
    for claim, primary, level in zip(plan.claims, estimates, levels, strict=True):
        wins = None
        if len(claim.contrast) == 2 and claim.metric == "gold":
            first, second = claim.contrast
            wins = length_matched_wins(members, first, second, plan)
        rows = [(contrast, of(contrast, claim)) for contrast in claim.secondary]
        few = claim.metric != "negation_auc" and _is_less_than_planned(primary, claim, plan)
        wide = primary.interval(1 - plan.alpha / len(plan.claims))
        conclusion = verdict(primary.interval(1 - level), wide, claim.margin)
        findings.append(Finding(claim, primary, level, conclusion, rows, wins, few))
    return findings


def _is_less_than_planned(found: Estimate, claim: Claim, plan: Preregistration) -> bool:
    """Whether fewer seeds or fewer held-out prompts have been judged than were registered."""
    prompts = found.prompts + found.left_out
    return bool(found.seeds) and (len(found.seeds) < (claim.seeds or plan.seeds) or prompts < (plan.prompts or 0))


def _arm(name: str, members: Sequence[Member], plan: Preregistration) -> Arm:
    over_sft = {name: 1.0, f"{name}:sft": -1.0}
    gold, proxy = (
        Contrast(title=name, metric="gold", contrast=over_sft),
        Contrast(title=name, metric="proxy", contrast=over_sft),
    )
    return Arm(
        name, [m for m in members if m.arm == name], estimate(members, gold, plan), estimate(members, proxy, plan)
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _registered(root: Path, members: Sequence[Member]) -> tuple[Preregistration, str, str, float | None, list[str]]:
    """The plan that was registered when the sweep began, else the first study's as it is, with its file's name, its hash,
    its time and what is wrong about that."""
    note = root / RECORD
    if not note.exists():
        problem = f"There is no {RECORD}: nothing shows that claims and margins were fixed before these runs."
        return parse(PREREGISTRATION.read_text(encoding="utf-8")), PREREGISTRATION.name, sha256(), None, [problem]
    known = recorded(note)
    plan, sha, when = parse(known["text"]), str(known["sha256"]), float(known["time"])
    problems, file = [], PREREGISTRATION.with_name(str(known.get("file", PREREGISTRATION.name)))
    now = sha256(file) if file.exists() else "gone"
    if sha != now:
        problems.append(
            f"{file.name} has changed since this study began ({sha[:12]} -> {now[:12]}); it is judged by the one that it "
            "began with."
        )
    if other := sorted({str(m.facts["registration"])[:12] for m in members if m.facts.get("registration", sha) != sha}):
        problems.append(f"Members were kept under another pre-registration: {', '.join(other)}.")
    started = [number(m.facts.get("started")) for m in members]
    early = sum(1 for value in started if value is not None and value < when)
    if early:
        problems.append(f"{early} members started before the registration.")
    return plan, file.name, sha, when, problems


def _refuse_twins(members: Sequence[Member]) -> None:
    """Two members of one arm and seed: nothing says which is meant, and to take the better one would be cheating."""
    first: dict[tuple[str, int], Member] = {}
    for member in members:
        twin = first.setdefault((member.arm, member.seed), member)
        if twin is not member:
            raise StudyError(
                f"arm {member.arm}, seed {member.seed} is there twice: {twin.run.path.name} and {member.run.path.name}. A "
                "study has one run of each; move one of them out of its directory"
            )


def _unlike(members: Sequence[Member]) -> list[str]:
    """Members that do not belong together: made by other code, or of one arm with other settings than its first seed."""
    made: dict[str, list[str]] = {}
    for member in members:
        if code := member.facts.get("code"):
            made.setdefault(str(code)[:12], []).append(f"{member.arm} {member.seed}")
    problems = []
    if len(made) > 1:
        by = "; ".join(f"{code}: {', '.join(names)}" for code, names in made.items())
        problems.append(f"The members were made by {len(made)} versions of the code (arm and seed by digest): {by}.")
    first: dict[str, dict[str, Any]] = {}
    for member in members:
        settings = {key: value for key, value in flat(member.run.config).items() if key not in OF_A_MEMBER}
        if not settings:
            continue  # it was refused before it had any
        known = first.setdefault(member.arm, settings)
        if other := sorted(key for key in {*known, *settings} if known.get(key) != settings.get(key)):
            problems.append(f"{member.arm}, seed {member.seed}, was not run as its first seed was: {', '.join(other)}.")
    of_seeds: dict[int, dict[str, str]] = {}
    for member in members:
        models = member.facts.get("models") or {}
        if other := sorted(
            n for n, v in of_seeds.setdefault(member.seed, dict(models)).items() if models.get(n, v) != v
        ):
            problems.append(
                f"{member.arm}, seed {member.seed}, had another model than the first arm of its seed: {', '.join(other)}."
            )
    return problems


def _negation(root: Path, sha: str, problems: list[str]) -> dict[str, Any] | None:
    path = root / negation.NAME
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    if found.get("preregistration") != sha:
        problems.append(f"{negation.NAME} was made under another pre-registration; run the negation test again.")
    return found


def as_json(study: Study) -> dict[str, Any]:
    """What is committed of a study: small, and every number of the page's tables."""
    return {
        "preregistration": study.sha,
        "registered_at": study.registered_at,
        "problems": study.problems,
        "machine": {
            "processor": platform.machine(),
            "cores": psutil.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        },
        "claims": [_claim_json(finding, study.sha) for finding in study.claims],
        "arms": [
            {
                "arm": arm.name,
                "gold_gain": arm.gain.as_dict(),
                "proxy_gain": arm.proxy_gain.as_dict(),
                "kl": arm.kl,
                "length_ratio": arm.length_ratio,
                "ended": arm.mean("ended"),
                "distinct_1": arm.evaluated("distinct_1"),
                "distinct_2": arm.evaluated("distinct_2"),
                "episodes": arm.members[0].episodes,
            }
            for arm in study.arms
        ],
        "members": [
            {
                "arm": member.arm,
                "seed": member.seed,
                "state": member.state,
                "error": member.error,
                "code": member.facts.get("code"),
                "diverged": member.divergence(study.plan.diverged),
                "missed_checks": member.missed_checks(study.plan.checks),
                "constraint": member.constraint,
                "gold": member.mean("own", "gold"),
                "gold_sft": member.mean("sft", "gold"),
                "kl": member.kl,
                "drift": member.drift,
            }
            for member in study.members
        ],
        "matched_kl": [{k: _finite(v) for k, v in asdict(row).items()} for row in study.matched],
        "negation_auc": {name: area.as_dict() for name, area in study.areas.items()},
        "tuning": [asdict(row) for row in study.tuning],
        "two_turn_mdp": study.mdp,
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _claim_json(finding: Finding, sha: str) -> dict[str, Any]:
    rows = {"number": finding.claim.number, "title": finding.claim.title, "verdict": finding.verdict}
    return rows | {
        "preregistration": sha,
        "preliminary": finding.is_preliminary,
        "metric": finding.claim.metric,
        "contrast": finding.claim.contrast,
        "margin": finding.claim.margin,
        "p_value": finding.estimate.p_value,
        "estimate": finding.estimate.as_dict(1 - finding.level),
        "secondary": [c.model_dump() | e.as_dict() for c, e in finding.secondary],
        "wins_at_equal_length": finding.wins.as_dict() if finding.wins else None,
    }
