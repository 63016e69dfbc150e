"""What a forward and a backward pass hold beside the weights: the code that trains, run on torch's meta device.

Tensors of the meta device have shapes and no memory, so that a model of any size passes in seconds. Every tensor that the
pass makes is counted from its birth to its death, gradients of weights until they are complete; what the optimizer then
makes of these is in `learner_memory.py`.
"""

import copy
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from common.error_text import error_lines
from common.models.forward import decoder_layers
from common.models.packed_attention import Packed
from learner.models import PolicyModel, ScalarModel

FUSED = "fused_on_meta"
MANY_TOKENS, FEW_LAYERS = 4096, 2  # of passes that are measured; larger ones are read off them


class Unplannable(ValueError):
    """The model's own code reads numbers from tensors, which those of the meta device do not have."""


class FusedAttention(torch.autograd.Function):
    """In the place of flash attention, which the meta device lacks: it keeps queries, keys, values, its output and a number
    for each query (Dao 2022, arXiv 2205.14135)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return FusedAttention.apply(query, key, value).transpose(1, 2), None


AttentionInterface.register(FUSED, _fused)


class LiveTensors(TorchDispatchMode):
    """Bytes of what is made while it is active and not yet dead: now, and at most."""

    def __init__(self, but: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in but}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class PassMemory:
    """Bytes of one microbatch beside weights and gradients."""

    kept: float  # by the graph, from the forward to the backward pass
    forward: float  # at most, during a forward pass with its graph
    backward: float  # at most, during the backward pass
    inference: float  # at most, during a forward pass without a graph

    @property
    def peak(self) -> float:
        return max(self.forward, self.backward)


@cache
def pass_memory(network: PolicyModel | ScalarModel, lengths: tuple[int, ...], selected: int) -> PassMemory:
    """Of `network`, on the meta device, for sequences of so many tokens, of which `selected` reach the head.

    Raises:
        Unplannable: naming the class.

    What is kept grows by a straight line with tokens and with layers, so that it is read off smaller passes. What a
    backward pass needs on top of it is most right at its start, below the head, whatever the depth.
    """

    def of_layers(part: Sequence[int]) -> PassMemory:
        chosen, deep = selected * sum(part) // sum(lengths), trained + frozen
        if deep <= 2 * FEW_LAYERS or some_recompute:
            return _measure(network, part, chosen)
        base = min(frozen, 1)
        less, more = (_measure(_with_layers(network, base, n), part, chosen) for n in (FEW_LAYERS, 2 * FEW_LAYERS))
        found = _line(less, more, (trained - FEW_LAYERS) / FEW_LAYERS)
        return replace(found, backward=found.kept + more.backward - more.kept)

    layers = decoder_layers(network.lm)
    some_recompute = len({getattr(layer, "gradient_checkpointing", False) for layer in layers}) > 1
    frozen = sum(not any(p.requires_grad for p in layer.parameters()) for layer in layers)
    trained = len(layers) - frozen
    if not trained:  # nothing is kept, whatever the depth
        trained, frozen = frozen, 0
    total = sum(lengths)
    step = min(len(lengths) // 4, -(-total // MANY_TOKENS))
    if step <= 1:
        return of_layers(lengths)
    few, many = lengths[:: 2 * step], lengths[::step]
    return _line(of_layers(few), of_layers(many), (total - sum(few)) / (sum(many) - sum(few)))


def _line(first: PassMemory, second: PassMemory, place: float) -> PassMemory:
    """What lies at `place` of the line on which `first` is 0 and `second` is 1."""
    names = [field.name for field in fields(PassMemory)]
    found = {name: (getattr(first, name), getattr(second, name)) for name in names}
    return PassMemory(**{name: a + place * (b - a) for name, (a, b) in found.items()})


def _with_layers(network: PolicyModel | ScalarModel, frozen: int, trained: int) -> PolicyModel | ScalarModel:
    """A copy with the lowest `frozen` and the highest `trained` layers."""
    small = copy.deepcopy(network)
    layers = decoder_layers(small.lm)
    del layers[frozen : len(layers) - trained]
    return small


def _measure(network: PolicyModel | ScalarModel, lengths: Sequence[int], selected: int) -> PassMemory:
    packed = Packed.of([[0] * length for length in lengths], torch.device("cpu"))
    for name in ("input_ids", "position_ids", "slots", "places", "is_source"):
        setattr(packed, name, getattr(packed, name).to("meta"))
    select = torch.zeros(max(1, selected), dtype=torch.int64, device="meta")
    arguments = (packed, select, select) if isinstance(network, PolicyModel) else (packed, select)
    there = [*network.parameters(), *network.buffers(), *(v for v in vars(packed).values() if isinstance(v, Tensor))]
    trained = [p for p in network.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(_drop) for p in trained]
    try:
        with LiveTensors(there) as live, torch.no_grad():
            network(*arguments)
        inference = live.peak
        with LiveTensors(there) as live:
            out = network(*arguments)
            numbers = out[0] if isinstance(out, tuple) else out
            kept, forward = live.now, live.peak
            live.peak = live.now
            if trained:
                numbers.sum().backward()
    # As of Tensor.item() and Tensor.numpy(), and of layers that need what a lower one has left out.
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise Unplannable(f"{type(network.lm).__name__} cannot be planned: {error_lines(error)[0]}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return PassMemory(kept, forward, live.peak, inference)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
