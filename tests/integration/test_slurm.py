"""Jobs in a real SLURM of one node, in namespaces of its own (slurm_node.sh)."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, VADER, cache_in

MISSING = [
    name for name in ("sbatch", "slurmctld", "slurmd", "munged", "unshare", "nsenter", "ip") if not shutil.which(name)
]
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: apt-get install slurm-wlm munge iproute2"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for namespaces"),
]
NODE = ["cluster.num_nodes=1", "cluster.gpus_per_node=0", "cluster.cpus_per_node=2"]


class Node:
    """A SLURM, and how to call programs in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        kinds = ["--pid", "--fork", "--kill-child", "--mount-proc", "--mount", "--uts", "--net"]
        script = Path(__file__).with_name("slurm_node.sh")
        self.process = subprocess.Popen(["unshare", *kinds, "bash", script, folder], stdout=subprocess.DEVNULL)
        for _ in range(120):
            if (folder / "started").exists() and " idle" in self.call("sinfo", "--noheader").stdout:
                return
            time.sleep(0.5)
        raise AssertionError("\n".join(path.read_text() for path in folder.glob("*.log")))

    def call(self, *command: str) -> subprocess.CompletedProcess[str]:
        [first] = psutil.Process(self.process.pid).children()
        environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        environment = {name: value for name, value in environment.items() if not name.startswith("RAY_")}
        inside = ["nsenter", f"--target={first.pid}", "--all", "env", f"--chdir={ROOT}", *command]
        return subprocess.run(inside, env=environment, capture_output=True, text=True, timeout=300)

    def submit(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.call(sys.executable, "submit.py", *words)

    def state(self, name: str) -> str:
        """As COMPLETED or RUNNING; of a job that SLURM has just forgotten, nothing."""
        shown = self.call("scontrol", "show", "jobs").stdout
        found = re.search(rf"JobName={name}\n.*?JobState=(\S+)", shown, re.DOTALL)
        return found[1] if found else ""

    def wait(self, name: str, *states: str, seconds: int = 240) -> str:
        deadline = time.monotonic() + seconds
        while (state := self.state(name)) not in states:
            assert time.monotonic() < deadline, state
            time.sleep(0.5)
        return state


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    started = Node(tmp_path_factory.mktemp("slurm"))
    yield started
    started.process.send_signal(signal.SIGKILL)  # and with it everything in the namespaces
    started.process.wait()


def sft(folder: Path, model: Path, *overrides: str) -> list[str]:
    short = [
        "stage=sft",
        "name=tiny",
        f"model.path={model}",
        f"data.sft.path={VADER}/sft.jsonl",
        "data.sft.max_rows=96",
    ]
    short += [
        "ppo.trainable_layers=null",
        "ppo.value_trainable_layers=null",
        "cluster.min_memory_gib=1",
        "sft.epochs=1",
    ]
    places = [f"cache_dir={cache_in(folder)}", f"run_dir={folder}/run", "logger.wandb=disabled"]
    return ["target=slurm", *NODE, *short, *places, *overrides]


def sent(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return re.search(r"submit\.py status (\S+)", done.stdout)[1]  # type: ignore[index]


def wait_for_line(log: Path, line: str, seconds: int = 240) -> None:
    deadline = time.monotonic() + seconds
    while not (log.exists() and line in log.read_text()):
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.5)


def test_a_job_runs_to_its_end(node: Node, tiny_model: Path, tmp_path: Path) -> None:
    name = sent(node.submit(*sft(tmp_path, tiny_model)))
    assert "RUNNING" in node.submit("status", name).stdout or node.state(name) in ("PENDING", "CONFIGURING")
    assert node.wait(name, "COMPLETED", "FAILED") == "COMPLETED", (tmp_path / "run/slurm.log").read_text()
    assert (tmp_path / "run/result.json").exists()


def test_a_refused_configuration_fails_the_job(node: Node, tiny_model: Path, tmp_path: Path) -> None:
    name = sent(node.submit(*sft(tmp_path, tiny_model, "sft.trainable_layers=9")))
    assert node.wait(name, "COMPLETED", "FAILED") == "FAILED"
    assert "sft.trainable_layers is 9, the model has 2 layers" in (tmp_path / "run/slurm.log").read_text()
    assert "ExitCode=2:0" in node.call("scontrol", "show", "jobs").stdout


def test_a_cancelled_job_is_told_and_not_queued_again(node: Node, tiny_model: Path, tmp_path: Path) -> None:
    name = sent(node.submit(*sft(tmp_path, tiny_model, "sft.epochs=200")))
    log = tmp_path / "run/slurm.log"
    wait_for_line(log, "SFT step")
    assert node.submit("stop", name).returncode == 0
    assert node.wait(name, "CANCELLED", "COMPLETED", "PENDING") == "CANCELLED"
    wait_for_line(log, "interrupted; finished stages are kept", 60)


# Stands for a train.py that saves its state at a SIGTERM, and comes to its end at the second attempt.
DRIVER = """#!/bin/bash
for word; do [[ $word == run_dir=* ]] && run=${word#run_dir=}; done
if [[ -e $run/state ]]; then
    echo '{"value": null}' >"$run/result.json"
    echo "goes on from $(cat "$run/state")"
    exit 0
fi
trap 'ray status >/dev/null && echo "version 3" >"$run/state"; exit 75' TERM
echo "waits for SIGTERM"
while :; do sleep 0.2; done
"""


def test_a_job_at_its_time_limit_is_queued_again_and_goes_on(node: Node, tmp_path: Path) -> None:
    """Ray still answers while the state is saved."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").write_text(DRIVER)
    (programs / "python").chmod(0o755)
    (programs / "ray").symlink_to(Path(sys.executable).with_name("ray"))
    options = [f"target.python={programs}/python", "target.time=2", "target.stop_wait_s=40", "checkpoint.grace_s=20"]
    name = sent(node.submit(*sft(tmp_path, tmp_path, *options)))
    assert node.wait(name, "COMPLETED", "FAILED", "TIMEOUT", seconds=400) == "COMPLETED"
    log = (tmp_path / "run/slurm.log").read_text()
    assert "train.py has saved its state; the job is queued again" in log
    assert "goes on from version 3" in log
    assert "Restarts=1" in node.call("scontrol", "show", "jobs").stdout
