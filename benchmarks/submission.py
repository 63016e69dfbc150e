"""From submitting a job to its first line: `submit.py` beside a bare `ray job submit`, on a Ray cluster of this machine.

    .venv/bin/python benchmarks/submission.py [--rounds 5]

Both send the same working directory with the same excludes to the same cluster (token authentication) and run the same
command, which says `Tandem: stage=` before it is refused, so nothing is trained. Rounds alternate and take turns at going
first; a warm-up round uploads the package.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from machine import machine, said

from common.processes.network_interface import free_port
from submission.targets import EXCLUDES, ROOT

RESULTS = ROOT / "benchmarks/results/submission.json"
RAY = Path(sys.executable).with_name("ray")
ACCEPTED, RUNNING, FIRST_LINE = "accepted", "job runs", "first line of train.py"
# What either command prints when the cluster has taken the job, when its shell starts, and when train.py speaks.
MARKS = {
    ACCEPTED: re.compile("submit.py status|submitted successfully"),
    RUNNING: re.compile("Running entrypoint for job"),
}
MARKS[FIRST_LINE] = re.compile("^Tandem: stage=")


@contextmanager
def ray_cluster() -> Iterator[tuple[str, dict[str, str]]]:
    """A node with token authentication; its address and the environment of a user."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "token").write_text("a-token-of-the-benchmark-0123456789abcdef")
        environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{folder}/token"}
        dashboard = free_port()
        ports = [
            f"--port={free_port()}",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={free_port()}",
        ]
        ports.append(f"--ray-client-server-port={free_port()}")
        options = ["--head", "--block", "--num-cpus=2", "--object-store-memory=300000000", "--disable-usage-stats"]
        with Path(folder, "log").open("wb") as log:
            command: list[str | Path] = [RAY, "start", *options, *ports, f"--temp-dir={folder}"]
            node = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        address = f"http://127.0.0.1:{dashboard}"
        while subprocess.run(
            [RAY, "job", "list", "--address", address], env=environment, capture_output=True
        ).returncode:
            time.sleep(1)
        yield address, environment
        node.send_signal(signal.SIGTERM)
        node.wait()


def seconds(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """From the start of `command` to each mark in what it prints."""
    found: dict[str, float] = {}
    start = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        assert job.stdout is not None
        for line in job.stdout:
            for name, mark in MARKS.items():
                if name not in found and mark.search(line):
                    found[name] = time.perf_counter() - start
    assert len(found) == len(MARKS), f"{command} printed only {list(found)}"
    return found


def commands(address: str, folder: str) -> dict[str, list[str]]:
    overrides = [
        "stage=sft",
        f"run_dir={folder}/run",
        f"cache_dir={ROOT}/.cache",
        "ppo.trainable_layers=99",  # of 30: refused when the model has been read
        f"model.path={ROOT}/.cache/models/smollm2-135m-instruct",
        "logger.wandb=disabled",
        "cluster.min_memory_gib=1",
    ]
    job = [sys.executable, "train.py", *overrides, "cluster.address=auto"]
    runtime = json.dumps({"excludes": EXCLUDES})
    bare = [str(RAY), "job", "submit", "--address", address, "--working-dir", str(ROOT), "--runtime-env-json", runtime]
    return {
        "ray job submit": [*bare, "--", *job],
        "submit.py": [
            sys.executable,
            "submit.py",
            f"target.address={address}",
            f"target.python={sys.executable}",
            *overrides,
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    where = machine("ray")
    print(said(where))
    with ray_cluster() as (address, environment), tempfile.TemporaryDirectory() as folder:
        ways = commands(address, folder)
        for command in ways.values():
            seconds(command, environment)
        times: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for number in range(rounds):
            for name in sorted(ways, reverse=number % 2 == 1):
                times[name].append(seconds(ways[name], environment))
    print(f"\n| seconds, median of {rounds} rounds [least, most] | " + " | ".join(ways) + " |\n|---|---|---|")
    for mark in MARKS:
        cells = [shown([row[mark] for row in rows]) for rows in times.values()]
        print(f"| {mark} | {' | '.join(cells)} |")
    bare, ours = times.values()
    more = [b[FIRST_LINE] - a[FIRST_LINE] for a, b in zip(bare, ours, strict=True)]
    print(f"submit.py takes {shown(more)} s more than ray job submit (paired)")
    RESULTS.write_text(json.dumps({"machine": where, "seconds": times, "more_s": more}, indent=1) + "\n")


def shown(cell: list[float]) -> str:
    return f"{statistics.median(cell):.2f} [{min(cell):.2f}, {max(cell):.2f}]"


if __name__ == "__main__":
    main()
