"""A node of the cluster is gone: two raylets on this machine, one of which is killed."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from common.processes.process_env import driver_env
from tests.chaos import ROLES, Run, overrides

pytestmark = pytest.mark.chaos

# Lives until its input ends; kills the second node when it is told to, and adds a third.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster()
options = {"include_dashboard": False, "object_store_memory": 2**28}
cluster.add_node(num_cpus=3, **options)
second = cluster.add_node(num_cpus=2, **options)
print("address", cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(second, allow_graceful=False)
    cluster.add_node(num_cpus=2, **options)
    print("removed", flush=True)
cluster.shutdown()
"""


@pytest.fixture
def token(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "token"
    path.write_text("0123456789abcdef" * 4)
    path.chmod(0o600)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


@pytest.fixture
def cluster(token: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **driver_env(), **token},
    )
    yield process
    assert process.stdin is not None
    process.stdin.close()
    process.wait(60)


def printed(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line.removeprefix(word).strip()
    raise AssertionError(f"the cluster has ended before it printed {word}")


def of_the_run(cluster: subprocess.Popen[str]) -> list[psutil.Process]:
    """Actors, ranks and reward replicas, on all nodes: they descend from whoever has started the raylets."""
    found = []
    for process in psutil.Process(cluster.pid).children(recursive=True):
        try:
            if any(role in "".join(process.cmdline()) for role in ROLES.values()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_what_ran_on_a_lost_node_is_started_on_another(
    cluster: subprocess.Popen[str], token: dict[str, str], tmp_path: Path, tiny_model: Path, reward_model: Path
) -> None:
    address = printed(cluster, "address")
    # A CPU for each process: actors and learner fill the first node, the rest goes to the second.
    arguments = ("ppo.updates=12", "ppo.max_staleness=1", "checkpoint.every=2", "cluster.num_actors=2")
    placed = (f"cluster.address={address}", "cluster.cpus_per_process=1", "cluster.max_actor_restarts=4")
    run = Run(tmp_path, overrides(tmp_path, tiny_model, reward_model, *arguments, *placed), token)
    try:
        run.wait_for(r"^version 2 ", 300)
        before = of_the_run(cluster)
        assert cluster.stdin is not None
        cluster.stdin.write("kill\n")
        cluster.stdin.flush()
        printed(cluster, "removed")
        end = time.monotonic() + 60
        while all(process.is_running() for process in before) and time.monotonic() < end:
            time.sleep(0.2)
        assert not all(process.is_running() for process in before), "nothing of the run was on the lost node"
        assert run.driver.poll() is None, run.printed
        assert run.end(400) == 0, run.printed
    finally:
        run.kill()
    print(run.printed)
    found = run.audit()
    assert (found.faults, found.trained) == ([], 12 * 16)
