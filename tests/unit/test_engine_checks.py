"""When engines are proved, what a proof is remembered by, and the verdict on its numbers; no engine starts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3Config

from actors.engine_proof import Differences, _key, _twin, prove_engine, verdict
from common.text.tokenizers import load_config, vocab_size
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


def test_a_proof_is_of_the_classes_that_lie_beside_a_checkpoint_where_they_are_run(tmp_path: Path) -> None:
    llama, model = TINY["llama"](), ModelConfig(path=str(tmp_path), dtype="float32")
    (tmp_path / "modeling_mine.py").write_text("scale = 1\n")
    keys = [_key(llama, replaced, 64) for replaced in (model, dataclasses.replace(model, trust_remote_code=True))]
    (tmp_path / "modeling_mine.py").write_text("scale = 2\n")
    keys += [_key(llama, replaced, 64) for replaced in (model, dataclasses.replace(model, trust_remote_code=True))]
    assert keys[0] == keys[2]
    assert len({*keys}) == 3


@pytest.mark.parametrize("there", ["", "{}"])
def test_two_runs_that_share_a_cache_prove_the_same_engine_at_once(
    there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is later writes the same; and what a run was torn from while it wrote is written anew."""
    TINY["llama"]().save_pretrained(tmp_path / "model")
    answer, memory = {"formats": {"float32": dataclasses.asdict(GOOD)}, "seconds": 1.0}, tmp_path / "proofs"
    asked = []

    def ask(model: ModelConfig, max_model_len: int) -> dict[str, Any]:
        asked.append(1)
        memory.mkdir(exist_ok=True)
        key = _key(load_config(model.path, model), model, max_model_len)
        (memory / f"{key}.json").write_text(there)
        return answer

    monkeypatch.setattr("actors.engine_proof._ask", ask)
    for _ in range(2):
        prove_engine(ModelConfig(path=str(tmp_path / "model"), dtype="float32"), 64, memory)
    assert len(asked) == 1
    assert [path.suffix for path in memory.iterdir()] == [".json"]


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
