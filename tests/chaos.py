"""A run as a user starts it, watched from outside: tests and benchmarks do harm to its processes at a chosen moment."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from controller.ledger.audit import Audit, audit
from controller.ledger.log import NAME
from tests.conftest import ROOT, VADER, cache_in
from tests.nodes.hosts import Host

# What the heartbeat says the run waits for, at the moments at which harm is done.
MOMENTS = {
    "rollouts": "waiting for: rollouts for the update",
    "update": "waiting for: the learner's update",
    "transfer": "waiting for: the engines to load version",
}
# What the processes of a role have in their command lines; Ray names them after the method that they run.
ROLES = {"actor": "RolloutActor", "rank": "LearnerActor", "reward": "ServeReplica:reward-proxy"}


def overrides(folder: Path, policy: Path, reward: Path, *more: str) -> list[str]:
    """Of a PPO run with tiny models, in phases of a second or so, that says twice a second what it waits for."""
    return [
        "stage=ppo",
        "name=chaos",
        f"run_dir={folder}/run",
        f"cache_dir={cache_in(folder)}",
        f"model.path={policy}",
        f"sft_model={policy}",
        f"proxy_model={reward}",
        *(f"data.{name}.path={VADER}/{part}.jsonl" for name, part in (("prompts", "sft"), ("sft", "sft"))),
        *(f"data.{name}.path={VADER}/{part}.jsonl" for name, part in (("preferences", "proxy"), ("test", "test"))),
        f"data.eval_prompts.path={VADER}/test.jsonl",
        *(f"data.{name}.max_rows=96" for name in ("prompts", "sft", "preferences", "test", "eval_prompts")),
        "data.gold=null",
        "ppo.gold_rollouts=0",
        "ppo.value_warmup_updates=0",
        "ppo.rollouts_per_update=16",
        "reward_model.trainable_layers=null",
        "ppo.trainable_layers=1",
        "ppo.value_trainable_layers=null",
        "ppo.sampling.max_completion_tokens=64",
        "ppo.sampling.min_completion_tokens=48",
        "engine.kv_cache_gib=0.25",
        "cluster.min_memory_gib=2",
        "cluster.threads_per_actor=1",
        "cluster.threads_per_learner_rank=1",
        "logger.heartbeat_s=0.5",
        "logger.wandb=disabled",
        *more,
    ]


class Run:
    """One `train.py`. Lines come with the seconds since its start. `hosts`: of the cluster that it works on, where that is
    not this machine; the first has the driver."""

    def __init__(
        self, folder: Path, arguments: list[str], env: dict[str, str] | None = None, hosts: Sequence[Host] = ()
    ):
        self._hosts = hosts
        before, around = (hosts[0].enter, hosts[0].environment) if hosts else ([], os.environ)
        self.run_dir = next(Path(a.split("=", 1)[1]) for a in arguments if a.startswith("run_dir="))
        folder.mkdir(parents=True, exist_ok=True)
        self.lines: list[tuple[float, str]] = []
        self._changed = threading.Condition()
        self._begin = time.monotonic()
        self.driver = subprocess.Popen(
            [*before, sys.executable, "train.py", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**around, **(env or {})},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.driver.stdout is not None
        for line in self.driver.stdout:
            with self._changed:
                self.lines.append((self.now(), line.rstrip()))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def now(self) -> float:
        return time.monotonic() - self._begin

    @property
    def printed(self) -> str:
        return "\n".join(f"{seconds:7.1f} {line}" for seconds, line in self.lines)

    def wait_for(self, pattern: str, timeout_s: float = 300, after_s: float = 0.0) -> float:
        """When a line that the regular expression is found in was printed, after `after_s`. Raises AssertionError."""
        end, seen = time.monotonic() + timeout_s, 0
        with self._changed:
            while True:
                for seconds, line in self.lines[seen:]:
                    if seconds >= after_s and re.search(pattern, line):
                        return seconds
                seen = len(self.lines)
                left = end - time.monotonic()
                if left <= 0 or not self._reader.is_alive():
                    raise AssertionError(f"{pattern!r} was not printed within {timeout_s} s:\n{self.printed}")
                self._changed.wait(min(left, 1.0))

    def processes(self, role: str) -> list[psutil.Process]:
        """Of a role, the oldest first."""
        if self._hosts:
            there = [process for host in self._hosts for process in host.processes(ROLES[role])]
            return sorted(there, key=lambda p: p.create_time())
        found = []
        for process in psutil.Process(self.driver.pid).children(recursive=True):
            try:
                if process.status() != psutil.STATUS_ZOMBIE and ROLES[role] in "".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return sorted(found, key=lambda p: p.create_time())

    def harm(self, role: str, how: signal.Signals, which: int = 0) -> tuple[float, psutil.Process]:
        """Send a signal to a process of the role; when, and to whom."""
        process = self.processes(role)[which]
        process.send_signal(how)
        return self.now(), process

    def reach(self, moment: str, after_s: float = 0.0) -> float:
        """Wait for the next time that the run is at that moment: one of `MOMENTS`, or "commit". A transfer of a tiny model
        is over at once, so an actor is stopped before; the caller lets it go on, or kills it."""
        if moment == "commit":
            return self._reach_commit()
        if moment != "transfer":
            return self.wait_for(MOMENTS[moment], after_s=after_s)
        self.reach("update", after_s)
        self.harm("actor", signal.SIGSTOP)
        return self.wait_for(MOMENTS[moment], after_s=self.now())

    def _reach_commit(self, timeout_s: float = 120) -> float:
        end = time.monotonic() + timeout_s
        while not list((self.run_dir / "checkpoints").glob("step_*.partial")):
            assert time.monotonic() < end, f"no commit was begun within {timeout_s} s:\n{self.printed}"
            time.sleep(0.002)
        return self.now()

    def signal_driver(self, how: signal.Signals) -> None:
        """To it alone."""
        drivers = self._hosts[0].processes("train.py") if self._hosts else [psutil.Process(self.driver.pid)]
        for process in drivers:
            process.send_signal(how)

    def stop(self) -> None:
        """As SIGTERM does it: saved, and out. Raises AssertionError."""
        self.signal_driver(signal.SIGTERM)
        assert self.end() == 75, self.printed

    def end(self, timeout_s: float = 300) -> int:
        """The exit code; ends the driver where it does not end itself."""
        try:
            return self.driver.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.printed}") from None
        finally:
            self.kill()
            self._reader.join(10)

    def kill(self) -> None:
        """The driver and everything that it has started."""
        try:
            family = [*psutil.Process(self.driver.pid).children(recursive=True), psutil.Process(self.driver.pid)]
        except psutil.NoSuchProcess:
            return
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.driver.wait(30)

    def rows(self) -> list[dict[str, Any]]:
        """Metrics of the updates."""
        return [row for row in self.log("metrics.jsonl") if row["stage"] == "ppo"]

    def log(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / name).read_text().splitlines()]

    def audit(self) -> Audit:
        return audit(self.run_dir / NAME)
