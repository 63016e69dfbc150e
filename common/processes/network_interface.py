"""This machine's network: which of its interfaces leads to another, and ports that nobody has."""

import socket


def interface_towards(address: str, port: int) -> str:
    """The name of the interface from which `address` is reached, as "eth0"; of this machine's own address the one that has
    it. Nothing is sent.

    Raises:
        OSError: no interface leads there.
    """
    import psutil  # only who has another machine needs it

    family, kind, protocol, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        mine = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == mine for entry in addresses):
            return name
    raise OSError(f"no interface has {mine}, from which {address} is reached")


def free_port(host: str = "127.0.0.1") -> int:
    """A port of `host` ("": of every interface) that nobody listens at now."""
    with socket.socket() as free:
        free.bind((host, 0))
        return int(free.getsockname()[1])
