"""GPUs: vLLM's own, one NCCL group of all engines and learner rank 0."""

from typing import Any

from contracts.transports import Transport


def _open(rank: int, num_workers: int) -> Any:
    import ray
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    from vllm.utils.network_utils import get_open_port

    return NCCLTrainerInitInfo(
        master_address=ray.util.get_node_ip_address(),
        master_port=get_open_port(),
        world_size=num_workers + 1,
        rank=rank,
    )


TRANSPORT = Transport(
    open=_open,
    is_default=lambda config: config.cluster.gpus_per_actor > 0 and config.cluster.layout != "colocated",
    layout="disaggregated",
    why="NCCL cannot join two processes on one device",
    needs_gpus=True,
    needs_all=True,
    one_a_gpu=True,
)
