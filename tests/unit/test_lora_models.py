"""LoRA in the learner: one frozen base under policy, value model and reference; against PEFT around transformers' class."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.models.lora import adapter_parameters, merged
from common.models.packed_attention import Packed
from contracts.checks.validation import ConfigError
from contracts.config import LoraByRoleConfig, LoraConfig, ModelConfig, RoleLoraConfig, TandemConfig
from contracts.records import Example
from controller.start_checks.model_checks import check_weights_and_code
from learner.engine import TrainEngine
from learner.examples import example_nll
from learner.models import load_policy
from learner.ppo import PPOTask
from learner.ranks import Ranks
from learner.sft import SFTTask
from learner.weight_sources import EngineSource
from tests.conftest import make_config
from tests.tiny_models import make
from tests.unit.test_ppo_task import EOS
from tests.unit.test_rank_state import update, weights

ROWS = [[5, 61, 302, 403, 94, 15, EOS], [9, 33, 444, 9, 120], [17, EOS, 18, 21, 22, 300, 301, 302, 5]]
EXAMPLES = [Example(tuple(row), tuple([False, *[True] * (len(row) - 1)])) for row in ROWS]


@pytest.fixture
def make_lora_config(small_vocab: Path, small_bfloat16: Path, tmp_path: Path) -> Callable[..., TandemConfig]:
    def make(dtype: str = "float32", zero: int = 0, **lora: Any) -> TandemConfig:
        config = make_config(small_vocab if dtype == "float32" else small_bfloat16, tmp_path, dtype)
        config.model.lora = LoraConfig(**{"rank": 4, "alpha": 8.0} | lora)
        config.learner.zero_stage, config.learner.held_tokens = zero, 0 if zero == 3 else 1000
        config.ppo.optimizer.learning_rate = config.ppo.value_optimizer.learning_rate = 1e-2
        config.ppo.updates, config.ppo.target_approx_kl = 8, None
        return config

    return make


def ppo(ranks: Ranks, config: TandemConfig, policy: str = "", value: str = "") -> PPOTask:
    base = config.model.path
    return PPOTask(ranks, config, policy or base, value or policy or base, (EOS,), [])


def logprobs(network: Any, rows: list[list[int]] = ROWS) -> torch.Tensor:
    """Of every token but the first of each row, by the packed forward pass."""
    packed = Packed.of(rows, torch.device("cpu"))
    select = torch.arange(packed.input_ids.shape[1])
    select = select[~torch.isin(select, packed.last)]
    return network(packed, select, packed.input_ids[0, select + 1])[0]


def randomise(engine: TrainEngine, seed: int = 0) -> None:
    """Adapters that change the output, B included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter_parameters(engine.model.lm).items():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.copy_(parameter + 0.1 * noise if "magnitude" in name else 0.1 * noise)


def peft_model(engine: TrainEngine, config: TandemConfig) -> Any:
    """PEFT's own model around transformers', with the adapter of `engine`, by PEFT's names."""
    lora, dtype = config.model.lora, getattr(torch, config.model.dtype)
    assert lora is not None
    lm = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=dtype, attn_implementation="eager")
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules="all-linear",
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(lm, settings, autocast_adapter_dtype=False)
    mine = {f"base_model.model.{n}": p.detach() for n, p in adapter_parameters(engine.model.lm).items()}
    found = peft.set_peft_model_state_dict(model, mine)
    assert not found.unexpected_keys
    assert not [name for name in found.missing_keys if "lora_" in name]
    return model.eval()


def padded_logprobs(model: Any, rows: list[list[int]] = ROWS) -> torch.Tensor:
    """The same as `logprobs`, of a batch that is padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    found = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits.float(), -1)
    parts = [found[i, : len(row) - 1].gather(1, torch.tensor(row[1:])[:, None])[:, 0] for i, row in enumerate(rows)]
    return torch.cat(parts)


@pytest.mark.parametrize("options", [{}, {"rslora": True, "targets": ["all-linear"]}, {"dora": True}])
def test_logprobs_and_gradients_are_those_of_peft(
    options: dict[str, Any], make_lora_config: Callable[..., TandemConfig], ranks: Ranks
) -> None:
    config = make_lora_config(**options)
    task = SFTTask(ranks, config, EXAMPLES, [])
    randomise(task.engine)
    independent = peft_model(task.engine, config)
    mine, theirs = logprobs(task.engine.model), padded_logprobs(independent)
    base = logprobs(load_policy(config.model.path, config.model, config.learner, on_cpu=True))
    assert (theirs - base).abs().max() > 0.1  # the adapter counts
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)
    (-mine.sum()).backward()
    (-theirs.sum()).backward()
    expected = adapter_parameters(independent.base_model.model)
    found = adapter_parameters(task.engine.model.lm)
    assert found.keys() == expected.keys()
    largest = max(p.grad.abs().max().item() for p in expected.values() if p.grad is not None)
    for name, parameter in found.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=1e-4 * largest)
    assert all(p.grad is None for n, p in task.engine.model.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero", [0, 2])
def test_a_rank_holds_one_base(
    dtype: str, zero: int, make_lora_config: Callable[..., TandemConfig], ranks: Ranks
) -> None:
    task = ppo(ranks, make_lora_config(dtype, zero))
    assert task.value is not None

    def base(engine: TrainEngine) -> dict[str, torch.Tensor]:
        parameters = engine.model.lm.named_parameters()
        return {n.replace(".base_layer", ""): p for n, p in parameters if "lora_" not in n and "score" not in n}

    mine, theirs = base(task.policy), base(task.value)
    assert theirs.keys() == mine.keys() - {"lm_head.weight"}
    assert {n: p.data_ptr() for n, p in theirs.items()} == {n: mine[n].data_ptr() for n in theirs}
    assert not any(p.requires_grad for p in mine.values())
    assert {p.dtype for p in mine.values()} == {getattr(torch, dtype)}
    before = {name: p.clone() for name, p in mine.items()}
    update(task, 0)
    assert all(torch.equal(p, before[name]) for name, p in mine.items())


@pytest.mark.parametrize(("dtype", "zero"), [("float32", 0), ("bfloat16", 0), ("bfloat16", 2), ("bfloat16", 3)])
def test_the_reference_stays_the_base_to_the_bit(
    dtype: str, zero: int, make_lora_config: Callable[..., TandemConfig], ranks: Ranks
) -> None:
    config = make_lora_config(dtype, zero)
    config.ppo.trainable_layers = 1  # of two
    task, plain = ppo(ranks, config), make_lora_config(dtype)
    plain.model.lora = None
    base = load_policy(plain.model.path, plain.model, plain.learner, on_cpu=True)
    with torch.no_grad():
        expected = logprobs(base)
        assert torch.equal(logprobs(task.policy), expected)  # as B is 0
    for number in range(3):
        update(task, number)
    with torch.no_grad():
        assert torch.equal(logprobs(task.reference), expected)
        assert (logprobs(task.policy) - expected).abs().max() > 1e-3
    moved = {name for name in adapter_parameters(task.policy.model.lm)}
    assert {name.split(".")[2] for name in moved} == {"1"}


def test_updates_of_one_base_are_those_of_two(
    make_lora_config: Callable[..., TandemConfig], ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a value model that has loaded a base of its own, and plain ZeRO 0 against the other stages."""
    from learner import adapted_models

    shared = ppo(ranks, make_lora_config())
    whole = adapted_models.load_scalar
    monkeypatch.setattr(adapted_models, "load_scalar", lambda *a, **k: whole(*a[:5]))
    apart = ppo(ranks, make_lora_config())
    monkeypatch.undo()
    expected = [update(apart, number) for number in range(2)]
    assert [update(shared, number) for number in range(2)] == expected
    for offload in ("none", "optimizer", "parameters"):
        config = make_lora_config(zero=3)
        config.learner.offload = offload
        sharded = ppo(ranks, config)
        for number, row in enumerate(expected):
            assert update(sharded, number) == pytest.approx(row, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("roles", "dtype", "zero"),
    [
        ("", "float32", 0),
        ("", "bfloat16", 0),
        ("", "bfloat16", 2),
        ("", "bfloat16", 3),
        ("smaller value", "bfloat16", 2),
        ("whole value", "bfloat16", 0),
        ("whole policy", "bfloat16", 2),
    ],
)
def test_a_resumed_rank_goes_on_bit_for_bit(
    roles: str,
    dtype: str,
    zero: int,
    make_lora_config: Callable[..., TandemConfig],
    make_roles_config: Callable[..., TandemConfig],
    ranks: Ranks,
    tmp_path: Path,
) -> None:
    make: Any = partial(make_roles_config, roles) if roles else make_lora_config
    unbroken = ppo(ranks, make(dtype, zero))
    for number in range(2):
        update(unbroken, number)
    commit = tmp_path / "step_2"
    commit.mkdir()
    unbroken.begin_commit(str(commit))
    records = unbroken.state.result()
    expected = [update(unbroken, number) for number in (2, 3)]
    resumed = ppo(ranks, make(dtype, zero))
    assert resumed.state.check(str(commit), records) is None
    resumed.load_commit(str(commit))
    assert [update(resumed, number) for number in (2, 3)] == expected
    mine, theirs = weights(resumed), weights(unbroken)
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []
    engines = [engine for engine in (unbroken.policy, unbroken.value) if engine]
    trained = sum(p.numel() for engine in engines for _, p in engine.named_weights())
    assert (commit / "rank_0.safetensors").stat().st_size < 12 * trained + 200_000  # master and two moments


# ---- roles with adapters of their own, or with none

ROLES: dict[str, tuple[bool, LoraByRoleConfig]] = {  # whether model.lora is set
    "smaller value": (True, LoraByRoleConfig(value_model=RoleLoraConfig(rank=2, targets=["q_proj"]))),
    "whole value": (False, LoraByRoleConfig(policy=RoleLoraConfig(rank=4))),
    "whole policy": (False, LoraByRoleConfig(value_model=RoleLoraConfig(rank=4))),
}


@pytest.fixture
def make_roles_config(make_lora_config: Callable[..., TandemConfig]) -> Callable[..., TandemConfig]:
    def make(name: str, dtype: str = "float32", zero: int = 0) -> TandemConfig:
        config = make_lora_config(dtype, zero)
        is_set, config.model.lora_by_role = ROLES[name]
        config.model.lora = config.model.lora if is_set else None
        config.ppo.trainable_layers = config.ppo.value_trainable_layers = None
        return config

    return make


def test_a_value_model_has_adapters_of_its_own_on_the_one_base(
    make_roles_config: Callable[..., TandemConfig], ranks: Ranks
) -> None:
    task = ppo(ranks, make_roles_config("smaller value"))
    assert task.value is not None
    mine, its = (adapter_parameters(engine.model.lm) for engine in (task.policy, task.value))
    assert mine["model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 128)
    assert {name.split(".")[4]: p.shape[0] for name, p in its.items() if "lora_A" in name} == {"q_proj": 2}
    bases = [engine.model.lm.model.layers[0].mlp.up_proj for engine in (task.policy, task.value)]
    assert bases[0].base_layer.weight.data_ptr() == bases[1].weight.data_ptr()


@pytest.mark.parametrize(("roles", "same"), [("whole value", "value/"), ("whole policy", "policy/")])
@pytest.mark.parametrize("zero", [0, 3])
def test_a_role_without_adapters_trains_as_in_a_run_without_any(
    roles: str, same: str, zero: int, make_roles_config: Callable[..., TandemConfig], ranks: Ranks
) -> None:
    """Until the other model, whose B begins with zeros, has learnt something else."""
    config = make_roles_config(roles, zero=zero)
    plain = make_roles_config(roles, zero=zero)
    plain.model.lora_by_role = LoraByRoleConfig()
    with_adapters, without = ppo(ranks, config), ppo(ranks, plain)
    found, expected = (update(task, 0) for task in (with_adapters, without))
    names = [name for name in expected if name.startswith((same, "kl/", "reward/"))]
    assert len(names) > 5
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}
    mine, theirs = weights(with_adapters), weights(without)
    whole = {name for name in theirs if name.startswith(same[:-1])}
    assert all(torch.equal(mine[name], theirs[name]) for name in whole)
    assert {"lora_" in name or "score" in name for name in mine.keys() - whole} == {True}
    with torch.no_grad():
        base = load_policy(plain.model.path, plain.model, plain.learner, on_cpu=True)
        assert torch.equal(logprobs(with_adapters.reference), logprobs(base))


def test_what_is_published_is_the_adapter_alone(make_lora_config: Callable[..., TandemConfig], ranks: Ranks) -> None:
    config = make_lora_config("bfloat16", targets=["q_proj", "down_proj"])
    task = ppo(ranks, config)
    source = EngineSource(task.policy)
    found = dict(source)
    assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()
    ]
    assert {name: (tuple(t.shape), t.dtype) for name, t in found.items() if ".layers.1." in name} == {
        "model.layers.1.self_attn.q_proj.lora_A.weight": ((4, 128), torch.bfloat16),
        "model.layers.1.self_attn.q_proj.lora_B.weight": ((128, 4), torch.bfloat16),
        "model.layers.1.mlp.down_proj.lora_A.weight": ((4, 256), torch.bfloat16),
        "model.layers.1.mlp.down_proj.lora_B.weight": ((128, 4), torch.bfloat16),
    }
    assert len(found) == 8


def test_dropout_acts_where_a_graph_is_built(make_lora_config: Callable[..., TandemConfig], ranks: Ranks) -> None:
    task = SFTTask(ranks, make_lora_config(dropout=0.5), EXAMPLES, [])
    randomise(task.engine)
    with torch.no_grad():
        assert torch.equal(logprobs(task.engine), logprobs(task.engine))
    first, second = (example_nll(task.engine, EXAMPLES, ranks.device) for _ in range(2))
    assert first != second
    other = ppo(ranks, make_lora_config(dropout=0.5)).policy
    randomise(other)
    assert torch.equal(logprobs(other), logprobs(other))


def test_a_merged_weight_by_hand() -> None:
    """W + 2 B A with W = [[1, 0], [0, 1]], A = [1, 2], B = [[1], [3]]; DoRA scales its rows to lengths 5 and 1."""
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [3.0]])
    expected = torch.tensor([[3.0, 4.0], [6.0, 13.0]])
    assert torch.equal(merged(torch.eye(2), a, b, 2.0), expected)
    found = merged(torch.eye(2), a, b, 2.0, torch.tensor([5.0, 1.0]))
    np.testing.assert_allclose(found, [[3, 4], [6 / 205**0.5, 13 / 205**0.5]], rtol=1e-6)


# ---- refused before a start


@pytest.mark.parametrize(
    ("architecture", "targets", "parts"),
    [
        ("llama", ["q_proj", "query"], ["LlamaForCausalLM", "found query, which names none", "gate_proj"]),
        ("llama-tied", ["lm_head"], ["found lm_head, the LM head, which may be tied"]),
        ("mixtral", ["all-linear"], ["experts, which are fused in 0.mlp.experts.gate_up_proj", "[k_proj,o_proj"]),
        ("mixtral", ["gate_up_proj"], ["found gate_up_proj, experts that are fused"]),
        ("gpt2", ["all-linear"], ["transposed (Conv1D), which is not supported; write model.lora=null"]),
        ("zamba2", ["o_proj"], ["o_proj of Zamba2ForCausalLM, which share theirs"]),
    ],
)
def test_what_cannot_have_adapters_is_named(
    architecture: str, targets: list[str], parts: list[str], tmp_path: Path
) -> None:
    make(architecture, 0).save_pretrained(tmp_path / "model")
    config = TandemConfig(model=ModelConfig(path=str(tmp_path / "model"), dtype="float32"), stage="pipeline")
    config.model.lora = LoraConfig(targets=targets)
    with pytest.raises(ConfigError) as refused:
        check_weights_and_code(config)
    assert [part for part in parts if part not in str(refused.value)] == []
