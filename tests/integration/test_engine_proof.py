"""The proof of an engine: it accepts what is right, and tells every way in which vLLM alone keeps or loses weights."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from actors.engine_proof import EngineUnproven, compare, in_fork, prove_engine, prove_here, save_tokenizer, verdict
from common.text.tokenizers import load_config
from contracts.config import LoraConfig, ModelConfig
from tests.conftest import SMOLLM
from tests.tiny_models import TINY, make

pytestmark = pytest.mark.usefixtures("engine_environment")


LORA = LoraConfig(rank=4, targets=["q_proj", "o_proj"])


def said_of(
    name: str, folder: Path, before: Callable[[], None] = lambda: None, lora: LoraConfig | None = LORA
) -> str | None:
    """The verdict on vLLM with tiny models of an architecture; `before` runs in the engine's process."""
    paths = [folder / str(seed) for seed in (0, 1)]
    for seed, path in enumerate(paths):
        make(name, seed).save_pretrained(path)
        save_tokenizer(path, TINY[name]().vocab_size)

    def work(result: Path) -> None:
        before()
        compare(paths[0], paths[1], ModelConfig(path=name, dtype="float32", lora=lora), result)

    answer = in_fork(work)
    return verdict({"formats": {}, **answer} if "error" in answer else {"formats": {"float32": answer}})


def plain_reload() -> None:
    """vLLM's own way to load weights again, in place of Tandem's."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    from actors.weight_transfer import HostEngine, HostUpdateInfo
    from common.processes.shared_memory import layout, view

    def receive(self: HostEngine, info: HostUpdateInfo) -> None:
        slots, _ = layout(info.parameters)
        self.model.load_weights((slot.name, view(info.buffer, slot)) for slot in slots)

    HostEngine.start_weight_update = lambda self: initialize_layerwise_reload(self.model)
    HostEngine.receive_weights = receive
    HostEngine.finish_weight_update = lambda self: finalize_layerwise_reload(self.model, self.model_config)


# A tied head that is packed apart; experts, of a padded width too; a router's correction; what a model copies by itself.
CASES = ["llama-tied", "qwen3_moe", "qwen3_moe-padded", "glm4_moe", "gpt_oss-window"]


@pytest.mark.parametrize("name", CASES)
def test_an_engine_takes_other_weights_and_the_first_ones_back(name: str, tmp_path: Path) -> None:
    assert said_of(name, tmp_path) is None


@pytest.mark.parametrize("name", CASES)
def test_the_proof_tells_that_vllm_alone_does_not(name: str, tmp_path: Path) -> None:
    said = said_of(name, tmp_path, plain_reload, lora=None)
    assert said is not None
    if name == "qwen3_moe-padded":
        assert "The size of tensor a (128) must match the size of tensor b (96)" in said
    else:
        assert "after a publish of other weights it differs from transformers by" in said


def test_the_proof_tells_an_adapter_that_counts_otherwise(tmp_path: Path) -> None:
    def before() -> None:
        import actors.vllm_engine

        actors.vllm_engine.scale = lambda lora: 2 * lora.alpha / lora.rank

    said = said_of("llama-tied", tmp_path, before)
    assert said is not None
    assert "after a publish of an adapter it differs from transformers with PEFT by" in said


def test_a_weight_that_is_not_sent_is_named(tmp_path: Path) -> None:
    """Half of a layer that vLLM keeps as one, and experts of one layer."""

    def leave_out(part: str) -> Callable[[], None]:
        def before() -> None:
            import actors.engine_proof as proof
            from common.processes.shared_memory import layout, view

            whole = proof.packed

            def packed(path: Path) -> tuple:
                parameters, buffer = whole(path)
                slots, _ = layout(parameters)
                kept = [(slot, view(buffer, slot)) for slot in slots if part not in slot.name]
                fewer = tuple(p for p in parameters if part not in p[0])
                again, size = layout(fewer)
                smaller = torch.zeros(size, dtype=torch.uint8)
                for slot, (_, tensor) in zip(again, kept, strict=True):
                    view(smaller, slot).copy_(tensor)
                return fewer, smaller

            proof.packed = packed

        return before

    for name, part, missing in [
        ("llama", "layers.1.mlp.up_proj", "model.layers.1.mlp.gate_up_proj.weight"),
        ("qwen3_moe", "layers.0.mlp.experts.3.down_proj", "model.layers.0.mlp.experts.routed_experts.w2_weight"),
        ("llama-tied", "norm.weight", "5 parameters"),
    ]:
        said = said_of(name, tmp_path / name, leave_out(part))
        assert said is not None
        assert "not sent" in said
        assert missing in said


def test_a_proof_is_remembered_and_a_refusal_names_model_and_numbers(tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    (tmp_path / "model").mkdir()
    shutil.copy(SMOLLM / "config.json", tmp_path / "model")
    model = ModelConfig(path=str(tmp_path / "model"), dtype="bfloat16")
    proof = prove_engine(model, 512, memory)
    assert proof.formats["float32"].published < 1e-4
    assert proof.formats["bfloat16"].published < 0.1
    assert {numbers.returned for numbers in proof.formats.values()} == {0.0}
    assert min(numbers.moved for numbers in proof.formats.values()) > 1
    start = time.perf_counter()
    assert prove_engine(model, 512, memory) == proof
    assert time.perf_counter() - start < 1
    [remembered] = memory.iterdir()
    answer = json.loads(remembered.read_text())
    answer["formats"]["float32"]["published"] = 3.25  # as an engine that keeps a layer
    remembered.write_text(json.dumps(answer))
    with pytest.raises(
        EngineUnproven, match=r"LlamaForCausalLM.*in float32, after a publish of other weights .* 3.2 nats"
    ):
        prove_engine(model, 512, memory)


@pytest.mark.parametrize(("max_model_len", "accepted"), [(8, True), (64, False)])
def test_a_window_counts_where_the_engine_passes_it(
    max_model_len: int, accepted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM 0.32 gives Cohere 2 a window that is one token too wide. This process has vLLM imported."""
    monkeypatch.setattr(
        "actors.engine_proof._ask", lambda model, length: prove_here(load_config(model.path, model), model, length)
    )
    config = TINY["cohere2-window"]()
    config.architectures = ["Cohere2ForCausalLM"]
    config.save_pretrained(tmp_path)
    model = ModelConfig(path=str(tmp_path), dtype="float32")
    if accepted:
        assert prove_engine(model, max_model_len).formats["float32"].loaded < 1e-4
    else:
        with pytest.raises(EngineUnproven, match=r"Cohere2ForCausalLM.*it differs from transformers by"):
            prove_engine(model, max_model_len)
