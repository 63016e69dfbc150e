"""Which machine a benchmark ran on: its table names it, and `run_all.py` compares seconds of one kind of machine alone."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.models.precision import cpu_dtype


def machine(*packages: str) -> dict[str, Any]:
    """CPU, cores, the format that the CPU multiplies (two CPUs of one name may differ in it), load and niceness now, and the
    versions of `packages`."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "multiplies": cpu_dtype(),
        "load_before": round(os.getloadavg()[0], 2),
        "niceness": os.nice(0),
        **{name: version(name) for name in packages},
    }


def said(where: dict[str, Any]) -> str:
    """For the line over a table."""
    return f"{where['cpu']}, {where['cores']} cores, load {where['load_before']} before"
