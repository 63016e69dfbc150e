"""What is published, saved and committed of a model is what its class stores: names, layout, values, buffers."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from contracts.config import LearnerConfig, ModelConfig, OptimizerConfig
from learner.engine import TrainEngine
from learner.ranks import Ranks
from learner.saved_model import save_checkpoint
from learner.weight_sources import EngineSource
from tests.tiny_models import TINY, make


class Holder(torch.nn.Module):
    """As the learner's models hold theirs."""

    def __init__(self, path: Path, dtype: torch.dtype):
        super().__init__()
        self.lm, self.adapter = AutoModelForCausalLM.from_pretrained(path, dtype=dtype), None


def stored(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path / "model.safetensors", framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """To the bit, but for parameters of ERNIE's router: its class keeps them in float32, here they train in bfloat16."""
    rounded = ("mlp.gate.weight", "moe_statics.e_score_correction_bias")
    wanted = {n: t.bfloat16() if n.endswith(rounded) else t for n, t in wanted.items()}
    assert found.keys() == wanted.keys()
    assert [n for n in wanted if found[n].dtype != wanted[n].dtype or not torch.equal(found[n], wanted[n])] == []


def engine_of(path: Path, ranks: Ranks, zero_stage: int = 0) -> TrainEngine:
    learner = LearnerConfig(zero_stage=zero_stage)
    return TrainEngine(Holder(path, torch.bfloat16), OptimizerConfig(), learner, ranks, 1)


def check(engine: TrainEngine, path: Path, tokenizer: Path, ranks: Ranks) -> None:
    wanted = stored(path)
    source = EngineSource(engine)
    same(dict(source), wanted)
    sent = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source]
    assert [(m.name, m.dtype, tuple(m.shape)) for m in source.metadata()] == sent
    save_checkpoint(engine, str(path / "saved"), str(tokenizer), ModelConfig(), ranks)
    same(stored(path / "saved"), wanted)


@pytest.mark.parametrize("name", TINY)
def test_all_that_a_class_stores_is_sent_and_saved(name: str, ranks: Ranks, tiny_model: Path, tmp_path: Path) -> None:
    make(name, 0, torch.bfloat16).save_pretrained(tmp_path)
    check(engine_of(tmp_path, ranks), tmp_path, tiny_model, ranks)


@pytest.mark.parametrize("name", ["glm4_moe", "mixtral"])
def test_so_it_is_where_a_layer_is_gathered_at_a_time(
    name: str, ranks: Ranks, tiny_model: Path, tmp_path: Path
) -> None:
    make(name, 0, torch.bfloat16).save_pretrained(tmp_path)
    check(engine_of(tmp_path, ranks, zero_stage=3), tmp_path, tiny_model, ranks)


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3", "dots1"])
def test_a_routers_correction_is_among_it_and_exact(name: str, tmp_path: Path) -> None:
    make(name, 0, torch.bfloat16).save_pretrained(tmp_path)
    correction = stored(tmp_path)["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert correction.abs().max() > 0.01


def test_experts_are_sent_one_by_one(ranks: Ranks, tmp_path: Path) -> None:
    make("mixtral", 0, torch.bfloat16).save_pretrained(tmp_path)
    engine = engine_of(tmp_path, ranks)
    held = dict(engine.named_weights())["model.layers.0.mlp.experts.gate_up_proj"]  # [experts, gate and up, hidden]
    sent = dict(EngineSource(engine))
    for expert in range(4):
        both = [sent[f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight"] for part in ("w1", "w3")]
        assert torch.equal(torch.cat(both), held[expert])
