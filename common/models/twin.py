"""A small model of a checkpoint's own configuration: same class, same flags, every kind of layer, random weights.

What a code path computes does not depend on widths or weights, so that it can be proved on a twin in a fraction of a second
for a model of any size.
"""

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from transformers import PreTrainedModel

VOCABULARY = 384
WINDOW = 8  # tokens, of whatever has a window: rows must be longer
EXPERTS = 8
HEAD = 16  # width of a head
LARGEST = 250_000_000  # parameters of a twin: a gigabyte in float32
CAPS = {
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts_per_tok": 2, "moe_topk": 2,
    "top_k_experts": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "state_size": 16,
    "mamba_d_state": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "n_groups": 1, "mamba_n_groups": 1, "mamba_ngroups": 1, "time_step_rank": 4,
    "mamba_dt_rank": 4, "chunk_size": 16, "mamba_chunk_size": 16,
}  # fmt: skip
WIDTHS = (
    "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "shared_intermediate_size", "lru_width",
    "moe_shared_expert_intermediate_size", "intermediate_size_mlp", "attention_hidden_size",
)  # fmt: skip
# Of state-space layers: heads x width = expansion x hidden_size.
SSM_HEADS = (
    ("num_heads", "head_dim", "expand"),
    ("mamba_n_heads", "mamba_d_head", "mamba_expand"),
    ("n_mamba_heads", "mamba_headdim", "mamba_expand"),
)
# What says after how many layers a kind of layer comes again.
RHYTHM = ("period", "pattern", "offset", "interval", "every_n", "step")
# What says after how many layers a kind of layer begins.
BEGINS = ("first_k_dense", "start_index", "num_dense_layers")


class NoTwin(ValueError):
    """No small model could be made of the configuration."""


def twin_config(config: Any, narrow: bool, short: bool, head_width: int = HEAD) -> Any:
    """A copy with few layers and short windows, with narrow layers, and with a short vocabulary."""
    twin = copy.deepcopy(config)
    text = twin.get_text_config()
    for part in (text, *_other_parts(twin, text)):
        _fewer_layers(part)
        _short_windows(part)
        if narrow:
            _narrow(part, head_width)
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
            twin = twin_config(config, narrow, short)
            with torch.device("meta"):
                size = sum(p.numel() for p in build(twin).parameters())
            if size > LARGEST:
                raise NoTwin(f"it would have {size} parameters")
            model = build(twin).eval()
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


def _other_parts(config: Any, text: Any) -> list[Any]:
    """Of a model with a tower for images or sound, what it has beside its text, where that is made of layers."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [p for p in parts if p is not text and hasattr(p, "num_hidden_layers") and hasattr(p, "hidden_size")]


def _fewer_layers(text: Any) -> None:
    """Keep the first layers, up to one of every kind; likewise of the last ones, which take keys and values of others."""
    layers, settings = text.num_hidden_layers, list(vars(text).items())
    shared = getattr(text, "num_kv_shared_layers", 0) or 0
    own = layers - shared if shared < layers else layers
    by_layer = {name: values for name, values in settings if isinstance(values, list | tuple) and len(values) == layers}
    indices = {name: values for name, values in settings if _are_indices(values, layers)}
    kinds = [
        (*(str(values[i]) for n, values in by_layer.items() if n not in indices), *(i in v for v in indices.values()))
        for i in range(layers)
    ]
    needed, takers = (
        max((part.index(kind) + 1 for kind in set(part)), default=0) for part in (kinds[:own], kinds[own:])
    )
    counts = {name: value for name, value in settings if _is_count(value)}
    begins, comes = (
        max((value for name, value in counts.items() if any(word in name for word in words)), default=0)
        for words in (BEGINS, RHYTHM)
    )
    needed = max(needed, begins + comes + 1)
    for name, value in settings:
        if isinstance(value, list | tuple) and len(value) < layers and ("types" in name or "pattern" in name):
            needed = max(needed, len(value))
    kept = [*range(min(own, max(2, needed))), *range(own, own + takers)]
    for name, values in by_layer.items():
        setattr(text, name, [values[i] for i in kept])
    for name, values in indices.items():
        setattr(text, name, [kept.index(i) for i in values if i in kept])
    text.num_hidden_layers = len(kept)
    if takers:
        text.num_kv_shared_layers = takers
    if getattr(text, "max_window_layers", None) is not None:
        text.max_window_layers = min(text.max_window_layers, len(kept) - 1)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_indices(values: Any, layers: int) -> bool:
    """Of layers, as of those with full attention or with experts."""
    if not isinstance(values, list | tuple) or not values or not all(map(_is_count, values)):
        return False
    return list(values) == sorted(set(values)) and values[-1] < layers


def _short_windows(text: Any) -> None:
    for name, value in vars(text).items():
        is_width = ("window" in name and "layers" not in name) or name == "attention_chunk_size"
        if is_width and _is_count(value) and value > WINDOW:
            setattr(text, name, WINDOW)


def _narrow(text: Any, width: int) -> None:
    """Few narrow heads, few experts; the ratios of heads to key-value heads and of widths stay, as far as they matter."""
    was = {name: value for name, value in vars(text).items() if _is_count(value)}
    heads = getattr(text, "num_attention_heads", None) or 2
    kv_names = [name for name in ("num_key_value_heads", "num_kv_heads") if was.get(name)]
    kv = was[kv_names[0]] if kv_names else heads
    ratio, groups = min(max(1, heads // kv), 3), min(kv, 2)
    hidden, head = text.hidden_size, _head_width(text)
    narrow = max(32, ratio * groups * width)

    def narrower(value: int) -> int:
        return max(32, round(min(value / hidden, 4) * narrow / 8) * 8)

    for name in WIDTHS:
        if isinstance(values := getattr(text, name, None), list):  # of each layer
            setattr(text, name, [narrower(value) for value in values])
    for name, value in was.items():
        if name in CAPS:
            setattr(text, name, min(value, CAPS[name]))
        elif "expert" in name and name.startswith(("num_", "n_")) and value > EXPERTS:
            setattr(text, name, EXPERTS)
        elif name in WIDTHS:
            setattr(text, name, narrower(value))
        elif value == hidden:
            setattr(text, name, narrow)
    new = {"hidden_size": narrow, "num_attention_heads": ratio * groups} | dict.fromkeys(kv_names, groups)
    if "qk_rope_head_dim" not in was:  # latent attention has head widths of its own
        new["head_dim"] = narrow // (ratio * groups)
        new["attention_head_dim"] = getattr(text, "attention_hidden_size", narrow) // (ratio * groups)
    for heads_name, width_name, expand in SSM_HEADS:
        if was.get(heads_name) and was.get(expand):
            new |= {heads_name: was[expand] * narrow // width, width_name: width, "mamba_d_ssm": was[expand] * narrow}
    for name, value in new.items():
        with suppress(AttributeError):  # derived from the others
            if getattr(text, name, None) is not None:
                setattr(text, name, value)
    for name, section in vars(text).items():
        if "rope" in name and isinstance(section, dict):
            for of_layers in (section, *section.values()):  # one for all layers, or one for each kind of them
                _fewer_factors(of_layers, _head_width(text), head)


def _head_width(text: Any) -> int:
    """Of what is turned; latent attention has a part of its own for it, which stays as wide as it is."""
    known = getattr(text, "qk_rope_head_dim", None) or getattr(text, "head_dim", None)
    return int(known or text.hidden_size // (getattr(text, "num_attention_heads", None) or 1))


def _fewer_factors(rope: Any, width: int, was: int) -> None:
    """Of factors of RoPE for each pair of dimensions (`longrope`), as many as heads of another width have, from the first to
    the last. Rotary dimensions are the same part of any head."""
    for name, factors in dict(rope).items() if isinstance(rope, dict) else ():
        if "factor" in name and isinstance(factors, list | tuple):
            count = len(factors) * width // was
            rope[name] = [factors[i * len(factors) // count] for i in range(count)]


def _short_vocabulary(config: Any, text: Any) -> None:
    text.vocab_size = min(text.vocab_size, VOCABULARY)
    if getattr(text, "vocab_size_per_layer_input", None):
        text.vocab_size_per_layer_input = min(text.vocab_size_per_layer_input, VOCABULARY)
    for part in (config, text):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            token = getattr(part, name, None)
            if isinstance(token, list):
                token = token[0]
            if token is not None:
                setattr(part, name, token if token < text.vocab_size else text.vocab_size - 1)
