"""Runs on several hosts: processes apart, slow cables, pulled ones, and hosts that die. What must hold after each: the run
ends as it should, and its ledger balances (docs/nodes.md).

The one without the mark is a small part of it, for `make test`; the others are `make test-nodes`. All of them need root.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import MOMENTS, ROLES, Run, overrides
from tests.conftest import PROOFS
from tests.nodes.hosts import Host, Network, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no hosts of its own: {why_not()}")
nodes = pytest.mark.nodes

# Each process fills a CPU, so Ray puts it where one is free. It fills the largest nodes first, in the order actors, ranks,
# reward replicas; the front of the reward service takes a CPU that is left.
SHORT = (
    "cluster.cpus_per_process=1",
    "ppo.max_staleness=0",
    "ppo.sampling.max_completion_tokens=24",
    "ppo.sampling.min_completion_tokens=16",
    "evaluate.prompts=8",
)
Start = Callable[..., Run]


@pytest.fixture
def start(net: Network, tmp_path: Path, tiny_model: Path, reward_model: Path) -> Iterator[Start]:
    """Starts a run on a host; the cluster's address is the first argument."""
    runs: list[Run] = []

    def begin(address: str, *more: str) -> Run:
        arguments = overrides(tmp_path, tiny_model, reward_model, f"cluster.address={address}", *SHORT, *more)
        run = Run(tmp_path, arguments, hosts=net.hosts)
        runs.append(run)
        return run

    yield begin
    for run in runs:
        run.kill()


def where(net: Network) -> dict[str, list[str]]:
    """Names of the hosts that have processes of a role, as many times as they have."""
    return {role: [host.name for host in net.hosts for _ in host.processes(part)] for role, part in ROLES.items()}


def host_of(net: Network, role: str) -> Host:
    """The only host that has processes of a role."""
    [name] = set(where(net)[role])
    return next(host for host in net.hosts if host.name == name)


def versions(run: Run, number: int, timeout_s: float = 180) -> None:
    """So many more."""
    at_s = run.now()
    for _ in range(number):
        at_s = run.wait_for(r"^version \d", timeout_s, after_s=at_s) + 1e-6


def check(run: Run, net: Network) -> dict[str, Any]:
    """The run trained each of its rollouts once, and lost none; the audit is read as a user does. Returns the last update's
    metrics."""
    print(run.printed)
    last, found = run.rows()[-1], run.audit()
    assert (found.faults, found.trained, found.quarantined) == ([], last["progress/version"] * 16, 0), found
    where_to = Path("/", *run.run_dir.parts[4:]) if run.run_dir.parts[1] == "proc" else run.run_dir
    audit = [sys.executable, "-m", "controller.ledger", str(where_to)]
    told = subprocess.run([*net.hosts[0].enter, *audit], env=net.hosts[0].environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
    return last


def test_an_actor_a_rank_and_a_replica_on_hosts_of_their_own(net: Network, start: Start) -> None:
    """Rollouts, scores and weights all go over the network: the hosts share no memory."""
    for _ in range(4):
        net.add()
    run = start(net.start_ray(1, 1, 1, 1), "ppo.updates=3")
    run.wait_for(MOMENTS["rollouts"], 400)  # four Ray nodes and the engines start on one core
    found = where(net)
    assert [len(hosts) for hosts in found.values()] == [1, 1, 1]
    assert len({host for hosts in found.values() for host in hosts}) == 3
    assert run.end() == 0, run.printed
    assert check(run, net)["progress/version"] == 3
    assert [row["fault/actors_without_update"] for row in run.rows()] == [0, 0, 0]
    assert max(abs(row["kl/mismatch_k3"]) for row in run.rows()) < 0.05  # sampled with the weights that were sent


# Every sequence alone in its batch, of the engine as of the scorer: what is computed beside it changes its last bits.
ALONE = (
    "model.dtype=float32",
    "engine.max_num_seqs=1",
    "reward_service.dtype=float32",
    "reward_service.batch_tokens=1",
)
NOT_TRAINED = ("perf/", "fleet/", "ledger/", "fault/", "progress/", "wall_s")


def trained(run: Run) -> list[dict[str, Any]]:
    return [{n: value for n, value in row.items() if not n.startswith(NOT_TRAINED)} for row in run.rows()]


@nodes
def test_ranks_on_two_hosts_of_which_one_dies_train_what_two_on_one_machine_do(
    net: Network, start: Start, tmp_path: Path, tiny_float32: Path, reward_model: Path
) -> None:
    for _ in range(4):
        net.add()
    models = (f"model.path={tiny_float32}", f"sft_model={tiny_float32}")
    same = (*models, *ALONE, "ppo.updates=8", "cluster.num_learner_ranks=2", "checkpoint.every=2")
    run = start(net.start_ray(1, 2, 2, 2), *same, "cluster.learner_silence_s=20")
    run.wait_for("^version 3 ")
    found = where(net)
    assert len(set(found["rank"])) == 2
    assert found["actor"][0] in found["rank"]
    net.power_off(host_of(net, "reward"))  # and a rank with it; the actor is beside the other
    run.wait_for(r"back to update \d", 120)
    run.wait_for("^version 5 ", 300)
    assert len(set(where(net)["rank"])) == 2
    assert run.end() == 0, run.printed
    last = check(run, net)
    assert (last["progress/version"], last["fault/learner_restarts"], last["fault/actors_lost"]) == (8, 1, 0)

    alone = Run(tmp_path / "alone", overrides(tmp_path / "alone", tiny_float32, reward_model, *SHORT[1:], *same[2:]))
    assert alone.end() == 0, alone.printed
    assert trained(run) == trained(alone)


@nodes
def test_a_cable_is_pulled_for_a_moment_and_for_good(net: Network, start: Start) -> None:
    for _ in range(3):
        net.add()
    fleet = ("cluster.num_actors=2", "cluster.actor_silence_s=20", "cluster.learner_silence_s=30")
    run = start(net.start_ray(1, 2, 2), "ppo.updates=1000", *fleet)
    run.wait_for("^version 1 ")
    for role in ("actor", "rank"):  # the reward replica is beside the rank
        host = host_of(net, role)
        net.cut(host)
        time.sleep(5)
        net.mend(host)
        versions(run, 2)
    assert " is lost" not in run.printed
    spare, host = net.join(2), host_of(net, "actor")
    net.cut(host)
    for number in (0, 1):
        run.wait_for(rf"^actor {number} is lost \(it has generated nothing", 60)
    back_s = max(run.wait_for(f"^actor {number} is back", 300) for number in (0, 1))
    assert len(spare.processes(ROLES["actor"])) == 2
    net.mend(host)  # it learns that it counts for dead
    run.wait_for("^version ", after_s=back_s)
    versions(run, 2)
    run.stop()
    last = check(run, net)
    assert (last["fault/actors_lost"], last["fault/learner_restarts"]) == (2, 0)


@nodes
def test_a_host_dies_with_all_processes_of_a_run_but_the_driver(net: Network, start: Start) -> None:
    for _ in range(3):
        net.add()
    bounds = ("cluster.actor_silence_s=20", "cluster.learner_silence_s=30")
    run = start(net.start_ray(1, 3, 3), "ppo.updates=1000", "checkpoint.every=2", *bounds)
    run.wait_for("^version 3 ")
    before = where(net)
    assert len({host for hosts in before.values() for host in hosts}) == 1
    net.power_off(host_of(net, "actor"))
    run.wait_for(r"back to update \d", 200)
    run.wait_for("^actor 0 is back", 300)
    versions(run, 2)
    assert {host for hosts in where(net).values() for host in hosts}.isdisjoint(before["actor"])
    run.stop()
    last = check(run, net)
    assert (last["fault/actors_lost"], last["fault/learner_restarts"]) == (1, 1)


@nodes
def test_a_host_that_is_about_to_go_loses_nothing(net: Network, start: Start) -> None:
    """Its actors leave, as `python -m actors.leave` asks them, and Ray starts none there any more."""
    for _ in range(3):
        net.add()
    bounds = ("cluster.min_actors=1", "cluster.num_actors=3", "cluster.max_actors=3", "cluster.leave_grace_s=10")
    run = start(net.start_ray(1, 3, 3), "ppo.updates=1000", *bounds)
    run.wait_for("^actor [12] has joined", 400)
    at_s = run.wait_for("^actor [12] has joined", 300, after_s=run.now())
    going = next(host for host in net.hosts[1:] if host.processes(ROLES["actor"]) and not host.processes(ROLES["rank"]))
    leave = [*going.enter, sys.executable, "-m", "actors.leave", "--within", "60"]
    told = subprocess.run(leave, env=going.environment, capture_output=True, text=True, timeout=120)
    assert (told.returncode, told.stderr) == (0, ""), told.stdout + told.stderr
    assert "rollout actors have left" in told.stdout
    run.wait_for(r"^actor \d has left", after_s=at_s)
    versions(run, 2)
    assert not going.processes(ROLES["actor"])
    net.power_off(going)
    versions(run, 2)
    run.stop()
    last = check(run, net)
    assert (last["fault/actors_lost"], last["fault/learner_restarts"]) == (0, 0)
    assert last["fleet/left"] >= 1


@nodes
def test_commits_lie_on_the_disk_of_the_learners_host(net: Network, start: Start, tmp_path: Path) -> None:
    """The other host, whose actor joins and dies, sees none of run directory and cache."""
    head = net.add()
    for name in ("run", "cache"):
        head.own_disk(tmp_path / name)
    (head.seen(tmp_path / "cache") / "proofs").symlink_to(PROOFS)
    bounds = ("cluster.min_actors=1", "cluster.num_actors=2", "cluster.max_actors=2", "cluster.actor_silence_s=20")
    run = start(net.start_ray(4), "ppo.updates=1000", "checkpoint.every=2", *bounds)
    run.run_dir = head.seen(tmp_path / "run")
    run.wait_for("^version 1 ")
    other = net.join(1)
    run.wait_for("^actor 1 has joined", 300)
    assert where(net) == {"actor": ["host1", "host2"], "rank": ["host1"], "reward": ["host1"]}
    versions(run, 2)
    net.power_off(other)
    run.wait_for("^actor 1 is lost", 60)
    versions(run, 2)
    run.stop()
    check(run, net)
    assert not list((tmp_path / "run").iterdir())
    assert list((run.run_dir / "checkpoints").glob("step_*/MANIFEST.json"))


@nodes
def test_a_slow_cable_that_loses_frames(net: Network, start: Start) -> None:
    """20 ms each way, and one frame in a hundred is lost."""
    net.add()
    for _ in range(3):
        net.add(delay_s=0.02, loss=0.01)
    run = start(net.start_ray(1, 1, 1, 1), "ppo.updates=4")
    assert run.end() == 0, run.printed
    assert check(run, net)["progress/version"] == 4
    print([(row["perf/sync_s"], row["wall_s"]) for row in run.rows()])


@nodes
def test_what_only_the_drivers_host_sees_is_refused(
    net: Network, start: Start, tmp_path: Path, tiny_model: Path
) -> None:
    head, _ = net.add(), net.add()
    head.own_disk(tmp_path / "run")
    head.own_disk(tmp_path / "models")
    shutil.copytree(tiny_model, head.seen(tmp_path / "models/tiny"))
    address = net.start_ray(1, 3)  # everything but the driver is on host2
    rank = start(address)
    assert rank.end() == 2, rank.printed
    rank.wait_for(
        f"^{tmp_path}/run of this machine cannot be seen from 10.77.0.2, where learner rank 0 is: write run_dir"
    )
    model = start(address, f"sft_model={tmp_path}/models/tiny", f"run_dir={tmp_path}/other")
    assert model.end() == 1, model.printed
    model.wait_for(f"the run failed: .*{tmp_path}/models/tiny is not on host2: a checkpoint must be where")
