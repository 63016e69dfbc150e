"""What the heap of a process that trains on a CPU keeps and nothing needs."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

GROWTH = 512 * 2**20  # bytes that may come on top before they are given back
FIRST_S = 20.0  # what calls of so many seconds in sum leave behind is needed

STATM = Path("/proc/self/statm")


def anonymous_bytes() -> int:
    """Of this process, in memory: resident pages less those of files and shared memory (man 5 proc_pid_statm)."""
    resident, shared = (int(word) for word in STATM.read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Of glibc's heap, every whole page that is free, also between blocks in use (man 3 malloc_trim)."""
    ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


class Heap:
    """`process_env.ON_CPU` has glibc keep what was freed, because touching fresh pages costs a third of a step. But every
    microbatch has sizes of its own: the gaps of one do not fit the blocks of the next, and from step to step the heap
    grows, without end that was seen. Giving back costs the touching of all that is used again, so that it is done
    only when the heap has grown by GROWTH beyond what it needed since the last time.

    Which pages lie where changes no number.
    """

    def __init__(self, size: Callable[[], int] = anonymous_bytes, give_back: Callable[[], None] = give_back):
        self._size, self._give_back = size, give_back
        self._worked_s, self._needed = 0.0, 0

    def after(self, seconds: float) -> bool:
        """A call that took so long and may have allocated. Whether memory was given back."""
        size = self._size()
        if self._worked_s < FIRST_S:
            self._worked_s, self._needed = self._worked_s + seconds, max(self._needed, size)
        elif size > self._needed + GROWTH:
            self._give_back()
            self._worked_s, self._needed = 0.0, self._size()
            return True
        return False
