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

    @property
    def last(self) -> Tensor:
        """int64 [B], the last token of each sequence, by its length: its id may be that of the padding."""
        ends = [start + length - 1 for start, length in zip(self.starts, self.lengths, strict=True)]
        return torch.tensor(ends, device=self.input_ids.device)


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


# What models hand on to their attention that changes nothing here: a training pass has no cache, and positions are in the
# queries and keys already. Whatever else is set is refused, as it would be lost in silence.
HARMLESS = ("position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "is_causal")


def short_causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed: Packed | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence.

    Args:
        query: [1, H, N, D]; key: [1, K, N, D] and value: [1, K, N, E], with H a multiple of K.
        scaling: of the scores; None for 1/sqrt(D).
        sliding_window: a token sees itself and the window - 1 before it (Beltagy et al. 2020, arXiv 2004.05150).
        softcap: c in c tanh(score / c) (Gemma 2, arXiv 2408.00118).
        s_aux: [H] logits of attention sinks, which take a part of each softmax (Xiao et al. 2023, arXiv 2309.17453).

    Returns:
        [1, N, H, E] and no weights.

    Raises:
        RuntimeError: where the architecture does not hand the layout on (attending across sequences would be silent), or
            hands on what would change the result and is not known here.
    """
    unknown = [
        name for name, given in kwargs.items() if name not in HARMLESS and given is not None and given is not False
    ]
    unknown += ["attention_mask"] * (attention_mask is not None) + ["dropout"] * bool(dropout)
    unknown += ["is_causal=False"] * (kwargs.get("is_causal") is False)
    if packed is None or unknown:
        problem = f"hands {unknown[0]}" if unknown else "does not pass keyword arguments on"
        raise RuntimeError(f"{type(module).__name__} {problem} to its attention: set learner.attention=sdpa")
    heads, groups = query.shape[1], key.shape[1]
    batch, tokens = len(packed.lengths), packed.slots.numel() // len(packed.lengths)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling

    def padded(x: Tensor) -> Tensor:  # [1, X, N, D] -> [B, X, T, D]
        flat = x[0].transpose(0, 1).flatten(1)
        return _Pad.apply(flat, packed).view(batch, tokens, -1, x.shape[3]).transpose(1, 2)

    hidden_from = None if sliding_window is None or sliding_window >= tokens else sliding_window
    if tokens > MAX_TOKENS and softcap is None and s_aux is None:
        seen = None if hidden_from is None else ~_unseen(tokens, hidden_from, query.device)
        q, k, v = (padded(x) for x in (query, key, value))
        rows = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, scale=scaling, enable_gqa=True
        )
    else:
        queries = padded(query * scaling).reshape(batch * groups, -1, query.shape[3])
        keys, values = (padded(x).reshape(batch * groups, tokens, -1) for x in (key, value))
        scores = torch.bmm(queries, keys.transpose(1, 2)).view(batch * groups, -1, tokens, tokens)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        future = torch.zeros((tokens, tokens), dtype=scores.dtype, device=scores.device)
        scores = scores + future.masked_fill_(_unseen(tokens, hidden_from, scores.device), float("-inf"))
        if s_aux is not None:
            sinks = s_aux.to(scores.dtype).view(1, groups, -1, 1, 1).expand(batch, -1, -1, tokens, -1)
            scores = torch.cat([scores, sinks.reshape(*scores.shape[:-1], 1)], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :tokens]
        rows = torch.bmm(weights.reshape(batch * groups, -1, tokens), values).view(batch, heads, tokens, -1)
    out = _Unpad.apply(rows.transpose(1, 2).reshape(batch * tokens, -1), packed)
    return out.view(1, -1, heads, value.shape[3]), None


def _unseen(tokens: int, window: int | None, device: torch.device) -> Tensor:
    """bool [T, T], True where the query of a row must not see the key of a column."""
    every = torch.ones((tokens, tokens), dtype=torch.bool, device=device)
    future = every.triu(1)
    return future if window is None else future | every.tril(-window)


AttentionInterface.register(NAME, short_causal_attention)
