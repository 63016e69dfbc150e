"""What an engine loads for an adapter: numbers worked out by hand, and what is refused before anything is touched."""

import pytest
import torch

from actors.adapter_merging import decoder_layer, merged_layers, misfit
from common.models.lora import merged
from contracts.config import LoraConfig
from contracts.weights import Parameters

BASE = {
    "model.embed_tokens.weight": torch.ones(5, 2),
    "model.layers.0.mlp.up_proj.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
    "model.layers.0.norm.weight": torch.ones(2),
    "model.layers.1.mlp.up_proj.weight": torch.zeros(3, 2),
    "model.layers.10.mlp.up_proj.weight": torch.zeros(3, 2),
}
UP = "model.layers.0.mlp.up_proj"
A, B = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0], [0.0], [2.0]])
SHAPES = {name: tuple(weight.shape) for name, weight in BASE.items()}
GOOD: dict[str, tuple[int, ...]] = {f"{UP}.lora_A.weight": (1, 2), f"{UP}.lora_B.weight": (3, 1)}


def of(shapes: dict[str, tuple[int, ...]]) -> Parameters:
    return tuple((name, "float32", shape) for name, shape in shapes.items())


def test_layers_with_an_adapter_are_loaded_whole_and_no_others() -> None:
    adapter = {f"{UP}.lora_A.weight": A, f"{UP}.lora_B.weight": B}
    for _ in range(2):  # from the same originals each time
        found = dict(merged_layers(BASE.items(), adapter, {"model.layers.0"}, torch.float32, scale=0.5))
        assert list(found) == ["model.layers.0.mlp.up_proj.weight", "model.layers.0.norm.weight"]
        assert found[f"{UP}.weight"].tolist() == [[1.5, 1.5], [3.0, 4.0], [6.0, 5.0]]


def test_a_layer_that_has_lost_its_adapter_is_the_base_again() -> None:
    found = dict(merged_layers(BASE.items(), {}, {"model.layers.1"}, torch.bfloat16, scale=0.5))
    assert list(found) == ["model.layers.1.mlp.up_proj.weight"]
    assert found["model.layers.1.mlp.up_proj.weight"] is BASE["model.layers.1.mlp.up_proj.weight"]


def test_dora_scales_rows_to_their_magnitudes() -> None:
    adapter = {
        f"{UP}.lora_A.weight": A,
        f"{UP}.lora_B.weight": B,
        f"{UP}.lora_magnitude_vector": torch.tensor([2.0, 5.0, 1.0]),
    }
    base = [(f"{UP}.weight", torch.tensor([[2.0, 5.0], [3.0, 4.0], [-2.0, 3.0]]))]
    [(_, found)] = merged_layers(base, adapter, {"model.layers.0"}, torch.float32, scale=1.0)
    # [3, 4], [3, 4], [0, 1], of norms 5, 5, 1
    torch.testing.assert_close(found, torch.tensor([[1.2, 1.6], [3.0, 4.0], [0.0, 1.0]]))


def test_dora_that_has_not_trained_changes_nothing_in_bfloat16() -> None:
    """As in PEFT's forward pass, which rounds norms as it stores magnitudes."""
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    magnitude = torch.linalg.vector_norm(weight.float(), dim=1).bfloat16()
    a, b = torch.randn(4, 32).bfloat16(), torch.zeros(64, 4).bfloat16()
    assert torch.equal(merged(weight, a, b, 2.0, magnitude), weight)


def test_decoder_layers_are_told_apart() -> None:
    assert decoder_layer("model.layers.10.mlp.experts.3.up_proj") == "model.layers.10"
    assert decoder_layer("transformer.h.2.attn") == "transformer.h.2"
    assert decoder_layer("lm_head.weight") is None


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (GOOD, None),
        ({}, None),
        (GOOD | {f"{UP}.lora_A.weight": (2, 2)}, "must be [1, 2] with model.lora.rank=1, dora=False; found [2, 2]"),
        ({f"{UP}.lora_A.weight": (1, 2)}, f"{UP}.lora_B.weight must be [3, 1]"),
        (GOOD | {f"{UP}.lora_magnitude_vector": (3,)}, "lora_magnitude_vector must be nothing"),
        (GOOD | {f"{UP}.weight": (3, 2)}, f"{UP}.weight must be nothing"),
        ({"model.embed_tokens.lora_A.weight": (1, 2)}, "model.embed_tokens is no linear layer"),
        ({"model.layers.0.norm.lora_A.weight": (1, 2)}, "model.layers.0.norm is no linear layer"),
        ({"model.layers.7.mlp.up_proj.lora_A.weight": (1, 2)}, "model.layers.7.mlp.up_proj is no linear layer"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(shapes: dict[str, tuple[int, ...]], said: str | None) -> None:
    found = misfit(of(shapes), SHAPES, LoraConfig(rank=1))
    assert found is None if said is None else said in str(found)
