"""The sending end of a weight transfer, through vLLM's own trainer API; every learner rank takes part.

The transport follows from the class of the init info that `make_weight_transfer` builds: vLLM's NCCL engine on GPUs, or
ours over Ray's object store, of which `actors/weight_transfer.py` is the receiving end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ray
import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
)
from vllm.distributed.weight_transfer.clients import RayVLLMWeightSyncClient

from contracts.packing import layout, view
from learner.engine import TrainEngine

BACKEND = "ray_object"


class EngineSource(WeightSource):
    """The weights of a `TrainEngine`. Iteration is a collective under ZeRO-3: all ranks iterate together."""

    def __init__(self, engine: TrainEngine):
        self._engine = engine

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, dtype, shape) for name, dtype, shape in self._engine.weight_shapes()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._engine.named_weights():
            yield name, parameter.detach()


class CheckpointSource(WeightSource):
    """The weights of a safetensors checkpoint directory, in the dtype that it was saved in."""

    def __init__(self, path: str):
        self._files = sorted(Path(path).glob("*.safetensors"))
        if not self._files:
            raise FileNotFoundError(f"no .safetensors file in {path}")

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file in self._files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    yield name, tensors.get_tensor(name)


@dataclass
class RayObjectTrainerInfo(TrainerInitInfo):
    backend: ClassVar[str] = BACKEND


class RayObjectTrainer(TrainerWeightTransferEngine[RayObjectTrainerInfo]):
    """Packs the weights into one buffer, puts it once, and lets every engine of a node read it in place."""

    init_info_cls = RayObjectTrainerInfo

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        # Kept between transfers: touching fresh pages costs several times the copy itself.
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @classmethod
    def trainer_init(cls, init_info: RayObjectTrainerInfo, *, client: Any, source: Any = None) -> "RayObjectTrainer":
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if engine.is_sender:
            client.init_weight_transfer_engine({})
        return engine

    def send_weights(self, weight_version: str | None = None) -> None:
        assert self.source is not None
        if not self.is_sender:
            for _ in self.source:  # takes part in the gathers
                pass
            return
        parameters = [(m.name, str(m.dtype).removeprefix("torch."), list(m.shape)) for m in self.source.metadata()]
        slots, size = layout(parameters)
        if self._buffer.numel() != size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        for slot, (name, tensor) in zip(slots, self.source, strict=True):
            if name != slot.name:
                raise RuntimeError(f"weights came out of order: {name} where {slot.name} was declared")
            view(self._buffer, slot).copy_(tensor)
        reference = ray.put(self._buffer.numpy())
        self.client.start_weight_update()
        self.client.update_weights({"parameters": parameters, "buffer": [reference]})
        self.client.finish_weight_update(weight_version)


class WeightPublisher:
    """`contracts.interfaces.WeightTransfer` over one of vLLM's trainer engines."""

    def __init__(self, backend: str, source: WeightSource, actors: list[Any], rank: int, world_size: int):
        client = RayVLLMWeightSyncClient(actors)
        self._client, self._rank = client, rank
        self._engine = WeightTransferTrainerFactory.trainer_init(
            _init_info(backend, rank, len(actors)), client=client, source=source
        )

    def send(self, policy_version: int) -> None:
        """Replace the weights of every engine. Returns when all of them serve `policy_version`."""
        if isinstance(self._engine, RayObjectTrainer):
            self._engine.send_weights(str(policy_version))
            return
        self._engine.send_weights()
        if self._rank == 0:  # vLLM's own trainers do not pass a version on
            ray.get([actor.update_weight_version.remote(str(policy_version)) for actor in self._client.handles])

    def shutdown(self) -> None:
        self._engine.shutdown()


def _init_info(backend: str, rank: int, num_engines: int) -> TrainerInitInfo:
    if backend == BACKEND:
        return RayObjectTrainerInfo(rank=rank)
    if backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_open_port

        return NCCLTrainerInitInfo(
            master_address=ray.util.get_node_ip_address(),
            master_port=get_open_port(),
            world_size=num_engines + 1,
            rank=rank,
        )
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    return IPCTrainerInitInfo(rank=rank)


if BACKEND not in WeightTransferTrainerFactory._registry:
    WeightTransferTrainerFactory.register_engine(BACKEND, "learner.weight_publisher", "RayObjectTrainer")
