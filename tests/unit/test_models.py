"""The trained networks against transformers' own, one sequence at a time, and the names of their weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma3Config,
    LlamaConfig,
    LlamaForCausalLM,
)

from common.models.packed_attention import Packed
from common.text.end_tokens import end_ids
from contracts.config import LearnerConfig, ModelConfig, OptimizerConfig
from learner.engine import TrainEngine, frozen_as_loaded
from learner.models import (
    FloatLinear,
    PolicyModel,
    ScalarModel,
    decoder_layers,
    freeze_below,
    load_policy,
    load_scalar,
    prove_policy,
    scalar_config,
)
from learner.ranks import Ranks
from learner.saved_model import save_checkpoint
from learner.stored_weights import weight_groups
from tests.tiny_models import TINY, make

EOS = 2  # the pad token too
SEQUENCES = [[5, 9, 2, 7, 11], [3, EOS], [8, 300, 1, 2, 2, 6, 4, EOS]]
CPU = torch.device("cpu")
# Positions or norms that are learned below the layers, and others.
FROZEN = (
    "gpt2",
    "gpt_bigcode",
    "gpt_neo-window",
    "opt",
    "bloom",
    "llama",
    "llama-tied",
    "falcon",
    "mpt",
    "mixtral",
    "lfm2",
)


def policy(path: Path, attention: str = "auto", dtype: str = "float32", **learner: Any) -> PolicyModel:
    return load_policy(str(path), ModelConfig(dtype=dtype), LearnerConfig(attention=attention, **learner), True)


def scalar(path: Path, seed: int = 3, dtype: str = "float32") -> ScalarModel:
    return load_scalar(str(path), ModelConfig(dtype=dtype), LearnerConfig(), True, seed)


def positions(packed: Packed, rows: list[int], steps: list[int]) -> torch.Tensor:
    return torch.tensor([packed.starts[row] + step for row, step in zip(rows, steps, strict=True)])


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_policy_logprobs_equal_log_softmax_one_by_one(attention: str, small_vocab: Path) -> None:
    model = policy(small_vocab, attention)
    plain = AutoModelForCausalLM.from_pretrained(small_vocab, dtype=torch.float64, attn_implementation="eager")
    packed = Packed.of(SEQUENCES, CPU)
    # Any order, with repetition: a target need not be the token that follows.
    rows, steps, targets = [2, 0, 1, 2, 2], [6, 3, 0, 0, 6], [EOS, 11, 400, 300, 5]
    logprobs, entropy = model(packed, positions(packed, rows, steps), torch.tensor(targets), temperature=0.7)
    for i, (row, step, target) in enumerate(zip(rows, steps, targets, strict=True)):
        logits = plain(torch.tensor([SEQUENCES[row]])).logits[0, step] / 0.7
        expected = torch.log_softmax(logits, 0)
        assert logprobs[i].item() == pytest.approx(expected[target].item(), abs=1e-5)
        assert entropy[i].item() == pytest.approx(-(expected.exp() * expected).sum().item(), abs=1e-5)


def test_banned_tokens_leave_their_probability_to_the_others(small_vocab: Path) -> None:
    model, plain = policy(small_vocab), AutoModelForCausalLM.from_pretrained(small_vocab, dtype=torch.float64)
    packed = Packed.of([SEQUENCES[0]], CPU)
    found, _ = model(packed, torch.tensor([1, 1]), torch.tensor([7, 7]), 1.0, (EOS, 0), torch.tensor([True, False]))
    p = torch.softmax(plain(torch.tensor([SEQUENCES[0]])).logits[0, 1], 0)
    assert found.exp().tolist() == pytest.approx([(p[7] / (1 - p[EOS] - p[0])).item(), p[7].item()], rel=1e-4)


def test_scores_equal_transformers_on_the_true_last_token(classifier: Path) -> None:
    model = scalar(classifier)
    plain = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float32)
    plain.config.pad_token_id = None  # else its pooling takes the EOS for padding
    packed = Packed.of(SEQUENCES, CPU)
    last = positions(packed, [0, 1, 2], [len(s) - 1 for s in SEQUENCES])
    expected = [(plain(torch.tensor([s])).logits.item() - 0.75) / 0.5 for s in SEQUENCES]
    assert model(packed, last).tolist() == pytest.approx(expected, abs=1e-5)
    before_eos = plain(torch.tensor([[3]])).logits.item()
    assert abs(expected[1] - (before_eos - 0.75) / 0.5) > 1e-3  # the EOS is told apart


def test_a_new_head_is_drawn_by_the_seed(small_vocab: Path) -> None:
    head = scalar(small_vocab).lm.score.weight
    assert head.shape == (1, 128)
    assert head.std().item() == pytest.approx(129**-0.5, rel=0.2)
    assert abs(head.mean().item()) < 4 * 129**-0.5 / 128**0.5
    assert torch.equal(head, scalar(small_vocab).lm.score.weight)
    assert not torch.equal(head, scalar(small_vocab, seed=4).lm.score.weight)
    assert (scalar(small_vocab).mean, scalar(small_vocab).std) == (0.0, 1.0)


def test_a_trained_head_and_its_normaliser_are_kept(classifier: Path) -> None:
    model = scalar(classifier)
    plain = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float32)
    assert torch.equal(model.lm.score.weight, plain.score.weight)
    assert (model.mean, model.std) == (0.75, 0.5)
    assert model.lm.config.problem_type == "regression"


def test_a_head_is_kept_whatever_the_class_is_called(classifier: Path, tmp_path: Path) -> None:
    """OpenRLHF's checkpoints name a class of its own; a new head in place of theirs would be noise."""
    shutil.copytree(classifier, tmp_path / "theirs")
    file = tmp_path / "theirs/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["RewardModel"]}))
    assert torch.equal(scalar(tmp_path / "theirs").lm.score.weight, scalar(classifier).lm.score.weight)


def test_a_head_computes_in_float32_whatever_its_dtype() -> None:
    head = FloatLinear(3, 1, bias=False, dtype=torch.bfloat16)
    head.weight.data = torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.bfloat16)
    # 256 + 1 needs nine bits, and bfloat16 keeps eight.
    assert head(torch.tensor([[256.0, 1.0, 0.5]], dtype=torch.bfloat16)).item() == 257.5
    assert head(torch.ones(1, 3)).dtype == torch.float32


def test_a_bfloat16_score_is_finer_than_bfloat16(small_vocab: Path) -> None:
    model = scalar(small_vocab, dtype="bfloat16")
    packed = Packed.of(SEQUENCES, CPU)
    scores = model(packed, torch.arange(packed.input_ids.shape[1]))
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


# ---- what trains


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def every(model: torch.nn.Module, *prefixes: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


@pytest.mark.parametrize(
    ("layers", "freeze_embeddings", "frozen"),
    [
        (None, False, ()),
        (None, True, ("model.embed_tokens",)),
        (2, False, ("model.embed_tokens",)),
        (1, False, ("model.embed_tokens", "model.layers.0.")),
        (0, True, ("model.embed_tokens", "model.layers.")),
    ],
)
def test_freeze_below(layers: int | None, freeze_embeddings: bool, frozen: tuple[str, ...], small_vocab: Path) -> None:
    lm = policy(small_vocab).lm
    freeze_below(lm, layers, freeze_embeddings)
    assert trainable(lm) == every(lm, "") - (every(lm, *frozen) if frozen else set())


def detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: detached(item) for key, item in value.items()}
    return type(value)(map(detached, value)) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("name", [*FROZEN, "opt-projected"])
def test_what_runs_before_the_first_trainable_layer_is_frozen(name: str, count: int) -> None:
    """Of all that lies beside the layers exactly that trains whose gradient does not flow through what enters the first
    trainable layer (or the final norm)."""
    if name == "opt-projected":
        config = TINY["opt"]()
        config.word_embed_proj_dim = 64
        lm = AutoModelForCausalLM.from_config(config)
    else:
        lm = make(name, 0)
    layers = decoder_layers(lm)
    if count:
        layers[-1].register_forward_pre_hook(lambda _, *given: detached(given), with_kwargs=True)
    else:
        layers[-1].register_forward_hook(lambda _, args, output: detached(output))
    lm(input_ids=torch.tensor([[5, 9, 7, 11, 3]]), use_cache=False).logits.logsumexp(-1).sum().backward()
    inside = {id(p) for p in layers.parameters()}
    embeddings = lm.get_input_embeddings().weight  # a tied head does not train
    beside = {n: p for n, p in lm.named_parameters() if id(p) not in inside}
    expected = {n for n, p in beside.items() if p.grad is not None and p is not embeddings}
    state = torch.get_rng_state()
    freeze_below(lm, count, freeze_embeddings=False)
    assert trainable(lm) & beside.keys() == expected
    assert len(beside) > len(expected) > 0
    assert all(
        p.requires_grad == (i >= len(layers) - count) for i, layer in enumerate(layers) for p in layer.parameters()
    )
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("layers", [3, -1])
def test_more_layers_than_there_are_is_an_error(layers: int, small_vocab: Path) -> None:
    with pytest.raises(ValueError, match=rf"trainable_layers is {layers}, the model has 2: write 0\.\.2"):
        freeze_below(policy(small_vocab).lm, layers, False)


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_dropout_is_off_also_in_training_mode(attention: str, small_vocab: Path, tmp_path: Path) -> None:
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            attention_dropout=0.5,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    model = policy(tmp_path, attention).train()
    packed = Packed.of([[1, 2, 3, 4, 5, 6, 7, 8]], CPU)
    targets = torch.arange(8)
    assert torch.equal(model(packed, targets, targets)[0], model(packed, targets, targets)[0])


def test_gradient_checkpointing_recomputes_and_changes_nothing(small_vocab: Path) -> None:
    gradients, calls = [], []
    for checkpointing, layers in ((False, None), (True, None), (True, 1)):
        model = policy(small_vocab, gradient_checkpointing=checkpointing, checkpointed_layers=layers)
        count = [0, 0]
        for i, layer in enumerate(model.lm.model.layers):
            layer.mlp.register_forward_pre_hook(lambda *_, i=i, count=count: count.__setitem__(i, count[i] + 1))
        packed = Packed.of(SEQUENCES, CPU)
        logprobs, _ = model(packed, torch.arange(4), torch.arange(4))
        logprobs.sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        calls.append(count)
    assert calls == [[1, 1], [2, 2], [1, 2]]
    for name, gradient in gradients[0].items():
        for recomputed in gradients[1:]:
            torch.testing.assert_close(recomputed[name], gradient, msg=name)


# ---- weights by name


def stored(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path / "model.safetensors", framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_have_the_names_of_the_checkpoint(tied: bool, tiny_model: Path, small_vocab: Path) -> None:
    path = tiny_model if tied else small_vocab
    model = policy(path, dtype="bfloat16" if tied else "float32")
    groups = weight_groups(model)
    flat = [(name, p) for group in groups for name, p in group]
    on_disk = stored(path)
    assert {name for name, _ in flat} == on_disk.keys()
    assert len(flat) == len(on_disk)
    assert all(torch.equal(p, on_disk[name]) for name, p in flat)
    assert ("lm_head.weight" in on_disk) != tied
    # One group for each decoder layer, which ZeRO-3 gathers at a time.
    layers = [{name.split(".")[2] for name, _ in group} for group in groups if ".layers." in group[0][0]]
    assert layers == [{"0"}, {"1"}]


def test_ranks_that_have_loaded_other_frozen_weights_are_refused(
    small_vocab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a checkpoint that is another one on another node: nobody sends frozen weights around."""
    second, model = Ranks(1, 2, on_cpu=True), policy(small_vocab)
    freeze_below(model.lm, 1, freeze_embeddings=True)
    number = sum(not p.requires_grad for p in model.parameters())
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_: None)
    with frozen_as_loaded(model, second, 2):
        assert [hasattr(p, "ds_optim_param") for p in model.parameters()].count(True) == number
    assert not any(hasattr(p, "ds_optim_param") for p in model.parameters())
    monkeypatch.setattr(torch.distributed, "broadcast", lambda sums, _: sums[0].add_(1))
    with (
        pytest.raises(
            ValueError, match=r"rank 1 of the learner has loaded 1 weights that are not those of rank 0: lm\."
        ),
        frozen_as_loaded(model, second, 2),
    ):
        pass


def test_sources_of_a_weight_transfer(small_vocab: Path, ranks: Ranks, tmp_path: Path) -> None:
    from learner.weight_sources import CheckpointSource, EngineSource

    on_disk = stored(small_vocab)
    engine = TrainEngine(policy(small_vocab), OptimizerConfig(), LearnerConfig(), ranks, 1)
    for source in (CheckpointSource(str(small_vocab)), EngineSource(engine)):
        declared = [(m.name, m.dtype, tuple(m.shape)) for m in source.metadata()]
        sent = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source]
        assert declared == sent
        assert {name for name, _, _ in sent} == on_disk.keys()
        assert all(torch.equal(tensor, on_disk[name]) for name, tensor in source)
        assert not any(tensor.requires_grad for _, tensor in source)
    with pytest.raises(FileNotFoundError, match="safetensors"):
        CheckpointSource(str(tmp_path))


def test_a_tied_model_is_saved_as_it_was(tiny_model: Path, ranks: Ranks, tmp_path: Path) -> None:
    config = ModelConfig(dtype="bfloat16")
    engine = TrainEngine(policy(tiny_model, dtype="bfloat16"), OptimizerConfig(), LearnerConfig(), ranks, 1)
    save_checkpoint(engine, str(tmp_path / "saved"), str(tiny_model), config, ranks, {"score_mean": 0.5})
    before, after = stored(tiny_model), stored(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert policy(tmp_path / "saved", dtype="bfloat16").lm.config.score_mean == 0.5


@pytest.mark.parametrize(
    "published",
    [{"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 7]}, {"eos_token_id": [2, 7], "pad_token_id": -1}],
)
def test_a_generation_config_is_saved_as_it_was_published(
    published: dict[str, Any], small_vocab: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """transformers loads these, and refuses to save them: a temperature without do_sample, padding of -1."""
    shutil.copytree(small_vocab, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text(json.dumps(published))
    engine = TrainEngine(policy(tmp_path / "model"), OptimizerConfig(), LearnerConfig(), ranks, 1)
    save_checkpoint(engine, str(tmp_path / "saved"), str(small_vocab), ModelConfig(), ranks)
    saved = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert {key: value for key, value in saved.items() if key != "transformers_version"} == published


@pytest.mark.parametrize(
    ("published", "taught", "expected"),
    [
        (0, {0, 2, 9}, [0, 2]),
        (7, {2, 9}, [7, 2]),  # its own first
        (0, {0, 9}, 0),  # plain texts
        ([2, 0], {0, 2}, [2, 0]),
        (None, {0, 2}, [0, 2]),
    ],
)
def test_ends_that_were_taught_are_named(
    published: Any, taught: set[int], expected: Any, small_vocab: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """As of base Qwen: its EOS is <|endoftext|>, its template ends an answer with <|im_end|>, which no file of it names."""
    shutil.copytree(small_vocab, tmp_path / "model")
    others = {"temperature": 0.6, "top_p": 0.9}
    (tmp_path / "model/generation_config.json").write_text(json.dumps({**others, "eos_token_id": published}))
    tokenizer = AutoTokenizer.from_pretrained(small_vocab)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "model")
    engine = TrainEngine(policy(tmp_path / "model"), OptimizerConfig(), LearnerConfig(), ranks, 1)
    save_checkpoint(engine, str(tmp_path / "saved"), str(tmp_path / "model"), ModelConfig(), ranks, taught=taught)
    saved = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert saved.pop("eos_token_id") == expected
    assert {key: value for key, value in saved.items() if key != "transformers_version"} == others
    ends = [end_ids(tokenizer, ModelConfig(path=str(tmp_path / name)), chat=2 in taught) for name in ("model", "saved")]
    assert ends[0] == ends[1]  # of a stage that starts from what was saved


@pytest.mark.parametrize(("eos", "pad"), [([5, 6, 7], 5), (6, 6), (None, None)])
def test_padding_of_a_classifier_is_one_token(eos: Any, pad: int | None) -> None:
    """Llama 3's instruction models name three ends and no padding."""
    assert scalar_config(LlamaConfig(eos_token_id=eos)).pad_token_id == pad
    nested = Gemma3Config(text_config={"eos_token_id": eos, "pad_token_id": None})
    assert scalar_config(nested).get_text_config().pad_token_id == pad


def test_decoder_layers_are_not_those_of_a_longer_vision_tower() -> None:
    text = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "vocab_size": 64,
        "num_attention_heads": 2,
    }
    vision = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=vision))
    freeze_below(lm, 1, False)
    trained = trainable(lm)
    assert not any("language_model.layers.0." in name for name in trained)
    assert any("language_model.layers.1." in name for name in trained)


@pytest.mark.parametrize(
    ("name", "noise"),
    [
        ("opt", {"dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.5}),
        ("starcoder2", {"residual_dropout": 0.1}),
        ("gpt_bigcode", {"attn_pdrop": 0.1, "resid_pdrop": 0.1}),
        ("bloom", {"hidden_dropout": 0.1}),
        ("mixtral", {"router_jitter_noise": 0.1}),
    ],
)
def test_gradient_checkpointing_turns_on_no_noise_of_training(name: str, noise: dict[str, float]) -> None:
    config = TINY[name]()
    for key, value in noise.items():
        setattr(config, key, value)
    learner = LearnerConfig(gradient_checkpointing=True)
    proof = prove_policy(config, ModelConfig(dtype="float32"), learner, on_cpu=True)
    assert max(proof.error, proof.gradient_error or 0.0) < 1e-4
