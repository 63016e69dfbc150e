"""What Hydra's multirun asks of a run: a directory of its own that stays the same, and a comparison at the end.

    python train.py -m ppo.kl.coef=0.02,0.05 ppo.seed=1,2
        runs/NAME/0-ppo.kl.coef=0.02,ppo.seed=1/     a run directory like any other
        runs/NAME/...
        runs/NAME/report.html                        the members compared

The same command again goes on where it stopped: members that are done are not run again.
"""

import atexit
import copy
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from common.composing import origin_of_run
from common.files.durable import replace_text
from common.files.outcome import read_outcome
from contracts.checks.overrides import quoted
from contracts.config import TandemConfig
from controller.record.reader import ORIGIN
from controller.record.redaction import redact_hydra, redact_sweep, redacted
from controller.record.status_file import read_status

MOST_CHARACTERS = 120  # of a directory's name; file systems allow 255 bytes


class RunFailed(RuntimeError):
    """A run failed and has said so. In a sweep Hydra counts it, goes on with the others, and ends with exit code 1."""


def member_name(number: int | str, overrides: str) -> str:
    """The directory of a member: its number and its overrides, of paths the last part."""
    short = re.sub(r"=[^,]*/", "=", str(overrides))
    return re.sub(r"[^\w.=,+-]+", "_", f"{number}-{short}".rstrip("-"))[:MOST_CHARACTERS]


def register_resolvers() -> None:
    """`${member_name:...}` of conf/config.yaml."""
    OmegaConf.register_new_resolver("member_name", member_name, replace=True)


def hide_secrets() -> None:
    """In what Hydra has written of this run and of its sweep, before anything can end the run."""
    hydra = HydraConfig.get()
    if hydra.output_subdir is not None:
        redact_hydra(Path(hydra.runtime.output_dir) / hydra.output_subdir)
    if is_member():
        redact_sweep(Path(hydra.sweep.dir))


def keep_origin(conf: Path) -> None:
    """Beside the overrides that Hydra has kept, where the command line has found its configuration: the command that a
    report prints has both."""
    hydra = HydraConfig.get()
    if hydra.output_subdir is None:
        return
    file, words = Path(hydra.runtime.output_dir) / hydra.output_subdir / ORIGIN, origin_of_run(hydra, conf).words
    if words:
        replace_text(file, yaml.safe_dump(words))
    else:
        file.unlink(missing_ok=True)


def is_member() -> bool:
    return HydraConfig.get().mode == RunMode.MULTIRUN


def place_member(composed: DictConfig) -> None:
    """Let the member's `run_dir` be the directory that Hydra has given it, and its sweep its group in wandb."""
    hydra = HydraConfig.get()
    composed.run_dir = hydra.runtime.output_dir
    composed.logger.group = group_of(composed, hydra.sweep.dir)


def group_of(composed: DictConfig, sweep_dir: str) -> str:
    """A member's group in wandb: its sweep, where it has none of its own."""
    return str(Path(sweep_dir).name if composed.logger.group is None else composed.logger.group)


def finished_objective(config: TandemConfig) -> tuple[bool, float | None]:
    """(whether this member is done already with the same configuration, files and code, its objective)."""
    from controller.pipeline.ingredients import made_of

    kept, status = Path(config.run_dir) / "config.yaml", read_status(config.run_dir)
    if status.state != "done":
        return False, None
    try:
        theirs, value = yaml.safe_load(kept.read_text()), read_outcome(kept.parent)
        started = copy.deepcopy(config)
        # A run writes the format that it has chosen, perhaps on another machine.
        for section, settings in (("model", started.model), ("reward_service", started.reward_service)):
            settings.dtype = theirs[section]["dtype"] if settings.dtype == "auto" else settings.dtype
        if config.reuse_stages is True:
            started.reuse_stages = theirs["reuse_stages"]
        if theirs != redacted(asdict(started)):
            return False, None
        if config.reuse_stages is not True and status.facts.get("made_of") != made_of(started):
            print(
                f"Tandem: {config.run_dir} was done with other data, checkpoints, functions or code: it runs again, but for "
                "stages that this does not reach (reuse_stages=true leaves it as it is)"
            )
            return False, None
        return True, value
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):  # not all there, or torn: it runs again
        return False, None


def keep_in_names_what_is_swept(config: DictConfig) -> None:
    """Leave the overrides that all members share out of the members' directories, but what the experiment itself sweeps:
    `arm=ppo` alone and `arm=raft` alone are not to share a directory. Hydra composes each member anew from the overrides
    that it has kept, so that is where it goes, and it reaches other processes with them."""
    given = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    swept = {override.key_or_group for override in given if override.is_sweep_override()}
    swept |= set(config.hydra.sweeper.get("params") or {})
    shared = ",".join(sorted({override.key_or_group for override in given} - swept))
    with read_write(config), open_dict(config):
        config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys=[{shared}]")


def share_directory(config: DictConfig) -> None:
    """Of all members: `name`, and so where a sweep lies, may be what an experiment that is swept says of itself."""
    with read_write(config), open_dict(config):
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(config.hydra.sweep.dir)}")


class SweepReport(Callback):
    """Compares the members of a sweep when it ends, however it ends.

    Hydra leaves a sweep with a failed member by raising, past `on_multirun_end`; so the report is drawn when the process
    ends, after Hydra has said what failed.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        keep_in_names_what_is_swept(config)
        share_directory(config)
        atexit.register(report_sweep, Path(config.hydra.sweep.dir))


def report_sweep(directory: Path) -> None:
    """Write the comparison of a sweep's members and say which is the best, with its command."""
    from controller.record.reader import ReportError
    from controller.report.comparison_page import render_comparison
    from controller.report.members import best_of, members_of

    redact_sweep(directory)  # of one whose members could not even be composed
    try:
        members = members_of([directory])
        target = render_comparison(members, directory / "report.html")
    except ReportError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return
    for member in members:
        value = "no objective" if member.objective is None else f"objective {member.objective:+.3f}"
        print(f"  {member.state:<12} {value:<20} {member.label}")
    failed = sum(member.state != "done" for member in members)
    print(f"sweep: {len(members) - failed} of {len(members)} members done; compared in {target}")
    best = best_of(members)
    if best is not None:
        print(f"best member: {best.run.path}\n  {shlex.join(best.command)}")
