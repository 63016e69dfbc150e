"""Which of this machine's network interfaces leads to another."""

import socket

import psutil


def interface_towards(address: str, port: int) -> str:
    """The name of the interface from which `address` is reached, as "eth0"; of this machine's own address the one that has
    it. Nothing is sent.

    Raises:
        OSError: no interface leads there.
    """
    family, kind, protocol, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        mine = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == mine for entry in addresses):
            return name
    raise OSError(f"no interface has {mine}, from which {address} is reached")
