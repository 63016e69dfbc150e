"""Where published weights come from: name by name, as vLLM's trainer API reads them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from common.models.adapters import read_tensors, split
from common.models.lora import saved_name, stored_name, target_modules
from common.text.tokenizers import load_config, local_checkpoint
from contracts.config import ModelConfig
from learner.engine import TrainEngine


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
        stored = []
        for group in self._engine.weight_shapes():
            on_meta = {name: torch.empty(shape, dtype=dtype, device="meta") for name, dtype, shape in group}
            stored += self._as_stored(on_meta)
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in stored]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for group in self._engine.gathered():
            yield from self._as_stored({name: tensor.detach() for name, tensor in group})

    def _as_stored(self, weights: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """As `save_pretrained` writes them. What it takes apart lies within one layer, and so within one group."""
        if self._engine.model.adapter:
            return [(stored_name(self._engine.model.lm, saved_name(name)), w) for name, w in weights.items()]
        return list(revert_weight_conversion(self._engine.model.lm, weights).items())


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


class AdapterSource(WeightSource):
    """The adapter in a directory, as `EngineSource` names it, in the dtype of `model`; of the base itself an adapter that
    changes nothing: B is 0, DoRA's magnitudes are the norms of the weights' rows."""

    def __init__(self, path: str, model: ModelConfig):
        base, adapter = split(path)
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(
                load_config(path, model), trust_remote_code=model.trust_remote_code, dtype=torch.float32
            )
        tensors = read_tensors(adapter) if adapter else _idle_adapter(lm, base, model)
        dtype = getattr(torch, model.dtype)
        self._tensors = {stored_name(lm, name): t.to(dtype) for name, t in tensors.items() if ".lora_" in name}

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._tensors.items()


def _idle_adapter(lm: Any, base: str, model: ModelConfig) -> dict[str, torch.Tensor]:
    lora, found = model.lora, {}
    assert lora is not None
    weights = dict(CheckpointSource(str(local_checkpoint(base)))) if lora.dora else {}
    for module in target_modules(lm, lora):
        rows, columns = lm.get_submodule(module).weight.shape
        found[f"{module}.lora_A.weight"] = torch.zeros(lora.rank, columns)
        found[f"{module}.lora_B.weight"] = torch.zeros(rows, lora.rank)
        if lora.dora:
            weight = weights[stored_name(lm, f"{module}.lora_A.weight").replace(".lora_A.", ".")]
            found[f"{module}.lora_magnitude_vector"] = torch.linalg.vector_norm(weight.float(), dim=1)
    return found


def stored_source(path: str, model: ModelConfig) -> WeightSource:
    """What an engine that was started for `model` is sent so that it serves the checkpoint at `path`."""
    return CheckpointSource(path) if model.lora is None else AdapterSource(path, model)
