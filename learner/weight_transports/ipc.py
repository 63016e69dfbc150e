"""GPUs: vLLM's own, through the memory of the device that an actor and its learner rank share."""

from typing import Any

from contracts.transports import Transport


def _open(rank: int, num_workers: int) -> Any:
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    return IPCTrainerInitInfo(rank=rank, packed=True)  # else every gathered weight is kept until the end


TRANSPORT = Transport(
    open=_open,
    is_default=lambda config: config.cluster.gpus_per_actor > 0 and config.cluster.layout == "colocated",
    layout="colocated",
    why="ipc needs actor and learner rank on one device",
    needs_gpus=True,
    needs_all=True,
)
