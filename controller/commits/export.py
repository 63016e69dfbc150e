"""`python -m controller.export RUN [--step N|best] OUT`: a plain Hugging Face directory with a model card, from a commit
that verifies. The newest one is taken where none is named."""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from common.files import durable
from controller.commits import commit_store
from controller.commits.commit_store import CheckpointError, Commit

POLICY = "policy/"
UNKNOWN = "not known: see the base model's card"


def chosen(run_dir: Path, step: str | None) -> Commit:
    """Raises CheckpointError where there is no such commit, or it is not valid."""
    if step is None:
        newest = commit_store.newest_valid(run_dir, lambda text: print(text, file=sys.stderr))
        if newest is None:
            raise CheckpointError(f"{run_dir} has no commits")
        return newest
    if step == "best":
        best = commit_store.best(run_dir)
        if best is None:
            raise CheckpointError(f"{run_dir} has no commit with a quality")
        return commit_store.verified(run_dir, best.step)
    if not step.isdigit() or int(step) not in commit_store.steps(run_dir):
        there = ", ".join(map(str, commit_store.steps(run_dir))) or "none"
        raise CheckpointError(f"--step {step}: there is no such commit in {run_dir}; there are: {there}, and best")
    return commit_store.verified(run_dir, int(step))


def export(run_dir: Path, commit: Commit, out: Path) -> None:
    """Copy the files of the policy that the manifest names.

    Raises:
        FileExistsError: `out` exists.
        CheckpointError: the commit is not what its manifest says.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; write a new path")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    records = {name.removeprefix(POLICY): record for name, record in commit.records.items() if name.startswith(POLICY)}
    if not records:
        raise CheckpointError(f"{commit.path} has no policy")
    for name, record in records.items():  # and nothing else that lies there
        target = partial / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(commit.path / POLICY / name, target, follow_symlinks=False)
        if problem := durable.problem(target, record):
            raise CheckpointError(f"the copy went wrong: {problem}")
    (partial / "README.md").write_text(card(run_dir, commit))
    durable.publish(partial, out)


def card(run_dir: Path, commit: Commit) -> str:
    """The model card, from what the run recorded; what nobody recorded is said to be unknown."""
    config = commit.run.config
    base, data = config["model"]["path"], config["data"]
    licence, rows = base_licence(base), last_metrics(run_dir, commit.step)
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "base_model": base}
    head |= {"license": licence} if licence else {}
    scorers = [f"- {name}: version `{version}`" for name, version in sorted(commit.run.scorers.items())]
    metrics = [f"| {name} | {value:.4g} |" for name, value in rows.items()]
    sources = [
        f"- {use}: `{source['path']}`"
        for name, use in (("sft", "SFT"), ("prompts", "PPO's prompts"), ("preferences", "reward model"))
        if (source := data.get(name)) and source["path"]
    ]
    quality = f"{commit.quality[0]} {commit.quality[1]:.4g} over the last updates" if commit.quality else "not measured"
    ppo = config["ppo"]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False).strip(),
            "---",
            f"# {config['name']}, after update {commit.step}",
            "",
            f"Policy version {commit.version} of a Tandem run: {ppo['estimator']} on completions that a reward model "
            f"scored; seed {config['seed']}, KL coefficient {ppo['kl']['coef']} against the SFT model.",
            "",
            f"- base model: `{base}`, SFT model: fingerprint `{commit.run.identity.get('policy')}`",
            f"- licence: {licence or UNKNOWN}; the terms of the data apply too",
            f"- quality: {quality}",
            f"- computed with {', '.join(f'{name} {version}' for name, version in sorted(commit.run.packages.items()))}",
            "",
            "## Data",
            *sources,
            f"- fingerprint of the prompts: `{commit.run.identity.get('prompts')}`",
            "",
            "## Reward",
            *scorers,
            "",
            f"## Metrics of update {commit.step}",
            "These are of training: rollouts of the version before, judged by the scorers above. They are no evaluation.",
            "",
            "| metric | value |",
            "|---|---|",
            *metrics,
            "",
        ]
    )


def last_metrics(run_dir: Path, step: int) -> dict[str, float]:
    """Scores, KL and lengths of the update that the commit was made after."""
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row: dict[str, Any] = json.loads(line)
        if row.get("stage") in ("ppo", "value_warmup") and row.get("step") == step - 1:
            return {n: v for n, v in row.items() if n.startswith(("reward/", "kl/", "completion/")) and v is not None}
    return {}


def base_licence(base: str) -> str | None:
    """Of the base model's own card, where the directory has one."""
    readme = Path(base) / "README.md"
    if not readme.is_file():
        return None
    parts = readme.read_text().split("---")
    head = yaml.safe_load(parts[1]) if len(parts) > 2 else None
    return head.get("license") if isinstance(head, dict) else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m controller.export", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--step", help="a commit's number, or `best`; the newest where it is left out")
    parser.add_argument("out", type=Path, help="directory to make")
    options = parser.parse_args(arguments)
    try:
        commit = chosen(options.run, options.step)
        export(options.run, commit, options.out)
    except (CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.out}: the policy of {commit.path}, version {commit.version}")
    return 0
