"""Tandem's entry point: `python train.py [stage=...] [key=value ...]`, a Hydra application.

Exit codes: 0 done, 1 a run failed, 2 the configuration or the data cannot be used, 75 (EX_TEMPFAIL) ended by SIGTERM and
to be run again, 130 interrupted by SIGINT.
"""

import os
import shlex
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

from common.processes.process_env import driver_env

os.environ.update({key: value for key, value in driver_env().items() if key not in os.environ})

import hydra
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from common.command_line import command_line_problems, flags_first, is_multirun, whole_sections
from common.composing import origin_of_run, reason
from common.error_text import last_line
from common.files.outcome import write_outcome
from common.models.precision import choose_dtypes
from contracts.checks.validation import ConfigError, raise_conflicts, validate
from contracts.config import TandemConfig, register_schema, to_config
from controller.cluster.signals import INTERRUPTED, Interrupted, Stop
from controller.sweep import (
    RunFailed,
    finished_objective,
    hide_secrets,
    is_member,
    keep_origin,
    place_member,
    register_resolvers,
)

register_schema()
register_resolvers()
CONF = Path(__file__).resolve().parent / "conf"


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> float | None:
    """Run one job. Returns what a sweeper maximises (`controller.record.evaluation`) where it was measured.

    Raises:
        RunFailed: in a sweep, where an exit would take the other members with it.
    """
    from controller.data.datasets import DataError

    hide_secrets()
    keep_origin(CONF)
    try:
        if is_member():
            place_member(composed)
        config = resolved(composed)
        validate(config)
        if is_member():
            done, value = finished_objective(config)
            if done:
                print(f"Tandem: {config.run_dir} is done already")
                return value
        stop = Stop(config.checkpoint.grace_s)
        with stop.installed():
            return run(config, stop)
    except (ConfigError, DataError) as error:
        code = refuse(error)
        if is_member():
            raise RunFailed("the configuration or the data cannot be used") from None
        sys.exit(code)
    except RunFailed as failed:
        if is_member():
            raise RunFailed(str(failed)) from None  # the whole traceback is in error.log
        sys.exit(1)
    except Interrupted as end:
        print(f"\ninterrupted; finished stages are kept and will be reused. {end.message}", file=sys.stderr)
        print(f"go on with: {sweep_command() or resume_command(config)}", file=sys.stderr)
        sys.exit(end.exit_code)


def resolved(composed: DictConfig) -> TandemConfig:
    try:
        return to_config(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(reason(error)) from None


def run(config: TandemConfig, stop: Stop) -> float | None:
    from controller.alarms.live import tell_alarms
    from controller.commits.resume import RunDirectory, open_run
    from controller.data.datasets import DataError
    from controller.pipeline.ingredients import made_of
    from controller.pipeline.pipeline import Pipeline
    from controller.pipeline.summary import summary_rows
    from controller.record.evaluation import objective
    from controller.record.status_file import StatusFile
    from controller.record.terminal import Progress
    from controller.report.run_page import render

    with Progress(config.logger.heartbeat_s) as progress:
        progress.line(f"Tandem: stage={config.stage}, run directory {config.run_dir}")
        if chosen := choose_dtypes(config):
            progress.line(chosen)
        directory = RunDirectory(Path(config.run_dir), progress.line)
        with StatusFile(config.run_dir, progress.waiting) as status:
            with open_run(config, directory) as log:
                tell_alarms(log, asdict(config), lambda alarm: progress.line(f"⚠ {alarm.title}: {alarm.finding}"))
                try:
                    pipeline = Pipeline(config, log, progress, directory, stop)
                    ingredients = made_of(config)
                    results = pipeline.run()
                except (ConfigError, DataError) as error:
                    directory.refused()
                    status.refuse(str(error), directory.has_begun)
                    raise
                except Exception as error:
                    path = Path(config.run_dir) / "error.log"
                    path.write_text(traceback.format_exc(), encoding="utf-8", errors="replace")
                    progress.line(f"✗ the run failed: {root_cause(error)}")
                    progress.line(f"  whole traceback: {path}; finished stages are kept and will be reused")
                    progress.line(f"  go on with: {resume_command(config)}")
                    status.end("failed", error=root_cause(error))
                    raise RunFailed(root_cause(error)) from error
            with progress.phase("writing the report"):
                report = render(Path(config.run_dir))
            value = objective(results.get("evaluate", {}), config.evaluate.max_kl)
            write_outcome(Path(config.run_dir), value)
            status.end("done", made_of=ingredients)
            progress.summary(summary_rows(config, results, report), "Tandem")
    return value


def root_cause(error: BaseException) -> str:
    """One line: Ray wraps what an actor raised in its own error."""
    return last_line(getattr(error, "cause", None) or error.__cause__ or error)


def resume_command(config: TandemConfig) -> str:
    from hydra.core.hydra_config import HydraConfig

    from controller.commits import resume

    hydra = HydraConfig.get()
    origin = origin_of_run(hydra, CONF).words
    return resume.resume_command(list(hydra.overrides.task), config.run_dir, origin)


def sweep_command() -> str:
    """Of the sweep that this process runs, if it runs one: an interrupt ends the whole sweep, not a member."""
    from controller.record.redaction import redacted_override

    words = [redacted_override(word) for word in sys.argv[1:]]
    return shlex.join(["python", "train.py", *words]) if is_multirun(sys.argv[1:]) else ""


def refuse(error: Exception) -> int:
    print(f"\nTandem cannot start:\n{error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.argv[1:] = flags_first(sys.argv[1:])
    try:
        raise_conflicts([], command_line_problems(sys.argv[1:], CONF, starts=True))
    except ConfigError as error:
        sys.exit(refuse(error))
    sys.argv[1:] = whole_sections(sys.argv[1:])
    try:
        main()
    except KeyboardInterrupt as end:  # between two members of a sweep, or while they run elsewhere
        sys.exit(end.exit_code if isinstance(end, Interrupted) else INTERRUPTED)
