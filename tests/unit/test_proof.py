"""What is trained and scored equals the model's own class, for every architecture: and the proof that says so can fail."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from common.models.forward import Form, head_logits, hidden_states
from common.models.loading import LoadingError
from common.models.packed_attention import MAX_TOKENS, Packed, short_causal_attention
from common.models.proof import POLICY, TOLERANCE, NoClass, Unproven, prove
from common.models.twin import LARGEST, telling_weights, twin_config
from contracts.checks.validation import ConfigError
from contracts.config import LearnerConfig, ModelConfig, TandemConfig
from controller.start_checks.model_checks import check_weights_and_code
from learner.models import load_policy, load_scalar, prove_policy, prove_scalar, scalar_config
from learner.selected_logprobs import selected_logprobs
from reward_service.model import RewardModel, prove_scores
from tests.tiny_models import TINY, make

FLOAT = ModelConfig(dtype="float32")
CPU = torch.device("cpu")
# One of each kind that needs care; the others are in `make test-full` and in docs/models.md.
KINDS = {
    "granite", "cohere", "gemma2-window", "gemma3-window", "mistral-window", "phi3-window", "phi3-longrope", "gpt_oss",
    "bloom", "falcon", "opt", "gptj", "lfm2", "mamba", "qwen3_next", "deepseek_v3", "glm4_moe", "mixtral",
    "qwen3_moe", "cohere2-window", "gpt_neo-window", "starcoder2-window",
}  # fmt: skip
CONTRADICTED = {"falcon-alibi"}  # by its own class
ALL = [
    name if name in KINDS else pytest.param(name, marks=pytest.mark.full) for name in TINY if name not in CONTRADICTED
]


def rows_of(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in (19, 4, 33, 1, 12)]


def test_a_class_that_contradicts_itself_is_refused() -> None:
    """transformers adds the biases of ALiBi twice in eager and once in sdpa; other Falcons are one model."""
    with pytest.raises(Unproven, match=r"FalconForCausalLM of transformers .* contradicts itself: .* differ by 0\.\d+"):
        prove_policy(TINY["falcon-alibi"](), FLOAT, LearnerConfig(), True)
    assert prove_policy(TINY["falcon"](), FLOAT, LearnerConfig(), True).error < TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_logprobs_and_scores_are_those_of_the_class_row_by_row(name: str, tmp_path: Path) -> None:
    plain = make(name, seed=1)
    plain.save_pretrained(tmp_path / "lm")
    rows = rows_of(plain.config.get_text_config().vocab_size)
    policy = load_policy(str(tmp_path / "lm"), FLOAT, LearnerConfig(), on_cpu=True)
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "lm", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    packed = Packed.of(rows, CPU)
    select = torch.arange(packed.input_ids.shape[1])
    targets = select % 7
    with torch.no_grad():
        found = policy(packed, select, targets)[0]
        logits = torch.cat([plain(torch.tensor([row]), use_cache=False).logits[0] for row in rows])
    expected = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    assert expected.std() > 0.1  # flat distributions would hide everything
    assert (found - expected).abs().max() < TOLERANCE
    if type(plain.config) not in AutoModelForSequenceClassification._model_mapping:
        with pytest.raises(NoClass, match=f"no AutoModelForSequenceClassification of {plain.config.model_type}"):
            load_scalar(str(tmp_path / "lm"), FLOAT, LearnerConfig(), on_cpu=True, seed=1)
        return
    scalar = load_scalar(str(tmp_path / "lm"), FLOAT, LearnerConfig(), on_cpu=True, seed=1)
    scalar.lm.save_pretrained(tmp_path / "scorer")
    classifier = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "scorer", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    classifier.config.get_text_config().pad_token_id = None
    with torch.no_grad():
        scores = [classifier(torch.tensor([row]), use_cache=False).logits.item() for row in rows]
        values = scalar(packed, packed.last).tolist()
    assert values == pytest.approx(scores, abs=TOLERANCE)
    served = RewardModel(str(tmp_path / "scorer"), "float32").score(rows)
    assert [score.raw for score in served] == pytest.approx(scores, abs=TOLERANCE)


SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "tokens",
    [
        # Most of these are in the rows of a twin: there the class drops the gradient of their embedding. Those that a twin
        # has no room for are its last one.
        *({"pad_token_id": pad} for pad in (4, 5, 12, 14, 17, 382, 383, 384, 900, -1)),
        {"eos_token_id": 7},
        {"eos_token_id": 383},
        {"eos_token_id": [900, 2]},
    ],
    ids=str,
)
def test_whatever_token_pads(tokens: dict[str, Any]) -> None:
    config = LlamaConfig(vocab_size=1000, **SMALL, **tokens)
    value = prove_scalar(scalar_config(config), FLOAT, LearnerConfig(), True)
    assert (value.form, value.tried) == (Form("short_causal", "packed"), {})
    assert max(value.error, value.gradient_error or 1.0) < 1e-5
    assert prove_scores(config, True).form == prove_policy(config, FLOAT, LearnerConfig(), True).form == value.form


@pytest.mark.parametrize(
    "config",
    [
        lambda: LlamaConfig(vocab_size=128256, bos_token_id=128000, eos_token_id=[128001, 128008, 128009], **SMALL),
        lambda: transformers.Qwen2Config(vocab_size=151936, eos_token_id=151645, pad_token_id=151643, **SMALL),
        lambda: transformers.Qwen3Config(vocab_size=151936, eos_token_id=151645, **SMALL),
    ],
    ids=["llama3", "qwen2", "qwen3"],
)
def test_large_vocabularies_end_and_pad_far_behind_a_twins(config: Callable[[], Any]) -> None:
    proof = prove_scalar(scalar_config(config()), FLOAT, LearnerConfig(), True)
    assert (proof.form, proof.tried) == (Form("short_causal", "packed"), {})


@pytest.mark.parametrize("eos", [2, 383, 384, 900])
def test_a_value_model_of_a_large_vocabulary_has_the_gradients_of_its_class(eos: int, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=1000, eos_token_id=eos, **SMALL)).save_pretrained(tmp_path)
    value = load_scalar(str(tmp_path), FLOAT, LearnerConfig(), on_cpu=True, seed=1)
    assert value.lm.config.pad_token_id == eos
    value.lm.save_pretrained(tmp_path / "value")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "value", attn_implementation="eager").eval()
    plain.config.pad_token_id = None
    rows = [[5, eos, 6], [7, 383, 384, 900, 8, eos]]  # the pad token inside and last
    packed = Packed.of(rows, CPU)
    value(packed, packed.last).sum().backward()
    sum(plain(torch.tensor([row])).logits.sum() for row in rows).backward()
    found = dict(value.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[f"lm.{name}"].grad, parameter.grad, rtol=1e-3, atol=1e-5)


# ---- the proof can fail


def faulty(change: Callable[[Any, Form, list[list[int]]], Any]) -> Callable[[Any, Form, list[list[int]]], torch.Tensor]:
    """Log-probabilities as the learner has them, but for one fault: `change` returns (logits, packed)."""

    def compute(lm: Any, form: Form, rows: list[list[int]]) -> torch.Tensor:
        logits, packed = change(lm, form, rows)
        select = torch.arange(packed.input_ids.shape[1])
        select = select[~torch.isin(select, packed.last)]
        return selected_logprobs(logits[select], packed.input_ids[0, select + 1])[0]

    return compute


def without_the_class_head(lm: Any, form: Form, rows: list[list[int]]) -> Any:
    packed = Packed.of(rows, CPU)
    return lm.get_output_embeddings()(hidden_states(lm, packed, form.layout)), packed


def with_neighbours(lm: Any, form: Form, rows: list[list[int]]) -> Any:
    """All rows as one sequence, but for their positions."""
    packed = Packed.of(rows, CPU)
    ids = packed.input_ids
    mask = torch.full((1, 1, ids.shape[1], ids.shape[1]), -1e9).triu(1)
    return lm(input_ids=ids, position_ids=packed.position_ids, attention_mask=mask, use_cache=False).logits[0], packed


def without_a_window(lm: Any, form: Form, rows: list[list[int]]) -> Any:
    packed = Packed.of(rows, CPU)
    lm.config.sliding_window = None
    for module in lm.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = None
    return head_logits(lm, hidden_states(lm, packed, form.layout)), packed


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("granite", without_the_class_head),
        ("cohere", without_the_class_head),
        ("gemma2", without_the_class_head),
        ("llama", with_neighbours),
        ("mistral-window", without_a_window),
        ("gemma3-window", without_a_window),
    ],
)
def test_a_fault_is_found(name: str, fault: Any) -> None:
    with pytest.raises(Unproven, match=r"numbers differ by \d"):
        prove(POLICY, TINY[name](), faulty(fault), "short_causal" if fault != with_neighbours else "eager", True)


def test_a_gradient_that_is_wrong_is_found() -> None:
    def detached(lm: Any, form: Form, rows: list[list[int]]) -> Any:
        packed = Packed.of(rows, CPU)
        hidden = hidden_states(lm, packed, form.layout)
        return head_logits(lm, hidden.detach() + 0.5 * (hidden - hidden.detach())), packed

    with pytest.raises(Unproven, match=r"gradients by 0\.5"):
        prove(POLICY, TINY["llama"](), faulty(detached), "short_causal", True)


RWKV = partial(
    transformers.RwkvConfig,
    vocab_size=300,
    hidden_size=64,
    attention_hidden_size=64,
    intermediate_size=96,
    context_length=64,
    num_hidden_layers=4,
    rescale_every=2,
)


def test_a_forward_pass_that_writes_to_weights_is_found() -> None:
    def plain(lm: Any, form: Form, rows: list[list[int]]) -> Any:
        packed = Packed.of(rows, CPU)
        return head_logits(lm, hidden_states(lm, packed, form.layout)), packed

    with pytest.raises(Unproven, match=r"eager, padded: RuntimeError: its forward pass writes to rwkv\.blocks\.0\."):
        prove(POLICY, RWKV(), faulty(plain), "eager", True)


def test_weights_of_a_class_that_halves_them_for_inference_stay(tmp_path: Path) -> None:
    """RWKV: what is saved is what is trained, in layers beyond the first `rescale_every` too."""
    made = AutoModelForCausalLM.from_config(RWKV())
    telling_weights(made)
    made.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), FLOAT, LearnerConfig(), on_cpu=True)
    rows = rows_of(300)
    packed = Packed.of(rows, CPU)
    select = torch.arange(packed.input_ids.shape[1])
    with torch.no_grad():
        found = policy(packed, select, select % 7)[0]
        # As it is trained: halved, the last norm's eps would weigh more.
        plain = AutoModelForCausalLM.from_pretrained(tmp_path).train()
        logits = torch.cat([plain(torch.tensor([row]), use_cache=False).logits[0] for row in rows])
    assert (found - torch.log_softmax(logits, -1).gather(1, select[:, None] % 7)[:, 0]).abs().max() < TOLERANCE
    for name, parameter in policy.lm.named_parameters():
        assert torch.equal(parameter, made.get_parameter(name)), name


def test_the_form_is_the_fastest_that_is_exact() -> None:
    forms = {name: prove_policy(TINY[name](), FLOAT, LearnerConfig(), True).form for name in ("llama", "lfm2", "bloom")}
    assert forms == {
        "llama": Form("short_causal", "packed"),
        "lfm2": Form("sdpa", "padded"),  # its convolutions reach into the neighbour of a packed row
        "bloom": Form("eager", "padded"),  # transformers adds its biases by the place in the row
    }
    with pytest.raises(Unproven, match="short_causal, packed: numbers differ"):
        prove_policy(TINY["lfm2"](), FLOAT, LearnerConfig(attention="short_causal"), True)


@pytest.mark.parametrize(
    "size", ["Llama", "Mixtral", "DeepseekV3", "GptOss", "Gemma3Text", "Lfm2", "FalconH1", "Llama4Text"]
)
def test_a_twin_is_small_whatever_the_model(size: str) -> None:
    """The default configurations are those of the published models, up to 671 billion parameters."""
    config = getattr(transformers, f"{size}Config")()
    twin = twin_config(config, narrow=True, short=True)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(twin).parameters())
    assert parameters < LARGEST / 50
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    assert set(kinds) == set(getattr(twin.get_text_config(), "layer_types", None) or [])


def test_a_class_that_clamps_in_place_is_computed() -> None:
    config = transformers.OlmoeConfig(vocab_size=300, **SMALL, num_experts=4, num_experts_per_tok=2, clip_qkv=0.5)
    assert prove_policy(config, FLOAT, LearnerConfig(), True).form == Form("short_causal", "packed")


@pytest.mark.parametrize(("begins", "every"), [(1, 1), (3, 1), (2, 2), (6, 3)])
def test_a_twin_has_the_layers_that_begin_late(begins: int, every: int) -> None:
    config = transformers.Ernie4_5_MoeConfig(
        num_hidden_layers=12, moe_layer_start_index=begins, moe_layer_end_index=11, moe_layer_interval=every
    )
    twin = twin_config(config, narrow=True, short=True)
    with torch.device("meta"):
        layers = AutoModelForCausalLM.from_config(twin).model.layers
    assert {type(layer.mlp).__name__ for layer in layers} == {"Ernie4_5_MoeMLP", "Ernie4_5_MoeSparseMoeBlock"}


def longrope(pairs: int) -> dict[str, Any]:
    factors = {"short_factor": [1 + i / pairs for i in range(pairs)], "long_factor": [2.0 + i for i in range(pairs)]}
    return {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096, **factors}


@pytest.mark.parametrize(
    ("config", "pairs"),
    [
        (  # as of Phi-4-mini
            lambda: transformers.Phi3Config(
                hidden_size=3072, num_attention_heads=24, num_key_value_heads=8, max_position_embeddings=131072,
                rope_parameters=longrope(48) | {"partial_rotary_factor": 0.75},
            ),
            6,
        ),
        (  # as of Phi-3.5-mini
            lambda: transformers.Phi3Config(max_position_embeddings=131072, rope_parameters=longrope(48)),
            8,
        ),
        (
            lambda: transformers.Gemma3TextConfig(
                head_dim=256, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"],
                rope_parameters={
                    "full_attention": longrope(128),
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                },
            ),
            8,
        ),
    ],
    ids=["a part of each head", "whole heads", "by kind of layer"],
)  # fmt: skip
def test_a_twin_has_as_many_factors_as_its_heads_have_pairs(config: Callable[[], Any], pairs: int) -> None:
    wide = config()
    twin = twin_config(wide, narrow=True, short=True)
    rope, of_wide = (c.rope_parameters.get("full_attention", c.rope_parameters) for c in (twin, wide))
    for name in ("short_factor", "long_factor"):
        assert len(rope[name]) == pairs
        assert rope[name][0] == of_wide[name][0]
        assert of_wide[name][-1] - rope[name][-1] < 0.2 * of_wide[name][-1]  # those of slow dimensions too
    model = AutoModelForCausalLM.from_config(twin)
    assert sum(p.numel() for p in model.parameters()) < LARGEST / 50
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


# ---- the attention that is ours


def scores_by_hand(
    q: Any, k: Any, v: Any, scaling: float, window: int | None, softcap: float | None, sinks: Any
) -> Any:
    """[T, H, D] in float64, a token and a head at a time."""
    out = torch.zeros(q.shape[2], q.shape[1], v.shape[3], dtype=torch.float64)
    for head in range(q.shape[1]):
        group = head * k.shape[1] // q.shape[1]
        for t in range(q.shape[2]):
            seen = range(max(0, t - window + 1) if window else 0, t + 1)
            scores = [float(q[0, head, t].double() @ k[0, group, s].double()) * scaling for s in seen]
            if softcap:
                scores = [softcap * math.tanh(score / softcap) for score in scores]
            weights = torch.softmax(
                torch.tensor([*scores, *([sinks[head].item()] if sinks is not None else [])]).double(), 0
            )
            out[t, head] = sum(w * v[0, group, s].double() for w, s in zip(weights, seen, strict=False))
    return out


@pytest.mark.parametrize("max_tokens", [MAX_TOKENS, 3])  # 3: the way of long sequences
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_attention_by_hand(
    max_tokens: int, window: int | None, softcap: float | None, has_sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.models.packed_attention.MAX_TOKENS", max_tokens)
    generator = torch.Generator().manual_seed(0)
    lengths, module = (7, 2, 5), torch.nn.Linear(1, 1)
    q = torch.randn(1, 4, sum(lengths), 6, generator=generator)
    k = torch.randn(1, 2, sum(lengths), 6, generator=generator)
    v = torch.randn(1, 2, sum(lengths), 3, generator=generator)  # narrower than the keys, as in latent attention
    sinks = torch.randn(4, generator=generator) if has_sinks else None
    packed = Packed.of([[0] * n for n in lengths], CPU)
    found, _ = short_causal_attention(
        module, q, k, v, None, 0.7, packed, sliding_window=window, softcap=softcap, s_aux=sinks
    )
    start = 0
    for n in lengths:
        part = slice(start, start + n)
        right = scores_by_hand(q[:, :, part], k[:, :, part], v[:, :, part], 0.7, window, softcap, sinks)
        torch.testing.assert_close(found[0, part].double(), right, atol=1e-5, rtol=1e-5)
        start += n


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "is_causal=False"),
        ({"dropout": 0.1}, "dropout"),
        ({"attention_mask": torch.zeros(1)}, "attention_mask"),
    ],
)
def test_what_would_change_the_result_is_not_swallowed(given: dict[str, Any], named: str) -> None:
    x = torch.zeros(1, 1, 2, 4)
    mask = given.pop("attention_mask", None)
    with pytest.raises(RuntimeError, match=f"hands {named} to its attention"):
        short_causal_attention(torch.nn.Linear(1, 1), x, x, x, mask, 1.0, Packed.of([[0, 0]], CPU), **given)


# ---- before anything starts


def config_of(path: Path, **changes: Any) -> TandemConfig:
    config = TandemConfig(model=ModelConfig(path=str(path), dtype="float32"), stage="ppo")
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def test_a_value_model_without_a_class_is_refused_with_what_needs_none(tmp_path: Path, reward_model: Path) -> None:
    make("granite", seed=0).save_pretrained(tmp_path)
    config = config_of(tmp_path, proxy_model=str(reward_model))
    config.ppo.init_value_from = "policy"
    with pytest.raises(ConfigError) as raised:
        check_weights_and_code(config)
    assert str(raised.value) == (
        f"model.path={tmp_path}: transformers has no AutoModelForSequenceClassification of granite, which the value model "
        "needs; write another model, or ppo.estimator=grpo, which has none"
    )
    config.ppo.estimator = "grpo"
    check_weights_and_code(config)


IMAGES = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64, "depth": 1}
WORDS = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


def test_a_model_of_which_the_text_alone_would_train_is_refused_by_name(tmp_path: Path) -> None:
    """vLLM serves the class that config.json names, tower for images and all."""
    config = transformers.Qwen3_5Config(text_config=dict(WORDS), vision_config=dict(IMAGES))
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / "whole")
    with pytest.raises(ConfigError) as raised:
        check_weights_and_code(config_of(tmp_path / "whole", stage="sft"))
    assert str(raised.value) == (
        f"model.path={tmp_path}/whole must be a model that trains whole; found Qwen3_5ForConditionalGeneration with "
        "vision_config, of which Qwen3_5ForCausalLM trains the text alone, while vLLM serves all of it; write what "
        f"save_pretrained() of AutoModelForCausalLM.from_pretrained('{tmp_path}/whole') writes, with its tokenizer beside it"
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "text")
    check_weights_and_code(config_of(tmp_path / "text", stage="sft"))


def test_a_twin_has_small_towers_too() -> None:
    """As of Gemma 3 4B: the tower for images alone has 417 million parameters."""
    tower = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 896, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(vision_config=tower)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(twin_config(config, narrow=True, short=True))
    assert sum(p.numel() for p in twin.parameters()) < LARGEST / 50
    assert len(twin.model.vision_tower.encoder.layers) == 2
    assert prove_policy(config, FLOAT, LearnerConfig(), True).error < TOLERANCE


def test_an_attention_that_is_not_exact_is_refused_by_key_and_number(tmp_path: Path) -> None:
    make("lfm2", seed=0).save_pretrained(tmp_path)
    config = config_of(tmp_path, stage="sft", learner=LearnerConfig(attention="short_causal"))
    with pytest.raises(
        ConfigError, match=r"the policy of lfm2 would not compute .*numbers differ by .*learner\.attention=auto"
    ):
        check_weights_and_code(config)
    check_weights_and_code(replace(config, learner=LearnerConfig()))


def test_weights_that_are_not_there_are_refused(small_vocab: Path, tmp_path: Path, classifier: Path) -> None:
    state = AutoModelForCausalLM.from_pretrained(small_vocab).state_dict()
    lm = AutoModelForCausalLM.from_pretrained(small_vocab)
    del state["model.layers.1.mlp.up_proj.weight"]
    lm.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(LoadingError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_policy(str(tmp_path), FLOAT, LearnerConfig(), on_cpu=True)
    with pytest.raises(ConfigError, match=r"sft_model=.*model\.layers\.1\.mlp\.up_proj\.weight"):
        check_weights_and_code(config_of(small_vocab, stage="preference", sft_model=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"proxy_model=.*score\.weight"):
        check_weights_and_code(config_of(small_vocab, proxy_model=str(small_vocab)))
    check_weights_and_code(config_of(small_vocab, proxy_model=str(classifier)))


def test_a_driver_keeps_its_random_state(small_vocab: Path) -> None:
    before = torch.get_rng_state()
    prove_policy(LlamaConfig(hidden_size=64, num_attention_heads=2, vocab_size=99), FLOAT, LearnerConfig(), True)
    assert torch.equal(before, torch.get_rng_state())
