"""CPU: memory that the engines of the learner's node read in place; Ray's object store for other nodes. The fastest there:
benchmarks/weight_transfer.py."""

from typing import Any

from contracts.transports import Transport


def _open(rank: int, num_workers: int) -> Any:
    from learner.host_trainer import SharedMemoryInfo

    return SharedMemoryInfo(rank=rank)


TRANSPORT = Transport(open=_open, is_default=lambda config: config.cluster.gpus_per_actor == 0)
