"""Adapters in an engine: merged into the weights that it loaded first, never into merged ones.

    update {module.lora_A.weight, ...} ── misfit? refused ──>  W = W0 + scale B A, layer by layer  ──> vLLM's loader
                                                               W0: the checkpoint's files, mapped

What is loaded again is every decoder layer that has an adapter, or had one until then; embeddings, LM head and all other
layers stay. W0 is read from the checkpoint again: its pages belong to the system's cache, which all engines of a machine
share, where a copy of the weights would be the engine's own. vLLM's own LoRA is not used: it makes generation on
CPU 3.6 times slower (docs/design.md), and has no DoRA.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from common.models.adapters import modules_in
from common.models.lora import KINDS, adapter_shapes, merged
from contracts.config import LoraConfig
from contracts.weights import Parameters

Shapes = Mapping[str, tuple[int, ...]]
DECODER_LAYER = re.compile(r".+?\.\d+(?=\.)")


def decoder_layer(name: str) -> str | None:
    """`model.layers.3` of a parameter or module within it; None outside."""
    found = DECODER_LAYER.match(name)
    return found[0] if found else None


def misfit(parameters: Parameters, base: Shapes, lora: LoraConfig) -> str | None:
    """Why these are not adapters on a checkpoint with weights of the shapes `base`, each whole; None where they are."""
    found: dict[str, tuple[int, ...]] = {name: shape for name, _, shape in parameters}
    wanted: dict[str, tuple[int, ...]] = {}
    for module in modules_in(found):
        shape = base.get(f"{module}.weight", ())
        if len(shape) != 2 or decoder_layer(module) is None:
            return f"{module} is no linear layer of the decoder layers of what the engine has loaded"
        wanted |= adapter_shapes(module, shape, lora)
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            is_there, should = (list(s[name]) if name in s else "nothing" for s in (found, wanted))
            return f"{name} must be {should} with model.lora.rank={lora.rank}, dora={lora.dora}; found {is_there}"
    return None


@torch.no_grad()
def merged_layers(
    base: Iterable[tuple[str, Tensor]],
    adapters: Mapping[str, Tensor],
    layers: set[str],
    dtype: torch.dtype,
    scale: float,
) -> Iterator[tuple[str, Tensor]]:
    """The weights in `layers`, each by its name in `base`; those that have an adapter with it, in `dtype`, the engine's."""
    for name, weight in base:
        if decoder_layer(name) not in layers:
            continue
        module = name.removesuffix(".weight")
        a, b, magnitude = (adapters.get(f"{module}.{end}") for end in ("lora_A.weight", "lora_B.weight", KINDS[2]))
        if a is not None and b is not None:
            weight = merged(weight.to(dtype), a, b, scale, magnitude)
        yield name, weight
