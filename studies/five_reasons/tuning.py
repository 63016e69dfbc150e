"""The tuning before a study: what was tried of every arm, by runs that are there and by the study.json of an earlier one.

`python -m studies.five_reasons.tuning SOURCE`: what the rule of the pre-registration chooses, to be written into conf/arm.
"""

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from controller.record.evaluation import PENALTY
from controller.record.number_text import number
from controller.record.reader import Run
from studies.five_reasons.kept import kept_members
from studies.five_reasons.members import Member, members_of_study
from studies.five_reasons.registration import PREREGISTRATION, RECORD, Preregistration, StudyError, parse, recorded

# What the tuning sets of what an arm reads, by method.
TUNED = {
    "ppo": "ppo.optimizer.learning_rate",
    "dpo": "preference.optimizer.learning_rate",
    "rank": "preference.nll_coef",
    "filtered_sft": "sft.top_fraction",
    "best_of_n": "evaluate.best_of_n",
}


@dataclass
class Tried:
    """One run of the tuning."""

    arm: str
    setting: str  # of the tuning group; empty where the sweep sets keys of its own
    key: str  # or several, by commas
    value: Any  # of one key; of several a text
    state: str
    gain: float | None
    drift: float | None  # `Member.drift`
    objective: float | None  # none without gain or drift
    missed: list[str] = field(default_factory=list)  # checks of its arm: such a setting is not chosen
    diverged: list[str] = field(default_factory=list)  # such a setting is chosen where all others diverged too
    source: str = ""  # the directory of its run's sweep, or the study.json that it was read from
    is_best: bool = False
    is_used: bool | None = None  # whether the study ran with this value; None where the arm is not in it


def tuned(sources: Sequence[Path], members: Sequence[Member], plan: Preregistration) -> list[Tried]:
    """What was tried, by arm and value, with the best of each arm.

    The best has the largest gold gain over SFT less the penalty for drift (`controller.record.evaluation`, with the KL from
    where its training started), of those that have not missed a check of their arm, and where the plan says so, of those of
    them that have not diverged, if there are any.

    Args:
        sources: directories of tuning sweeps, of which one that is not there has nothing, and files study.json. An arm's
            best is one of the first source that has any of it; values that only later ones have tried are shown beside.

    Raises:
        StudyError: a file that is no study.json.
    """
    rows: list[Tried] = []
    for source in sources:
        known = {(row.arm, row.key, str(row.value)) for row in rows}
        found = _written(source) if source.is_file() else _run(source, plan)
        rows += [row for row in found if (row.arm, row.key, str(row.value)) not in known]
    newest = {row.arm: row.source for row in reversed(rows)}  # the first source of each arm
    for arm, source_of_arm in newest.items():
        tried = [row for row in rows if (row.arm, row.source) == (arm, source_of_arm)]
        fit = [row for row in tried if row.objective is not None and not row.missed]
        whole = [row for row in fit if not row.diverged]
        fit = whole if whole and plan.tuning_avoids_divergence else fit
        for row in fit:
            row.is_best = row is max(fit, key=lambda row: row.objective or 0.0)
    for row in rows:
        ran = [m.run for m in members if m.arm == row.arm]
        row.is_used = row.value in [_value(run, row.key.split(", ")) for run in ran] if ran else None
    used = {row.arm: row.source for row in reversed(rows) if row.is_used}  # the first source that has what was used
    for row in rows:
        row.is_used = row.is_used and row.source == used[row.arm]
    order = list(dict.fromkeys(row.arm for row in rows))
    return sorted(rows, key=lambda row: (order.index(row.arm), number(row.value) or 0.0))


def _value(run: Run, keys: Sequence[str]) -> Any:
    """The setting of one key; of several a text."""
    return run.setting(keys[0]) if len(keys) == 1 else ", ".join(str(run.setting(key)) for key in keys)


def swept(overrides: Iterable[str]) -> list[str]:
    """The keys that a sweep of its own gave to an arm; empty for one over the tuning group."""
    given = [override.lstrip("+").split("=", 1)[0] for override in overrides]
    return [key for key in given if key.startswith(("ppo.", "preference.", "sft.")) and key != "ppo.seed"]


def _run(directory: Path, plan: Preregistration) -> list[Tried]:
    try:
        runs = kept_members(directory) or members_of_study(directory)
    except StudyError:
        return []
    rows = []
    for member in runs:
        setting = next((o.split("=", 1)[1] for o in member.run.overrides or [] if o.startswith("tuning=")), "")
        own, sft, drift = member.mean("own", "gold"), member.mean("sft", "gold"), member.drift
        gain = own - sft if own is not None and sft is not None else None
        bound = number(member.run.setting("evaluate.max_kl")) or math.inf
        objective = None if gain is None or drift is None else gain - PENALTY * max(0.0, drift - bound)
        keys = swept(member.run.overrides or []) or [TUNED.get(str(member.run.setting("method") or "ppo"), "")]
        row = Tried(
            arm=member.arm,
            setting=setting,
            key=", ".join(keys),
            value=_value(member.run, keys),
            state=member.state,
            gain=gain,
            drift=drift,
            objective=objective,
            missed=member.missed_checks(plan.checks),
            diverged=member.divergence(plan.diverged),
            source=directory.name,
        )
        rows.append(row)
    return rows


def _written(path: Path) -> list[Tried]:
    """The rows of a study.json; those of an earlier study keep the source that they name."""
    names = {entry.name for entry in fields(Tried)} - {"is_best", "is_used"}
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        rows = [Tried(**{key: value for key, value in row.items() if key in names}) for row in study["tuning"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(
            f"{path} has no tuning: write a study.json, or the directory of a tuning sweep ({error})"
        ) from None
    for row in rows:
        row.source = row.source or f"study {str(study['preregistration'])[:12]}"
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.five_reasons.tuning", description="What a tuning chose.")
    parser.add_argument("source", type=Path, help="directory of a tuning sweep, or of what is kept of one")
    given = parser.parse_args(arguments)
    try:
        note = given.source / RECORD
        plan = parse(recorded(note)["text"] if note.exists() else PREREGISTRATION.read_text(encoding="utf-8"))
        rows = tuned([given.source], [], plan)
        if not rows:
            raise StudyError(f"{given.source} has no tuning")
    except StudyError as error:
        raise SystemExit(f"study: {error}") from error
    for row in rows:
        objective = "drift not known" if row.objective is None else f"objective {row.objective:+.2f}"
        said = "no result" if row.gain is None else f"{objective}, gain {row.gain:+.2f}"
        notes = "; ".join([*row.missed, *row.diverged])
        print(
            f"  {'✦' if row.is_best else ' '} {row.arm} {row.key} {row.value}: {said}{f' ({notes})' if notes else ''}"
        )


if __name__ == "__main__":
    main()
