"""Sends weights over vLLM's own transports, whose transfers need every receiver: NCCL joins all of them in one group.

So before each transfer the sender asks who is there, and builds the group again without those that do not answer. The other
ranks need not know: they belong to no group, they only take part in the gathers.

What cannot be mended from here: an actor that dies within a transfer. Over IPC that is `ReceiversLost`; an NCCL group
leaves the sender waiting for it, and the deadline of its caller, `cluster.step_timeout_s`, ends the run.
"""

import math
import time
from collections.abc import Callable

from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine, WeightSource

from contracts.weights import LoadReport, PublishReport
from learner.receivers import Receivers


class GroupTrainer:
    """`open_engine(receivers)` joins the members of `receivers` and returns vLLM's engine for them."""

    def __init__(
        self,
        open_engine: Callable[[Receivers], TrainerWeightTransferEngine],
        source: WeightSource,
        is_sender: bool,
        receivers: Receivers,
    ):
        self._open_engine = open_engine
        self._source = source
        self._is_sender = is_sender
        self._engine: TrainerWeightTransferEngine | None = None
        self.connect(receivers)

    def connect(self, receivers: Receivers) -> None:
        """Send to these from now on."""
        self._receivers, self._is_joined = receivers, False

    def send_weights(self, version: int) -> PublishReport | None:
        """All ranks together.

        Returns:
            On the sender, who serves `version`; None on the other ranks.

        Raises:
            ReceiversLost: a receiver was lost within the transfer.
        """
        start, receivers = time.perf_counter(), self._receivers
        lost = self._is_sender and receivers.leave_out_lost()
        if lost or not self._is_joined:
            self._join()
        assert self._engine is not None
        self._engine.send_weights()
        if not self._is_sender:
            return None
        receivers.call_all("update_weight_version", lambda i: (str(version),))
        seconds = time.perf_counter() - start
        nbytes = sum(math.prod(m.shape) * m.dtype.itemsize for m in self._source.metadata())
        # ready, start, update, finish, version. Generation stands still from the start to the end.
        loaded = {i: LoadReport(version, pause_s=seconds) for i in receivers.members}
        return PublishReport(version, seconds, 0.0, nbytes, 5 * len(loaded), loaded, dict(receivers.left_out))

    def _join(self) -> None:
        self.shutdown()
        if self._is_sender and self._engine is not None:  # members of the group before may have nothing to shut down
            self._receivers.call("shutdown_weight_transfer_engine", lambda i: ())
        self._engine, self._is_joined = self._open_engine(self._receivers), True

    def shutdown(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
