"""The members of a study: what each run directory says, by arm and seed, with every completion that was judged."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from contracts.estimators import find_estimator
from controller.record.evaluation import judged_model
from controller.record.number_text import number, percent
from controller.record.reader import ReportError, Run, is_run, read
from controller.record.status_file import read_status
from studies.five_reasons.registration import Check, Diverged, StudyError

BEFORE = ("base", "sft")  # the models that every member judges beside its own
WINDOW = 3  # versions at the end of a training, whose mean is how it ended
# Of a line of samples.jsonl, by the metric of a contrast.
COLUMNS = {"gold": "gold", "proxy": "proxy", "vader": "vader", "length": "tokens", "kl": "kl", "ended": "eos"}


@dataclass
class Member:
    """One run of the study."""

    arm: str
    seed: int
    run: Run
    state: str
    facts: dict[str, Any] = field(default_factory=dict)  # of its status.json
    # By model ("base", "sft", and "own" for what the arm has made), metric and prompt.
    scores: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)

    @property
    def error(self) -> str:
        return str(self.facts.get("error") or "")

    @property
    def is_judged(self) -> bool:
        return "own" in self.scores

    def mean(self, model: str, metric: str) -> float | None:
        """Over the prompts that have it."""
        values = [v for v in self.scores.get(model, {}).get(metric, {}).values() if math.isfinite(v)]
        return float(np.mean(values)) if values else None

    def evaluated(self, model: str, name: str) -> float | None:
        """A number of evaluation.json that is of a whole model."""
        models = self.run.evaluation.get("models") or {}
        row = models.get(model) if model in BEFORE else judged_model(self.run.evaluation)
        return number((row or {}).get(name))

    @property
    def kl(self) -> float | None:
        """Nats a sequence from SFT; of best of n the bound (`controller.evaluation.best_of_n.kl_bound`)."""
        return self.mean("own", "kl")

    @property
    def drift(self) -> float | None:
        """Nats a sequence from where its training started: `kl` where that was SFT, else by its last `WINDOW` versions in
        training."""
        if self.run.setting("method") not in (None, "ppo") or self.run.setting("ppo.init_from") in (None, "sft"):
            return self.kl
        known = [value for _, value in self.run.curve("ppo", "kl/ref_seq") if value is not None]
        return float(np.mean(known[-WINDOW:])) if known else None

    def missed_checks(self, checks: Sequence[Check]) -> list[str]:
        """What it should have done and has not, of the checks of its arm, or of which nobody knows whether it has; empty
        where it was not judged and has no numbers."""
        found = self.run.stage("preference").get("metrics") or {}
        low, sft = number(found.get("accuracy_low")), number(found.get("sft_accuracy"))
        name, missed = f"{self.arm}, seed {self.seed}", []
        for check in (check for check in checks if check.arm == self.arm):
            asked = f"the check asks for {check.pairs_over_sft:.0%} more than SFT"
            if low is None or sft is None:
                if self.is_judged:
                    missed.append(f"{name}, does not say how many held-out pairs it and SFT order right: {asked}")
            elif low - sft < check.pairs_over_sft:
                share = percent(found.get("accuracy"), 1)
                missed.append(f"{name}, orders {share} of held-out pairs (at least {low:.1%}), SFT {sft:.1%}: {asked}")
        return missed

    @property
    def constraint(self) -> str:
        """How the constraint of the combined loss ended, in words; empty without one."""
        target = number(self.run.setting("ppo.combined.target"))
        ends = [self.run.curve("ppo", f"combined/{name}") for name in ("lambda", "score_mean")]
        if target is None or not all(ends):
            return ""
        multiplier, score = (float(np.mean([v for _, v in end[-WINDOW:] if v is not None])) for end in ends)
        return f"score {score:.2f}, target {target:g} {'reached' if score >= target else 'missed'}; lambda {multiplier:.1f}"

    def divergence(self, limits: Diverged) -> list[str]:
        """Why this member counts as diverged, as one that was judged does where a number is not known; empty where it does
        not."""
        kl, ended, distinct = self.drift, self.mean("own", "ended"), self.evaluated("own", "distinct_2")
        known = {"drift": kl, "share that ends": ended, "distinct-2": distinct}
        found = [f"{name} is not known" for name, value in known.items() if value is None and self.is_judged]
        if kl is not None and kl > limits.max_kl:
            found.append(f"drift of {kl:.1f} nats > {limits.max_kl:g}")
        if ended is not None and ended < limits.min_eos_share:
            found.append(f"{ended:.0%} end < {limits.min_eos_share:.0%}")
        if distinct is not None and distinct < limits.min_distinct_2:
            found.append(f"distinct-2 {distinct:.2f} < {limits.min_distinct_2:g}")
        return found

    @property
    def episodes(self) -> int | None:
        """Completions that were sampled to train on."""
        return planned_episodes(self.run.config)


def planned_episodes(config: dict[str, Any]) -> int | None:
    """Completions that a configuration samples to train on, those of the critic's warm-up included; 0 where it trains on
    none, None where it does not say."""
    ppo = config.get("ppo") or {}
    if config.get("method", "ppo") != "ppo":
        return 0
    if not {"updates", "rollouts_per_update", "estimator", "value_warmup_updates"} <= set(ppo):
        return None
    has_critic = find_estimator(ppo["estimator"]).has_value_model
    return (ppo["updates"] + (ppo["value_warmup_updates"] if has_critic else 0)) * ppo["rollouts_per_update"]


def members_of_study(directory: str | Path) -> list[Member]:
    """The runs below `directory` that name an arm, by arm in the order of the sweep, then by seed.

    Raises:
        StudyError: there is none.
    """
    root = Path(directory)
    paths = sorted((p for p in root.iterdir() if is_run(p)), key=_number) if root.is_dir() else []
    found = [member for path in paths if (member := _member(path)) is not None]
    if not found:
        raise StudyError(
            f"{directory} holds no member of a study: write the directory of a sweep over `arm`, which "
            "`python train.py -m +experiment=five_reasons` has made"
        )
    order = list(dict.fromkeys(member.arm for member in found))
    return sorted(found, key=lambda m: (order.index(m.arm), m.seed))


def _number(path: Path) -> tuple[int, str]:
    head = path.name.split("-")[0]
    return (int(head) if head.isdigit() else 1 << 30), path.name


def _member(path: Path) -> Member | None:
    try:
        run = read(path)
    except ReportError:
        return None
    settings = dict(o.lstrip("+").split("=", 1) for o in run.overrides or [] if "=" in o)
    if "arm" not in settings:
        return None
    status = read_status(path)
    state = status.state or ("done" if run.evaluation else "not started")
    # A member that was refused has left its command line and nothing else.
    seed = int(number(run.setting("ppo.seed")) or float(settings.get("ppo.seed", 0)))
    member = Member(settings["arm"], seed, run, state, status.facts)
    if run.evaluation and state == "done":  # else it is left from an earlier run in the same directory
        member.scores = _scores(run.samples)
    return member


def _scores(samples: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """A run that was evaluated twice has its lines twice: the later count. A judge that failed gives NaN."""
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for row in samples:
        if row.get("stage") != "evaluate" or "prompt_id" not in row:
            continue
        model = row["model"] if row.get("model") in BEFORE else "own"
        table = scores.setdefault(model, {})
        for metric, column in COLUMNS.items():
            if column in row:
                value = row[column]
                table.setdefault(metric, {})[row["prompt_id"]] = math.nan if value is None else float(value)
    return scores
