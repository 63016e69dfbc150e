"""Environment variables that libraries insist on, set in one place, for the processes that Ray starts for us.

They steer libraries, never Tandem: what a user chooses is in the configuration. And how a driver starts or joins Ray.
"""

import logging
from typing import Any

from common.processes.cores import usable_cores
from contracts.config import ClusterConfig

ON_CPU = {
    # Keep what was allocated, in huge pages: a training step allocates and frees gigabytes of activations, and touching
    # fresh 4 KiB pages took a third of it. Where a GPU has the activations, whole models that pass through the host's memory
    # would stay there.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=68719476736:glibc.malloc.top_pad=67108864",
    # Sampling and scoring are eager; without this vLLM compiles a sampler for 22 s on the first request. On GPUs
    # engine.enforce_eager says whether it compiles.
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Ray 2.60 hides a node's GPUs no more from processes that ask for none, and a scorer takes one where it sees one.
    "CUDA_VISIBLE_DEVICES": "",
}


def worker_env(threads: int, on_cpu: bool) -> dict[str, str]:
    """Environment of one actor, learner rank or reward replica that may use `threads` cores."""
    env = {
        # Must be there before torch is imported: OpenMP reads it once.
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # A thread that waits for its sibling sleeps at once. Spinning, it keeps the core from what its sibling waits
        # for whenever another process wants one too (benchmarks/busy.py).
        "GOMP_SPINCOUNT": "0",
        # The engine runs inside the actor process: half the start-up time, and no core reserved for a front-end.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        # Whatever the user's shell says: no debugging endpoints, no pickle from whoever reaches a socket of an engine.
        "VLLM_SERVER_DEV_MODE": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # DeepSpeed otherwise probes for devices and warns that it found none.
    return env | ({"DS_ACCELERATOR": "cpu"} | ON_CPU if on_cpu else {"DS_ACCELERATOR": "cuda"})


# By default 1024. With them a learner rank's peak was 0.15 GiB higher and it was no faster: a product compiles in a
# millisecond or two.
LEARNER_PRODUCTS, SCORER_PRODUCTS = 128, 16


def learner_env(threads: int, on_cpu: bool) -> dict[str, str]:
    """Environment of one learner rank. oneDNN keeps a compiled product for each shape, and every microbatch has its own
    number of tokens."""
    return worker_env(threads, on_cpu) | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(LEARNER_PRODUCTS)}


def scorer_env(threads: int, on_cpu: bool) -> dict[str, str]:
    """Environment of one reward replica, whose batches of texts are scored once: no shape comes back."""
    return worker_env(threads, on_cpu) | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(SCORER_PRODUCTS)}


def driver_env() -> dict[str, str]:
    """Environment of the driver, which holds no model. Set before ray, torch or transformers is imported."""
    return {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray starts workers at nice 15, where any other program on the machine starves them.
        "RAY_worker_niceness": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "DS_ACCELERATOR": "cpu",
        "WANDB_DISABLE_WEAVE": "true",
    }


def embedded_cpus() -> int:
    """Of the Ray that a driver starts for itself. Ray Serve's own processes need room beside ours: two at least."""
    return max(usable_cores(), 2)


def fitting_threads(cluster: ClusterConfig, threads: int) -> int:
    """Of a process that is to have `threads`: no more than the cores of this machine, where the processes of an embedded
    Ray are. Threads above that wait for one another at every operator."""
    return min(threads, usable_cores()) if cluster.address == "local" else threads


def ray_options(cluster: ClusterConfig, namespace: str) -> dict[str, Any]:
    """Arguments of `ray.init`: `cluster.address` "local" starts an embedded Ray, anything else joins one."""
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": namespace}
    if cluster.address == "local":
        options |= {
            "num_cpus": embedded_cpus(),
            "object_store_memory": int(cluster.object_store_gib * 2**30),
            "include_dashboard": False,
        }
    return options | {"address": cluster.address}
