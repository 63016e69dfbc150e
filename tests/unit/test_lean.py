"""The lean norm and MLP against transformers' own in float64, and what they keep."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from learner.lean_layers import ROWS, RMSNorm, SwiGLU, make_lean

WIDTH = 24


def norm(dtype: torch.dtype) -> LlamaRMSNorm:
    module = LlamaRMSNorm(WIDTH, eps=1e-5).to(dtype)
    with torch.no_grad():
        module.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return module


def run(module: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, grad: torch.Tensor) -> list[Any]:
    """Output, gradient of the input, gradients of the weights."""
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(grad)
    parameters = module.parameters() if isinstance(module, nn.Module) else ()
    return [out.detach(), x.grad, *(p.grad for p in parameters)]


@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS + 3])
def test_norm_equals_the_formula_in_float64(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, grad = (torch.randn(2, rows, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    lean = norm(torch.float32)
    weight, u = lean.weight.detach().double().requires_grad_(), x.clone().requires_grad_()
    expected = weight * u / (u.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    expected.backward(grad)
    assert make_lean(nn.ModuleList([lean])) == 1
    out, dx, dw = run(lean, x.float(), grad.float())
    torch.testing.assert_close(out.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx.double(), u.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dw.double(), weight.grad, rtol=1e-4, atol=1e-4)


def clamped(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = module(x)
    return out.clamp_(-0.5, 0.5)


def test_what_a_norm_gives_may_be_changed_in_place() -> None:
    """OLMoE clamps its normed queries so."""
    x, grad = (torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(2))
    layers = nn.ModuleList([norm(torch.float32), norm(torch.float32)])
    assert make_lean(layers[1:]) == 1
    (plain, lean), turned = layers, x.transpose(0, 1)  # of inputs in another order too
    for u, g in ((x, grad), (turned, grad.transpose(0, 1))):
        layers.zero_grad()
        expected, found = (run(partial(clamped, m), u, g) for m in (plain, lean))
        for ours, right in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lean.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-5)


def test_norm_rounds_where_transformers_rounds() -> None:
    x = torch.randn(3, 200, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    module = norm(torch.bfloat16)
    expected = module(x)
    make_lean(nn.ModuleList([module]))
    assert (module(x) != expected).float().mean() < 1e-3  # but for sums in another order


def test_mlp_gradients_in_float64() -> None:
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=40, num_attention_heads=4)
    mlp = LlamaMLP(config).double()
    generator = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(5, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = run(mlp, x, grad)
    mlp.zero_grad()
    assert make_lean(nn.ModuleList([mlp])) == 1
    for found, right in zip(run(mlp, x, grad), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(SwiGLU.apply, (gate, up))
    x = torch.randn(3, 8, requires_grad=True)
    weight = torch.rand(8, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: RMSNorm.apply(*a, 1e-5), (x, weight), eps=1e-2, atol=2e-2, rtol=2e-2)


def test_another_formula_is_left_alone() -> None:
    gemma = GemmaRMSNorm(WIDTH)  # multiplies by 1 + weight
    with torch.no_grad():
        gemma.weight.uniform_(0.5, 1.5)
    gelu = LlamaMLP(LlamaConfig(hidden_size=WIDTH, intermediate_size=40, num_attention_heads=4, hidden_act="gelu"))
    assert make_lean(nn.ModuleList([gemma, gelu])) == 0


def test_a_stack_keeps_less(tiny_model: Path) -> None:
    """Bytes that autograd keeps of a bfloat16 decoder stack, weights apart."""
    lm = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    weights = {p.data_ptr() for p in lm.parameters()}

    def kept() -> int:
        storages: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            if t.data_ptr() not in weights:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = lm.model(input_ids=torch.arange(48)[None])
        return sum(storages.values()) if out.last_hidden_state.requires_grad else 0

    before = kept()
    assert make_lean(lm) == 2 * 3 + 1
    assert kept() < 0.7 * before


def test_zeros_that_wait_to_be_trained_hide_no_other_activation() -> None:
    """A layer that was put in between others begins with down_proj = 0, whatever its activation computes."""
    config = GemmaConfig(hidden_size=WIDTH, intermediate_size=40, num_attention_heads=4, hidden_act="gelu_pytorch_tanh")
    gelu, silu = GemmaMLP(config), LlamaMLP(LlamaConfig(hidden_size=WIDTH, intermediate_size=40, num_attention_heads=4))
    for mlp in (gelu, silu):
        nn.init.zeros_(mlp.down_proj.weight)
    assert (make_lean(nn.ModuleList([gelu])), make_lean(nn.ModuleList([silu]))) == (0, 1)


class ClampedMLP(LlamaMLP):
    """As the shared experts of DeepSeek-V4, whose limit is 10."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x).clamp(max=10.0), self.up_proj(x).clamp(min=-10.0, max=10.0)
        return self.down_proj(self.act_fn(gate) * up)


class ClampedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.clamp(-1000.0, 1000.0))


class OtherEpsRMSNorm(LlamaRMSNorm):
    """x / (rms(x) + eps), which differs where x is small."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rms = hidden_states.pow(2).mean(-1, keepdim=True).sqrt()
        return self.weight * (hidden_states / (rms + self.variance_epsilon))


def test_what_differs_on_large_or_small_inputs_alone_is_left_alone() -> None:
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=40, num_attention_heads=4)
    layers = nn.ModuleList([ClampedMLP(config), ClampedRMSNorm(WIDTH), OtherEpsRMSNorm(WIDTH)])
    assert make_lean(layers) == 0
    assert make_lean(nn.ModuleList([LlamaMLP(config), LlamaRMSNorm(WIDTH)])) == 2
