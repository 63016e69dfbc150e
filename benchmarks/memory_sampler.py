"""How much memory the processes of a job hold, counting what they share once: by kind of memory, at every moment."""

import subprocess
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
INTERVAL_S, FILES_EVERY = 0.5, 3  # the mapped files of a process change rarely, and take long to list
MODELS = (".safetensors", ".bin", ".arrow")
# By what Ray and the kernel call a process; the first that is in its command line counts.
ROLES = {
    "ray::LearnerActor": "learner rank",
    "ray::RolloutActor": "actor",
    "ray::ServeReplica:reward:": "reward front",
    "ray::ServeReplica": "reward replica",
    "ray::ServeController": "serve controller",
    "ray::ProxyActor": "serve proxy",
    "ray::": "spare workers",
    "default_worker.py": "spare workers",
    "dashboard/agent.py": "raylet and agents",
    "runtime_env/agent/main.py": "raylet and agents",
    "log_monitor.py": "raylet and agents",
    "autoscaler/_private/monitor.py": "raylet and agents",
    "dashboard/dashboard.py": "raylet and agents",
    "gcs_server": "gcs",
    "raylet/raylet": "raylet and agents",
    "actors.engine_proof": "engine proof",
    "train.py": "driver",
}


@dataclass
class Held:
    """MiB of one process."""

    anonymous: float = 0.0
    shared: float = 0.0  # memory that processes share: segments, Ray's objects
    libraries: float = 0.0
    models: float = 0.0  # files of weights while they are read

    @property
    def total(self) -> float:
        return self.anonymous + self.shared + self.libraries + self.models


@dataclass
class Job:
    """Peaks of a job and of its processes, by role and process id."""

    processes: dict[tuple[str, int], Held] = field(default_factory=dict)
    peak: dict[tuple[str, int], Held] = field(default_factory=dict)  # of all, at the moment of the job's peak
    timeline: list[tuple[float, dict[str, float]]] = field(default_factory=list)  # seconds, MiB by role

    @property
    def total(self) -> float:
        return sum(held.total for held in self.peak.values())


class Sampler(threading.Thread):
    """Looks at `pid` and all that it starts until `stop`. What other programs of the machine map, too, is not deducted:
    a page of a library counts whole, divided among the job's own processes."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self._root, self._done, self._start = psutil.Process(pid), threading.Event(), time.time()
        self._files: dict[int, dict[tuple[str, str], float]] = {}
        self._roles: dict[int, str] = {}
        self.job = Job()

    def stop(self) -> Job:
        self._done.set()
        self.join()
        return self.job

    def run(self) -> None:
        count = 0
        while not self._done.wait(INTERVAL_S):
            self._sample(with_files=count % FILES_EVERY == 0)
            count += 1

    def _sample(self, with_files: bool) -> None:
        try:
            pids = [self._root.pid, *(child.pid for child in self._root.children(recursive=True))]
        except psutil.NoSuchProcess:
            return
        now: dict[tuple[str, int], Held] = {}
        for pid in pids:
            try:
                role = self._role(pid)
                rollup = _fields(Path(f"/proc/{pid}/smaps_rollup").read_text())
                if with_files or pid not in self._files:
                    self._files[pid] = _mapped_files(pid)
            except (OSError, psutil.Error):  # it has ended meanwhile
                continue
            now[role, pid] = Held(rollup.get("Pss_Anon", 0.0), rollup.get("Pss_Shmem", 0.0))
        sharers: dict[tuple[str, str], int] = defaultdict(int)
        for _, pid in now:
            for mapping in self._files[pid]:
                sharers[mapping] += 1
        for (_, pid), held in now.items():
            for mapping, mib in self._files[pid].items():
                share = mib / sharers[mapping]
                if mapping[0].endswith(MODELS):
                    held.models += share
                else:
                    held.libraries += share
        self._keep(now)

    def _keep(self, now: dict[tuple[str, int], Held]) -> None:
        for key, held in now.items():
            if key not in self.job.processes or held.total > self.job.processes[key].total:
                self.job.processes[key] = held
        if sum(held.total for held in now.values()) > self.job.total:
            self.job.peak = now
        roles: dict[str, float] = defaultdict(float)
        for (role, _), held in now.items():
            roles[role] += held.total
        self.job.timeline.append((time.time() - self._start, dict(roles)))

    def _role(self, pid: int) -> str:
        """A worker of Ray gets its name after it has started."""
        if self._roles.get(pid) in (None, "spare workers"):
            line = " ".join(psutil.Process(pid).cmdline())
            self._roles[pid] = next((role for mark, role in ROLES.items() if mark in line), "other: " + line[:60])
        return self._roles[pid]


def sampled(command: list[str], log: Path) -> tuple[int, Job, int]:
    """Run a program of this repository, which prints to `log`: its exit code, what it and all that it started held, and how
    many seconds it took."""
    start = time.time()
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
        sampler = Sampler(process.pid)
        sampler.start()
        code = process.wait()
    return code, sampler.stop(), round(time.time() - start)


def _fields(text: str) -> dict[str, float]:
    """MiB by name of a block of smaps."""
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): int(row[1]) / 1024 for row in rows if len(row) == 3 and row[2] == "kB"}


def _mapped_files(pid: int) -> dict[tuple[str, str], float]:
    """MiB of the resident pages of files by (path, offset); pages that a process has changed are not the file's any more."""
    found: dict[tuple[str, str], float] = {}
    mapping: tuple[str, str] | None = None
    resident = 0.0
    with open(f"/proc/{pid}/smaps") as lines:
        for line in lines:
            words = line.split()
            if not words[0].endswith(":"):
                path = words[5] if len(words) > 5 else ""
                is_file = path.startswith("/") and not path.startswith(("/memfd:", "/dev/shm/", "/dev/zero", "/SYSV"))
                mapping = (path, words[2]) if is_file else None
            elif mapping and words[0] == "Rss:":
                resident = int(words[1]) / 1024
            elif mapping and words[0] == "Anonymous:":
                # The same pages, mapped twice by a process that loads a checkpoint twice, are there once.
                found[mapping] = max(found.get(mapping, 0.0), resident - int(words[1]) / 1024)
    return found
