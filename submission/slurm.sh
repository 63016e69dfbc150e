#!/bin/bash
{% for option in options %}
#SBATCH {{ option }}
{% endfor %}
# Written by submit.py; `submit.py resume {{ job.id }}` sends it again, in the same run directory.
set -u
mark={{ (job.run_dir ~ "/" ~ mark) | quote }}
export PATH={{ programs | quote }}:$PATH # symmetric-run calls ray by its name
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT={{ target.node_wait_s }}
{% for name, value in target.env.items() %}
export {{ name }}={{ value | quote }}
{% endfor %}
trap : TERM # the warning is for the tasks; this shell must live to queue the job again
TANDEM_HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TANDEM_HEAD
cd {{ target.directory | quote }} || exit 1
rm -f "$mark"
# Whoever reaches Ray runs code: nodes and train.py share a token that is made for this start of the job.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={{ (job.run_dir ~ "/ray_token") | quote }}
(umask 077 && mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")" && rm -f "$RAY_AUTH_TOKEN_PATH" &&
    od -An -vtx1 -N32 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH") || exit 1

driver() { # on the first node, when Ray runs on all
    echo $$ >"$TANDEM_PID"
    [[ -e $TANDEM_PID.told ]] && exit {{ requeue }}
    {{ job.command }}
}
node() { # one shell a node. setsid: a signal for the task is one for this shell alone
    TANDEM_PID=$(mktemp -d)/pid || exit 1 # nobody else can write there, or know its name
    export TANDEM_PID
{% for line in target.setup %}
    {{ line }}
{% endfor %}
    trap 'touch "$TANDEM_PID.told"; [[ -e $TANDEM_PID ]] && kill -TERM "$(cat "$TANDEM_PID")"' TERM
    setsid ray symmetric-run --address "$TANDEM_HEAD:{{ target.port }}" --min-nodes "$SLURM_JOB_NUM_NODES" \
        --num-cpus={{ cpus }} --num-gpus={{ gpus }} --disable-usage-stats -- bash -c driver &
    ray=$!
    while wait "$ray"; code=$?; [[ $code -gt 128 ]] && kill -0 "$ray" 2>/dev/null; do :; done # a trap ends `wait`, too
    rm -rf "$(dirname "$TANDEM_PID")"
    exit $code
}
export -f driver node
srun --kill-on-bad-exit=1 --cpus-per-task={{ cpus }} --cpu-bind=none bash -c node
code=$?

if [[ -e $mark ]]; then
    exit 0
fi
# A job that somebody cancelled is no longer RUNNING, and stays cancelled.
if [[ $code == {{ requeue }} && $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
    echo "train.py has saved its state; the job is queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
if [[ $code == 0 ]]; then
    echo "train.py has not run to its end: Ray did not start" >&2
    exit 1
fi
exit $code
