#!/bin/bash
# A SLURM of one node on the loopback of a network of its own, in namespaces of its own: `ray symmetric-run` refuses to start
# beside another Ray, and ends with `ray stop`, which ends every Ray that it sees.
#   unshare --pid --fork --kill-child --mount-proc --mount --uts --net bash slurm_node.sh DIRECTORY
set -eu
dir=$1
hostname node1
# SLURM resolves no name on a machine whose only address is that of the loopback.
ip link set lo up
ip link add veth0 type veth peer name veth1
ip addr add 10.98.0.1/24 dev veth0
ip link set veth0 up
ip link set veth1 up
mkdir -p "$dir"/{state,spool,munge} /tmp/ray
mount -t tmpfs tmpfs /tmp/ray
mount -t tmpfs tmpfs /run
printf "127.0.0.1 localhost\n10.98.0.1 node1\n" >"$dir/hosts"
mount --bind "$dir/hosts" /etc/hosts
# --all: nproc alone believes OMP_NUM_THREADS, which is 1 under pytest, and no job would ever fit.
cat >"$dir/slurm.conf" <<CONF
ClusterName=tandem
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge.socket,cred_expire=10 # which a job that is queued again waits for
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
KillWait=30
NodeName=node1 NodeAddr=node1 CPUs=$(nproc --all) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
CONF
head -c 1024 /dev/urandom >"$dir/munge/key"
chmod 700 "$dir/munge"
chmod 400 "$dir/munge/key"
munged --force --key-file="$dir/munge/key" --socket=/run/munge.socket --pid-file=/run/munged.pid \
    --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
export SLURM_CONF=$dir/slurm.conf
slurmctld
slurmd
touch "$dir/started"
while :; do sleep 1; done # and reap orphans, as the first process of a machine does
