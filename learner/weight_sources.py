"""Where published weights come from: name by name, as vLLM's trainer API reads them."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from learner.engine import TrainEngine


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
        self._metadata: list[ParamMeta] = []

    def metadata(self) -> list[ParamMeta]:
        if not self._metadata:
            self._metadata = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file in self._files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    yield name, tensors.get_tensor(name)
