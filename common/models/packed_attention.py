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
    """B sequences, the longest of T tokens, as N tokens in a row."""

    input_ids: Tensor  # int64 [1, N]
    position_ids: Tensor  # int64 [1, N], from 0 in every sequence
    starts: list[int]  # where each sequence begins, or goes on behind a prompt that it shares
    lengths: list[int]
    slots: Tensor  # int64 [B * T], the token in each place of a padded layout (0 on padding)
    places: Tensor  # int64 [N], the place of each token in a padded layout; of a shared one in its first sequence
    is_source: Tensor  # bool [B * T, 1], where `places` are
    siblings: list[tuple[int, int, int]]  # (first sequence, how many, tokens) that have one prompt in the row

    @staticmethod
    def of(
        sequences: Sequence[Sequence[int] | np.ndarray],
        device: torch.device,
        prompt_lens: Sequence[int] | np.ndarray | None = None,
    ) -> "Packed":
        """`prompt_lens`: let neighbours whose first so many tokens are the same have them once in the row. The attention
        of `short_causal` alone knows such rows."""
        tokens = [np.asarray(s, dtype=np.int64) for s in sequences]
        runs = [] if prompt_lens is None else siblings(tokens, prompt_lens)
        lengths = [len(s) for s in tokens]
        shared, behind = [0] * len(tokens), [*range(len(tokens))]  # tokens of a sequence that are another's, and whose
        for first, count, prompt in runs:
            for row in range(first + 1, first + count):
                shared[row], behind[row] = prompt, first
        own = [slice(k, n) for k, n in zip(shared, lengths, strict=True)]
        starts = np.cumsum([0, *(part.stop - part.start for part in own[:-1])])
        width = max(lengths)
        slots = np.zeros((len(tokens), width), dtype=np.int64)
        is_source = np.zeros((len(tokens), width), dtype=bool)
        for row, part in enumerate(own):
            slots[row, : part.start] = starts[behind[row]] + np.arange(part.start)
            slots[row, part] = starts[row] + np.arange(part.stop - part.start)
            is_source[row, part] = True

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        return Packed(
            input_ids=tensor(np.concatenate([s[part] for s, part in zip(tokens, own, strict=True)])[None]),
            position_ids=tensor(np.concatenate([np.arange(part.start, part.stop) for part in own])[None]),
            starts=starts.tolist(),
            lengths=lengths,
            slots=tensor(slots.reshape(-1)),
            places=tensor(np.flatnonzero(is_source)),
            is_source=tensor(is_source.reshape(-1, 1)),
            siblings=runs,
        )

    def at(self, rows: Tensor, steps: Tensor) -> Tensor:
        """int64, where tokens `steps` of the sequences `rows` are in the row."""
        return self.slots.view(len(self.lengths), -1)[rows, steps]

    @property
    def last(self) -> Tensor:
        """int64 [B], the last token of each sequence, by its length: its id may be that of the padding."""
        device = self.input_ids.device
        return self.at(torch.arange(len(self.lengths), device=device), torch.tensor(self.lengths, device=device) - 1)


def siblings(sequences: list[np.ndarray], prompt_lens: Sequence[int] | np.ndarray) -> list[tuple[int, int, int]]:
    """Runs of neighbours with the same prompt, two at least."""
    prompts = [s[:n].tobytes() for s, n in zip(sequences, prompt_lens, strict=True)]
    runs, first = [], 0
    for row in range(1, len(prompts) + 1):
        if row == len(prompts) or prompts[row] != prompts[first] or not prompts[first]:
            if row - first > 1:
                runs.append((first, row - first, int(prompt_lens[first])))
            first = row
    return runs


class _Pad(torch.autograd.Function):
    """[N, X] -> [B * T, X]. A gather in both directions: autograd's own backward of indexing is a serial scatter. What a
    shared prompt's tokens get in each of its sequences is summed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return x.index_select(0, packed.slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        packed = ctx.packed
        out = grad.index_select(0, packed.places)
        padded = grad.reshape(len(packed.lengths), -1, grad.shape[-1])
        for first, count, tokens in packed.siblings:
            start = packed.starts[first]
            out[start : start + tokens] += padded[first + 1 : first + count, :tokens].sum(0, dtype=torch.float32)
        return out, None


class _Unpad(torch.autograd.Function):
    """[B * T, X] -> [N, X]. Of a shared prompt the first sequence's is taken; all have the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return x.index_select(0, packed.places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.packed.slots) * ctx.packed.is_source, None


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
