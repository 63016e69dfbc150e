"""Packed sequences, and causal attention for them on CPU as an attention implementation of transformers.

Sequences of a microbatch lie one after another in one row, so that no linear layer computes padding. transformers' own
`sdpa` and `flash_attention_2` recognise such rows by their position ids. On CPU torch's attention kernels spend most of
their time on overhead when sequences are short (at 88 tokens the backward pass was 20% of a training step of a 135M
model), so `short_causal` lays queries, keys and values out as [sequence, token] for two batched matrix products and a
softmax, with the query heads of a group folded into rows so that keys and values are never repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

NAME = "short_causal"
MAX_TOKENS = 512  # scores take heads x T x T memory a sequence; above it torch's kernel wins


@dataclass
class Packed:
    """B sequences of N tokens together, the longest of T."""

    input_ids: Tensor  # int64 [1, N]
    position_ids: Tensor  # int64 [1, N], from 0 in every sequence
    starts: list[int]  # where each sequence begins
    lengths: list[int]
    slots: Tensor  # int64 [B * T], the token in each place of a padded layout (0 on padding)
    places: Tensor  # int64 [N], the place of each token in a padded layout
    is_real: Tensor  # bool [B * T, 1]

    @staticmethod
    def of(sequences: Sequence[Sequence[int] | np.ndarray], device: torch.device) -> "Packed":
        lengths = [len(s) for s in sequences]
        starts = np.cumsum([0, *lengths[:-1]])
        width, total = max(lengths), sum(lengths)
        places = np.concatenate([i * width + np.arange(n) for i, n in enumerate(lengths)])
        slots = np.zeros(len(lengths) * width, dtype=np.int64)
        slots[places] = np.arange(total)
        is_real = np.zeros((len(lengths) * width, 1), dtype=bool)
        is_real[places] = True
        position_ids = np.concatenate([np.arange(n) for n in lengths])
        arrays = (np.concatenate([np.asarray(s, dtype=np.int64) for s in sequences])[None], position_ids[None])
        ids, positions, slot, place, real = (torch.from_numpy(a).to(device) for a in (*arrays, slots, places, is_real))
        return Packed(ids, positions, starts.tolist(), lengths, slot, place, real)

    def hidden(self, backbone: Any) -> Tensor:
        """[N, width] last hidden state, each sequence attending to itself alone."""
        extra = {"packed": self} if backbone.config._attn_implementation == NAME else {}
        out = backbone(input_ids=self.input_ids, position_ids=self.position_ids, use_cache=False, **extra)
        return out.last_hidden_state[0]


class _Pad(torch.autograd.Function):
    """[N, ...] -> [B * T, ...]. A gather in both directions: autograd's own backward of indexing is a serial scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return x.index_select(0, packed.slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.packed.places), None


class _Unpad(torch.autograd.Function):
    """[B * T, ...] -> [N, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return x.index_select(0, packed.places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.packed.slots) * ctx.packed.is_real, None


def short_causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    packed: Packed | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence.

    Args:
        query: [1, H, N, D]; key, value: [1, K, N, D] with H a multiple of K.

    Returns:
        [1, N, H, D] and no weights.

    Raises:
        RuntimeError: where the architecture does not hand the layout on; attending across sequences would be silent.
    """
    if packed is None:
        raise RuntimeError(
            f"{type(module).__name__} does not pass keyword arguments on to its attention: set learner.attention=sdpa"
        )
    heads, groups, width = query.shape[1], key.shape[1], query.shape[3]
    batch, tokens = len(packed.lengths), packed.slots.numel() // len(packed.lengths)

    def padded(x: Tensor) -> Tensor:  # [1, X, N, D] -> [B, X, T, D]
        flat = x[0].transpose(0, 1).flatten(1)
        return _Pad.apply(flat, packed).view(batch, tokens, -1, width).transpose(1, 2)

    if tokens > MAX_TOKENS:
        rows = F.scaled_dot_product_attention(
            padded(query), padded(key), padded(value), is_causal=True, scale=scaling, enable_gqa=True
        )
    else:
        queries = padded(query * scaling).reshape(batch * groups, -1, width)
        keys, values = (padded(x).reshape(batch * groups, tokens, width) for x in (key, value))
        scores = torch.bmm(queries, keys.transpose(1, 2)).view(batch * groups, -1, tokens, tokens)
        future = torch.full((tokens, tokens), float("-inf"), dtype=scores.dtype, device=scores.device).triu_(1)
        weights = torch.softmax(scores + future, dim=-1)
        rows = torch.bmm(weights.view(batch * groups, -1, tokens), values).view(batch, heads, tokens, width)
    out = _Unpad.apply(rows.transpose(1, 2).reshape(batch * tokens, heads * width), packed)
    return out.view(1, -1, heads, width), None


AttentionInterface.register(NAME, short_causal_attention)


def resolve(attention: str, on_cpu: bool) -> str:
    """The implementation that `auto` stands for on this device."""
    return (NAME if on_cpu else "sdpa") if attention == "auto" else attention
