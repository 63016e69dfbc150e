"""A cable that is slow and loses frames: two network devices, and what enters one leaves the other later, or never.

    python cable.py DEVICE DEVICE SECONDS SHARE      makes both devices, prints "ready", lives until its input ends

For kernels without netem. What is lost is drawn from a seed; order is kept, as on a line of one speed.
"""

import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF = 0x400454CA
TAP, WITHOUT_HEADER = 0x0002, 0x1000
LONGEST_FRAME = 65536


def device(name: str) -> int:
    """The descriptor of a new device: a frame a read, a frame a write."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH14x", name.encode(), TAP | WITHOUT_HEADER))
    return file


def main(left: str, right: str, delay_s: float, loss: float) -> None:
    ends = [device(left), device(right)]
    print("ready", flush=True)
    draw, under_way = random.Random(0), deque[tuple[float, int, bytes]]()
    while True:
        timeout_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready, _, _ = select.select([sys.stdin, *ends], [], [], timeout_s)
        if sys.stdin in ready:
            return
        for end in ready:
            frame = os.read(end, LONGEST_FRAME)
            if draw.random() >= loss:
                under_way.append((time.monotonic() + delay_s, ends[1 - ends.index(end)], frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, end, frame = under_way.popleft()
            try:
                os.write(end, frame)
            except OSError:  # the device is down: nobody is there to get it
                continue


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
