"""Processes that run what is not ours: they end with the one that started them, and leave nothing behind."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import IO

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # Linux
END_S = 2.0  # after which a process that does not go is left to the system
MARK = "TANDEM_FAMILY"  # of the environment: nothing reads it but `end_family`
ROUNDS = 20  # of looking for processes that were started while others were ended


def belong_to_parent() -> None:
    """End with the process that started this one, even one that was killed; and be the parent of all that is started from
    here on, so that nothing gets away by leaving its own parent."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)


def own_channels() -> tuple[IO[str], IO[str]]:
    """(requests, replies): standard input and output, for this process's own use. What others read and print is nothing from
    then on: it may be a text of a completion, and it must not be taken for a reply."""
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    return requests, replies


def end_children(but: frozenset[int] = frozenset()) -> None:
    """End everything that was started from this process, and wait for it.

    Args:
        but: processes that stay, with all that they have started: those of `children` before what is to be ended.
    """
    end = time.monotonic() + END_S
    while (found := children() - but) and time.monotonic() < end:
        for pid in found:
            with suppress(psutil.NoSuchProcess):
                child = psutil.Process(pid)
                for one in (*child.children(recursive=True), child):
                    with suppress(psutil.NoSuchProcess):
                        one.kill()
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.001)


def children() -> frozenset[int]:
    """Of this process, those that have ended and were not waited for among them; far cheaper than a look through all
    processes."""
    found: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError), open(f"/proc/self/task/{thread}/children") as file:
            found.update(map(int, file.read().split()))
    return frozenset(found)


def end_family(process: subprocess.Popen, mark: str) -> None:
    """End a process that leads a session of its own, and everything that was started from it.

    Args:
        mark: what `MARK` is in its environment. It finds those whose parent ended before them.
    """
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        family = psutil.Process(process.pid)
        family.suspend()  # it starts nothing more, and stays the parent of what its children leave behind
        for _ in range(ROUNDS):
            alive = [child for child in family.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
            if not alive:
                break
            for child in alive:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    for other in psutil.process_iter(["environ"]):
        if (other.info["environ"] or {}).get(MARK) == mark:
            with suppress(psutil.NoSuchProcess):
                other.kill()
