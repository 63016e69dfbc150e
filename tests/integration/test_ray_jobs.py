"""Jobs on a real Ray cluster with token authentication, sent as a user sends them."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest
import requests

from common.files.outcome import read_outcome
from common.processes.network_interface import free_port
from tests.conftest import ROOT, VADER, cache_in

TOKEN = "a-token-of-the-test-cluster-0123456789abcdef"


@dataclass
class RayCluster:
    address: str  # of the dashboard
    gcs_port: int
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Of a user: the token in a file, and no word of the mode; an address of another cluster, which must not count."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return kept | {"RAY_AUTH_TOKEN_PATH": str(self.folder / "token"), "RAY_ADDRESS": "http://127.0.0.1:1"}

    def call(self, *words: str, token: bool = True) -> subprocess.CompletedProcess[str]:
        environment = self.environment | ({} if token else {"RAY_AUTH_TOKEN_PATH": str(self.folder / "none")})
        return subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )

    def submit(self, *words: str, token: bool = True) -> subprocess.CompletedProcess[str]:
        return self.call(
            "submit.py", f"target.address={self.address}", f"target.python={sys.executable}", *words, token=token
        )


def start_node(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    """A raylet, and what belongs to it, as children of a process that takes them with it."""
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    common = ["--num-cpus=2", "--object-store-memory=300000000", "--disable-usage-stats", "--block"]
    with (folder / "ray.log").open("ab") as log:
        ray = Path(sys.executable).with_name("ray")
        return subprocess.Popen([ray, "start", *options, *common], env=environment, stdout=log, stderr=log)


def end_node(node: subprocess.Popen[bytes]) -> None:
    node.send_signal(signal.SIGTERM)
    node.wait(60)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """One node with two CPUs, on ports of its own. Not below pytest's folder: the names of Ray's sockets must be short."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as name:
        folder, dashboard, gcs = Path(name), free_port(), free_port()
        (folder / "token").write_text(TOKEN)
        ports = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
        ports += [f"--ray-client-server-port={free_port()}"]
        node = start_node(folder, "--head", f"--temp-dir={folder}", *ports)
        found = RayCluster(f"http://127.0.0.1:{dashboard}", gcs, folder)
        wait_for_answer(found, node)
        yield found
        end_node(node)


def wait_for_answer(cluster: RayCluster, node: subprocess.Popen[bytes]) -> None:
    header = {"Authorization": f"Bearer {TOKEN}"}
    for _ in range(240):
        assert node.poll() is None, (cluster.folder / "ray.log").read_text()
        try:
            if "ALIVE" in requests.get(f"{cluster.address}/api/v0/nodes", headers=header, timeout=5).text:
                return
        except requests.RequestException:
            pass  # not there yet
        time.sleep(0.5)
    raise AssertionError((cluster.folder / "ray.log").read_text())


def sft(folder: Path, model: Path, *overrides: str) -> list[str]:
    """The overrides of a short SFT."""
    return [
        "stage=sft",
        "name=tiny",
        f"model.path={model}",
        f"cache_dir={cache_in(folder)}",
        f"data.sft.path={VADER}/sft.jsonl",
        "data.sft.max_rows=96",
        "sft.epochs=1",
        "ppo.trainable_layers=null",
        "ppo.value_trainable_layers=null",
        "cluster.threads_per_learner_rank=1",
        "cluster.min_memory_gib=1",
        "logger.wandb=disabled",
        *overrides,
    ]


def job_id(printed: str) -> str:
    return re.search(r"submit\.py status (\S+)", printed)[1]  # type: ignore[index]


def test_what_cannot_run_is_not_sent(cluster: RayCluster, tiny_model: Path, tmp_path: Path) -> None:
    refused = cluster.submit(*sft(tmp_path, tiny_model, f"run_dir={tmp_path}/run"), token=False)
    assert refused.returncode == 2
    assert "wants a token" in refused.stderr
    large = cluster.submit(*sft(tmp_path, tiny_model, f"run_dir={tmp_path}/run", "cluster.cpus_per_process=3"))
    assert large.returncode == 2
    assert "the job needs 1 learner rank x 3 CPUs = 3 CPUs; the cluster has 2 CPUs (1 node x 2)" in large.stderr
    assert not (tmp_path / "run").exists()


def test_a_job_that_fails_ends_with_its_own_exit_code(cluster: RayCluster, tiny_model: Path, tmp_path: Path) -> None:
    """Nobody can know on this machine how many layers a model on the cluster has."""
    sent = cluster.submit(*sft(tmp_path, tiny_model, f"run_dir={tmp_path}/run", "sft.trainable_layers=9"))
    assert sent.returncode == 2, sent.stdout + sent.stderr
    assert "Tandem: stage=sft, run directory" in sent.stdout
    assert "sft.trainable_layers is 9, the model has 2 layers" in sent.stdout
    name = job_id(sent.stdout)
    assert name.startswith("tiny-sft-")
    status = cluster.submit("status", name)
    assert re.search(r"status +FAILED\n +exit code +2\n", status.stdout), status.stdout + status.stderr
    assert f"run directory  {tmp_path}/run" in status.stdout
    assert "Job nothing does not exist" in cluster.submit("status", "nothing").stderr


def follow(cluster: RayCluster, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "submit.py", *words]
    return subprocess.Popen(command, cwd=ROOT, env=cluster.environment, stdout=subprocess.PIPE, text=True)


def read_until(log: IO[str] | None, part: str) -> str:
    assert log is not None
    printed = ""
    for line in log:
        printed += line
        if part in line:
            return printed
    raise AssertionError(printed)


@pytest.mark.full
def test_a_job_is_stopped_and_resumed(cluster: RayCluster, tiny_model: Path, tmp_path: Path) -> None:
    sent = cluster.submit("--detach", *sft(tmp_path, tiny_model, f"run_dir={tmp_path}/run", "sft.epochs=1000"))
    assert sent.returncode == 0, sent.stdout + sent.stderr
    name = job_id(sent.stdout)
    with follow(cluster, "logs", name) as logs:
        read_until(logs.stdout, "SFT step")
        early = cluster.call("submit.py", "resume", name)
        assert f"{name} is RUNNING: stop it first" in early.stderr
        stopped = cluster.call("submit.py", "stop", name)
        read_until(logs.stdout, "has ended with exit code 143")
    assert re.search(r"status +STOPPED\n +exit code +143\n", stopped.stdout), stopped.stdout + stopped.stderr
    assert logs.returncode == 143
    assert not (tmp_path / "run/result.json").exists()
    with follow(cluster, "resume", name) as resumed:
        printed = read_until(resumed.stdout, "SFT step")
        assert f"Tandem: stage=sft, run directory {tmp_path}/run" in printed
        cluster.call("submit.py", "stop", f"{name}-r2")
        read_until(resumed.stdout, "has ended with exit code 143")
    assert resumed.returncode == 143


@pytest.mark.full
def test_a_job_on_two_nodes(cluster: RayCluster, tiny_model: Path, tmp_path: Path) -> None:
    """Each node holds one of the two ranks. The result file is the mark of success."""
    options = [f"--address=127.0.0.1:{cluster.gcs_port}", f"--dashboard-agent-listen-port={free_port()}"]
    node = start_node(cluster.folder, *options)
    try:
        run = [f"run_dir={tmp_path}/run", "cluster.num_learner_ranks=2", "cluster.cpus_per_process=2"]
        deadline = time.monotonic() + 60
        while "1 node x 2" in cluster.submit("--dry-run", *sft(tmp_path, tiny_model, *run)).stderr:
            assert time.monotonic() < deadline
        sent = cluster.submit(*sft(tmp_path, tiny_model, *run))
    finally:
        end_node(node)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert read_outcome(tmp_path / "run") is None  # SFT alone has no gold reward
    assert json.loads((tmp_path / "run/stages.json").read_text())[0]["name"] == "sft"
    gone = cluster.submit("--dry-run", *sft(tmp_path, tiny_model, *run))
    assert "the cluster has 2 CPUs (1 node x 2)" in gone.stderr  # a node that is dead holds nothing


@pytest.mark.full
def test_a_sweep_of_jobs(cluster: RayCluster, tiny_model: Path, tmp_path: Path) -> None:
    """Three members, two at a time. The one that fails takes no other with it."""
    options = ["hydra/launcher=ray_jobs", f"hydra.launcher.address={cluster.address}", "hydra.launcher.max_parallel=2"]
    options += [f"hydra.launcher.python={sys.executable}", f"hydra.sweep.dir={tmp_path}/sweep"]
    options.append("hydra.sweep.subdir=${hydra.job.num}")
    sweep = cluster.call("train.py", "-m", *options, *sft(tmp_path, tiny_model, "sft.trainable_layers=9,1,2"))
    assert sweep.returncode == 1, sweep.stdout + sweep.stderr
    assert "#0 failed: member 0 ended with exit code 2: python submit.py logs tiny-sft-" in sweep.stderr
    assert sorted(re.findall(r"#(\d) \S+ has ended with exit code (\d)", sweep.stdout)) == [
        ("0", "2"),
        ("1", "0"),
        ("2", "0"),
    ]
    for number in (1, 2):
        assert read_outcome(tmp_path / f"sweep/{number}") is None
    logs = cluster.call("submit.py", "logs", re.search(r"#1 (\S+):", sweep.stdout)[1])  # type: ignore[index]
    assert f"run directory {tmp_path}/sweep/1" in logs.stdout


@pytest.mark.full
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_sweep_that_is_ended_stops_its_jobs(
    signum: signal.Signals, code: int, cluster: RayCluster, tiny_model: Path, tmp_path: Path
) -> None:
    options = ["hydra/launcher=ray_jobs", f"hydra.launcher.address={cluster.address}", "hydra.launcher.max_parallel=1"]
    options += [f"hydra.launcher.python={sys.executable}", f"hydra.sweep.dir={tmp_path}/sweep"]
    words = ["train.py", "-m", *options, *sft(tmp_path, tiny_model, "sft.epochs=1000", "ppo.seed=1,2")]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, env=cluster.environment, **pipe) as sweep:  # type: ignore[call-overload]
        name = re.search(r"#0 (\S+):", read_until(sweep.stdout, "#0 "))[1]  # type: ignore[index]
        with follow(cluster, "logs", name) as logs:
            read_until(logs.stdout, "SFT step")
            sweep.send_signal(signum)
        printed = sweep.stdout.read()
    assert sweep.returncode == code, printed
    assert re.search(r"status +STOPPED\n", cluster.submit("status", name).stdout)
    assert "#1 " not in printed  # the member that waited is not sent any more
