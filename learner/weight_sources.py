"""Where published weights come from: name by name, as vLLM's trainer API reads them."""

from collections.abc import Iterator

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from common.files.checkpoint_files import weight_files
from common.models.adapters import split, stored_adapter
from common.text.tokenizers import local_checkpoint
from contracts.config import ModelConfig
from learner.engine import TrainEngine
from learner.stored_weights import as_stored, stored_shapes


class EngineSource(WeightSource):
    """The weights of a `TrainEngine`. Iteration is a collective under ZeRO-3: all ranks iterate together.

    Names and layout are those of a checkpoint on disk, which engines read: transformers holds all experts of a layer in one
    tensor, and a checkpoint has each by itself. With LoRA they are those of the adapter alone, by the modules of the base's
    checkpoint: `model.layers.0.mlp.up_proj.lora_A.weight` [rank, in], `...lora_B.weight` [out, rank], and of DoRA
    `...lora_magnitude_vector` [out].
    """

    def __init__(self, engine: TrainEngine):
        self._engine = engine

    def metadata(self) -> list[ParamMeta]:
        shapes = stored_shapes(self._engine.model, self._engine.weight_shapes())
        return [ParamMeta(name, dtype, shape) for name, dtype, shape in shapes]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for group in self._engine.gathered():
            yield from as_stored(self._engine.model, {name: tensor.detach() for name, tensor in group})


class CheckpointSource(WeightSource):
    """The weights of a safetensors checkpoint, a directory or a hub id, in the dtype that it was saved in."""

    def __init__(self, path: str, revision: str | None = None):
        self._files = weight_files(local_checkpoint(path, revision))
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


class AdapterSource(WeightSource):
    """The adapter in a directory, as `EngineSource` names it, in the dtype of `model`; of the base itself nothing, since an
    engine's modules without an adapter are those of the base."""

    def __init__(self, path: str, model: ModelConfig):
        _, adapter = split(path)
        tensors = stored_adapter(adapter, model) if adapter else {}
        self._tensors = {name: tensor.to(getattr(torch, model.dtype)) for name, tensor in tensors.items()}

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._tensors.items()


def stored_source(path: str, model: ModelConfig) -> WeightSource:
    """What an engine that was started for `model` is sent so that it serves the checkpoint at `path`."""
    return AdapterSource(path, model) if model.lora else CheckpointSource(path, model.revision_of(path))
