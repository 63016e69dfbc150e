"""The sending end of a weight transfer, through vLLM's own trainer API; every learner rank takes part.

    all ranks                     rank 0                                     every actor
    gather a layer ──────> copy it into the packed buffer ─── one call ───> map the buffer, or get and check it, exchange the
    gather the next ...                                                     weights between two decoding steps

    shared_memory   CPU: memory that the engines of the learner's node read in place; Ray's object store for other nodes
    ray_object      CPU: the object store for all
    nccl, ipc       vLLM's own, on GPUs

On CPU an actor that is dead, late or refuses is left out and reported, and gets the current version when it is connected
again. vLLM's own transports need every actor: one that is found dead before a transfer raises `ReceiversLost`, and
`connect` builds the group again without it. One that dies within an NCCL broadcast leaves rank 0 waiting in it; the
deadline of the caller, `cluster.step_timeout_s`, then ends the learner.
"""

import math
import time
from typing import Any

import ray
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine, WeightSource

from contracts.weights import LoadReport, PublishReport
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
        self._backend, self._source, self._rank = backend, source, rank
        self._tensor_parallel_size, self._timeout_s = tensor_parallel_size, timeout_s
        self._trainer: TrainerWeightTransferEngine | None = None
        self._receivers: Receivers | None = None

    def connect(self, actors: list[Any]) -> None:
        """Send to these actors from now on; all ranks together. Again, when actors have been lost or replaced."""
        self._receivers = Receivers(actors, self._tensor_parallel_size, self._timeout_s)
        if isinstance(self._trainer, HostTrainer):
            if self._rank == 0:
                self._trainer.connect(self._receivers)
            return
        if self._trainer is not None:
            self._trainer.shutdown()
            if self._rank == 0:  # new actors have nothing to shut down, lost ones do not answer
                self._receivers.call("shutdown_weight_transfer_engine", lambda i: ())
        info = _init_info(self._backend, self._rank, len(actors) * self._tensor_parallel_size)
        self._trainer = WeightTransferTrainerFactory.trainer_init(info, client=self._receivers, source=self._source)

    def send(self, policy_version: int) -> PublishReport | None:
        """Give every actor the weights of `policy_version`; all ranks together.

        Returns:
            What became of it, on rank 0; None on the others.

        Raises:
            ReceiversLost: one of vLLM's own transports has lost an actor.
        """
        assert self._trainer is not None, "send() before connect()"
        assert self._receivers is not None
        if isinstance(self._trainer, HostTrainer):
            return self._trainer.send_weights(policy_version)
        start = time.perf_counter()
        if self._rank == 0:
            self._receivers.call_all("ready")  # before the collective: it would wait for ever for a dead actor
        self._trainer.send_weights()
        if self._rank != 0:
            return None
        self._receivers.call_all("update_weight_version", lambda i: (str(policy_version),))
        seconds = time.perf_counter() - start
        nbytes = sum(math.prod(m.shape) * m.dtype.itemsize for m in self._source.metadata())
        count = len(self._receivers.actors)
        # ready, start, update, finish, version. Generation stands still from the start to the end.
        loaded = {i: LoadReport(policy_version, pause_s=seconds) for i in range(count)}
        return PublishReport(policy_version, seconds, 0.0, nbytes, 5 * count, loaded, {})

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
