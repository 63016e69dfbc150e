"""The sending end of a weight transfer, through vLLM's own trainer API; every learner rank takes part.

    all ranks                     rank 0                                     every actor
    gather a layer ──────> copy it into the packed buffer ─── one call ───> map the buffer, or get and check it, exchange the
    gather the next ...                                                     weights between two decoding steps

    shared_memory   CPU: memory that the engines of the learner's node read in place; Ray's object store for other nodes
    ray_object      CPU: the object store for all
    nccl, ipc       vLLM's own, on GPUs

An actor that is dead, late or refuses is left out and reported, and gets the current version when it is connected again;
what vLLM's own transports cannot do without an actor is in `learner/group_trainer.py`.
"""

from typing import Any

import ray
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import TrainerInitInfo, WeightSource

from contracts.weights import PublishReport
from learner.group_trainer import GroupTrainer
from learner.host_trainer import HostTrainer, RayObjectInfo, SharedMemoryInfo
from learner.receivers import Receivers

BACKEND = SharedMemoryInfo.backend  # the fastest on CPU: benchmarks/weight_transfer.py


class WeightPublisher:
    """`contracts.interfaces.WeightTransfer` over one of vLLM's trainer engines.

    Args:
        timeout_s: longest wait for an actor; a transfer goes on without it.
    """

    def __init__(
        self, backend: str, source: WeightSource, rank: int = 0, tensor_parallel_size: int = 1, timeout_s: float = 120.0
    ):
        self._backend = backend
        self._source = source
        self._rank = rank
        self._tensor_parallel_size, self._timeout_s = tensor_parallel_size, timeout_s
        self._trainer: HostTrainer | GroupTrainer | None = None

    def connect(self, actors: list[Any]) -> None:
        """Send to these actors from now on; all ranks together. Again, when actors have been lost or replaced."""
        receivers = Receivers(actors, self._tensor_parallel_size, self._timeout_s)
        if self._trainer is not None:
            if self._rank == 0:
                self._trainer.connect(receivers)
        elif self._backend in (SharedMemoryInfo.backend, RayObjectInfo.backend):
            self._trainer = self._open(receivers)
        else:
            self._trainer = GroupTrainer(self._open, self._source, self._rank == 0, receivers)

    def _open(self, receivers: Receivers) -> Any:
        info = _init_info(self._backend, self._rank, len(receivers.members) * self._tensor_parallel_size)
        return WeightTransferTrainerFactory.trainer_init(info, client=receivers, source=self._source)

    def send(self, policy_version: int) -> PublishReport | None:
        """Give every actor the weights of `policy_version`; all ranks together.

        Returns:
            What became of it, on rank 0; None on the others.

        Raises:
            ReceiversLost: an actor was lost within a transfer over one of vLLM's own transports.
        """
        assert self._trainer is not None, "send() before connect()"
        return self._trainer.send_weights(policy_version)

    def shutdown(self) -> None:
        if self._trainer is not None:
            self._trainer.shutdown()


def _init_info(backend: str, rank: int, num_workers: int) -> TrainerInitInfo:
    """`num_workers`: processes of all engines together."""
    if backend == SharedMemoryInfo.backend:
        return SharedMemoryInfo(rank=rank)
    if backend == RayObjectInfo.backend:
        return RayObjectInfo(rank=rank)
    if backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_open_port

        return NCCLTrainerInitInfo(
            master_address=ray.util.get_node_ip_address(),
            master_port=get_open_port(),
            world_size=num_workers + 1,
            rank=rank,
        )
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    return IPCTrainerInitInfo(rank=rank, packed=True)  # else every gathered weight is kept until the end
