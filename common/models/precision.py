"""Which number format the forward pass uses where the configuration says `auto`.

bfloat16 halves the memory of weights and activations, and is the fastest format on GPUs and on CPUs that multiply it: x86
with AVX512-BF16 or AMX, Arm with BF16. On any other CPU its products are emulated, and cost eight times as much as
float32's (17 against 138 GFLOP/s on two Zen 3 cores).
"""

import platform
from pathlib import Path

from contracts.config import TandemConfig

# Flags of /proc/cpuinfo; any one of them is enough.
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What the first core can do; empty where the system does not say."""
    if not cpuinfo.exists():
        return set()
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return set(value.split())
    return set()


def cpu_dtype(flags: set[str] | None = None) -> str:
    """What a CPU multiplies best; `flags` of this one where they are not given."""
    return "bfloat16" if BFLOAT16_FLAGS & (cpu_flags() if flags is None else flags) else "float32"


def choose_dtypes(config: TandemConfig, flags: set[str] | None = None) -> str:
    """Replace `auto` by a format, in place, so that everything after this sees the one that is used.

    The nodes of a CPU cluster are taken to be like this machine.

    Args:
        flags: as of `cpu_dtype`.

    Returns:
        A line for the user where a choice was made, else "".
    """
    on_cpu = cpu_dtype(flags)
    cluster, chosen = config.cluster, False
    if config.model.dtype == "auto":
        config.model.dtype = "bfloat16" if cluster.gpus_per_learner_rank else on_cpu
        chosen = not cluster.gpus_per_learner_rank
    if config.reward_service.dtype == "auto":
        config.reward_service.dtype = "bfloat16" if cluster.gpus_per_reward_replica else on_cpu
    if not chosen:
        return ""
    able = "multiplies it" if on_cpu == "bfloat16" else "does not multiply bfloat16, which would be eight times slower"
    return f"model.dtype: {config.model.dtype}, as this CPU ({platform.machine()}) {able}"
