"""The receiving end of a weight transfer on CPU, registered with vLLM's own weight-transfer API.

vLLM ships engines for NCCL and CUDA IPC, which need a GPU; this one takes the weights from Ray's object store, where one
put serves every engine of a node without a copy each. `learner/weight_publisher.py` is the sending end.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from contracts.packing import layout, view

BACKEND = "ray_object"


@dataclass
class RayObjectInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand: each update names its parameters."""


@dataclass
class RayObjectUpdateInfo(WeightTransferUpdateInfo):
    parameters: list = field(default_factory=list)  # [name, dtype, shape] in the order of the buffer
    # One object reference, in a list so that Ray passes the reference on instead of resolving it.
    buffer: list = field(default_factory=list)


class RayObjectEngine(WeightTransferEngine[RayObjectInitInfo, RayObjectUpdateInfo]):
    """Loads weights in checkpoint format; on CPU vLLM has prepacked its linear layers and must repack them."""

    init_info_cls = RayObjectInitInfo
    update_info_cls = RayObjectUpdateInfo

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # A prepacked layer leaves an empty `weight` behind, which a plain load_weights cannot fill.
        self.prepacked = any(p.numel() == 0 for p in self.model.parameters())

    def init_transfer_engine(self, init_info: RayObjectInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        if self.prepacked:
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: RayObjectUpdateInfo) -> None:
        array = ray.get(update_info.buffer[0], timeout=120)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the object store's memory is read-only; nothing writes
            buffer = torch.from_numpy(array)
        slots, _ = layout(update_info.parameters)
        with torch.no_grad():
            self.model.load_weights((slot.name, view(buffer, slot)) for slot in slots)

    def finish_weight_update(self) -> None:
        if not self.prepacked:
            return
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        head = getattr(self.model, "lm_head", None)
        if head is not None and getattr(self.model_config.hf_config, "tie_word_embeddings", False):
            # A tied head keeps a packed copy of its own, which the reload does not know: without this the
            # embeddings are new and the head is old.
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        pass


def register() -> None:
    """Entry point `vllm.general_plugins`; vLLM calls it in every process it starts, some more than once."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "actors.weight_transfer", "RayObjectEngine")
