"""Which interface leads to an address: the one by which the ranks of a learner reach one another."""

import fcntl
import socket
import struct

import pytest

from common.processes.network_interface import interface_towards

SIOCGIFADDR = 0x8915


def addresses() -> dict[str, str]:
    """Of each interface that has one, from the kernel."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has none
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def test_the_own_address_lies_on_the_interface_that_has_it() -> None:
    known = addresses()
    assert known["lo"] == "127.0.0.1"
    assert {name: interface_towards(address, 29500) for name, address in known.items()} == {
        name: name for name in known
    }


@pytest.mark.parametrize("address", ["localhost", "127.0.1.1"])
def test_loopback_has_more_than_one_address(address: str) -> None:
    assert interface_towards(address, 29500) == "lo"
