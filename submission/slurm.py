"""A job on SLURM: a batch script (slurm.sh) around `ray symmetric-run`, which starts Ray on every node and train.py on the
first.

What the script adds to symmetric-run, each because it was missed there:
- It exits 0 when Ray could not be started, so train.py leaves a mark (common/files/outcome.py); without it the job fails.
- It waits 30 s for the other nodes; RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT is `node_wait_s`.
- It dies of SIGTERM, and train.py after it without a checkpoint. The shell of each task therefore takes the signal and
  passes it to train.py alone; Ray stays up until the checkpoint is there. One that comes while Ray starts is remembered.
- It ends with `ray stop`, which ends every Ray of the user on the node: the job takes whole nodes.
A train.py that was told to end and has saved its state exits with REQUEUE_EXIT_CODE: the job is queued again and goes on.
"""

import re
from pathlib import Path

from common.files.outcome import FILE
from common.files.templates import filled
from contracts.config import ClusterConfig
from submission.job import Job
from submission.targets import Slurm

REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h
LOG = "slurm.log"
PLAIN = re.compile(r"[\w./:,=@%+-]+", re.ASCII)


def render(job: Job, cluster: ClusterConfig) -> str:
    """The batch script.

    Args:
        cluster: with num_nodes, gpus_per_node and cpus_per_node set.
    """
    target = job.target
    assert isinstance(target, Slurm)
    return filled(
        Path(__file__).with_suffix(".sh"),
        job=job,
        target=target,
        options=[quoted_option(option) for option in directives(job, target, cluster)],
        mark=FILE,
        programs=str(Path(target.python).parent),
        cpus=whole(cluster.cpus_per_node),
        gpus=whole(cluster.gpus_per_node),
        requeue=REQUEUE_EXIT_CODE,
    )


def directives(job: Job, target: Slurm, cluster: ClusterConfig) -> list[str]:
    """The options of sbatch."""
    gpus = whole(cluster.gpus_per_node)
    optional = {
        "partition": target.partition,
        "account": target.account,
        "gpus-per-node": gpus or None,
        **target.options,
    }
    return [
        f"--job-name={job.id}",
        f"--nodes={cluster.num_nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={whole(cluster.cpus_per_node)}",
        "--exclusive",
        f"--time={target.time}",
        f"--signal=TERM@{target.stop_wait_s}",
        "--requeue",
        "--open-mode=append",
        f"--output={job.run_dir.replace('%', '%%')}/{LOG}",  # %j and others stand for something else
        *(f"--{name}={value}" for name, value in optional.items() if value is not None),
    ]


def quoted_option(option: str) -> str:
    """As sbatch reads a directive (`_get_argument` of its opt.c): what is between quotes stays together, `#` begins a
    comment elsewhere, a backslash takes the next character as it is, and nothing is expanded. No line goes on in the next:
    `directive_checks` of submission/targets.py refuses what would need it."""
    if PLAIN.fullmatch(option):
        return option
    escaped = option.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def whole(number: float | None) -> int:
    assert number is not None
    return int(number)


def commands(job: Job, script: str) -> dict[str, list[str]]:
    """What each verb runs, and what lists the job while it waits or runs; `script` is the file with the batch script."""
    return {
        "live": ["squeue", "--noheader", f"--name={job.id}", "--format=%i %T"],
        "submit": ["sbatch", script],
        "status": ["squeue", f"--name={job.id}", "--format=%i %T %M %R"],
        "logs": ["tail", "-n", "+1", "-F", f"{job.run_dir}/{LOG}"],
        "stop": ["scancel", f"--name={job.id}"],
        "resume": ["sbatch", script],
    }
