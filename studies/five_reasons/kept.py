"""Results of members that outlive their run directories: one small file each, in the repository.

    runs/STUDY/0-arm=ppo,ppo.seed=11/ ── keep ──> docs/results/STUDY/members/arm=ppo,ppo.seed=11.json
        ── read_kept ──> Member

A study of some hours is run in pieces, on machines that are gone afterwards with all of `runs` and of the cache. A file has
what verdicts and page read: scores by prompt, the settings that make an arm, the curves of the frontier, and which code,
registration and models the run had. Completions are not in it.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files.durable import replace_text
from common.files.source_code import TANDEM
from controller.record.evaluation import judged_model
from controller.record.reader import Run
from studies.five_reasons.members import Member
from studies.five_reasons.registration import StudyError

FOLDER = "members"
MOST_BYTES = 64 << 10
# Decimal places by metric: scores have a spread of 0.5 and more, of which half of the last place is nothing.
PLACES = {"gold": 3, "proxy": 3, "vader": 3, "length": 0, "kl": 2, "ended": 0}
SECTIONS = ("method", "environment", "evaluate", "ppo", "preference", "sft", "reward_model")
CURVES = ("kl/ref_seq", "reward/gold_mean", "combined/lambda", "combined/score_mean")
OF_A_MODEL = ("distinct_1", "distinct_2", "best_of_n")
MODELS = ("sft", "reward_model/proxy", "reward_model/gold")  # shared by the members of a seed
FACTS = ("started", "ended", "code")


def keep(member: Member, registration: str, directory: Path) -> Path:
    """Write what is kept of a judged member below `directory`.

    Args:
        registration: SHA-256 of the pre-registration.

    Raises:
        StudyError: it was not judged, or there is too much of it.
    """
    if not member.is_judged:
        raise StudyError(f"{member.run.path} was not judged ({member.state}): there is nothing to keep of it")
    run, prompts = member.run, sorted({p for tables in member.scores.values() for t in tables.values() for p in t})
    content = {
        "arm": member.arm,
        "seed": member.seed,
        "registration": registration,
        "facts": {name: member.facts.get(name) for name in FACTS} | {"models": models_of(run)},
        "overrides": run.overrides,
        "config": {"name": run.name, "model": {"dtype": run.setting("model.dtype")}}
        | {name: run.config[name] for name in SECTIONS if name in run.config},
        "curves": {name: curve for name in CURVES if (curve := run.curve("ppo", name))},
        "seconds": run.wall_s,
        "stages": [
            {"name": row["name"], "seconds": row.get("seconds"), "metrics": row.get("metrics")}
            for row in run.stages
            if row["name"] != "evaluate"  # all of evaluation.json
        ],
        "evaluation": {
            "method": run.evaluation.get("method"),
            "models": {
                run.evaluation.get("method"): {
                    name: value for name, value in judged_model(run.evaluation).items() if name in OF_A_MODEL
                }
            },
        },
        "prompts": prompts,
        "scores": {
            model: {
                metric: [_rounded(table.get(p), PLACES[metric]) for p in prompts] for metric, table in tables.items()
            }
            for model, tables in member.scores.items()
        },
    }
    return _write(content, directory, re.sub(r"^[0-9]+-", "", run.path.name))  # what Hydra has swept


def keep_failed(job: Mapping[str, str], error: str, registration: str, directory: Path) -> Path:
    """Write of a member that could not be judged that it ran: it takes its seed out of contrasts, and does not run again
    until it succeeds. `job` is what the sweep set of it."""
    nothing: dict[str, Any] = {"config": {}, "curves": {}, "stages": [], "evaluation": {}, "prompts": [], "scores": {}}
    content = {
        "arm": job["arm"],
        "seed": int(job["ppo.seed"]),
        "state": "failed",
        "registration": registration,
        "facts": dict.fromkeys(FACTS) | {"models": {}, "error": error},
        "overrides": [f"{key}={value}" for key, value in job.items()],
        "seconds": None,
    }
    return _write(content | nothing, directory, ",".join(f"{key}={value}" for key, value in sorted(job.items())))


def _write(content: dict[str, Any], directory: Path, name: str) -> Path:
    text = json.dumps(content, separators=(",", ":")) + "\n"
    if len(text) > MOST_BYTES:
        raise StudyError(f"{content['arm']}, seed {content['seed']}: {len(text)} bytes to keep, more than {MOST_BYTES}")
    path = directory / FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)
    return path


def models_of(run: Run) -> dict[str, str]:
    """Fingerprints of the SFT model and the reward models that a run had from the cache or left there.

    Raises:
        StudyError: the cache has one no more, so that nothing tells whether other arms had the same.
    """
    # The cache is written down as the run saw it, from the repository.
    paths = {
        row["name"]: TANDEM / Path(row["path"]).parent / "stage.json" for row in run.stages if row["name"] in MODELS
    }
    gone = [str(path) for path in paths.values() if not path.exists()]
    if gone:
        raise StudyError(f"{run.path}: {', '.join(gone)} are gone, so which models it had cannot be told")
    return {name: json.loads(path.read_text())["fingerprint"] for name, path in paths.items()}


def _rounded(value: float | None, places: int) -> float | int | None:
    if value is None or math.isnan(value):
        return None
    return round(value, places) if places else int(value)


def read_kept(path: Path) -> Member:
    """Raises StudyError where the file is not what `keep` writes."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows = [
            {"stage": "ppo", "step": step, "progress/version": step, name: value}
            for name, curve in content["curves"].items()
            for step, value in curve
        ]
        run = Run(
            path,
            config=content["config"],
            overrides=content["overrides"],
            metrics=rows,
            stages=content["stages"],
            evaluation=content["evaluation"],
            wall_s=content["seconds"],
        )
        member = Member(content["arm"], content["seed"], run, content.get("state", "done"), content["facts"])
        member.facts["registration"] = content["registration"]
        member.scores = {
            model: {
                metric: {
                    p: math.nan if value is None else float(value)
                    for p, value in zip(content["prompts"], values, strict=True)
                }
                for metric, values in tables.items()
            }
            for model, tables in content["scores"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(f"{path} is no kept result of a member ({type(error).__name__}: {error})") from None
    return member


def kept_members(directory: Path) -> list[Member]:
    """All that are kept below `directory`, in the order in which they ran."""
    found = [read_kept(path) for path in sorted((directory / FOLDER).glob("*.json"))]
    return sorted(found, key=lambda member: (member.facts.get("started") or 0.0, member.arm))
