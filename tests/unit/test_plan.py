"""The plan of a job's memory: counts worked out by hand, and a pass on the meta device against the same pass on the CPU."""

import copy
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from common.models.packed_attention import Packed
from common.processes.memory_room import Room, memory_room
from common.text.tokenizers import load_config
from contracts.checks.validation import ConfigError
from contracts.config import LearnerConfig, LoraConfig, ModelConfig, RoleLoraConfig, TandemConfig
from contracts.records import Example
from contracts.scorer_roles import value_model_key
from contracts.stages import all_stages
from controller.plan import show
from controller.plan.activations import Unplannable, _measure, pass_memory
from controller.plan.bound import most
from controller.plan.learner_memory import Network, Sizes, network_shapes, network_state, sizes, stage_networks
from controller.plan.memory_items import GIB, JobPlan
from controller.plan.microbatch_lengths import batch_lengths
from controller.plan.plan import plan_job, plan_stage, planned_stages, stage_lengths
from controller.plan.room import _gains, check_nodes_room, check_room
from controller.start_checks.kv_cache import kv_bytes_a_token, one_sequence_bytes
from learner.models import freeze_below, load_policy, policy_shapes, prove_policy
from tests import tiny_models

KEY = "engine.kv_cache_gib"
MODEL, LEARNER = ModelConfig(path="", dtype="float32"), LearnerConfig()


@pytest.mark.parametrize(
    ("size", "zero", "ranks", "expected"),
    [  # bytes: weights, masters, moments, in a backward pass, of that before its last microbatch, in the step
        (2, 0, 1, (2000, 2400, 4800, 2400, 1200, 3600)),
        (4, 0, 1, (4000, 0, 4800, 4800, 2400, 2400)),
        (2, 1, 2, (2000, 1200, 2400, 1200 + 1200 + 600, 1200, 2400)),  # reduces at the end alone
        (2, 2, 2, (2000, 1200, 2400, 1200 + 1200, 600, 2400)),
        (2, 3, 2, (1000, 1200, 2400, 2000 + 1200 + 600, 1800, 1800 + 600 + 1200)),
    ],
)
def test_state_of_1000_weights_of_which_600_train(size: int, zero: int, ranks: int, expected: tuple) -> None:
    state = network_state(Sizes(1000, 600), size, zero, ranks)
    assert (state.weights, state.masters, state.moments, state.backward, state.earlier, state.step) == expected


def shapes_of(name: str, layers: int | None = None, **more: Any) -> Any:
    config = tiny_models.TINY[name]()
    for key, value in more.items():
        setattr(config, key, value)
    proof = prove_policy(config, MODEL, LEARNER, True)
    network = policy_shapes(config, MODEL, LEARNER, proof.form, True)
    freeze_below(network.lm, layers, False)
    return network


def kept_on_cpu(name: str, lengths: list[int], folder: Path) -> int:
    """Bytes of what autograd keeps in a real pass, each storage once, weights aside."""
    tiny_models.make(name, seed=0).save_pretrained(folder)
    network = load_policy(str(folder), ModelConfig(path=str(folder), dtype="float32"), LEARNER, True)
    weights = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers()]}
    packed = Packed.of([[5] * n for n in lengths], torch.device("cpu"))
    select = torch.zeros(sum(lengths), dtype=torch.int64)
    weights |= {t.untyped_storage().data_ptr() for t in (*vars(packed).values(), select) if isinstance(t, torch.Tensor)}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = network(packed, select, select)
    del out
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gemma2", "gpt2"])
def test_a_pass_keeps_what_the_same_pass_keeps_on_the_cpu(name: str, tmp_path: Path) -> None:
    lengths = [40, 31, 25]
    expected = kept_on_cpu(name, lengths, tmp_path)
    assert pass_memory(shapes_of(name), tuple(lengths), sum(lengths)).kept == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("layers", [None, 5])
def test_a_large_pass_is_read_off_small_ones(layers: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.plan.activations.MANY_TOKENS", 400)
    network = shapes_of("llama", layers, num_hidden_layers=9)
    lengths = [60 + i % 7 for i in range(32)]
    found, exact = pass_memory(network, tuple(lengths), 1600), _measure(network, lengths, 1600)
    assert found.kept == pytest.approx(exact.kept, rel=0.02)
    assert found.backward == pytest.approx(exact.backward, rel=0.03)
    assert found.inference == pytest.approx(exact.inference, rel=0.1)


def test_gradient_checkpointing_keeps_less() -> None:
    config = tiny_models.TINY["llama"]()
    proof = prove_policy(config, MODEL, LEARNER, True)
    again = LearnerConfig(gradient_checkpointing=True)
    plain = pass_memory(policy_shapes(config, MODEL, LEARNER, proof.form, True), (50,) * 4, 10)
    less = pass_memory(policy_shapes(config, MODEL, again, proof.form, True), (50,) * 4, 10)
    # of each of two layers its input alone: 200 tokens x 128 x 4 bytes, beside what the head keeps
    assert less.kept < plain.kept / 3
    assert less.kept > 2 * 200 * 128 * 4


def test_a_model_that_reads_its_own_numbers_is_named() -> None:
    with pytest.raises(Unplannable, match="GPTJForCausalLM"):
        pass_memory(shapes_of("gptj"), (20, 20), 10)


def test_kv_cache_of_smollm2() -> None:
    config = tiny_models.of(
        "Llama", hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    )()
    assert kv_bytes_a_token(config, 2) == 2 * 30 * 3 * 64 * 2 == 23040


def test_a_cache_is_not_halved_below_what_one_sequence_takes(
    ppo_of_adapters: TandemConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.plan.room.GAIN", 1)  # byte: a tiny model's cache is small
    monkeypatch.setattr("controller.plan.room._candidates", lambda c: [(KEY, c.engine.kv_cache_gib / 2)])
    config = ppo_of_adapters
    config.ppo.gold_rollouts = 0
    needed = one_sequence_bytes(config, load_config(config.model.path, config.model))
    (stage,) = planned_stages(config)

    def suggested(nbytes: int) -> list[str]:
        config.engine.kv_cache_gib = nbytes / GIB
        return [key for key, _, _ in _gains(config, lambda item: (), stage, lambda plan: plan.cpu)]

    assert suggested(2 * needed) == [KEY]
    assert suggested(2 * needed - 2) == []


def test_lengths_are_those_of_the_largest_microbatch() -> None:
    config = TandemConfig()
    config.learner.microbatch_tokens, config.cluster.num_learner_ranks = 100, 1
    bound = batch_lengths(config, [], batch_size=4, steps=3, most=50)
    assert (bound.largest, bound.microbatches, bound.tokens, bound.sizes) == ((50, 50), 2, 200, 6)


def test_what_is_offloaded_is_in_the_host(tiny_config: TandemConfig) -> None:
    tiny_config.stage, tiny_config.cluster.gpus_per_learner_rank = "sft", 1.0
    hosts = []
    for tiny_config.learner.offload in ("none", "optimizer", "parameters"):
        rank = next(p for p in plan_job(tiny_config).largest.processes if p.role == "learner rank")
        hosts.append({item.what for item in rank.items if not item.on_gpu} - {"libraries"})
    moments, weights = "masters and moments of the policy", "weights of the policy"
    assert hosts == [set(), {moments}, {moments, weights}]


# ---- LoRA


@pytest.fixture
def ppo_of_adapters(tiny_config: TandemConfig) -> TandemConfig:
    tiny_config.stage, tiny_config.model.lora = "ppo", LoraConfig(rank=4, targets=["q_proj", "down_proj"])
    tiny_config.sft_model = tiny_config.proxy_model = tiny_config.model.path
    tiny_config.ppo.trainable_layers = tiny_config.ppo.value_trainable_layers = None
    tiny_config.data.gold = None
    return tiny_config


def test_adapters_train_on_one_base_with_moments_of_their_own(ppo_of_adapters: TandemConfig) -> None:
    tiny_config = ppo_of_adapters
    base = load_config(tiny_config.model.path, ModelConfig(path=""))
    # A [rank, in] and B [out, rank] of two layers' attention and MLP
    layers, width, mlp = base.num_hidden_layers, base.hidden_size, base.intermediate_size
    heads = base.num_attention_heads * base.head_dim
    adapter = layers * 4 * ((width + heads) + (mlp + width))
    plan = plan_job(tiny_config).largest
    (rank,) = (process for process in plan.processes if process.role == "learner rank")
    held = {item.what: item.nbytes for item in rank.items}
    size = 4 if tiny_config.model.dtype == "float32" else 2
    each = 8 if size == 4 else 12  # moments, and masters where they are not the weights themselves
    assert held["masters and moments of the policy"] == each * adapter
    assert held["masters and moments of the value model"] == each * (adapter + width)  # and its head
    assert held["weights of the value model"] == size * (adapter + width)  # its base is the policy's
    assert not any("reference" in what for what in held)
    sent = {movement.what: movement.nbytes for movement in plan.movements}
    assert sent["publish"] == size * adapter
    full = copy.deepcopy(tiny_config)
    full.model.lora = None
    less, more = (plan_job(config).largest.cpu for config in (tiny_config, full))
    assert less < more
    assert plan.cpu < most(tiny_config, planned_stages(tiny_config)[0], lambda item: ())


@pytest.mark.parametrize(("policy", "value"), [(4, 2), (4, None), (None, 4)])
def test_each_role_is_counted_with_its_adapters(
    policy: int | None, value: int | None, ppo_of_adapters: TandemConfig
) -> None:
    config = ppo_of_adapters
    base = load_config(config.model.path, ModelConfig(path=""))
    width, heads = base.hidden_size, base.num_attention_heads * base.head_dim
    block = width * (heads + 2 * base.num_key_value_heads * base.head_dim + heads + 3 * base.intermediate_size)
    body = base.vocab_size * width + base.num_hidden_layers * (block + 2 * width) + width
    a_rank = base.num_hidden_layers * ((width + heads) + (base.intermediate_size + width))  # of both matrices
    config.model.lora = None
    for role, rank in (("policy", policy), ("value_model", value)):
        own = RoleLoraConfig(rank=rank, targets=["q_proj", "down_proj"]) if rank else None
        setattr(config.model.lora_by_role, role, own)
    plan = plan_job(config).largest
    (rank_,) = (process for process in plan.processes if process.role == "learner rank")
    held = {item.what: item.nbytes for item in rank_.items}
    trained = {
        "policy": a_rank * policy if policy else body,
        "value model": (a_rank * value if value else body) + width,
    }
    for name, count in trained.items():
        assert held[f"masters and moments of the {name}"] == 12 * count
    assert any("reference" in what for what in held) == (policy is None)
    assert held["weights of the value model"] == 2 * ((a_rank * value if value else body) + width)
    assert any("frozen weights of the value model" in what for what in held) == (
        policy is None
    )  # else it is the policy's
    movements = {movement.what: movement.nbytes for movement in plan.movements}
    assert movements["publish"] == 2 * trained["policy"]
    assert movements["commit"] == 12 * sum(trained.values()) + 2 * trained["policy"]
    assert plan.cpu < most(config, planned_stages(config)[0], lambda item: ())


# ---- the job


@pytest.fixture
def job(tiny_config: TandemConfig) -> TandemConfig:
    tiny_config.stage = "sft"
    return tiny_config


def test_every_process_of_a_job_is_there(job: TandemConfig) -> None:
    job.stage = "ppo"
    job.sft_model = job.proxy_model = job.model.path
    job.data.gold = None
    roles = [process.role for process in plan_job(job).largest.processes]
    assert roles[:4] == ["driver", "learner rank", "actor", "reward replica"]
    assert {"gcs", "raylet and agents", "serve controller", "reward front"} <= {*roles}


def test_pages_of_a_checkpoint_are_there_once(job: TandemConfig) -> None:
    job.sft.trainable_layers = 1
    shapes = network_shapes(job, Network("policy", job.model.path, trainable_layers=1))
    frozen = sizes(shapes).total - sizes(shapes).trained
    one = copy.deepcopy(job)
    job.cluster.num_learner_ranks = 2
    mapped = [
        sum(i.nbytes * p.count for p in plan_job(c).largest.processes for i in p.items if i.file) for c in (one, job)
    ]
    assert mapped == [2 * frozen, 2 * frozen]


ALWAYS = lambda stage: True  # noqa: E731


@pytest.fixture
def large(job: TandemConfig) -> TandemConfig:
    """Activations of 16384 tokens, of texts that are there."""
    job.learner.microbatch_tokens, job.sft.max_tokens, job.sft.batch_size = 16384, 64, 256
    return job


def texts(item: str) -> list[Any]:
    return [Example([5] * 64, [True] * 64)] * 300


def test_a_job_without_room_is_told_what_brings_most(large: TandemConfig) -> None:
    sft = plan_job(large, texts).largest
    assert sft.least < sft.cpu
    assert check_room(large, texts, Room(sft.least, "whole", sft.cpu, "free"), ALWAYS) == []
    assert check_room(large, texts, Room(0, "whole", 0, "free"), lambda stage: False) == []  # its result is there
    with pytest.raises(ConfigError, match=r"SFT needs at least .* \(the limit of a test\)") as refused:
        check_room(large, texts, Room(sft.least - 1, "the limit of a test", 0, "free"), ALWAYS)
    large.learner.microbatch_tokens = 8192
    saved = (sft.least - plan_job(large, texts).largest.least) / GIB
    assert f"learner.microbatch_tokens=8192 ({saved:.1f} GiB less)" in str(refused.value)


def test_what_is_likely_and_not_certain_is_a_warning(large: TandemConfig) -> None:
    sft = plan_job(large, texts).largest
    (warning,) = check_room(large, texts, Room(sft.least, "whole", sft.cpu - 1, "free now"), ALWAYS)
    assert warning.startswith("warning: memory: SFT is likely to hold")
    assert "(free now)" in warning
    # the same of texts as long as they may get: only weights, moments and gradients are certain
    assert plan_job(large).largest.least < sft.least


def test_nodes_of_a_cluster_are_told_apart(job: TandemConfig) -> None:
    job.cluster.address, job.cluster.num_learner_ranks, job.cluster.cpus_per_process = "auto", 2, 1.0
    rank = next(p for p in plan_job(job, texts).largest.processes if p.role == "learner rank")

    def nodes(*memory: float) -> list[dict[str, float]]:
        return [{"CPU": 2.0, "memory": amount - 7, "object_store_memory": 8} for amount in memory]

    assert check_nodes_room(job, texts, nodes(2 * rank.cpu + 1), ALWAYS) == []
    (warning,) = check_nodes_room(job, texts, nodes(2 * rank.least), ALWAYS)
    assert "is likely to hold, on one node," in warning
    with pytest.raises(ConfigError, match=r"needs at least .*on all 1 nodes"):
        check_nodes_room(job, texts, nodes(2 * rank.least - 100), ALWAYS)
    with pytest.raises(ConfigError, match=r"a process that needs at least .*on the largest node"):
        check_nodes_room(job, texts, nodes(*[rank.least - 100] * 4), ALWAYS)
    job.cluster.num_nodes = 2  # which may still come
    assert check_nodes_room(job, texts, nodes(1000), ALWAYS) == []


def test_what_fits_by_far_needs_no_pass(large: TandemConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    large.stage, large.sft_model, large.proxy_model = "pipeline", None, None
    for stage in planned_stages(large):
        assert plan_stage(large, stage).cpu < most(large, stage, lambda item: ()) < 40 * GIB, stage.name
    monkeypatch.setattr("controller.plan.room.plan_stage", None)
    assert check_room(large, lambda item: (), Room(0, "whole", 40 * GIB, "free"), ALWAYS) == []


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        ("0::/pod/box\n", {"pod/box/memory.max": "max\n", "pod/box/memory.current": "5\n"}, None),
        (
            "0::/pod/box\n",
            {
                "pod/memory.max": f"{GIB}\n",
                "pod/memory.current": f"{GIB // 2}\n",
                "pod/memory.stat": f"anon 7\ninactive_file {GIB // 4}\n",
            },
            0.75 * GIB,
        ),
        (
            "3:memory:/docker/box\n2:cpu,cpuacct:/docker/box\n",
            {
                "memory/memory.limit_in_bytes": f"{GIB}\n",
                "memory/memory.usage_in_bytes": f"{GIB // 4}\n",
                "memory/memory.stat": "total_inactive_file 1024\n",
            },
            0.75 * GIB + 1024,
        ),
        (
            "3:memory:/\n",
            {"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": "1\n"},
            None,
        ),
    ],
)
def test_a_limit_of_a_control_group_counts(own: str, files: dict[str, str], left: float | None, tmp_path: Path) -> None:
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    room = memory_room(tmp_path / "groups", tmp_path / "own")
    assert ("free of the machine" in room.free_source) == (left is None)
    assert ("the machine's" in room.whole_source) == (left is None)
    assert left is None or (room.free, room.whole) == (left, GIB + psutil.swap_memory().total)


def test_a_batch_of_pairs_without_data_has_two_texts_each(job: TandemConfig) -> None:
    job.reward_model.batch_size, job.reward_model.max_tokens = 8, 32
    [stage] = [stage for stage in all_stages() if stage.name == "reward_model"]
    lengths, _ = stage_lengths(job, stage, lambda item: ())
    assert lengths.tokens == 8 * 2 * 32


def test_texts_of_ptx_are_counted_with_all_their_tokens(job: TandemConfig) -> None:
    job.stage, job.learner.microbatch_tokens = "ppo", 4096
    [stage] = [stage for stage in all_stages() if stage.name == "ppo"]
    job.ppo.sampling.max_completion_tokens, job.ppo.rollouts_per_update, job.ppo.minibatches = 8, 8, 1
    job.data.max_prompt_tokens, job.engine.max_model_len = 8, 64
    plain, selected = stage_lengths(job, stage, lambda item: ())
    assert (sum(plain.largest), selected) == (8 * 16, 8 * 8)
    job.ppo.ptx_coef, job.ppo.ptx_batch_size, job.sft.max_tokens = 0.5, 4, 200
    found, selected = stage_lengths(job, stage, lambda item: ())
    assert (sum(found.largest), selected) == (4 * 200, 4 * 200)
    assert found.tokens == plain.tokens  # whose graphs may be kept


def test_all_replicas_that_may_come_are_counted_on_one_machine(job: TandemConfig) -> None:
    job.stage, job.data.gold = "ppo", None
    job.sft_model = job.proxy_model = job.model.path

    def replicas() -> list[int]:
        return [p.count for p in plan_job(job).largest.processes if p.role == "reward replica"]

    job.reward_service.replicas, job.reward_service.max_replicas = 1, 8
    assert replicas() == [8]
    job.cluster.address = "auto"
    assert replicas() == [1]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sft.trainable_layers=99"], "trainable_layers is 99, the model has 2"),
        (["stage=tests.unit.test_extending_stages:STAGE"], "none of what stage="),
    ],
)
def test_what_cannot_be_planned_is_said_without_a_traceback(
    overrides: list[str], said: str, job: TandemConfig, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def config(words: list[str]) -> TandemConfig:
        if words[0].startswith("sft"):
            job.sft.trainable_layers = 99
        return job

    monkeypatch.setattr(show, "read_config", config)
    monkeypatch.setattr("sys.argv", ["plan", "--no-data", *overrides])
    if overrides[0].startswith("stage"):
        monkeypatch.setattr(show, "plan_job", lambda *given: JobPlan(()))
    assert show.main() == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("init_from", "given", "path", "made"),
    [("base", "other", "model.path", ""), ("sft", "other", "other", ""), ("sft", None, "model.path", "sft")],
)
def test_what_a_reward_model_starts_from(
    init_from: str, given: str | None, path: str, made: str, job: TandemConfig
) -> None:
    job.sft_model, job.reward_model.init_from, job.reward_model.trainable_layers = given, init_from, 3
    [network] = stage_networks(job, "reward_model")
    assert (network.path, network.made) == (job.model.path if path == "model.path" else path, made)
    assert (network.name, network.is_scalar, network.trainable_layers) == ("reward model", True, 3)
    assert network.role == "reward_model"
    assert network.freeze_embeddings


@pytest.mark.parametrize(
    ("init_from", "init_value_from", "expected"),
    [("sft", "policy", "sft_model"), ("base", "policy", "model.path"), ("base", "reward_model", "proxy_model")],
)
def test_what_the_value_model_starts_from(
    init_from: str, init_value_from: str, expected: str, job: TandemConfig
) -> None:
    job.stage, job.sft_model, job.proxy_model = "ppo", "other", "judge"
    job.ppo.init_from, job.ppo.init_value_from = init_from, init_value_from
    assert value_model_key(job) == expected
