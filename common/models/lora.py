"""Low-rank adapters (Hu 2021) on a model of transformers: where they go, and which of them counts. PEFT makes them.

They lie in the linear layers of the decoder layers alone. An adapter on a tied LM head would move the embeddings with it,
once it is merged (PEFT 0.21), and fused experts are no linear layers. A, B and DoRA's magnitudes have the model's own dtype,
the one that engines serve: in float32, as PEFT's autocast has them, every adapted layer would keep a float32 copy of its
input for the backward pass, and learner and engine would compute different policies. Adam's masters are float32 (DeepSpeed).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from common.models.forward import decoder_layers
from common.models.loading import LoadingError
from contracts.config import LoraConfig

TRAINED = "default"  # names of adapters: the one that trains, and what it started from, where that was an adapter
REFERENCE = "reference"
ALL = "all-linear"
KINDS = ("lora_A", "lora_B", "lora_magnitude_vector")
SHOWN = 12  # names in a message


class GradientDropout(nn.Dropout):
    """Active where a graph is built: transformers' models stay in evaluation mode here."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, torch.is_grad_enabled())


def target_modules(lm: Any, lora: LoraConfig, top: int | None = None, key: str = "model.lora.targets") -> list[str]:
    """Names of the modules of `lm`, which has no adapters yet, that `lora.targets` stands for, in its top `top` decoder
    layers (None: all). `key` is where the configuration has them.

    Raises:
        LoadingError: a target names no linear layer of the decoder layers, or experts that are fused.
    """
    layers = decoder_layers(lm)
    prefix = next(name for name, module in lm.named_modules() if module is layers)
    first = len(layers) - (len(layers) if top is None else top)
    inside = {f"{prefix}.{name}": module for name, module in layers.named_modules()}
    linear = [name for name, module in inside.items() if isinstance(module, nn.Linear)]
    chosen: set[str] = set()
    for target in lora.targets:
        found = linear if target == ALL else [n for n in linear if n == target or n.endswith(f".{target}")]
        problem = _problem(lm, layers, inside, target) if target == ALL or not found else None
        if problem or not found:
            there = sorted({name.rpartition(".")[2] for name in linear})[:SHOWN]
            instead = f"{key}=[{','.join(there)}] or some of these" if there else f"{key.rpartition('.')[0]}=null"
            raise LoadingError(
                f"{key} must name linear layers of the decoder layers of {type(lm).__name__}; found "
                f"{target}, {problem or 'which names none'}; write {instead}"
            )
        chosen.update(found)
    owners: dict[int, str] = {}
    for name in sorted(chosen):
        if (other := owners.setdefault(id(inside[name].weight), name)) != name:
            raise LoadingError(
                f"{key} must name layers with weights of their own; found {other} and {name} of "
                f"{type(lm).__name__}, which share theirs: merged, both adapters would count in both; write other targets"
            )
    return [name for name in linear if name in chosen and int(name.removeprefix(f"{prefix}.").split(".")[0]) >= first]


def _problem(lm: Any, layers: nn.ModuleList, inside: dict[str, nn.Module], target: str) -> str | None:
    """Why a target cannot have adapters, where that is known."""
    fused = [name for name, p in layers.named_parameters() if p.ndim > 2 and not _is_convolution(layers, name)]
    if fused and target == ALL:
        return f"but PEFT's adapters do not reach the experts, which are fused in {fused[0]}"
    if any(name.endswith(f".{target}") for name in fused):
        return f"experts that are fused in {fused[0]}, which PEFT's adapters do not reach"
    if any(isinstance(m, Conv1D) and (target == ALL or n.endswith(f".{target}")) for n, m in inside.items()):
        return "but its layers are transposed (Conv1D), which is not supported"
    outside = {"embedding": lm.get_input_embeddings(), "LM head": lm.get_output_embeddings()}
    for what, module in outside.items():
        if module is not None and any(m is module and n.split(".")[-1] == target for n, m in lm.named_modules()):
            return f"the {what}, which may be tied to its counterpart: an adapter on the one would move the other"
    return None


def _is_convolution(layers: nn.ModuleList, parameter: str) -> bool:
    return isinstance(layers.get_submodule(parameter.rpartition(".")[0]), nn.Conv1d | nn.Conv2d | nn.Conv3d)


def add_adapter(
    lm: Any, lora: LoraConfig, modules: list[str], seed: int, name: str = TRAINED, dropout: float = 0.0
) -> None:
    """Put an adapter on `modules`; it alone trains from then on (`REFERENCE`: it does not). What it computes is 0 until it
    has been trained or filled.

    Args:
        seed: of A: the same numbers in every process.
        dropout: of what goes into it, while a graph is built.

    Raises:
        LoadingError: PEFT has none for one of the modules, or has them elsewhere.
    """
    import peft

    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides it as it is
        target_modules=modules,
        init_lora_weights=True if lora.init == "kaiming" else "gaussian",
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(settings, lm, name)
        except ValueError as error:  # as of the projections of Mamba, whose kernels take weights past their layers
            raise LoadingError(f"model.lora: {type(lm).__name__} cannot have these adapters: {error}") from error
    # PEFT puts those of some mixtures of experts on the fused experts in place of the layers that are named.
    there = {layer for layer, module in adapted_layers(lm).items() if name in module.lora_A}
    if there != set(modules):
        found = ", ".join(sorted(there.symmetric_difference(modules))[:SHOWN])
        raise LoadingError(
            f"model.lora.targets must name layers of {type(lm).__name__} that PEFT adapts as such; found others of {found}; "
            "write other targets"
        )
    for layer in adapted_layers(lm).values():
        layer._active_adapter = [TRAINED]
        if dropout and name in layer.lora_dropout:
            layer.lora_dropout[name] = GradientDropout(dropout)
    for parameter_name, parameter in lm.named_parameters():
        parameter.requires_grad_(is_of_adapter(parameter_name, TRAINED))


@torch.no_grad()
def with_telling_adapter(lm: Any, lora: LoraConfig | None) -> Any:
    """`lm` with an adapter on every target, whose numbers change the output, the same ones each time; for a proof. Without
    `lora`, or where it has one, as it is."""
    if lora is None or adapted_layers(lm):
        return lm
    add_adapter(lm, lora, target_modules(lm, lora), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter_parameters(lm).items():
        drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
        if "lora_B" in name:  # B A, scaled, is half as large as the matrix that it joins
            parameter.copy_(drawn * (0.75 / lora.rank) ** 0.5 / scale(lora))
        elif "magnitude" in name:
            parameter.mul_(1 + 0.1 * drawn)
    return lm


def base_state(lm: nn.Module) -> dict[str, Tensor]:
    """The weights of a model without the adapters that it may have, by its own names."""
    adapters = [f".{kind}." for kind in KINDS]
    state = {name: tensor for name, tensor in lm.state_dict().items() if not any(part in name for part in adapters)}
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}


def adapted_layers(lm: nn.Module) -> dict[str, Any]:
    """The layers that PEFT has replaced, by name."""
    return {name: module for name, module in lm.named_modules() if hasattr(module, "lora_A")}


def is_of_adapter(parameter: str, name: str) -> bool:
    return any(f".{kind}.{name}." in parameter for kind in KINDS)


def saved_name(parameter: str) -> str:
    """Of an adapter's parameter as PEFT's files have it, without their prefix."""
    for kind in KINDS:
        module, found, _ = parameter.partition(f".{kind}.")
        if found:
            return f"{module}.{kind}" + (".weight" if kind != "lora_magnitude_vector" else "")
    return parameter


def adapter_parameters(lm: nn.Module, name: str = TRAINED) -> dict[str, nn.Parameter]:
    """By `saved_name`."""
    return {saved_name(n): p for n, p in lm.named_parameters() if is_of_adapter(n, name)}


@contextmanager
def counting(lm: nn.Module, name: str) -> Iterator[None]:
    """Within it the adapter `name` counts in place of the one that trains; nothing, where there is none of that name."""
    layers = adapted_layers(lm).values()
    for layer in layers:
        layer._active_adapter = [name]
    try:
        yield
    finally:
        for layer in layers:
            layer._active_adapter = [TRAINED]


def scale(lora: LoraConfig) -> float:
    """What the product of B and A is multiplied with."""
    return lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)


def adapter_shapes(module: str, weight: Sequence[int], lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of an adapter on `module`, whose weight is [out, in], by `saved_name`."""
    rows, columns = weight
    shapes = {f"{module}.lora_A.weight": (lora.rank, columns), f"{module}.lora_B.weight": (rows, lora.rank)}
    return shapes | ({f"{module}.{KINDS[2]}": (rows,)} if lora.dora else {})


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """W' = W + scale B A, computed in float32 and rounded once to the dtype of W [out, in]; of DoRA (Liu 2024) each row of
    W' is scaled to its magnitude [out]. The norm of a row is rounded as magnitudes are stored: PEFT, which trains, divides
    one rounded number by the other, so that with B = 0 nothing changes."""
    found = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)
    if magnitude is not None:
        norm = torch.linalg.vector_norm(found, dim=1).to(magnitude.dtype)
        found *= (magnitude / norm).float()[:, None]
    return found.to(weight.dtype)


def stored_name(lm: Any, name: str) -> str:
    """`saved_name` with the module as the base's checkpoint, which engines read, has it; transformers may have another name
    in memory.

    Raises:
        LoadingError: the checkpoint has the layer in parts, or as a part.
    """
    module, kind, rest = name.partition(".lora_")
    shape = lm.get_submodule(module).weight.shape
    found = list(revert_weight_conversion(lm, {f"{module}.weight": torch.empty(shape, device="meta")}))
    if len(found) != 1 or not found[0].endswith(".weight"):
        raise LoadingError(
            f"model.lora.targets must name layers that the checkpoint has as such; found {module} of {type(lm).__name__}, "
            f"which it has as {', '.join(found)}; write other targets"
        )
    return found[0].removesuffix(".weight") + kind + rest
