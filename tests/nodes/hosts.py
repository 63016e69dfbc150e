"""Machines of a network of their own, for tests of several nodes: what each sees of the others is what comes over a cable.

    host1 ──cable──┐
    host2 ──cable──┤ switch          10.77.0.0/24; no way out, and none in
    host3 ──cable──┘

A host has namespaces of its own for network, processes, mounts, name and System V memory. So it has an address, a loopback,
/dev/shm and /tmp/ray that no other host sees, process numbers that mean nothing elsewhere, and, as Debian writes it, an
/etc/hosts in which its name is 127.0.1.1. It shares the kernel, its cores and its clock, and the file system: what all hosts
see stands for NFS, and `own_disk` is a directory that one host sees alone.

Nothing is left over: a host ends with its first process, and its cables with it. The first process ends when it is killed,
or when the test's process has ended, however it did.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import which

import psutil

from common.processes.process_env import driver_env

ROOT = Path(__file__).resolve().parents[2]
SPACES = ("--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--mount", "--uts", "--ipc")
STARTED = "Ray runtime started"
TOKEN = "0123456789abcdef" * 4
# The first process of a host: it makes the host's own directories, reaps orphans, and lives until its input ends. No name
# server is asked: it would be waited for.
FIRST = """
set -eu
hostname "$1"
ip link set lo up
mkdir -p /tmp/ray
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp/ray
mount --bind "$2" /etc/hosts
if [ -e /etc/resolv.conf ]; then mount --bind /dev/null /etc/resolv.conf; fi
echo ready
while read -r _; do :; done
"""
SWITCH = "ip link add switch type bridge && ip link set switch up && echo ready && read -r _"


def why_not() -> str | None:
    """Why hosts cannot be made here; None where they can."""
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    if missing := [name for name in ("unshare", "nsenter", "ip", "mount") if not which(name)]:
        return f"needs {', '.join(missing)}: apt-get install util-linux iproute2"
    tried = "mount -t tmpfs tmpfs /mnt && ip link add p1 type veth peer name p2 && ip link add br0 type bridge"
    done = subprocess.run(["unshare", *SPACES, "bash", "-c", tried], capture_output=True, text=True)
    return f"namespaces, veth or a bridge are not allowed here: {done.stderr.strip()}" if done.returncode else None


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


class _Namespaces:
    """A process that holds namespaces of its own until it is killed, or until this process ends."""

    def __init__(self, kinds: Sequence[str], script: str, log: Path, *arguments: str):
        command = ["unshare", *kinds, "bash", "-c", script, "bash", *arguments]
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", log.read_text()
        inside = psutil.Process(self.process.pid).children() if "--fork" in kinds else []
        self.pid = inside[0].pid if inside else self.process.pid  # of the first process, as this one sees it

    def kill(self) -> None:
        """With everything in it; returns when it is gone."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process.wait(30)


class Host:
    """One machine, from its start until `die`."""

    def __init__(self, number: int, folder: Path):
        self.name, self.address, self.port = f"host{number}", f"10.77.0.{number}", f"port{number}"
        self.folder = folder
        self.settings = dict[str, str]()  # of Ray here, besides those of all hosts
        names = folder / f"{self.name}.hosts"
        lines = ["127.0.0.1 localhost", f"127.0.1.1 {self.name}", *(f"10.77.0.{n} node{n}" for n in range(1, 10))]
        names.write_text("\n".join(lines) + "\n")
        self._spaces = _Namespaces(SPACES, FIRST, self.log, self.name, str(names))
        self.pid = self._spaces.pid
        self._raylet: subprocess.Popen[bytes] | None = None

    @property
    def enter(self) -> list[str]:
        """What stands before a command that is to run here. Its signals do not reach the command."""
        return ["nsenter", f"--target={self.pid}", "--all", f"--wdns={ROOT}"]

    @property
    def environment(self) -> dict[str, str]:
        """Of whatever runs here with Ray."""
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}
        return {**os.environ, **driver_env(), **token, **self.settings}

    def call(self, *command: str) -> str:
        return _call(*self.enter, *command)

    def own_disk(self, path: Path) -> None:
        """From now on `path` is a directory that only this host sees; before Ray is started here."""
        path.mkdir(parents=True, exist_ok=True)
        self.call("mount", "-t", "tmpfs", "tmpfs", str(path))

    def seen(self, path: Path) -> Path:
        """`path` as this host sees it, for the test to read."""
        return Path(f"/proc/{self.pid}/root{path}")

    def start_ray(self, head: "Host", num_cpus: int, *more: str) -> None:
        """Without waiting until it is up. `more`: further options of `ray start`."""
        part = (
            ["--head", "--port=6379", "--include-dashboard=false"]
            if head is self
            else [f"--address={head.address}:6379"]
        )
        ray = str(Path(sys.executable).with_name("ray"))
        size = ["--object-store-memory=200000000", f"--num-cpus={num_cpus}"]
        command = [ray, "start", *part, f"--node-ip-address={self.address}", *size, "--disable-usage-stats", "--block"]
        command += more
        self._ray = [*self.enter, *command]
        self._try_ray()

    def _try_ray(self) -> None:
        with self.log.open("ab") as log:
            self._raylet = subprocess.Popen(self._ray, env=self.environment, stdout=log, stderr=log)

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def start_ray_again(self) -> bool:
        """Where it has ended by itself, as a machine's supervisor does; returns when it is up. Whether it had."""
        if self._raylet is None or self._raylet.poll() is None:
            return False
        said, end = self.log.read_text().count(STARTED), time.monotonic() + 180
        self._try_ray()
        while self.log.read_text().count(STARTED) == said:
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.2)
        return True

    def ray_logs(self) -> str:
        """The ends of what Ray's own processes have said here; for a test that has failed."""
        tail = "tail -n 40 /tmp/ray/session_2*/logs/{raylet,gcs_server}.{out,err} 2>/dev/null || true"
        return f"{self.name}: raylet {self._raylet and self._raylet.poll()}\n{self.call('bash', '-c', tail)}"

    def wait_for_ray(self) -> None:
        """Until the head knows it. Ray gives a raylet 30 s and no setting changes that; on two busy cores a second trial is
        needed now and then."""
        assert self._raylet is not None
        end = time.monotonic() + 180
        while STARTED not in self.log.read_text():
            if self._raylet.poll() is not None:
                assert self.log.read_text().count("timed out during startup") == 1, self.log.read_text()
                self._try_ray()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.2)

    def processes(self, part: str) -> list[psutil.Process]:
        """Those that run here with `part` in their command lines, by their numbers outside; the oldest first."""
        here, found = os.readlink(f"/proc/{self.pid}/ns/pid"), []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, OSError):  # it ends meanwhile
                if os.readlink(f"/proc/{process.pid}/ns/pid") == here and part in "".join(process.cmdline()):
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def die(self) -> None:
        """At once, with every process on it."""
        self._spaces.kill()
        if self._raylet is not None:
            self._raylet.wait(30)


class Network:
    """A switch, and the hosts on it: `with network() as net`."""

    def __init__(self, folder: Path):
        self.folder, self.hosts, self._added = folder, list[Host](), 0
        (folder / "token").write_text(TOKEN)
        (folder / "token").chmod(0o600)
        self._switch = _Namespaces(["--net"], SWITCH, folder / "switch.log")
        self._cables: list[subprocess.Popen[str]] = []

    def _at_switch(self, *words: str) -> None:
        _call("nsenter", f"--target={self._switch.pid}", "--net", *words)

    def add(self, delay_s: float | None = None, loss: float = 0.0) -> Host:
        """One more host. With `delay_s` (each way) its cable is slow and loses frames at random, as `loss` has it."""
        self._added += 1
        host = Host(self._added, self.folder)
        self.hosts.append(host)
        if delay_s is None:
            end = ["peer", "name", "eth0", "netns", str(host.pid)]
            self._at_switch("ip", "link", "add", host.port, "type", "veth", *end)
        else:
            self._bad_cable(host, delay_s, loss)
        self._at_switch("ip", "link", "set", host.port, "master", "switch", "up")
        host.call("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        host.call("ip", "link", "set", "eth0", "up")
        host.call("ip", "route", "add", "default", "dev", "eth0")
        return host

    def _bad_cable(self, host: Host, delay_s: float, loss: float) -> None:
        cable = [sys.executable, str(Path(__file__).with_name("cable.py")), host.port, "eth0", str(delay_s), str(loss)]
        inside = ["nsenter", f"--target={self._switch.pid}", "--net", *cable]
        process = subprocess.Popen(inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._cables.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        self._at_switch("ip", "link", "set", "eth0", "netns", str(host.pid))

    def start_ray(self, *num_cpus: int) -> str:
        """On the first hosts, as many CPUs on each; the first one is the head. Returns the address when all are there."""
        head, *others = self.hosts[: len(num_cpus)]
        head.start_ray(head, num_cpus[0])
        head.wait_for_ray()
        for host, number in zip(others, num_cpus[1:], strict=True):
            host.start_ray(head, number)
        for host in others:
            host.wait_for_ray()
        return f"{head.address}:6379"

    def join(self, num_cpus: int) -> Host:
        """One more host, as a node of the cluster that runs."""
        host = self.add()
        host.start_ray(self.hosts[0], num_cpus)
        host.wait_for_ray()
        return host

    def cut(self, host: Host) -> None:
        """Pull its cable."""
        self._at_switch("ip", "link", "set", host.port, "down")

    def mend(self, host: Host) -> None:
        self._at_switch("ip", "link", "set", host.port, "up")

    def power_off(self, host: Host) -> None:
        """It is gone with every process, and none of its connections says so."""
        self.cut(host)
        self.hosts.remove(host)
        host.die()

    def close(self) -> None:
        for host in self.hosts:
            host.die()
        for cable in self._cables:
            cable.kill()
            cable.wait(30)
        self._switch.kill()


@contextmanager
def network() -> Iterator[Network]:
    with tempfile.TemporaryDirectory(prefix="hosts-", ignore_cleanup_errors=True) as folder:
        net = Network(Path(folder))
        try:
            yield net
        finally:
            net.close()
