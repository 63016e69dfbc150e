"""The sending end of a weight transfer, through vLLM's own trainer API; every learner rank takes part.

    all ranks                     rank 0                                     every actor
    gather a layer ──────> copy it into the packed buffer ─── one call ───> map the buffer, or get and check it, exchange the
    gather the next ...                                                     weights between two decoding steps

The transports are in learner/weight_transports.

An actor that is dead, late or refuses is left out and reported, and gets the current version when it is connected again;
what vLLM's own transports cannot do without an actor is in `learner/group_trainer.py`.
"""

import math
from typing import Any

from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import WeightSource

from contracts.transports import find_transport
from contracts.weights import PublishReport
from learner.group_trainer import GroupTrainer
from learner.host_trainer import HostTrainer, SharedMemoryInfo
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
        self._transport = find_transport(backend)
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
        elif self._transport.needs_all:
            self._trainer = GroupTrainer(self._open, self._source, self._rank == 0, receivers)
        else:
            self._trainer = self._open(receivers)

    def _open(self, receivers: Receivers) -> Any:
        info = self._transport.open(self._rank, len(receivers.members) * self._tensor_parallel_size)
        if info.backend == "ipc":
            # vLLM's packer refuses a weight above its buffer of 1 GiB, as the embedding of Qwen2.5-7B is. NCCL's takes any:
            # there a larger buffer would only cost memory.
            sizes = [math.prod(m.shape) * m.dtype.itemsize for m in self._source.metadata()]
            info.packed_buffer_size_bytes = max([info.packed_buffer_size_bytes, *sizes])
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
