"""Sends weights through the memory of the host: the CPU counterpart of vLLM's NCCL and IPC trainers."""

import time
import uuid
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import ray
import torch
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine

from common.processes.shared_memory import Segment, layout, view
from contracts.weights import Parameters, PublishReport, WeightUpdate, checksum
from learner.receivers import Receivers


@dataclass
class SharedMemoryInfo(TrainerInitInfo):
    backend: ClassVar[str] = "shared_memory"


@dataclass
class RayObjectInfo(TrainerInitInfo):
    backend: ClassVar[str] = "ray_object"


class HostTrainer(TrainerWeightTransferEngine[TrainerInitInfo]):
    """Packs the weights once, into memory that the engines of the node share, and tells every actor where they are.
    Actors that cannot read it, as those of other nodes, get the same bytes through Ray's object store.

    What this process holds beyond its shards is one gathered layer and the packed buffer, which is the node's one copy.
    """

    init_info_cls = TrainerInitInfo
    client: Receivers

    def __init__(self, *, shares_memory: bool, **kwargs: Any):
        super().__init__(**kwargs)
        self._name = uuid.uuid4().hex
        self._shares_memory = shares_memory
        self._needs_object = not shares_memory
        # One, unless a late reader still holds it. Kept, because touching fresh pages costs several times the copy.
        self._segments: list[Segment] = []
        self._current: Segment | None = None
        self._update: WeightUpdate | None = None
        self._version: int | None = None  # on every rank

    @classmethod
    def trainer_init(cls, init_info: TrainerInitInfo, *, client: Any, source: Any = None) -> "HostTrainer":
        shares_memory = isinstance(init_info, SharedMemoryInfo)
        trainer = cls(client=client, source=source, is_sender=init_info.is_sender, shares_memory=shares_memory)
        if trainer.is_sender:
            trainer.connect(client)
        return trainer

    def connect(self, receivers: Receivers) -> None:
        """Send to these from now on. Those that were connected before keep the version that they have."""
        self.client = receivers
        if not self._segments:
            self._segments = [Segment(layout(self._parameters())[1])]
        address = self._segments[0].address if self._shares_memory else None
        reaches, _ = receivers.call("connect_weights", lambda i: (self._name, address))
        self._needs_object = not all(reaches.values())

    def send_weights(self, version: int = 0) -> PublishReport | None:  # type: ignore[override]  # vLLM knows no versions
        """Publish; the version that was sent last is sent again as it was. All ranks together.

        Returns:
            On the sender, who serves `version`; None on the other ranks.
        """
        again, self._version = version == self._version, version
        if not self.is_sender:
            for _ in () if again else self.source or ():  # takes part in the gathers
                pass
            return None
        start = time.perf_counter()
        if not again:
            self._update = self._pack(version)
        assert self._update is not None
        assert self._current is not None
        if self._needs_object and not self._update.objects:
            payload = self._current.payload
            self._update = replace(self._update, objects=[ray.put(payload)], checksum=checksum(payload))
        update, pack_s = self._update, time.perf_counter() - start
        answers, missing = self.client.call("load_weights", lambda i: (update,))
        loaded = {i: answer for i, answer in answers.items() if answer.version >= version}
        missing |= {i: f"it serves version {answer.version}" for i, answer in answers.items() if i not in loaded}
        return PublishReport(
            version=version,
            seconds=time.perf_counter() - start,
            pack_s=pack_s,
            nbytes=len(self._current.payload),
            calls=len(self.client.members),
            loaded=loaded,
            missing=missing,
            update=update,
        )

    def _parameters(self) -> Parameters:
        assert self.source is not None
        return tuple((m.name, str(m.dtype).removeprefix("torch."), tuple(m.shape)) for m in self.source.metadata())

    def _pack(self, version: int) -> WeightUpdate:
        assert self.source is not None
        parameters = self._parameters()
        slots, size = layout(parameters)
        self._update = None  # an object of the last version would stand beside the new one
        self._current = segment = self._free_segment(size)
        buffer = torch.from_numpy(segment.payload)
        for slot, (name, tensor) in zip(slots, self.source, strict=True):
            if name != slot.name:
                raise RuntimeError(f"weights came out of order: {name} where {slot.name} was declared")
            view(buffer, slot).copy_(tensor)
        segment.commit(version)
        return WeightUpdate(self._name, version, parameters, segment.address if self._shares_memory else None)

    def _free_segment(self, size: int) -> Segment:
        """One that nobody reads, ready to be written."""
        free = [segment for segment in self._segments if segment.begin()]
        for spare in free[1:]:
            self._segments.remove(spare)
            spare.close()
        if not free:
            free = [Segment(size)]
            free[0].begin()
            self._segments += free
        return free[0]

    def shutdown(self) -> None:
        for segment in self._segments:
            segment.close()
        self._segments = []


for info in (SharedMemoryInfo, RayObjectInfo):
    if info.backend not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine(info.backend, HostTrainer)
