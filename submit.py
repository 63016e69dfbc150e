"""Send a job to a cluster: `python submit.py [target=ray_jobs|kuberay|slurm] [target.key=value] [overrides of train.py]`.

    python submit.py status JOB     what became of it
    python submit.py logs JOB       its log, followed to its end
    python submit.py stop JOB       SIGTERM; train.py saves its state
    python submit.py resume JOB     the same command in the same run directory

The exit code is that of train.py where the job is followed (Ray Jobs); 2: it cannot be sent as it is written.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from contracts.checks.validation import ConfigError
from contracts.config import TandemConfig
from submission import kuberay, slurm
from submission.job import RECORDS, Job, recorded, to_job
from submission.ray_jobs import Cluster, ClusterError
from submission.targets import RayJobs, Slurm, changed, is_target, target_name, to_target

VERBS = ("status", "logs", "stop", "resume")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, write the script or manifest, send nothing"
    )
    parser.add_argument("--detach", action="store_true", help="do not follow the log of a Ray job")
    parser.add_argument("words", nargs="*", metavar="VERB JOB | key=value")
    options = parser.parse_intermixed_args(arguments)  # overrides may stand on both sides of an option
    words = options.words
    try:
        names = [word for word in words if "=" not in word and not word.startswith("~")]
        if names and names[0] in VERBS:
            return manage(names[0], names[1:], [word for word in words if word not in names], options.detach)
        if names:
            raise ConfigError(f"{names[0]} is neither key=value nor one of {', '.join(VERBS)}")
        job, config = to_job(words)
        if isinstance(job.target, RayJobs):
            return submit_ray_job(job, config, options.dry_run, options.detach)
        return submit_file(job, config, options.dry_run)
    except (ConfigError, ClusterError) as error:
        print(f"\nTandem cannot submit:\n{error}", file=sys.stderr)
        return 2


def submit_ray_job(job: Job, config: TandemConfig, dry_run: bool, detach: bool) -> int:
    assert isinstance(job.target, RayJobs)
    cluster = Cluster(job.target)
    cluster.check_capacity(config)
    if dry_run:
        print(f"the cluster at {job.target.address} can hold the job; it would run\n  {job.command}")
        return 0
    cluster.submit(job)
    print_commands(job)
    return 0 if detach else follow(cluster, job.id)


def follow(cluster: Cluster, job_id: str) -> int:
    try:
        code = cluster.follow(job_id)
    except KeyboardInterrupt:
        print(f"\n{job_id} goes on; python submit.py logs {job_id} follows it again", file=sys.stderr)
        return 130
    print(f"{job_id} has ended with exit code {code}")
    return code


def print_commands(job: Job) -> None:
    print(f"{job.id}, run directory {job.run_dir}")
    for verb in VERBS:
        print(f"  python submit.py {verb} {job.id}", flush=True)


def commands(job: Job) -> dict[str, list[str]]:
    """The programs behind the verbs of a job that is sent as a file."""
    if isinstance(job.target, Slurm):
        return slurm.commands(job, str(RECORDS / f"{job.id}.sbatch"))
    return kuberay.commands(job, str(RECORDS / f"{job.id}.yaml"))


def submit_file(job: Job, config: TandemConfig, dry_run: bool) -> int:
    """Write the script or manifest; hand it to sbatch or kubectl."""
    job.record()
    text = slurm.render(job, config.cluster) if isinstance(job.target, Slurm) else kuberay.render(job, config)
    command = commands(job)["submit"]
    Path(command[-1].removeprefix("--filename=")).write_text(text)
    if dry_run:
        print(f"it would run\n  {shlex.join(command)}")
        return 0
    if isinstance(job.target, Slurm):
        make_run_dir(job.run_dir)
    code = run(command)
    if code == 0:
        print_commands(job)
    return code


def make_run_dir(run_dir: str) -> None:
    """SLURM starts no job whose log has no directory, and says so nowhere."""
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir} cannot be made here: {error.strerror}") from error


def run(command: list[str]) -> int:
    try:
        return subprocess.run(command).returncode
    except FileNotFoundError as error:
        raise ConfigError(f"{command[0]} is not on this machine; where it is, run\n  {shlex.join(command)}") from error


def manage(verb: str, jobs: list[str], overrides: list[str], detach: bool) -> int:
    """A verb for a job that has been submitted. One that another machine has sent needs `target.address=...` as well."""
    if len(jobs) != 1:
        raise ConfigError(f"write python submit.py {verb} JOB; found {len(jobs)} names of jobs")
    if strange := [word for word in overrides if not is_target(word)]:
        raise ConfigError(f"{strange[0]} is nothing that {verb} can change; resume takes the overrides of the job")
    known = recorded(jobs[0])
    target = to_target(overrides) if known is None else changed(known.target, overrides)
    if known is not None and not isinstance(known.target, RayJobs) and overrides:
        instead = "; submit it again, with the same run_dir, to change it" if verb == "resume" else ""
        raise ConfigError(
            f"{overrides[0]} is nothing that {verb} can change with target={target_name(known.target)}: what the job was "
            f"submitted with holds{instead}"
        )
    if isinstance(target, RayJobs):
        return manage_ray_job(verb, jobs[0], target, detach)
    if known is None:
        raise ConfigError(f"{jobs[0]} has not been submitted from this directory: {RECORDS} does not know it")
    if verb == "resume" and isinstance(known.target, Slurm):
        refuse_live(known)
    return run(commands(known)[verb])


def refuse_live(job: Job) -> None:
    """A second start would take the mark and the token from under the first, and both would write one run directory."""
    command = commands(job)["live"]
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{command[0]} is not on this machine: it says whether {job.id} still runs") from error
    if found.returncode:
        raise ConfigError(f"{shlex.join(command)} does not say whether {job.id} still runs: {found.stderr.strip()}")
    if found.stdout.strip():
        raise ConfigError(
            f"{job.id} is there ({found.stdout.strip()}): python submit.py stop {job.id}, and wait for its end"
        )


def manage_ray_job(verb: str, job_id: str, target: RayJobs, detach: bool) -> int:
    cluster = Cluster(target)
    if verb == "logs":
        return follow(cluster, job_id)
    if verb == "resume":
        job = cluster.resume(job_id)
        print_commands(job)
        return 0 if detach else follow(cluster, job.id)
    if verb == "stop":
        cluster.stop(job_id)
    for name, value in cluster.describe(job_id):
        print(f"{name:>13}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
