"""How many cores this process may use: what the machine has is not what a laptop's taskset or a pod's quota leaves."""

import os
from collections.abc import Iterator
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def usable_cores(groups: Path = CONTROL_GROUPS, own: Path = OWN_GROUPS) -> int:
    """The cores of the affinity, or those of the smallest CPU quota where that is less; at least 1.

    A quota is rounded down: of two threads that share 1.5 cores one waits, and OpenMP's other one spins meanwhile.
    """
    quotas = [int(quota) for quota in _quotas(groups, own)]
    return max(1, min([len(os.sched_getaffinity(0)), *quotas]))


def _quotas(groups: Path, own: Path) -> Iterator[float]:
    """In cores, of this process's control group and all above it, in both versions of control groups.

    https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max), https://docs.kernel.org/scheduler/sched-bwc.html (cfs)
    """
    for folder in group_folders(groups, own):
        yield from _quota(text_of(folder / "cpu.max"))
        period = text_of(folder / "cpu.cfs_period_us")
        yield from _quota(f"{text_of(folder / 'cpu.cfs_quota_us').strip()} {period}")


def group_folders(groups: Path, own: Path) -> Iterator[Path]:
    """Where the files of this process's control groups and of all above them may be, in both versions."""
    for line in text_of(own).splitlines():
        _, controllers, path = line.split(":", 2)
        roots = [groups / name for name in controllers.split(",")] if controllers else [groups, groups / "unified"]
        inner = Path(path.lstrip("/"))
        for root in roots:
            for folder in (inner, *inner.parents):  # the last of them is the root's own
                yield root / folder


def _quota(text: str) -> Iterator[float]:
    """Of "50000 100000": half a core. "max" and -1 are none."""
    quota, _, period = text.strip().partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        yield int(quota) / int(period)


def text_of(path: Path) -> str:
    """Nothing of a file that is not there."""
    try:
        return path.read_text()
    except OSError:
        return ""
