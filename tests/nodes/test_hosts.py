"""The hosts themselves: what they see of one another, and that nothing is left of them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.nodes.hosts import Host, Network, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no hosts of its own: {why_not()}")

LISTEN = "import socket; s = socket.create_server(('', 7)); print('up', flush=True); [s.accept() for _ in range(9)]"
# Prints the seconds that a connection takes, or an error.
CONNECT = """
import socket, sys, time
begin = time.monotonic()
try:
    socket.create_connection((sys.argv[1], 7), timeout=1).close()
    print(time.monotonic() - begin)
except OSError as error:
    print(error)
"""


def listen(host: Host) -> None:
    process = subprocess.Popen([*host.enter, sys.executable, "-c", LISTEN], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"


def connect(host: Host, to: Host) -> str:
    return host.call(sys.executable, "-c", CONNECT, to.address).strip()


def test_a_cable_that_is_pulled_and_put_back(net: Network) -> None:
    one, two = net.add(), net.add()
    listen(two)
    assert float(connect(one, two)) < 0.5
    net.cut(two)
    assert connect(one, two) == "timed out"
    net.mend(two)
    assert float(connect(one, two)) < 1


@pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="a slow cable needs /dev/net/tun")
def test_a_slow_cable_takes_its_time_each_way(net: Network) -> None:
    one, two = net.add(), net.add(delay_s=0.05)
    listen(two)
    connect(one, two)  # and who has this address
    assert 0.1 <= float(connect(one, two)) < 0.5


def test_hosts_share_no_names_processes_or_memory(net: Network, tmp_path: Path) -> None:
    one, two = net.add(), net.add()
    assert [one.call("hostname"), two.call("hostname")] == ["host1\n", "host2\n"]
    assert one.call("getent", "hosts", "host1").split() == ["127.0.1.1", "host1"]
    for shared in ("/dev/shm", "/tmp/ray"):
        one.call("touch", f"{shared}/mine")
        assert two.call("ls", shared) == ""
    one.own_disk(tmp_path / "disk")
    one.call("touch", f"{tmp_path}/disk/mine")
    assert (two.call("ls", f"{tmp_path}/disk"), [p.name for p in one.seen(tmp_path / "disk").iterdir()]) == (
        "",
        ["mine"],
    )
    numbers = [int(name) for name in os.listdir(one.seen(Path("/proc"))) if name.isdecimal()]
    assert max(numbers) < 100


def interfaces() -> list[str]:
    return sorted(re.findall(r"^\d+: (\S+?)[@:]", subprocess.check_output(["ip", "link"], text=True), re.MULTILINE))


def test_nothing_is_left_of_a_host_that_dies_or_whose_test_is_killed(net: Network, tmp_path: Path) -> None:
    before, host = interfaces(), net.add()
    listen(host)
    inside = host.processes("")
    assert len(inside) == 2
    assert interfaces() == before
    net.power_off(host)
    psutil.wait_procs(inside, timeout=5)
    assert not any(process.is_running() for process in inside)
    code = "from tests.nodes.hosts import *\nwith network() as net:\n print(net.add().pid, flush=True)\n input()"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert other.stdout is not None
    first = psutil.Process(int(other.stdout.readline()))
    other.kill()
    other.wait()
    first.wait(10)
