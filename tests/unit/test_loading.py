"""A checkpoint without the weights of its model is refused, by names; what lies beside the model is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from common.models.loading import LoadingError, loading_report, normaliser, refuse_adapter, refuse_unloaded
from contracts.checks.validation import ConfigError
from contracts.config import ModelConfig, TandemConfig
from controller.start_checks.amounts import check_model
from controller.start_checks.model_checks import check_weights_and_code
from reward_service.model import check_reward_model
from tests.tiny_models import make

Weights = dict[str, torch.Tensor]


def without(w: Weights, part: str) -> Weights:
    return {name: tensor for name, tensor in w.items() if part not in name}


def renamed(w: Weights, old: str, new: str) -> Weights:
    return {name.replace(old, new): tensor for name, tensor in w.items()}


@pytest.fixture
def changed(classifier: Path, tmp_path: Path) -> Callable[[Callable[[Weights], Weights]], str]:
    def make(change: Callable[[Weights], Weights]) -> str:
        path = tmp_path / "changed"
        shutil.copytree(classifier, path)
        weights = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
        save_file(change(weights), path / "model.safetensors", metadata={"format": "pt"})
        return str(path)

    return make


def judge(path: str, kind: type = AutoModelForSequenceClassification, allowed_new: tuple[str, ...] = ()) -> None:
    """By the report without weights, and by that of the real load: they must agree."""
    results = []
    for model, info in (
        loading_report(kind, path),
        kind.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True),  # type: ignore[attr-defined]
    ):
        try:
            refuse_unloaded(info, path, "proxy_model", allowed_new, model)
        except LoadingError as error:
            results.append(error)
    if results:
        first, second = results
        assert str(first) == str(second)
        raise first


def test_a_complete_checkpoint_is_taken(classifier: Path, small_vocab: Path) -> None:
    judge(str(classifier))
    judge(str(small_vocab), AutoModelForCausalLM)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: without(w, "score"), ["no score.weight;", "stage=reward_model"]),
        (lambda w: renamed(w, "score.", "value_head."), ["value_head.weight renamed to score.weight"]),
        (
            lambda w: {f"base_model.model.{name}": tensor for name, tensor in w.items()},
            ["do not begin with base_model.model. ", "merge_and_unload()", "more"],
        ),
        (lambda w: without(w, "layers.1.mlp"), ["no model.layers.1.mlp.down_proj.weight, ", "complete"]),
        (lambda w: w | {"model.layers.2.mlp.up_proj.weight": torch.zeros(256, 128)}, ["model.layers.2.mlp", "layers"]),
        (lambda w: w | {"model.layers.1.self_attn.q_proj.bias": torch.zeros(128)}, ["q_proj.bias, which the model"]),
        (lambda w: w | {"score.bias": torch.zeros(1)}, ["found score.bias, which the model does not know"]),
        (
            lambda w: w | {"score.weight": torch.zeros(3, 128)},
            ["score.weight of shape [1, 128] (it has [3, 128])", "one label"],
        ),
    ],
)
def test_weights_that_are_not_there_are_named(
    changed: Callable[[Callable[[Weights], Weights]], str], change: Callable[[Weights], Weights], named: list[str]
) -> None:
    path = changed(change)
    with pytest.raises(LoadingError) as refused:
        judge(path)
    assert all(text in str(refused.value) for text in [f"proxy_model={path} must be", *named])


def test_parts_beside_the_model_are_left_alone(changed: Callable[[Callable[[Weights], Weights]], str]) -> None:
    """Heads that nothing of this model reads, a vision tower, and a table that every model computes."""
    beside = {
        "lm_head.weight": torch.zeros(512, 128),
        "v_head.summary.weight": torch.zeros(1, 128),
        "model.vision_tower.layers.0.weight": torch.zeros(2, 2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(32),
    }
    judge(changed(lambda w: w | beside))


def test_without_a_model_nothing_may_be_over(small_vocab: Path) -> None:
    """A language model as a classifier: the head may be new if it is said; `lm_head` is told apart by the model alone."""
    path = str(small_vocab)
    judge(path, allowed_new=("score.weight",))
    with pytest.raises(LoadingError, match=r"no score\.weight and lm_head\.weight, which"):
        judge(path)
    _, info = loading_report(AutoModelForSequenceClassification, path)
    with pytest.raises(LoadingError, match=r"found lm_head\.weight, which"):
        refuse_unloaded(info, path, "model.path", ("score.weight",))


def test_names_without_the_prefix_of_the_backbone(tmp_path: Path) -> None:
    """GPT-2's own checkpoint on the hub: no `transformer.` before a name, and causal masks on disk."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=16))
    model.save_pretrained(tmp_path)
    weights = renamed(load_file(tmp_path / "model.safetensors"), "transformer.", "")
    weights["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    judge(str(tmp_path), AutoModelForCausalLM)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 1}))
    with pytest.raises(LoadingError, match=r"h\.1\.attn\.c_attn\.weight, h"):
        judge(str(tmp_path), AutoModelForCausalLM)


def test_an_adapter_is_refused_also_beside_a_whole_model(classifier: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    shutil.copytree(classifier, path)
    refuse_adapter(str(path), "model.path")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "base"}))
    with pytest.raises(LoadingError, match=r"model\.path=.* found an adapter of PEFT; write .* --merged"):
        refuse_adapter(str(path), "model.path")
    with pytest.raises(LoadingError, match=r"model\.safetensors beside adapter_config\.json"):
        check_reward_model(str(path), "proxy_model")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "mxfp4", "a_new_one"])
def test_a_quantised_model_is_refused_by_its_method(method: str, small_vocab: Path, tmp_path: Path) -> None:
    path = tmp_path / "quantised"
    shutil.copytree(small_vocab, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method, "bits": 4}}))
    with pytest.raises(ConfigError, match=f"model.path=.*found quantization_config of {method}; write the checkpoint"):
        check_model(TandemConfig(model=ModelConfig(path=str(path)), stage="sft"))
    with pytest.raises(LoadingError, match=f"path=.*quantization_config of {method}"):
        check_reward_model(str(path), "path")


def test_a_torn_file_is_refused_by_name(small_vocab: Path, tmp_path: Path) -> None:
    path = tmp_path / "torn"
    shutil.copytree(small_vocab, path)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"model\.path=.*torn: no model can be loaded from there: .*incomplete"):
        check_weights_and_code(TandemConfig(model=ModelConfig(path=str(path)), stage="sft"))


@pytest.mark.parametrize("differ", [True, False])
def test_a_head_that_only_the_configuration_ties(differ: bool, small_vocab: Path, tmp_path: Path) -> None:
    """transformers computes with both matrices where they differ, vLLM with that of the embeddings."""
    path = tmp_path / "tied"
    shutil.copytree(small_vocab, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(path / "model.safetensors")
    if not differ:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    config = TandemConfig(model=ModelConfig(path=str(path)), stage="sft")
    if not differ:
        check_weights_and_code(config)
        refuse_unloaded(info, str(path), "model.path", model=model)
        return
    with pytest.raises(LoadingError, match=r"a lm_head\.weight other than model\.embed.*tie_word_embeddings=false"):
        refuse_unloaded(info, str(path), "model.path", model=model)
    with pytest.raises(ConfigError, match=r"model\.path=.*a lm_head\.weight other than model\.embed.*=false"):
        check_weights_and_code(config)  # without loading the weights


@pytest.mark.parametrize("row", [None, 0, 299])
def test_tied_matrices_in_two_files_and_without_the_prefix_of_the_backbone(row: int | None, tmp_path: Path) -> None:
    """A row that differs is found wherever it is."""
    make("gpt2", 0).save_pretrained(tmp_path)
    weights = renamed(load_file(tmp_path / "model.safetensors"), "transformer.", "")
    head = weights["wte.weight"].clone()
    if row is not None:
        head[row] += 1
    (tmp_path / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": weights, "model-00002-of-00002.safetensors": {"lm_head.weight": head}}
    for name, part in files.items():
        save_file(part, tmp_path / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {weight: name for name, part in files.items() for weight in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    if row is None:
        judge(str(tmp_path), AutoModelForCausalLM)
        return
    with pytest.raises(LoadingError, match=r"found a lm_head\.weight other than transformer\.wte\.weight"):
        judge(str(tmp_path), AutoModelForCausalLM)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), "1", True, [1.0], 10**400])
def test_a_normaliser_that_is_no_number_is_refused(number: object) -> None:
    for name in ("score_mean", "score_std"):
        with pytest.raises(LoadingError, match=f"{name} in the config.json of path=/m must be a finite number"):
            normaliser(SimpleNamespace(**{name: number}), "/m", "path")


@pytest.mark.parametrize("std", [0, 0.0, -1.0, 1e-300, 5e-324, 1e-7])
def test_a_normaliser_that_would_only_enlarge_rounding_is_refused(std: float) -> None:
    with pytest.raises(
        LoadingError, match=r"score_std in the config\.json of path=/m must be a finite number, 1e-06 or more"
    ):
        normaliser(SimpleNamespace(score_std=std), "/m", "path")


def test_a_normaliser_is_the_checkpoints_or_none() -> None:
    assert normaliser(SimpleNamespace(score_mean=None), "/m", "path") == (0.0, 1.0)
    assert normaliser(SimpleNamespace(score_mean=-2, score_std=0.5), "/m", "path") == (-2.0, 0.5)
