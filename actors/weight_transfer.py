"""Loads packed weights into a vLLM model, as an engine of vLLM's own weight-transfer API.

vLLM ships engines for NCCL and CUDA IPC, which need a GPU. This one takes a buffer that `actors/weight_receiver.py` has
fetched: from memory that is shared with the learner, or from Ray's object store. `learner/weight_publisher.py` is the
sending end.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import (
    _get_original_loader,
    _layerwise_process,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.meta import materialize_layer
from vllm.platforms import current_platform

from actors.adapter_merging import decoder_layer, merged_layers, misfit
from common.processes.shared_memory import layout, view
from contracts.config import LoraConfig
from contracts.weights import Parameters

BACKENDS = ("shared_memory", "ray_object")  # where the bytes come from makes no difference here


@dataclass
class HostInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand: each update names its parameters."""


@dataclass
class HostUpdateInfo(WeightTransferUpdateInfo):
    parameters: Parameters
    buffer: torch.Tensor  # uint8, packed
    lora_scale: float | None = (
        None  # of adapters on what was loaded first, which these are; None: these are all weights
    )


class HostEngine(WeightTransferEngine[HostInitInfo, HostUpdateInfo]):
    """Loads weights in checkpoint format. On CPU vLLM has packed its layers for the kernels and must pack them again, which
    it does layer by layer (`vllm.model_executor.model_loader.reload`) with four gaps that are closed here:

    - Experts are packed where their kernel is made, and a kernel that is there is kept: it would read unpacked weights.
    - A layer that shares a parameter with another, as a tied head does, keeps a packed copy of its own.
    - In bfloat16 a convolution is packed, and Mamba 2 goes on with what its weight was before.
    - Until a layer has all of its elements its parameters have no memory. Where a model copies into one by itself, past the
      parameter's loader (GPT-OSS: sinks and experts), the values go nowhere and the old ones come back.

    So no parameter counts as sent because `load_weights` says so: a layer that is not complete by vLLM's count is filled
    with NaN, given its weights again, and must have lost every NaN.

    A layer keeps references to incoming tensors until its last one is there, so the buffer must stay as it is until
    `finish_weight_update` has returned.
    """

    init_info_cls = HostInitInfo
    update_info_cls = HostUpdateInfo

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._names = {layer: f"{name}." if name else "" for name, layer in self.model.named_modules()}
        owners: dict[int, torch.nn.Module] = {}
        self._shared = [
            (layer, name)
            for layer in self._names
            for name, parameter in _own_parameters(layer)
            if owners.setdefault(id(parameter), layer) is not layer
        ]
        self._past_loaders: list[torch.nn.Module] = []  # layers that the model fills by itself
        self._missing: list[str] = []
        self._kernels: dict[torch.nn.Module, Any] = {}  # of experts, until their layer is packed again
        self._takes_all = True  # of the update under way: a layer that is given nothing lacks its weights
        self._base_shapes: dict[str, tuple[int, ...]] = {}
        self._adapted: set[str] = set()  # decoder layers whose weights are not those of the checkpoint

    def init_transfer_engine(self, init_info: HostInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        for layer in self._names:
            method: Any = getattr(layer, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None and current_platform.is_cpu():
                self._kernels[layer] = method.moe_kernel
                method.moe_kernel = None  # on GPUs it is in captured graphs, and packs nothing
        initialize_layerwise_reload(self.model)
        for layer, name in self._shared:
            tensors = get_layerwise_info(layer).kernel_tensors
            assert tensors is not None  # since it was processed
            setattr(layer, name, tensors[0][name])
        for layer in self._past_loaders:
            _give_memory(layer)

    def misfit(self, parameters: Parameters, lora: LoraConfig) -> str | None:
        """Why `parameters` are no adapters on the checkpoint that was loaded first."""
        if not self._base_shapes:
            self._base_shapes = {name: tuple(weight.shape) for name, weight in self._base()}
        return misfit(parameters, self._base_shapes, lora)

    def _base(self) -> Iterable[tuple[str, torch.Tensor]]:
        loader: Any = get_model_loader(self.vllm_config.load_config)  # the one of safetensors files, which it maps
        return loader.get_all_weights(self.model_config, self.model)

    def receive_weights(self, update_info: HostUpdateInfo) -> None:
        slots, _ = layout(update_info.parameters)
        sent = {slot.name: view(update_info.buffer, slot) for slot in slots}
        scale = update_info.lora_scale
        self._takes_all = scale is None
        adapted = set() if scale is None else {layer for name in sent if (layer := decoder_layer(name))}
        layers, self._adapted = adapted | self._adapted, adapted

        def weights() -> Iterable[tuple[str, torch.Tensor]]:
            if scale is None:
                return sent.items()
            dtype: Any = self.model_config.dtype  # names are resolved by now
            return merged_layers(self._base(), sent, layers, dtype, scale)

        with torch.no_grad():
            self._load(weights())
            if self._missing:
                # Once more, now that the layers that the model fills by itself have memory.
                self.start_weight_update()
                self._load(weights())

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        model: Any = self.model  # each of vLLM's has this method, and Module says nothing of it
        model.load_weights(weights)
        for layer in self._incomplete():
            _give_memory(layer)
            _load_again(layer)
        empty = {layer: names for layer in self._incomplete() if (names := _unfilled(layer))}
        self._missing = [self._names[layer] + name for layer, names in empty.items() for name in names]
        self._past_loaders += list(empty)

    def finish_weight_update(self) -> None:
        if self._missing:
            # vLLM would only warn, and sample from a mixture of old and new layers.
            names = sorted(self._missing)
            raise RuntimeError(f"{len(names)} parameters of the engine were not sent, the first is {names[0]}")
        for layer, kernel in self._kernels.items():
            if not self._takes_all and all(_is_untouched(part) for part in layer.modules() if _own_parameters(part)):
                method: Any = layer.quant_method
                method.moe_kernel = kernel
        self._kernels.clear()
        borrowers = [layer for layer, _ in self._shared]
        for layer in sorted(self._incomplete(), key=borrowers.__contains__):  # after those that they share with
            _layerwise_process(layer, get_layerwise_info(layer))
        finalize_layerwise_reload(self.model, self.model_config)
        for layer in self._names:
            convolution: Any = getattr(layer, "conv1d", None)
            if "conv_weights" in layer._buffers and hasattr(convolution, "_cpu_unpacked_conv_weight"):
                layer.conv_weights.copy_(convolution._cpu_unpacked_conv_weight)

    def _incomplete(self) -> list[torch.nn.Module]:
        """Layers with parameters that vLLM has not packed, because it has not counted all of their elements. Those that an
        adapter does not reach have none of them, and get back what they had from vLLM."""
        waiting = [layer for layer in self._names if _own_parameters(layer) and get_layerwise_info(layer).can_load()]
        return [layer for layer in waiting if self._takes_all or not _is_untouched(layer)]

    def shutdown(self) -> None:
        pass


def _is_untouched(layer: torch.nn.Module) -> bool:
    info = get_layerwise_info(layer)
    return info.can_load() and not info.load_numel


def _own_parameters(layer: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return list(layer.named_parameters(recurse=False))


def _give_memory(layer: torch.nn.Module) -> None:
    """Parameters that have none get memory, full of NaN, and their own loaders."""
    waiting = [name for name, parameter in _own_parameters(layer) if parameter.is_meta]
    materialize_layer(layer, get_layerwise_info(layer))
    for name in waiting:
        parameter = getattr(layer, name)
        parameter.data.fill_(float("nan"))
        parameter.weight_loader = _get_original_loader(parameter)


def _load_again(layer: torch.nn.Module) -> None:
    """Load what vLLM has kept for this layer until it would be complete."""
    for name, arguments in get_layerwise_info(layer).loaded_weights:
        parameter = getattr(layer, name)
        arguments.arguments["param"] = parameter
        _get_original_loader(parameter)(*arguments.args, **arguments.kwargs)


def _unfilled(layer: torch.nn.Module) -> list[str]:
    return [name for name, parameter in _own_parameters(layer) if bool(parameter.isnan().any())]


def register() -> None:
    """Entry point `vllm.general_plugins`; vLLM calls it in every process it starts, some more than once."""
    for backend in BACKENDS:
        if backend not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(backend, "actors.weight_transfer", "HostEngine")
