"""How much memory a job may still take on this machine: what is free is not what a container's limit leaves."""

from pathlib import Path
from typing import NamedTuple

import psutil

from common.processes.cores import CONTROL_GROUPS, OWN_GROUPS, group_folders, text_of

# Files of a control group in versions 2 and 1: limit, usage, and of memory.stat the cache that the kernel gives back.
FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class Room(NamedTuple):
    nbytes: float
    source: str  # what leaves no more than that


def memory_room(groups: Path = CONTROL_GROUPS, own: Path = OWN_GROUPS) -> Room:
    """Free memory, or what the smallest limit of this process's control group and those above leaves where that is less.

    https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.max), https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
    """
    machine = psutil.virtual_memory()
    found = [Room(machine.available, f"free of the machine's {machine.total / 2**30:.1f} GiB")]
    for folder in group_folders(groups, own):
        for limit_file, usage_file, cache in FILES:
            limit, usage = text_of(folder / limit_file).strip(), text_of(folder / usage_file).strip()
            if not (limit.isdigit() and usage.isdigit()) or int(limit) >= machine.total:
                continue  # there is none: "max", or more than there is
            stat = dict(line.split() for line in text_of(folder / "memory.stat").splitlines() if line.count(" ") == 1)
            left = int(limit) - int(usage) + int(stat.get(cache, 0))
            found.append(Room(max(0, left), f"left of {limit_file} {int(limit) / 2**30:.1f} GiB in {folder}"))
    return min(found)
