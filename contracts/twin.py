"""A small model of a checkpoint's own configuration: same class, same flags, every kind of layer, random weights.

What a code path computes does not depend on widths or weights, so that it can be proved on a twin in a fraction of a second
for a model of any size.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

VOCABULARY = 384
WINDOW = 8  # tokens, of whatever has a window: rows must be longer
EXPERTS = 8
# Of a configuration: how many layers, and what says after how many of them a kind of layer comes again.
RHYTHM = ("period", "pattern", "offset", "first_k_dense", "interval", "num_hidden_layers_to_skip", "every_n")


class NoTwin(ValueError):
    """No small model could be made of the configuration."""


def twin_config(config: Any, narrow: bool, short: bool) -> Any:
    """A copy with few layers and short windows, with narrow layers, and with a short vocabulary."""
    twin = copy.deepcopy(config)
    text = twin.get_text_config()
    _fewer_layers(text)
    _short_windows(text)
    if narrow:
        _narrow(text)
    if short:
        _short_vocabulary(twin, text)
    return twin


def make_twin(config: Any, build: Callable[[Any], PreTrainedModel], try_it: Callable[[PreTrainedModel], Any]) -> Any:
    """The smallest twin that can be built, with weights that tell, and on which `try_it` works: (model, what that returned).

    Raises:
        NoTwin: with what each attempt said.
    """
    problems = []
    for narrow, short in ((True, True), (False, True), (False, False)):
        torch.manual_seed(0)
        try:
            model = build(twin_config(config, narrow, short)).eval()
            telling_weights(model)
            return model, try_it(model)
        except Exception as error:  # a configuration that does not fit its narrower self, in its class's own words
            problems.append(f"{type(error).__name__}: {str(error)[:200]}")
    raise NoTwin("; ".join(dict.fromkeys(problems)))


@torch.no_grad()
def telling_weights(model: PreTrainedModel, seed: int = 0) -> None:
    """Weights with which every part changes the output: matrices that neither vanish nor explode, norms and biases away
    from 1 and 0."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    outputs, saved = model.get_output_embeddings(), model.state_dict()
    # Of buffers those alone that are learnt, as the bias of a router: others are tables that fit one another.
    learnt = [buffer for name, buffer in model.named_buffers() if name in saved and buffer.ndim == 1]
    for tensor in [*model.parameters(), *learnt]:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if tensor.ndim < 2:
            tensor.add_(0.1 * noise(tensor))
            continue
        gain = 3.0 if outputs is not None and tensor is outputs.weight else 1.0
        tensor.copy_(noise(tensor) * gain / tensor.shape[-1] ** 0.5)


# ---- smaller


def _fewer_layers(text: Any) -> None:
    layers = text.num_hidden_layers
    lists = [value for value in vars(text).values() if isinstance(value, list | tuple) and len(value) == layers]
    kinds = [tuple(str(values[i]) for values in lists) for i in range(layers)]
    needed = max((kinds.index(kind) + 1 for kind in set(kinds)), default=1)
    for name, value in vars(text).items():
        if isinstance(value, int) and not isinstance(value, bool) and any(word in name for word in RHYTHM):
            needed = max(needed, value + 1)
    keep = min(layers, max(2, needed))
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == layers:
            setattr(text, name, value[:keep])
    text.num_hidden_layers = keep
    if getattr(text, "max_window_layers", None) is not None:
        text.max_window_layers = min(text.max_window_layers, keep - 1)


def _short_windows(text: Any) -> None:
    for name, value in vars(text).items():
        is_width = ("window" in name and "layers" not in name) or name == "attention_chunk_size"
        if is_width and isinstance(value, int) and not isinstance(value, bool) and value > WINDOW:
            setattr(text, name, WINDOW)


def _narrow(text: Any) -> None:
    heads = text.num_attention_heads
    kv = getattr(text, "num_key_value_heads", None) or heads
    hidden = text.hidden_size
    ratio, groups = min(max(1, heads // kv), 3), min(kv, 2)
    width = 16
    narrow = ratio * groups * width
    was = {name: value for name, value in vars(text).items() if isinstance(value, int) and not isinstance(value, bool)}
    for name, value in was.items():
        if name in ("moe_intermediate_size", "shared_expert_intermediate_size"):
            setattr(text, name, 32)
        elif "expert" in name and "per_tok" not in name and name.startswith(("num_", "n_")) and value > EXPERTS:
            setattr(text, name, EXPERTS)
        elif name in ("num_experts_per_tok", "moe_topk", "top_k_experts"):
            setattr(text, name, min(value, 2))
        elif name in ("n_group", "topk_group"):
            setattr(text, name, 1)
        elif value == hidden:
            setattr(text, name, narrow)
    for name in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"):
        if was.get(name) is not None:
            setattr(text, name, max(32, round(min(was[name] / hidden, 4) * narrow / 8) * 8))
    text.hidden_size, text.num_attention_heads = narrow, ratio * groups
    if getattr(text, "num_key_value_heads", None) is not None:
        text.num_key_value_heads = groups
    if getattr(text, "head_dim", None) is not None:
        text.head_dim = width


def _short_vocabulary(config: Any, text: Any) -> None:
    text.vocab_size = min(text.vocab_size, VOCABULARY)
    for part in (config, text):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            token = getattr(part, name, None)
            if isinstance(token, list):
                token = token[0]
            if token is not None:
                setattr(part, name, token if token < text.vocab_size else text.vocab_size - 1)
