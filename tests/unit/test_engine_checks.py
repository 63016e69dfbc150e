"""When engines are proved, what a proof is remembered by, and the verdict on its numbers; no engine starts."""

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import Gemma3Config

from actors.engine_proof import Differences, _key, _twin, verdict
from common.text.tokenizers import vocab_size
from contracts.config import LoraConfig, ModelConfig, TandemConfig
from controller.start_checks.engine_checks import begin_proofs
from tests.tiny_models import TINY

GOOD = Differences(loaded=1e-5, published=2e-5, returned=0.0, moved=4.0, limit=2e-3)


@pytest.mark.parametrize("field", ["loaded", "published", "returned"])
@pytest.mark.parametrize("number", [0.5, float("nan"), float("inf")])
def test_any_number_above_rounding_is_a_fault(field: str, number: float) -> None:
    assert GOOD.fault() is None
    assert f"by {number:.2g} nats" in (dataclasses.replace(GOOD, **{field: number}).fault() or "")


def test_a_verdict_names_the_format_and_takes_an_error_as_it_is() -> None:
    bad = dataclasses.asdict(dataclasses.replace(GOOD, published=1.5))
    good = dataclasses.asdict(GOOD)
    assert verdict({"formats": {"float32": good, "bfloat16": good}}) is None
    assert (verdict({"formats": {"float32": good, "bfloat16": bad}}) or "").startswith(
        "in bfloat16, after a publish of"
    )
    assert verdict({"formats": {}, "error": "KeyError: 'factor'"}) == "KeyError: 'factor'"


def test_a_proof_is_of_one_configuration_format_and_length() -> None:
    llama, tied = TINY["llama"](), TINY["llama-tied"]()
    model = ModelConfig(dtype="float32")
    keys = [
        _key(llama, model, 64),
        _key(tied, model, 64),
        _key(llama, dataclasses.replace(model, dtype="bfloat16"), 64),
        _key(llama, dataclasses.replace(model, lora=LoraConfig()), 64),
        _key(llama, dataclasses.replace(model, lora=LoraConfig(rank=8)), 64),
        _key(llama, model, 65),
    ]
    assert len({*keys}) == 6
    llama._name_or_path = "elsewhere"
    assert _key(llama, dataclasses.replace(model, path="elsewhere"), 64) == keys[0]


def test_a_window_that_the_engine_never_passes_is_none_of_the_proof() -> None:
    config = TINY["mistral-window"]()
    config.sliding_window = 100
    assert _twin(config, True, True, max_model_len=512).sliding_window == 8
    assert _twin(config, True, True, max_model_len=100).sliding_window == 100


def test_a_twin_is_padded_where_its_model_is() -> None:
    for name, rest in (("qwen3_moe", 0), ("qwen3_moe-padded", 16)):
        assert _twin(TINY[name](), True, True, 64).moe_intermediate_size % 32 == rest


def test_the_vocabulary_is_that_of_the_text_model(tmp_path: Path) -> None:
    TINY["gpt2"]().save_pretrained(tmp_path / "plain")
    assert vocab_size(str(tmp_path / "plain"), ModelConfig()) == 300
    Gemma3Config(text_config={"vocab_size": 96}).save_pretrained(tmp_path / "nested")
    assert "vocab_size" not in json.loads((tmp_path / "nested/config.json").read_text())
    assert vocab_size(str(tmp_path / "nested"), ModelConfig()) == 96


@pytest.mark.parametrize(("stage", "gpus"), [("sft", 0.0), ("reward_model", 0.0), ("preference", 0.0), ("ppo", 1.0)])
def test_nothing_is_proved_where_no_engine_on_cpu_samples(stage: str, gpus: float, tmp_path: Path) -> None:
    config = TandemConfig(stage=stage, cache_dir=str(tmp_path))
    config.model.path = str(tmp_path / "none")
    config.cluster.gpus_per_actor = gpus
    assert begin_proofs(config)() == []
    assert not list(tmp_path.iterdir())
