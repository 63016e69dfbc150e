"""How a model of transformers computes the sequences of a microbatch, whatever its architecture.

In the `packed` layout they lie in one row and nothing is computed twice; a model that mixes neighbours there (convolutions,
state-space layers, biases that its attention adds by position in the row) computes them in the `padded` layout, a row each:
padding lies behind, where a causal model cannot see it. `common/models/proof.py` finds out which of the two a model can do.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.models.packed_attention import NAME, Packed


@dataclass(frozen=True)
class Form:
    attention: str  # of transformers' attention implementations, or short_causal
    layout: str  # packed | padded


def candidates(attention: str, on_cpu: bool) -> list[Form]:
    """Forms to try, the fastest first, for a value of `learner.attention`."""
    named = ([NAME] if on_cpu else []) + ["sdpa", "eager"] if attention == "auto" else [attention]
    forms = [Form(name, "packed") for name in named if name != "eager" or attention == "eager"]
    return forms + [Form(name, "padded") for name in named if name in ("sdpa", "eager")]


def backbone_name(lm: Any) -> str:
    """The name of the module below the head; Llama 4 names another in `base_model_prefix` than it has."""
    if lm.base_model_prefix in lm._modules:
        return lm.base_model_prefix
    names = [name for name, module in lm.named_children() if isinstance(module, PreTrainedModel)]
    if len(names) != 1:
        raise TypeError(f"{type(lm).__name__} has no module {lm.base_model_prefix!r} below its head")
    return names[0]


def decoder_layers(lm: Any) -> nn.ModuleList:
    """The stack of decoder layers: the ModuleList of the backbone with as many as the configuration says. A vision tower's
    may be longer."""
    lists = [m for m in getattr(lm, backbone_name(lm)).modules() if isinstance(m, nn.ModuleList)]
    layers = lm.config.get_text_config().num_hidden_layers
    return next((m for m in lists if len(m) == layers), None) or max(lists, key=len)


def knows_shared_prompts(lm: Any, layout: str) -> bool:
    """Whether sequences whose prompt is in the row once (`Packed.siblings`) are computed as each for itself."""
    return layout == "packed" and getattr(lm, backbone_name(lm)).config._attn_implementation == NAME


def hidden_states(lm: Any, packed: Packed, layout: str) -> Tensor:
    """[N, width], what the backbone of `lm` computes last, each sequence for itself."""
    backbone = getattr(lm, backbone_name(lm))
    if layout == "padded":
        rows = packed.input_ids[0].index_select(0, packed.slots).view(len(packed.lengths), -1)
        out = backbone(input_ids=rows, use_cache=False)[0]
        return out.flatten(0, 1).index_select(0, packed.places)
    extra = {"packed": packed} if backbone.config._attn_implementation == NAME else {}
    out = backbone(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, **extra)
    return out[0][0]


class _HandsOn(nn.Module):
    """In the place of a backbone and of each module in it: its output is given, its settings are the backbone's."""

    def __init__(self, backbone: Any, hidden: Tensor):
        super().__init__()
        object.__setattr__(self, "_of", (backbone, _Output(hidden)))

    def forward(self, *args: Any, **kwargs: Any) -> "_Output":
        return self._of[1]

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._of[0], name)
        return self if isinstance(value, nn.Module) else value


class _Output:
    """Hidden states alone; whatever else a model's head asks for, as router logits, is not there."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return self.last_hidden_state if index == 0 else ()

    def __getattr__(self, name: str) -> None:
        return None


def head_logits(lm: Any, hidden: Tensor) -> Tensor:
    """Logits [M, V] of hidden states [M, width], as the model's own class computes them.

    Between the output embeddings and the logits many classes scale or cap (Granite, Cohere, Gemma 2), so the class's own
    forward pass runs, with the backbone's place taken by the hidden states.
    """
    view, name = object.__new__(type(lm)), backbone_name(lm)
    stand_in = _HandsOn(getattr(lm, name), hidden[None])
    view.__dict__ = lm.__dict__ | {"_modules": lm._modules | {name: stand_in}}
    ids = torch.zeros((1, hidden.shape[0]), dtype=torch.int64, device=hidden.device)
    return type(lm).forward(view, input_ids=ids, use_cache=False, return_dict=True).logits[0]
