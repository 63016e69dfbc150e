"""An elastic fleet under Ray's own autoscaler, the one of KubeRay and of Ray's cluster launcher. Its provider of nodes is
the one that Ray has for tests: each node is one more raylet, here all of one host. (Ray's second autoscaler does not start
with this provider: a file that it reads is not in the package of Ray 2.60.)
"""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from controller import scale
from tests.chaos import Run, overrides
from tests.nodes.hosts import Host, Network, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no hosts of its own: {why_not()}")

HEAD = "f" * 51 + "00000"  # the name that the provider gives it
IDLE_S = 12  # after which an idle node is taken away
# Each process fills a CPU: the head has room for actor, rank, replica and the service's front; another actor needs a node.
HEAD_CPUS = 4


# Of Ray's file: what is done on machines that are rented, which is nothing here.
COMMANDS = (
    "cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "rsync_exclude", "rsync_filter",
)  # fmt: skip


def autoscaling(file: Path, address: str) -> str:
    """Ray's file of a cluster that may have two nodes more, of one CPU."""
    kinds = {
        "ray.head.default": {"resources": {"CPU": HEAD_CPUS}, "node_config": {}, "max_workers": 0},
        "more": {
            "resources": {"CPU": 1, "object_store_memory": 200_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 2,
        },
    }
    provider = {
        "type": "fake_multinode",
        "gcs_address": address,
        "head_node_id": HEAD,
        "launch_multiple": True,
        "use_node_id_as_ip": True,
    }
    whole: dict[str, Any] = {
        **{name: [] for name in COMMANDS},
        "file_mounts": {},
        "auth": {},
        "cluster_name": "tandem",
        "upscaling_speed": 10.0,
        "file_mounts_sync_continuously": False,
        "max_workers": 2,
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": provider,
        "available_node_types": kinds,
        "head_node_type": "ray.head.default",
    }
    file.write_text(json.dumps(whole))
    return f"--autoscaling-config={file}"


def until_raylets(host: Host, number: int) -> None:
    end = time.monotonic() + 180
    while len(found := host.processes("raylet/raylet")) != number:
        assert time.monotonic() < end, found
        time.sleep(0.5)


@pytest.mark.nodes
def test_a_node_comes_for_an_actor_that_is_asked_for_and_goes_when_it_has_left(
    net: Network, tmp_path: Path, tiny_model: Path, reward_model: Path
) -> None:
    host = net.add()
    host.settings |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    address = f"{host.address}:6379"
    host.start_ray(host, HEAD_CPUS, autoscaling(tmp_path / "autoscaling.json", address))
    host.wait_for_ray()
    bounds = ("cluster.num_actors=1", "cluster.min_actors=1", "cluster.max_actors=3", "cluster.cpus_per_process=1")
    endless = ("ppo.updates=100000", "ppo.max_staleness=1", f"cluster.address={address}")
    run = Run(tmp_path, overrides(tmp_path, tiny_model, reward_model, *bounds, *endless), hosts=net.hosts)
    try:
        run.wait_for(r"^version \d")
        assert len(host.processes("raylet/raylet")) == 1
        assert scale.main([str(run.run_dir), "3"]) == 0
        run.wait_for("actor 1 has joined")
        run.wait_for("actor 2 has joined")
        assert len(host.processes("raylet/raylet")) == 3
        run.wait_for(r"^version \d", after_s=run.now())
        assert scale.main([str(run.run_dir), "1"]) == 0
        run.wait_for("actor 1 has left")
        until_raylets(host, 1)  # both nodes are taken away, and nobody is lost
        run.wait_for(r"^version \d", after_s=run.now())
        run.stop()
    finally:
        run.kill()
    rows, found = run.rows(), run.audit()
    assert (found.faults, found.quarantined) == ([], 0), found
    assert found.trained == rows[-1]["progress/version"] * 16
    assert rows[-1]["fault/actors_lost"] == 0
    assert max(row["fleet/actors"] for row in rows) == 3
