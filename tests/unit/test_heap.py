"""Memory that a rank on a CPU gives back."""

import os
import subprocess
import sys

from common.processes.heap import FIRST_S, GROWTH, Heap
from common.processes.process_env import ON_CPU

MIB = 2**20
# Blocks as a step's, with something small between them that stays, as a compiled product does: freed, they are gaps.
GAPS = """
from common.processes.heap import GROWTH, Heap, anonymous_bytes
heap = Heap()
assert not heap.after(60)
before, stays, blocks = anonymous_bytes(), [], []
while sum(map(len, blocks)) < GROWTH + (64 << 20):
    blocks.append(bytearray(b"x" * (1 << 20)))
    stays.append(bytes([len(stays) % 251]) * 400)
del blocks
kept = anonymous_bytes() - before
is_given = heap.after(1)
assert all(set(small) == {i % 251} for i, small in enumerate(stays))
print(kept >> 20, is_given, (anonymous_bytes() - before) >> 20)
"""


def test_gaps_between_blocks_in_use_are_given_back() -> None:
    env = os.environ | ON_CPU | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", GAPS], env=env, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    kept, is_given, left = ran.stdout.split()
    assert is_given == "True", ran.stdout
    assert int(left) < 100 < GROWTH // MIB < int(kept), ran.stdout


class Process:
    """A heap of `size` bytes that falls to `least` when it is given back."""

    def __init__(self, least: int):
        self.size, self.least, self.given = least, least, 0
        self.heap = Heap(lambda: self.size, self.give_back)

    def give_back(self) -> None:
        self.size, self.given = self.least, self.given + 1

    def after(self, seconds: float, size: int) -> bool:
        self.size = size
        return self.heap.after(seconds)


def test_what_the_first_calls_need_is_kept() -> None:
    process = Process(least=500 * MIB)
    assert not process.after(1, 600 * MIB)
    assert not process.after(FIRST_S - 2, 4000 * MIB)
    assert not process.after(60, 4000 * MIB + GROWTH)
    assert process.given == 0


def test_growth_is_given_back_and_the_need_is_measured_anew() -> None:
    process = Process(least=500 * MIB)
    process.after(FIRST_S, 2000 * MIB)
    assert process.after(1, 2000 * MIB + GROWTH + 1)
    assert process.size == 500 * MIB
    # A call that comes at once and is small does not make the next large one look like growth.
    assert not process.after(1, 500 * MIB)
    assert not process.after(FIRST_S, 1800 * MIB)
    assert not process.after(60, 1800 * MIB + GROWTH)
    assert process.after(5, 1800 * MIB + GROWTH + 1)
    assert process.given == 2


def test_a_call_of_an_hour_is_its_own_need() -> None:
    """The first of all calls, and the first after memory was given back, may end after any time."""
    process = Process(least=500 * MIB)
    assert not process.after(3600, 6000 * MIB)
    assert not process.after(3600, 6000 * MIB + GROWTH)
    assert process.given == 0
