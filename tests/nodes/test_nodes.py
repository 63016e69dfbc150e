"""Runs on several hosts: processes apart, slow cables, pulled ones, and hosts that die. What must hold after each: the run
ends as it should, and its ledger balances (docs/nodes.md).

The one without the mark is a small part of it, for `make test`; the others are `make test-nodes`. All of them need root.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import ROLES, Run, overrides
from tests.nodes.hosts import Host, Network, network, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no hosts of its own: {why_not()}")
nodes = pytest.mark.nodes

# Each process fills a CPU, so Ray puts it where one is free.
SHORT = (
    "cluster.cpus_per_process=1",
    "ppo.max_staleness=0",
    "ppo.sampling.max_completion_tokens=24",
    "ppo.sampling.min_completion_tokens=16",
    "evaluate.prompts=8",
)
Start = Callable[..., Run]


@pytest.fixture
def net() -> Iterator[Network]:
    with network() as made:
        yield made


@pytest.fixture
def start(net: Network, tmp_path: Path, tiny_model: Path, reward_model: Path) -> Iterator[Start]:
    """Starts a run on a host; the cluster's address is the first argument."""
    runs: list[Run] = []

    def begin(address: str, *more: str, on: Host | None = None) -> Run:
        host = on or net.hosts[0]
        arguments = overrides(tmp_path, tiny_model, reward_model, f"cluster.address={address}", *SHORT, *more)
        run = Run(tmp_path, arguments, host.environment, before=host.enter)
        runs.append(run)
        return run

    yield begin
    for run in runs:
        run.kill()


def where(net: Network) -> dict[str, list[str]]:
    """Names of the hosts that have processes of a role, as many times as they have."""
    return {role: [host.name for host in net.hosts for _ in host.processes(part)] for role, part in ROLES.items()}


def check(run: Run, updates: int, net: Network) -> None:
    """The run trained each of its rollouts once, and lost none; the audit is read as a user does."""
    found = run.audit()
    assert (found.faults, found.trained, found.quarantined, found.open) == ([], updates * 16, 0, 0), found
    audit = [sys.executable, "-m", "controller.ledger", str(run.run_dir)]
    told = subprocess.run([*net.hosts[0].enter, *audit], env=net.hosts[0].environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr


def test_an_actor_a_rank_and_a_replica_on_hosts_of_their_own(net: Network, start: Start) -> None:
    """Rollouts, scores and weights all go over the network: the three hosts share no memory."""
    for _ in range(3):
        net.add()
    run = start(net.start_ray(1, 1, 1), "ppo.updates=3")
    run.wait_for("^version 1 ")
    found = where(net)
    assert [len(hosts) for hosts in found.values()] == [1, 1, 1]
    assert {host for hosts in found.values() for host in hosts} == {"host1", "host2", "host3"}
    assert run.end() == 0, run.printed
    check(run, 3, net)
    rows = run.rows()
    assert [row["fault/actors_without_update"] for row in rows] == [0, 0, 0]
    assert max(row["staleness/max"] for row in rows) == 0
    assert max(abs(row["kl/mismatch_k3"]) for row in rows) < 0.05  # the actor sampled with the weights that were sent
