"""`python -m controller.export RUN [--step N|best] [--merged] OUT`: a plain Hugging Face directory with a model card, from a
commit that verifies. The newest one is taken where none is named. Of a run with adapters it is a directory of PEFT, or with
`--merged` the whole model; RUN may then be an adapter's directory too."""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from common.files import durable
from common.files.templates import filled
from common.models.adapters import is_adapter, write_merged
from contracts.estimators import known_estimator
from controller.commits import commit_store
from controller.commits.commit_store import CheckpointError, Commit

POLICY = "policy/"
UNKNOWN = "not known: see the base model's card"
SOURCES = {"sft": "SFT", "prompts": "PPO's prompts", "preferences": "reward model"}


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


def export(run_dir: Path, commit: Commit, out: Path, is_merged: bool = False) -> None:
    """Copy the files of the policy that the manifest names; `is_merged`: merge the adapter that they are into its base.

    Raises:
        FileExistsError: `out` exists.
        CheckpointError: the commit is not what its manifest says, or there is no adapter to merge.
        LoadingError: the base of the adapter is not there.
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
    if is_merged:
        partial = _merged(partial, f"the policy of {commit.path}")
    (partial / "README.md").write_text(card(run_dir, commit, is_adapter(str(partial))))
    durable.publish(partial, out)


def _merged(adapter: Path, title: str) -> Path:
    """The whole model, in a directory beside that of the adapter, which goes."""
    if not is_adapter(str(adapter)):
        raise CheckpointError(f"--merged: {title} is no adapter, but a whole model already")
    whole = adapter.with_name(adapter.name + ".whole")
    shutil.rmtree(whole, ignore_errors=True)
    write_merged(str(adapter), whole)
    shutil.rmtree(adapter)
    return whole


def export_adapter(adapter: Path, out: Path) -> None:
    """The whole model of an adapter's directory. Raises as `export`."""
    if out.exists():
        raise FileExistsError(f"{out} exists; write a new path")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_merged(str(adapter), partial)
    durable.publish(partial, out)


def card(run_dir: Path, commit: Commit, is_of_adapter: bool = False) -> str:
    """The model card, from what the run recorded; what nobody recorded is said to be unknown."""
    config, read = commit.run.config, commit.run.sources
    estimator = known_estimator(config["ppo"]["estimator"])
    base, licence = config["model"]["path"], base_licence(config["model"]["path"])
    head = {
        "library_name": "peft" if is_of_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": base,
    }
    head |= {"license": licence} if licence else {}
    return filled(
        Path(__file__).with_name("model_card.md"),
        head=yaml.safe_dump(head, sort_keys=False).strip(),
        licence=licence or UNKNOWN,
        commit=commit,
        config=config,
        kl=config["ppo"]["kl"].get("place") or (estimator.kl if estimator else None),
        sources=[
            (use, source["path"])
            for name, use in SOURCES.items()
            if read is None or name in read
            for source in _sources(config["data"], name)
        ],
        metrics=last_metrics(run_dir, commit.step),
    )


def _sources(data: dict[str, Any], name: str) -> list[dict[str, Any]]:
    mixed = list((data.get("prompt_sources") or {}).values()) if name == "prompts" else []
    return mixed or ([data[name]] if data.get(name) else [])


def last_metrics(run_dir: Path, step: int) -> dict[str, float]:
    """Scores, KL and lengths of the update that the commit was made after."""
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:  # torn, where a disk was full
            continue
        if row.get("stage") in ("ppo", "value_warmup") and row.get("step") == step - 1:
            return {n: v for n, v in row.items() if n.startswith(("reward/", "kl/", "completion/")) and v is not None}
    return {}


def base_licence(base: str) -> str | None:
    """Of the base model's own card, where the directory has one."""
    readme = Path(base) / "README.md"
    if not readme.is_file():
        return None
    parts = readme.read_text().split("---")
    try:
        head = yaml.safe_load(parts[1]) if len(parts) > 2 else None
    except yaml.YAMLError:  # other people's cards are as they are
        return None
    return head.get("license") if isinstance(head, dict) else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m controller.export", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--step", help="a commit's number, or `best`; the newest where it is left out")
    parser.add_argument("--merged", action="store_true", help="of adapters: the whole model")
    parser.add_argument("out", type=Path, help="directory to make")
    options = parser.parse_args(arguments)
    try:
        if options.merged and is_adapter(str(options.run)):
            export_adapter(options.run, options.out)
            print(f"{options.out}: {options.run} merged into its base")
            return 0
        commit = chosen(options.run, options.step)
        export(options.run, commit, options.out, options.merged)
    except (CheckpointError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.out}: the policy of {commit.path}, version {commit.version}")
    return 0
