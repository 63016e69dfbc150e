"""A job on SLURM: a batch script around `ray symmetric-run`, which starts Ray on every node and train.py on the first.

What the script adds to symmetric-run, each because it was missed there:
- It exits 0 when Ray could not be started, so train.py leaves a mark (common/files/outcome.py); without it the job fails.
- It waits 30 s for the other nodes; RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT is `node_wait_s`.
- It dies of SIGTERM, and train.py after it without a checkpoint. The shell of each task therefore takes the signal and
  passes it to train.py alone; Ray stays up until the checkpoint is there. One that comes while Ray starts is remembered.
- It ends with `ray stop`, which ends every Ray of the user on the node: the job takes whole nodes.
A train.py that was told to end and has saved its state exits with REQUEUE_EXIT_CODE: the job is queued again and goes on.
"""

import re
import shlex
from pathlib import Path

from common.files.outcome import FILE
from contracts.config import ClusterConfig
from submission.job import Job
from submission.targets import Slurm

REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h
LOG = "slurm.log"
PLAIN = re.compile(r"[\w./:,=@%+-]+", re.ASCII)

SCRIPT = """\
#!/bin/bash
{directives}
# Written by submit.py; `submit.py resume {id}` sends it again, in the same run directory.
set -u
mark={mark}
export PATH={bin}:$PATH # symmetric-run calls ray by its name
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT={node_wait_s}
{environment}trap : TERM # the warning is for the tasks; this shell must live to queue the job again
TANDEM_HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TANDEM_HEAD
cd {directory} || exit 1
rm -f "$mark"
# Whoever reaches Ray runs code: nodes and train.py share a token that is made for this start of the job.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token}
(umask 077 && mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")" && rm -f "$RAY_AUTH_TOKEN_PATH" &&
    od -An -vtx1 -N32 /dev/urandom | tr -d ' \\n' >"$RAY_AUTH_TOKEN_PATH") || exit 1

driver() {{ # on the first node, when Ray runs on all
    echo $$ >"$TANDEM_PID"
    [[ -e $TANDEM_PID.told ]] && exit {requeue}
    {command}
}}
node() {{ # one shell a node. setsid: a signal for the task is one for this shell alone
    TANDEM_PID=$(mktemp -d)/pid || exit 1 # nobody else can write there, or know its name
    export TANDEM_PID
    {setup}trap 'touch "$TANDEM_PID.told"; [[ -e $TANDEM_PID ]] && kill -TERM "$(cat "$TANDEM_PID")"' TERM
    setsid ray symmetric-run --address "$TANDEM_HEAD:{port}" --min-nodes "$SLURM_JOB_NUM_NODES" \\
        --num-cpus={cpus} --num-gpus={gpus} --disable-usage-stats -- bash -c driver &
    ray=$!
    while wait "$ray"; code=$?; [[ $code -gt 128 ]] && kill -0 "$ray" 2>/dev/null; do :; done # a trap ends `wait`, too
    rm -rf "$(dirname "$TANDEM_PID")"
    exit $code
}}
export -f driver node
srun --kill-on-bad-exit=1 --cpus-per-task={cpus} --cpu-bind=none bash -c node
code=$?

if [[ -e $mark ]]; then
    exit 0
fi
# A job that somebody cancelled is no longer RUNNING, and stays cancelled.
if [[ $code == {requeue} && $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
    echo "train.py has saved its state; the job is queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
if [[ $code == 0 ]]; then
    echo "train.py has not run to its end: Ray did not start" >&2
    exit 1
fi
exit $code
"""


def render(job: Job, cluster: ClusterConfig) -> str:
    """The batch script.

    Args:
        cluster: with num_nodes, gpus_per_node and cpus_per_node set.
    """
    target = job.target
    assert isinstance(target, Slurm)
    return SCRIPT.format(
        id=job.id,
        directives="\n".join(f"#SBATCH {quoted_option(option)}" for option in directives(job, target, cluster)),
        mark=shlex.quote(f"{job.run_dir}/{FILE}"),
        token=shlex.quote(f"{job.run_dir}/ray_token"),
        bin=shlex.quote(str(Path(target.python).parent)),
        node_wait_s=target.node_wait_s,
        environment="".join(f"export {name}={shlex.quote(value)}\n" for name, value in target.env.items()),
        directory=shlex.quote(target.directory),
        command=job.command,
        setup="".join(f"{line}\n    " for line in target.setup),
        port=target.port,
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
    """What each verb runs; `script` is the file that holds the batch script."""
    return {
        "submit": ["sbatch", script],
        "status": ["squeue", f"--name={job.id}", "--format=%i %T %M %R"],
        "logs": ["tail", "-n", "+1", "-F", f"{job.run_dir}/{LOG}"],
        "stop": ["scancel", f"--name={job.id}"],
        "resume": ["sbatch", script],
    }
