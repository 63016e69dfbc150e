"""How many cores a process may use, against files as the kernel writes them."""

import os
from pathlib import Path

import pytest

from common.processes.cores import usable_cores
from common.processes.process_env import fitting_threads
from contracts.config import ClusterConfig

OWN_2 = "0::/kubepods/pod1/box\n"
OWN_1 = "4:cpu,cpuacct:/docker/box\n3:memory:/docker/box\n"


def cores(folder: Path, own: str, files: dict[str, str], machine: int = 8) -> int:
    (folder / "own").write_text(own)
    for name, text in files.items():
        (folder / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "groups" / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda pid: set(range(machine)))
        return usable_cores(folder / "groups", folder / "own")


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        (OWN_2, {}, 8),
        (OWN_2, {"kubepods/pod1/box/cpu.max": "max 100000\n"}, 8),
        (OWN_2, {"kubepods/pod1/box/cpu.max": "200000 100000\n"}, 2),
        (OWN_2, {"kubepods/pod1/box/cpu.max": "150000 100000\n"}, 1),
        (OWN_2, {"kubepods/pod1/box/cpu.max": "50000 100000\n"}, 1),
        (OWN_2, {"kubepods/pod1/cpu.max": "300000 100000\n", "kubepods/pod1/box/cpu.max": "max 100000\n"}, 3),
        (OWN_2, {"cpu.max": "400000 100000\n"}, 4),  # within a container the own group is the root
        (OWN_2, {"unified/kubepods/pod1/box/cpu.max": "500000 100000\n"}, 5),
        (OWN_1, {"cpu/docker/box/cpu.cfs_quota_us": "-1\n", "cpu/docker/box/cpu.cfs_period_us": "100000\n"}, 8),
        (OWN_1, {"cpu/docker/box/cpu.cfs_quota_us": "250000\n", "cpu/docker/box/cpu.cfs_period_us": "100000\n"}, 2),
        (OWN_1, {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 2),
    ],
)
def test_the_smallest_quota_counts(tmp_path: Path, own: str, files: dict[str, str], expected: int) -> None:
    assert cores(tmp_path, own, files) == expected


def test_affinity_counts(tmp_path: Path) -> None:
    assert cores(tmp_path, OWN_2, {"cpu.max": "400000 100000"}, machine=3) == 3


def test_threads_fit_the_cores_of_this_machine_alone() -> None:
    kept = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(kept)})
        assert fitting_threads(ClusterConfig(), 2) == 1
        assert fitting_threads(ClusterConfig(address="auto"), 4) == 4
    finally:
        os.sched_setaffinity(0, kept)
