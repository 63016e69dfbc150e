"""How much memory a job may take on this machine: a container's limit leaves less than there is, or than is free."""

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
    """Bytes, and what leaves no more than that."""

    whole: float  # if nothing else ran here; more can never be had
    whole_source: str
    free: float
    free_source: str


def memory_room(groups: Path = CONTROL_GROUPS, own: Path = OWN_GROUPS) -> Room:
    """The machine's memory, or the smallest limit of this process's control group and those above where that is less; and
    the same of what is free now. Swap counts as memory of the whole: slow, but there.

    https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.max), https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
    """
    machine, swap = psutil.virtual_memory(), psutil.swap_memory().total
    name = f"the machine's {machine.total / 2**30:.1f} GiB"
    wholes, frees = [(float(machine.total), name)], [(float(machine.available), f"free of {name}")]
    for folder in group_folders(groups, own):
        for limit_file, usage_file, cache in FILES:
            limit, usage = text_of(folder / limit_file).strip(), text_of(folder / usage_file).strip()
            if not (limit.isdigit() and usage.isdigit()) or int(limit) >= machine.total:
                continue  # there is none: "max", or more than there is
            name = f"{limit_file} {int(limit) / 2**30:.1f} GiB in {folder}"
            stat = dict(line.split() for line in text_of(folder / "memory.stat").splitlines() if line.count(" ") == 1)
            wholes.append((float(limit), name))
            frees.append((max(0.0, float(int(limit) - int(usage) + int(stat.get(cache, 0)))), f"left of {name}"))
    (whole, whole_source), (free, free_source) = min(wholes), min(frees)
    return Room(whole + swap, whole_source, free, free_source)
