"""Packed rows against transformers one sequence at a time, and against its own attention implementations."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.models import packed_attention as attention
from common.models.forward import hidden_states
from common.models.packed_attention import Packed

SEQUENCES = [[5, 9, 2, 7], [3], [8, 8, 1, 2, 2, 6, 4], [2, 2]]


def build(implementation: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        initializer_range=0.5,
        attn_implementation=implementation,
    )
    return LlamaForCausalLM(config)


def gradients(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("max_tokens", [512, 3])  # 3: the long-sequence path
@pytest.mark.parametrize("implementation", [attention.NAME, "sdpa"])
def test_packed_equals_one_by_one(implementation: str, max_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_TOKENS", max_tokens)
    reference, model = build("eager"), build(implementation)
    packed = Packed.of(SEQUENCES, torch.device("cpu"))
    hidden = hidden_states(model, packed, "packed")
    single = torch.cat([reference.model(input_ids=torch.tensor([s])).last_hidden_state[0] for s in SEQUENCES])
    torch.testing.assert_close(hidden, single, atol=1e-5, rtol=1e-4)
    weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    (hidden * weights).sum().backward()
    (single * weights).sum().backward()
    mine, theirs = gradients(model), gradients(reference)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], atol=1e-4, rtol=1e-3)


def test_a_sequence_does_not_see_its_neighbours() -> None:
    model = build(attention.NAME)
    before = hidden_states(model, Packed.of(SEQUENCES, torch.device("cpu")), "packed")
    changed = [SEQUENCES[0], [11], *SEQUENCES[2:]]
    after = hidden_states(model, Packed.of(changed, torch.device("cpu")), "packed")
    same = [i for i in range(before.shape[0]) if i != 4]
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[4], after[4])


def test_an_architecture_that_drops_the_layout_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"learner\.attention=sdpa"):
        build(attention.NAME).model(input_ids=torch.tensor([[1, 2, 3]]))


def test_starts_and_places() -> None:
    packed = Packed.of(SEQUENCES, torch.device("cpu"))
    assert packed.starts == [0, 4, 5, 12]
    assert packed.position_ids[0].tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert packed.places.tolist() == [0, 1, 2, 3, 7, 14, 15, 16, 17, 18, 19, 20, 21, 22]


def test_real_model_loads_with_it(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=attention.NAME)
    packed = Packed.of([[1, 2, 3], [4]], torch.device("cpu"))
    assert hidden_states(model, packed, "packed").shape == (4, 128)
