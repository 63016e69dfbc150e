"""Adapters that a real vLLM serves, against transformers with PEFT, unmerged and merged; and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import ray
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.engine_proof import save_tokenizer
from common.models.proof import row_logprobs
from common.processes.shared_memory import pack
from contracts.config import EngineConfig, LoraConfig, ModelConfig, SamplingConfig
from contracts.records import Prompt, RolloutRequest
from contracts.weights import WeightsRefused
from controller.cluster.runtime import Runtime
from learner.weight_publisher import BACKEND, WeightPublisher
from learner.weight_sources import stored_source
from tests.conftest import kill, make_config, make_tiny_model
from tests.forked_engine import beside_engine
from tests.tiny_models import TINY, make

pytestmark = pytest.mark.usefixtures("engine_environment")
ROWS = [[(7 * i) % 290 + 3 for i in range(40)], [(11 * i) % 290 + 3 for i in range(17)]]
REQUESTS = [RolloutRequest(0, 0, Prompt(0, "", tuple(ROWS[0])), seed=1)]
Adapter = dict[str, Tensor]


def drawn(path: Path, lora: LoraConfig, seed: int, layers: tuple[int, ...] = (0, 1)) -> Adapter:
    """An adapter on the linear layers of some decoder layers, as large as to move every log-probability."""
    lm = AutoModelForCausalLM.from_pretrained(path)
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, module in lm.named_modules():
        if not isinstance(module, torch.nn.Linear) or not any(f".layers.{i}." in name for i in layers):
            continue
        rows, columns = module.weight.shape
        found[f"{name}.lora_A.weight"] = torch.randn(lora.rank, columns, generator=generator) * 0.1
        found[f"{name}.lora_B.weight"] = torch.randn(rows, lora.rank, generator=generator) * 0.1
        if lora.dora:
            spread = 1 + 0.1 * torch.randn(rows, generator=generator)
            found[f"{name}.lora_magnitude_vector"] = module.weight.detach().norm(dim=1) * spread
    return found


@torch.no_grad()
def of_peft(path: Path, lora: LoraConfig, adapter: Adapter, merge: bool) -> Tensor:
    """log p of the rows' tokens but the first, in float32, by PEFT's own code."""
    modules = sorted({name.partition(".lora_")[0] for name in adapter})
    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=modules, use_rslora=lora.rslora, use_dora=lora.dora
    )  # type: ignore[arg-type]
    model: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), settings)
    named = {f"base_model.model.{name}": tensor for name, tensor in adapter.items()}
    assert not peft.set_peft_model_state_dict(model, named).unexpected_keys
    model = model.merge_and_unload() if merge else model
    return torch.cat([row_logprobs(model.eval(), row) for row in ROWS])


def started(path: Path, lora: LoraConfig, dtype: str = "float32") -> Callable[[], Any]:
    def make_engine() -> Any:
        from actors.vllm_engine import VLLMEngine

        options = EngineConfig(max_num_seqs=2, max_model_len=64, kv_cache_gib=1 / 64)
        return VLLMEngine(
            ModelConfig(path=str(path), dtype=dtype, lora=lora), options, "shared_memory", on_cpu=True, end_ids=()
        )

    return make_engine


def logprobs(engine: Any) -> list[float]:
    return [p for row in engine.token_logprobs([(row, 1) for row in ROWS]) for p in row]


def refusal(engine: Any, adapter: Adapter) -> str:
    try:
        engine.exchange(*pack(adapter), 9)
    except WeightsRefused as error:
        return str(error)
    return "taken"


def idle(adapter: Adapter) -> Adapter:
    return {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in adapter.items()}


@pytest.mark.parametrize("lora", [LoraConfig(rank=4), LoraConfig(rank=4, rslora=True, dora=True)], ids=["lora", "dora"])
def test_an_engine_serves_adapters_as_peft_computes_them(tmp_path: Path, lora: LoraConfig) -> None:
    """A tied head; one adapter, another on fewer layers, none; and what does not fit, after which the engine goes on."""
    path = make_tiny_model(tmp_path / "model", torch.float32, tied=True, vocab_size=300)
    first, second = drawn(path, lora, 1), drawn(path, lora, 2, layers=(1,))

    def scenario(engine: Any) -> dict[str, Any]:
        said = {"base": logprobs(engine)}
        engine.exchange(*pack(first), 1)
        said["first"] = logprobs(engine)
        name = next(iter(first))
        bad = {
            "head": first
            | {"lm_head.lora_A.weight": torch.zeros(4, 128), "lm_head.lora_B.weight": torch.zeros(300, 4)},
            "rank": first | {name: torch.zeros(5, first[name].shape[1])},
            "half": {n: t for n, t in first.items() if n != name},
            "layer": first | {n.replace("layers.0", "layers.7"): t for n, t in first.items()},
            "whole": first | {"model.norm.weight": torch.ones(128)},
        }
        said["refused"] = {what: refusal(engine, adapter) for what, adapter in bad.items()}
        said["after"] = logprobs(engine)
        engine.exchange(*pack(second), 2)
        said["second"] = logprobs(engine)
        engine.exchange(*pack({} if lora.dora else idle(second)), 3)
        said["none"] = logprobs(engine)
        return said

    said = beside_engine(started(path, lora), scenario)
    assert "error" not in said, said
    for name, adapter in (("first", first), ("second", second)):
        for merge in (False, True):
            expected = of_peft(path, lora, adapter, merge)
            assert said[name] == pytest.approx(expected.tolist(), abs=1e-3)
        assert (expected - torch.tensor(said["base"])).abs().mean() > 0.05
    assert said["none"] == said["base"]
    assert said["after"] == said["first"]
    refused = said["refused"]
    assert "lm_head is no linear layer of the decoder layers" in refused["head"]
    assert "model.layers.7" in refused["layer"]
    assert "q_proj.lora_A.weight must be [4, 128]" in refused["rank"]
    assert "found [5, 128]" in refused["rank"]
    assert "q_proj.lora_A.weight must be [4, 128]" in refused["half"]
    assert "found nothing" in refused["half"]
    assert "model.norm.weight must be nothing" in refused["whole"]


def test_layers_without_an_adapter_keep_what_they_have(tmp_path: Path) -> None:
    """Experts, whose kernels are packed apart, in a decoder layer with an adapter and in one without; in bfloat16."""
    path, lora = tmp_path / "moe", LoraConfig(rank=4)
    make("qwen3_moe", 0).save_pretrained(path)
    save_tokenizer(path, TINY["qwen3_moe"]().vocab_size)
    adapter = {name: t for name, t in drawn(path, lora, 1, layers=(1,)).items() if "self_attn" in name}

    def scenario(engine: Any) -> dict[str, Any]:
        said = {"base": logprobs(engine)}
        engine.exchange(*pack(adapter), 1)
        said["adapted"] = logprobs(engine)
        engine.exchange(*pack(idle(adapter)), 2)
        return said | {"none": logprobs(engine)}

    said = beside_engine(started(path, lora), scenario)
    assert "error" not in said, said
    assert said["adapted"] == pytest.approx(of_peft(path, lora, adapter, merge=False).tolist(), abs=1e-3)
    assert said["none"] == said["base"] != said["adapted"]


def test_an_engine_starts_from_the_directory_of_an_adapter(tmp_path: Path) -> None:
    path, lora = make_tiny_model(tmp_path / "model", torch.bfloat16, tied=True, vocab_size=300), LoraConfig(rank=4)
    adapter = drawn(path, lora, 1)
    settings = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"])
    model: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path), settings)
    kept = {name: t for name, t in adapter.items() if "q_proj" in name or "down_proj" in name}
    peft.set_peft_model_state_dict(model, {f"base_model.model.{name}": t for name, t in kept.items()})
    model.save_pretrained(tmp_path / "adapter")

    def scenario(engine: Any) -> dict[str, Any]:
        begun = logprobs(engine)
        engine.exchange(*pack(kept), 1)
        return {"begun": begun, "sent": logprobs(engine)}

    said = beside_engine(started(tmp_path / "adapter", lora, "bfloat16"), scenario)
    assert "error" not in said, said
    assert said["begun"] == said["sent"]
    gap = torch.tensor(said["begun"]) - of_peft(path, lora, kept, merge=True)
    assert gap.abs().mean() < 0.05


@pytest.mark.usefixtures("ray_runtime")
def test_a_late_actor_gets_base_and_adapter_and_the_base_is_an_update_of_nothing(tmp_path: Path) -> None:
    path, lora = make_tiny_model(tmp_path / "model", torch.bfloat16, tied=True), LoraConfig(rank=4, dora=True)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=32,
        target_modules="all-linear",
        use_dora=True,
        init_lora_weights=False,
        base_model_name_or_path=str(path),
    )
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path), settings).save_pretrained(tmp_path / "adapter")
    config = make_config(path, tmp_path)
    config.model.lora, config.cluster.num_actors, config.cluster.threads_per_actor = lora, 1, 1
    runtime = Runtime(config)
    try:
        with runtime.actors(str(path), BACKEND, (2,), None) as actors:

            def now() -> tuple[list[list[float]], set[int]]:
                done = ray.get(actors[0].rollout.remote(REQUESTS, SamplingConfig(max_completion_tokens=4), [], 60))
                said = ray.get(actors[0].token_logprobs.remote([(row, 1) for row in ROWS]))
                return said, {int(v) for r in done for v in r.completion.policy_versions}

            begun, _ = now()
            publisher = WeightPublisher(BACKEND, stored_source(str(tmp_path / "adapter"), config.model))
            publisher.connect(actors)
            report = publisher.send(1)
            assert report is not None
            report.require_all()
            assert report.nbytes < 0.05 * sum(f.stat().st_size for f in path.glob("*.safetensors"))
            adapted = now()
            assert adapted[1] == {1}
            assert adapted[0] != begun
            kill(actors)
            assert runtime.replace_actor(actors, 0, report.update)
            assert now() == adapted
            base = WeightPublisher(BACKEND, stored_source(str(path), config.model))
            base.connect(actors)
            assert base.send(2) is not None
            assert now() == (begun, {2})
    finally:
        runtime.release()
