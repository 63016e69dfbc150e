"""What is published, saved and committed of a model: which tensors, in which order, under which names."""

import torch
from transformers.core_model_loading import revert_weight_conversion

from common.models.lora import TRAINED, is_of_adapter, saved_name, stored_name
from learner.models import PolicyModel, ScalarModel


def weight_groups(model: PolicyModel | ScalarModel) -> list[list[tuple[str, torch.Tensor]]]:
    """Parameters and persistent buffers (a router's correction is one) by the model's own names, one group for each decoder
    layer and one for each neighbour in between; of a model with LoRA the adapter that trains and the head alone."""
    groups: dict[str, list[tuple[str, torch.Tensor]]] = {}
    stored = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in stored]
    tensors: list[tuple[str, torch.Tensor]] = [*model.named_parameters(), *buffers]
    if model.adapter:
        tensors = [(n, p) for n, p in tensors if is_of_adapter(n, TRAINED) or ".score." in n]
    for name, tensor in tensors:
        name = name.removeprefix("lm.")
        parts = name.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        key = name if index is None else ".".join(parts[: index + 1])
        groups.setdefault(key, []).append((name, tensor))
    return list(groups.values())


def as_stored(model: PolicyModel | ScalarModel, weights: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """The weights of one of `weight_groups`, or their shapes on the meta device, with the names and the layout that
    `save_pretrained` writes: what it takes apart lies within one layer, and so within one group."""
    if model.adapter:
        return [(stored_name(model.lm, saved_name(name)), weight) for name, weight in weights.items()]
    return list(revert_weight_conversion(model.lm, weights).items())


def stored_shapes(
    model: PolicyModel | ScalarModel, groups: list[list[tuple[str, torch.dtype, tuple[int, ...]]]]
) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """(name, dtype, shape) of what `as_stored` gives, in its order, from those of `weight_groups`: no weight is touched."""
    stored = []
    for group in groups:
        on_meta = {name: torch.empty(shape, dtype=dtype, device="meta") for name, dtype, shape in group}
        stored += as_stored(model, on_meta)
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in stored]
