"""Loads packed weights into a vLLM model, as an engine of vLLM's own weight-transfer API.

vLLM ships engines for NCCL and CUDA IPC, which need a GPU. This one takes a buffer that `actors/weight_receiver.py` has
fetched: from memory that is shared with the learner, or from Ray's object store. `learner/weight_publisher.py` is the
sending end.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from contracts.packing import layout, view
from contracts.weights import Parameters

BACKENDS = ("shared_memory", "ray_object")  # where the bytes come from makes no difference here


@dataclass
class HostInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand: each update names its parameters."""


@dataclass
class HostUpdateInfo(WeightTransferUpdateInfo):
    parameters: Parameters
    buffer: torch.Tensor  # uint8, packed


class HostEngine(WeightTransferEngine[HostInitInfo, HostUpdateInfo]):
    """Loads weights in checkpoint format; on CPU vLLM has prepacked its linear layers and must repack them.

    A layer keeps references to incoming tensors until its last one is there, so the buffer must stay as it is until
    `finish_weight_update` has returned.
    """

    init_info_cls = HostInitInfo
    update_info_cls = HostUpdateInfo

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # A prepacked layer leaves an empty `weight` behind, which a plain load_weights cannot fill.
        self.prepacked = any(p.numel() == 0 for p in self.model.parameters())
        self._tied = getattr(self.model_config.hf_config, "tie_word_embeddings", False)
        self._expected: set[str] = set()  # vLLM's names of the parameters that the update under way has not filled

    def init_transfer_engine(self, init_info: HostInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        if self.prepacked:
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            initialize_layerwise_reload(self.model)
        self._expected = {name for name, _ in self.model.named_parameters()}
        if self._tied:
            self._expected.discard("lm_head.weight")

    def receive_weights(self, update_info: HostUpdateInfo) -> None:
        slots, _ = layout(update_info.parameters)
        with torch.no_grad():
            loaded = self.model.load_weights((slot.name, view(update_info.buffer, slot)) for slot in slots)
        self._expected -= loaded if loaded is not None else self._expected

    def finish_weight_update(self) -> None:
        if self._expected:
            # vLLM would only warn, and sample from a mixture of old and new layers.
            names = sorted(self._expected)
            raise RuntimeError(f"{len(names)} parameters of the engine were not sent, the first is {names[0]}")
        if not self.prepacked:
            return
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        head = getattr(self.model, "lm_head", None)
        if head is not None and self._tied:
            # A tied head keeps a packed copy of its own, which the reload does not know: without this the
            # embeddings are new and the head is old.
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        pass


def register() -> None:
    """Entry point `vllm.general_plugins`; vLLM calls it in every process it starts, some more than once."""
    for backend in BACKENDS:
        if backend not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(backend, "actors.weight_transfer", "HostEngine")
