"""Every rule with one failing value: the message names the key, the value found and what to write instead."""

import copy
import json
import math
from dataclasses import is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
from transformers import AutoConfig
from vllm.config.model import _get_and_verify_max_len as vllm_length
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from common.models.positions import positions
from contracts.checks.check import Leaf, leaves
from contracts.checks.validation import ConfigError, check_machine, validate, validate_service
from contracts.config import (
    LoraByRoleConfig,
    LoraConfig,
    RoleLoraConfig,
    ScorerConfig,
    SourceConfig,
    TandemConfig,
)
from contracts.plugins import closest
from contracts.records import Example, Prompt, RatedExample
from contracts.stages import method_titles
from contracts.transports import weight_backend
from controller.data.inputs import Inputs
from controller.start_checks.amounts import check_amounts, check_model
from controller.start_checks.row_checks import check_rows
from reward_service.call_forms import ACCEPTED
from tests.conftest import SMOLLM

# A value that breaks each rule of the table of ranges.
OUTSIDE = {
    "null or at least 2": 1,
    "at least 1": 0,
    "a list of different names, or of all-linear alone": ["all-linear", "q_proj"],
    "a list of different numbers from 1 on": [],
    "at least 2, as one prompt has no confidence interval": 1,
    "at least 2, as the newest commit may turn out bad": 1,
    "at least 2, as the best of one is SFT": 1,
    "0 or more": -1,
    "null or 0 or more": -1,
    "null or a list of different columns": ["answer", "answer"],
    "null or left to data.prompts and data.eval_prompts": ["answer"],
    "above 0": 0,
    "in [0.01, 2]": 2.5,
    "null or above 0": 0,
    "null or at least 1": 0,
    "null or 0 (the head and the norm before it) or more": -1,
    "in [0, 1]": 1.5,
    "in [0, 1)": 1.0,
    "null or in [0, 1)": 1.0,
    "null or 0, as PPO compares forward passes": 0.1,
    "null or a list of different names, or of all-linear alone": ["all-linear", "q_proj"],
    "in [1, 64]": 0,
    "1 of a judge": 2,
    "in (0, 1)": 1.0,
    "null or in (0, 1)": 1.0,
    "in [0, 1), as tokens with w = 1 must train": 1.0,
    "above 1, as tokens with w = 1 must train": 1.0,
    "in (0, 1]": 0.0,
    "null or above 1": 1.0,
    "1, as the log-probabilities of a truncated, renormalised distribution bias the policy ratio": 0.9,
    "a day as 2026-01-31": "today",
    "two numbers in [0, 1)": [0.9, 1.0],
}


ONLINE_DPO = {"ppo__estimator": "online_dpo", "ppo__samples_per_prompt": 2}


@pytest.fixture
def config() -> TandemConfig:
    """The defaults with the paths that have none."""
    filled = TandemConfig(run_dir="runs/demo", cache_dir="cache")
    filled.model.path = "model"
    for source in ("sft", "prompts", "preferences", "test", "eval_prompts"):
        getattr(filled.data, source).path = f"{source}.jsonl"
    filled.data.gold = SourceConfig(path="gold.jsonl")
    return filled


def put(config: TandemConfig, **values: Any) -> TandemConfig:
    """A copy with the values at dotted keys, whose dots are written as `__`."""
    changed = copy.deepcopy(config)
    for key, value in values.items():
        *parents, name = key.split("__")
        section: Any = changed
        for parent in parents:  # a scorer has a name of the user's
            is_named = isinstance(section, dict)
            if not is_named and getattr(section, parent) is None:
                setattr(section, parent, LoraConfig() if parent == "lora" else RoleLoraConfig())
            section = section.setdefault(parent, ScorerConfig()) if is_named else getattr(section, parent)
        setattr(section, name, value)
    return changed


def conflicts(config: TandemConfig) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        validate(config)
    count, *lines = str(raised.value).split("\n  - ")
    assert count.split()[0] == str(len(lines))
    return lines


def test_defaults_with_paths_pass(config):
    validate(config)


def schema() -> list[Leaf]:
    """Every key, also of what is null or empty by default."""
    filled = TandemConfig()
    filled.data.gold, filled.model.lora = SourceConfig(), LoraConfig()
    filled.model.lora_by_role = LoraByRoleConfig(RoleLoraConfig(), RoleLoraConfig(), RoleLoraConfig())
    filled.reward_service.scorers = {"any": ScorerConfig()}
    return list(leaves(filled))


@pytest.mark.parametrize(("rule", "key"), [(leaf.rule.text, leaf.key) for leaf in schema() if leaf.rule])
def test_each_range(config, rule, key):
    value = OUTSIDE[rule]
    expected = f"{key} must be {rule}; found {value}; write for example "
    assert any(line.startswith(expected) for line in conflicts(put(config, **{key.replace(".", "__"): value})))


def float_keys(section: Any, prefix: str = "") -> list[str]:
    """Keys that the schema says may hold a float."""
    found: list[str] = []
    for name, hint in get_type_hints(section).items():
        if is_dataclass(hint):
            found += float_keys(hint, f"{prefix}{name}.")
        elif float in (hint, *get_args(hint)):
            found.append(prefix + name)
    return found


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("key", float_keys(TandemConfig))
def test_every_float_is_finite(config, key, number):
    value = [0.9, number] if key.endswith("betas") else number
    expected = f"{key} must be finite, as the records of a run hold no other number; found {value}; write for example "
    lines = conflicts(put(config, **{key.replace(".", "__"): value}))
    assert sum(line.startswith(expected) for line in lines) == 1


def test_floats_of_scorers_and_environments_are_finite(config):
    weighted = {"kind": "weighted_sum", "parts": ["gold_model", "proxy_model"], "weights": [1.0, math.inf]}
    (line,) = conflicts(with_scorers(config, gold=weighted))
    assert line.startswith("reward_service.scorers.gold.weights must be finite")
    options = put(config, environment__name="games:Guess", environment__options={"most": {"of": math.inf}})
    (line,) = conflicts(options)
    assert line.startswith("environment.options.most.of must be finite")
    assert line.endswith("found inf; write a number, however large")


@pytest.mark.parametrize("key", [leaf.key for leaf in schema() if leaf.options])
def test_each_choice(config, key):
    lines = conflicts(put(config, **{key.replace(".", "__"): "other"}))
    assert any(line.startswith(f"{key} must be one of ") and "found other; write " in line for line in lines)


def test_every_number_and_every_text_declares_what_it_may_hold() -> None:
    """Bounds, choices, or the reason why there are neither."""
    open_kinds = (int, float, str, Any)
    wanting = [
        leaf.key
        for leaf in schema()
        if {leaf.annotation, *get_args(leaf.annotation)}.intersection(open_kinds)
        and not (leaf.rule or leaf.options or leaf.free)
    ]
    assert wanting == []


def test_a_section_may_narrow_a_key_of_its_class_and_choices_may_be_known_late() -> None:
    found = {leaf.key: leaf for leaf in schema()}
    assert found["evaluate.sampling.top_p"].rule.text == "in (0, 1]"
    assert found["ppo.sampling.top_p"].rule.text.startswith("1, as the log-probabilities")
    assert found["method"].options == tuple(method_titles())
    assert found["preference.loss"].options == (None, "dpo", "rank")


def test_a_choice_suggests_the_closest_name(config):
    (line,) = conflicts(put(config, ppo__kl__controller="adaptve"))
    assert line == "ppo.kl.controller must be one of fixed, adaptive; found adaptve; write adaptive"


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (
            {"ppo__samples_per_prompt": 6},
            ["ppo.rollouts_per_update must be a multiple of ppo.samples_per_prompt (6)", "found 64", "write 66"],
        ),
        (
            {"cluster__num_learner_ranks": 8, "ppo__minibatches": 9},
            ["ppo.rollouts_per_update must be at least", "(8 * 9 = 72)", "found 64", "write 72 or more"],
        ),
        (  # 64 x 0.05 = 3.2: three may fail, and 61 are left
            {"ppo__max_failed_scores": 0.05, "ppo__minibatches": 62},
            ["* ppo.minibatches (62) are left where 3 have no score", "ppo.max_failed_scores (0.05) allows; found 64"],
        ),
        (  # of pairs each takes its sibling along: 58 are left
            {
                "ppo__max_failed_scores": 0.05,
                "ppo__minibatches": 59,
                "ppo__estimator": "grpo",
                "ppo__samples_per_prompt": 2,
            },
            ["* ppo.minibatches (59) are left where 6 have no score or no scored sibling", "found 64"],
        ),
        (  # all but one
            {"ppo__max_failed_scores": 1.0, "ppo__minibatches": 2},
            ["* ppo.minibatches (2) are left where 63 have no score"],
        ),
        (
            {"data__curriculum__order": "descending"},
            [
                "data.curriculum.order must be ascending (the default) where data.curriculum.column is null: nothing reads",
                "found descending; write data.curriculum.column as well",
            ],
        ),
        (
            {"ppo__overlong__penalty": 2.0},
            ["ppo.overlong.penalty must be 1.0 (the default) where ppo.overlong.buffer_tokens is null", "found 2.0"],
        ),
        (
            {"ppo__combined__max": 5.0},
            [
                "ppo.combined.max must be 10.0 (the default) where ppo.combined.target is null",
                "write ppo.combined.target",
            ],
        ),
        ({"ppo__combined__initial": 0.5}, ["ppo.combined.initial must be 1.0 (the default) where", "found 0.5"]),
        ({"ppo__combined__learning_rate": 1.0}, ["ppo.combined.learning_rate must be 0.1 (the default) where"]),
        (
            {"method": "dpo", "evaluate__every": 4},
            ["evaluate.every must be null with method dpo", "found 4; write evaluate.every=null, or method=ppo"],
        ),
        (
            {"ppo__gold_rollouts": 65},
            ["ppo.gold_rollouts must be at most ppo.rollouts_per_update (64)", "found 65", "write 64 or less"],
        ),
        (
            {"method": "dpo", "preference__loss": "rank"},
            ["preference.loss must be null or dpo with method dpo", "found rank", "or method=rank"],
        ),
        (
            {"data__gold": None},
            ["ppo.gold_rollouts must be 0 without a gold judge", "found 32", "set data.gold or gold_model"],
        ),
        (
            {"ppo__sampling__min_completion_tokens": 48},
            ["ppo.sampling.min_completion_tokens must be below", "(48)", "found 48", "write 47 or less"],
        ),
        (
            {"evaluate__sampling__min_completion_tokens": 50},
            ["evaluate.sampling.min_completion_tokens must be below", "(48)", "found 50", "write 47 or less"],
        ),
        (
            {"ppo__sampling__max_completion_tokens": 300},
            [
                "data.max_prompt_tokens + ppo.sampling.max_completion_tokens must be at most engine.max_model_len",
                "found 256 + 300 = 556",
                "write engine.max_model_len=556",
            ],
        ),
        (
            {"evaluate__sampling__max_completion_tokens": 257},
            [
                "data.max_prompt_tokens + evaluate.sampling.max_completion_tokens must be at most engine.max_model_len",
                "found 256 + 257 = 513",
                "write engine.max_model_len=513",
            ],
        ),
        (
            {"learner__microbatch_tokens": 303},
            ["learner.microbatch_tokens must be at least", "(304)", "found 303", "write 304 or more"],
        ),
        (
            {"learner__zero_stage": 3, "learner__held_tokens": 4096},
            ["learner.held_tokens must be 0 with learner.zero_stage 3", "found 4096", "learner.zero_stage=2"],
        ),
        (
            {"model__dtype": "float16"},
            [
                "model.dtype must be bfloat16 or float32: the learner has no loss scaling",
                "found float16",
                "write bfloat16",
            ],
        ),
        (
            {"model__dtype": "float16", "cluster__gpus_per_learner_rank": 1.0},
            ["model.dtype must be bfloat16 or float32", "found float16"],
        ),
        (
            {"learner__attention": "flash_attention_2"},
            ["learner.attention must be one for CPUs", "found flash_attention_2", "write auto"],
        ),
        (
            {"learner__attention": "short_causal", "cluster__gpus_per_learner_rank": 1.0},
            ["learner.attention must be one for GPUs", "rank 1)", "found short_causal", "write auto"],
        ),
        (
            {"learner__weight_transfer": "nccl"},
            [
                "learner.weight_transfer must be shared_memory or ray_object unless actors and learner ranks have GPUs",
                "found nccl; write shared_memory",
            ],
        ),
        (
            {"cluster__gpus_per_actor": 1.0},
            [
                "shared_memory or ray_object unless actors and learner ranks have GPUs (cluster.gpus_per_actor 1, "
                "cluster.gpus_per_learner_rank 0); found auto, which is nccl for actors on GPUs",
            ],
        ),
        (
            {"cluster__gpus_per_actor": 0.5, "cluster__layout": "colocated"},
            ["found auto, which is ipc for actors on GPUs"],
        ),
        (
            {"cluster__gpus_per_actor": 1.5, "cluster__gpus_per_learner_rank": 1.0},
            ["cluster.gpus_per_actor must be at most 1, or engine.tensor_parallel_size (1), over whose", "found 1.5"],
        ),
        (
            {"cluster__gpus_per_actor": 4.0, "cluster__gpus_per_learner_rank": 1.0},
            ["cluster.gpus_per_actor must be at most 1, or engine.tensor_parallel_size (1)", "found 4.0"],
        ),
        (
            {"cluster__gpus_per_learner_rank": 2.0},
            ["cluster.gpus_per_learner_rank must be at most 1: each uses one device", "found 2.0; write 1, and more"],
        ),
        (
            {"cluster__gpus_per_reward_replica": 2.5},
            ["cluster.gpus_per_reward_replica must be at most 1: each uses one device", "found 2.5"],
        ),
        (
            {"cluster__gpus_per_actor": 0.5, "cluster__gpus_per_learner_rank": 0.5},
            [
                "cluster.gpus_per_actor and cluster.gpus_per_learner_rank must be so large that no GPU holds two of",
                "found 0.5 + 0.5 = 1; write 1 or more for each, or cluster.layout=colocated",
            ],
        ),
        (
            {"cluster__gpus_per_actor": 0.4, "cluster__num_actors": 2, "cluster__gpus_per_learner_rank": 1.0},
            ["which NCCL joins to transfer weights; found 0.4 + 0.4 = 0.8"],
        ),
        (
            {
                "cluster__gpus_per_actor": 1.0,
                "cluster__gpus_per_learner_rank": 0.5,
                "cluster__num_learner_ranks": 2,
            },
            [
                "cluster.gpus_per_learner_rank must be so large that no GPU holds two of the 2 learner ranks",
                "found 0.5 + 0.5 = 1; write 1 for each rank",
            ],
        ),
        (
            {
                "cluster__layout": "colocated",
                "cluster__gpus_per_actor": 0.25,
                "cluster__gpus_per_learner_rank": 0.25,
                "cluster__num_actors": 2,
                "cluster__num_learner_ranks": 2,
            },
            [
                "cluster.gpus_per_actor + cluster.gpus_per_learner_rank must be so large that no GPU holds two of the 2",
                "found 0.5 + 0.5 = 1; write 0.5 and 0.5",
            ],
        ),
        (
            {"engine__tensor_parallel_size": 2, "cluster__gpus_per_actor": 1.0, "cluster__gpus_per_learner_rank": 1.0},
            ["engine.tensor_parallel_size must be 1, or at most", "(1.0)", "found 2", "cluster.gpus_per_actor=2"],
        ),
        (
            {"ppo__estimator": "rloo"},
            ["ppo.samples_per_prompt must be at least 2 with ppo.estimator rloo", "found 1", "samples_per_prompt=4"],
        ),
        (
            {"ppo__estimator": "reinforce_plus_plus", "ppo__init_value_from": "policy"},
            [
                "ppo.init_value_from must be null or reward_model",
                "found policy",
                "write ppo.init_value_from=null",
            ],
        ),
        (
            {"ppo__estimator": "raft"},
            ["ppo.samples_per_prompt must be at least 2 with ppo.estimator raft", "found 1", "or ppo.estimator=rwr"],
        ),
        (
            {**ONLINE_DPO, "ppo__samples_per_prompt": 1},
            ["ppo.samples_per_prompt must be at least 2 with ppo.estimator online_dpo", "found 1"],
        ),
        (
            {**ONLINE_DPO, "ppo__epochs": 2, "ppo__minibatches": 4},
            ["ppo.epochs * ppo.minibatches must be 1 with ppo.estimator online_dpo", "found 2 * 4 = 8", "ppo.epochs=1"],
        ),
        (
            {**ONLINE_DPO, "ppo__kl__place": "k2"},
            ["ppo.kl.place must be null or none with ppo.estimator online_dpo", "found k2", "ppo.dpo_beta"],
        ),
        (
            {**ONLINE_DPO, "ppo__aggregation": "tokens"},
            ["ppo.aggregation must be null or sequence_sums with ppo.estimator online_dpo", "found tokens"],
        ),
        (
            {**ONLINE_DPO, "ppo__off_policy__correction": "truncated"},
            ["ppo.off_policy.correction must be null or none with ppo.estimator online_dpo", "found truncated"],
        ),
        (
            {"ppo__estimator": "rwr", "ppo__whiten_advantages": True},
            ["ppo.whiten_advantages must be null or False with ppo.estimator rwr", "found True", "advantages=null"],
        ),
        (
            {"ppo__estimator": "rwr", "ppo__kl__controller": "adaptive"},
            ["ppo.kl.controller must be fixed where there is no KL penalty", "found adaptive", "ppo.kl.place=reward"],
        ),
        (
            {"ppo__kl__controller": "adaptive", "ppo__kl__coef": 0.0},
            ["ppo.kl.coef must be above 0 with ppo.kl.controller adaptive", "found 0.0", "ppo.kl.controller=fixed"],
        ),
        (
            {"ppo__combined__target": 0.5},
            ["ppo.ptx_coef must be above 0 with ppo.combined.target (0.5)", "found 0.0", "write ppo.ptx_coef=1"],
        ),
        (
            {"ppo__combined__initial": 11.0, "ppo__combined__target": 0.5, "ppo__ptx_coef": 1.0},
            ["ppo.combined.initial must be at most ppo.combined.max (10)", "found 11.0", "write 10 or less"],
        ),
        (
            {"cluster__num_nodes": 2},
            ["cluster.num_nodes, cluster.gpus_per_node and cluster.cpus_per_node must be all null or all set", "None"],
        ),
        (
            {"cluster__layout": "colocated", "cluster__gpus_per_actor": 1.0, "cluster__gpus_per_learner_rank": 0.5},
            ["must be at most 1 with cluster.layout colocated", "found 1.0 + 0.5 = 1.5", "write 0.5 and 0.5"],
        ),
        (
            {
                "cluster__layout": "colocated",
                "cluster__gpus_per_actor": 0.5,
                "cluster__gpus_per_learner_rank": 0.5,
                "cluster__num_actors": 2,
            },
            ["cluster.num_actors must be at most cluster.num_learner_ranks (1)", "found 2", "write 1 or less"],
        ),
        (
            {"learner__weight_transfer": "ipc", "cluster__gpus_per_actor": 1.0, "cluster__gpus_per_learner_rank": 1.0},
            ["learner.weight_transfer must be auto or nccl with cluster.layout disaggregated", "found ipc"],
        ),
        (
            {"reward_service__replicas": 3, "reward_service__max_replicas": 2},
            ["reward_service.max_replicas must be at least reward_service.replicas (3)", "found 2; write 3 or more"],
        ),
        (
            {"cluster__min_actors": 4, "cluster__max_actors": 2},
            ["cluster.min_actors must be at most cluster.max_actors (2)", "found 4; write 2 or less"],
        ),
        (
            {"cluster__min_actors": 2, "cluster__max_actors": 6},
            ["cluster.num_actors must be from cluster.min_actors to cluster.max_actors (2 and 6", "found 1; write 6"],
        ),
        (
            {"cluster__max_actors": 2, "cluster__num_actors": 3},
            [
                "cluster.num_actors must be from cluster.min_actors to cluster.max_actors (null and 2",
                "found 3; write 2",
            ],
        ),
        (
            {"cluster__min_actors": 2, "cluster__max_actors": 2, "cluster__num_actors": 4},
            ["cluster.num_actors must be from cluster.min_actors to cluster.max_actors (2 and 2", "found 4; write 2"],
        ),
        (
            {"cluster__max_actors": 2, "cluster__layout": "colocated"},
            ["cluster.layout must be disaggregated with cluster.min_actors and cluster.max_actors", "found colocated"],
        ),
        (
            {
                "cluster__max_actors": 2,
                "cluster__gpus_per_actor": 1.0,
                "cluster__gpus_per_learner_rank": 1.0,
                "learner__weight_transfer": "nccl",
            },
            [
                "learner.weight_transfer must be shared_memory or ray_object with cluster.min_actors",
                "nccl joins the learner and all actors in one group",
                "found nccl; write shared_memory, or cluster.min_actors=null cluster.max_actors=null",
            ],
        ),
        (
            {
                "learner__weight_transfer": "nccl",
                "cluster__layout": "colocated",
                "cluster__gpus_per_actor": 0.5,
                "cluster__gpus_per_learner_rank": 0.5,
            },
            ["learner.weight_transfer must be auto or ipc with cluster.layout colocated", "found nccl"],
        ),
        (
            {"cluster__publish_timeout_s": 900.0},
            ["cluster.publish_timeout_s must be below cluster.step_timeout_s (900)", "found 900.0", "write 225"],
        ),
        (
            {"cluster__num_learner_ranks": 4, "sft__batch_size": 3},
            ["sft.batch_size must be at least cluster.num_learner_ranks (4)", "found 3", "write 4 or more"],
        ),
        (
            {"cluster__num_learner_ranks": 4, "reward_model__batch_size": 2},
            ["reward_model.batch_size must be at least cluster.num_learner_ranks (4)", "found 2", "write 4 or more"],
        ),
        (
            {"cluster__num_learner_ranks": 4, "ppo__ptx_batch_size": 2, "ppo__ptx_coef": 0.1},
            ["ppo.ptx_batch_size must be at least cluster.num_learner_ranks (4)", "found 2", "write 4 or more"],
        ),
        (
            {"model__lora": LoraConfig(), "model__revision": "main"},
            ["model.revision must be null with model.lora", "found main", "write model.revision=null"],
        ),
        (
            {"model__lora": LoraConfig(), "reward_model__init_from": "sft"},
            ["reward_model.init_from must be base with model.lora", "found sft", "write reward_model.init_from=base"],
        ),
        (
            {"model__lora": LoraConfig(), "reward_model__trainable_layers": 0},
            ["reward_model.trainable_layers must be null or at least 1 with model.lora", "found 0"],
        ),
        (
            {"model__lora": LoraConfig(dora=True), "learner__zero_stage": 3},
            ["model.lora.dora must be false with learner.zero_stage 3", "write model.lora.dora=false or"],
        ),
        (
            {"model__lora": LoraConfig(dora=True, dropout=0.1)},
            ["model.lora.dropout must be 0 with model.lora.dora", "found 0.1", "write model.lora.dropout=0"],
        ),
        (
            {"model__lora": LoraConfig(dropout=0.1), "model__lora_by_role__policy": RoleLoraConfig(dora=True)},
            ["model.lora.dropout must be 0 with model.lora_by_role.policy.dora", "found 0.1"],
        ),
        (
            {"model__lora": LoraConfig(), "model__lora_by_role__value_model": RoleLoraConfig(rank=4)},
            [
                "model.lora_by_role.value_model.rank must be 16, as of the reward model (model.lora.rank)",
                "found 4; write model.lora_by_role.value_model.rank=16; or ppo.init_value_from=policy",
            ],
        ),
        (
            {
                "model__lora": LoraConfig(),
                "model__lora_by_role__policy": RoleLoraConfig(rslora=True),
                "ppo__init_value_from": "policy",
            },
            [
                "model.lora.rslora must be True, as of the policy (model.lora_by_role.policy.rslora)",
                "found False; write model.lora_by_role.value_model.rslora=true",
            ],
        ),
        (
            {
                "model__lora_by_role__policy": RoleLoraConfig(),
                "model__lora_by_role__value_model": RoleLoraConfig(rank=4),
            },
            [
                "model.lora_by_role.value_model must be null where the policy has adapters and the reward model",
                "write 'model.lora_by_role.reward_model={rank:4,alpha:32.0,rslora:false,dora:false}' as well; or",
            ],
        ),
        (
            {"model__lora_by_role__reward_model": RoleLoraConfig(rank=4)},
            [
                "model.lora_by_role.value_model must be set where the reward model, from which the value model starts",
                "found null; write 'model.lora_by_role.value_model={rank:4,alpha:32.0,rslora:false,dora:false}'",
            ],
        ),
        (
            {
                "model__lora": LoraConfig(),
                "learner__weight_transfer": "nccl",
                "cluster__gpus_per_actor": 1.0,
                "cluster__gpus_per_learner_rank": 1.0,
            },
            ["learner.weight_transfer must be shared_memory or ray_object with model.lora", "found nccl"],
        ),
        (
            {"data__prompts__path": "???"},
            ["data.prompts.path must be set for stage pipeline", "found ???", "write a file"],
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_each_relation(config, values, parts):
    (line,) = conflicts(put(config, **values))
    assert [part for part in parts if part not in line] == []


def test_scoring_needs_room_for_an_eos(config):
    lines = conflicts(put(config, reward_service__max_tokens=304))
    assert len(lines) == 2  # the completions of PPO and of the evaluation
    assert "found 256 + 48 = 304; write reward_service.max_tokens=305" in lines[0]
    validate(put(config, reward_service__max_tokens=305))


def test_a_directory_that_is_a_file_is_refused(config, tmp_path):
    file = tmp_path / "run"
    file.touch()
    for key in ("run_dir", "cache_dir"):
        (line,) = conflicts(put(config, **{key: str(file)}))
        assert line == f"{key} must be a directory; found the file {file}; write another path"
    validate(put(config, run_dir=str(tmp_path), cache_dir="relative/cache"))


@pytest.mark.parametrize(
    "values",
    [
        {"learner__zero_stage": 3},
        {"learner__held_tokens": 4096, "ppo__epochs": 4, "ppo__minibatches": 4},
        {"learner__zero_stage": 2, "learner__held_tokens": 4096},
        {"ppo__ptx_coef": 0.5},
        {"cluster__num_learner_ranks": 4, "ppo__ptx_batch_size": 2},
        # The value model's defaults, its warm-up included, are no conflict where there is none.
        *[{"ppo__estimator": e, "ppo__samples_per_prompt": 2} for e in ("grpo", "dr_grpo", "rloo")],
        {"ppo__estimator": "reinforce_plus_plus"},
        {"ppo__estimator": "raft", "ppo__samples_per_prompt": 4, "ppo__epochs": 2, "ppo__kl__place": "reward"},
        {"ppo__estimator": "rwr", "ppo__minibatches": 2, "ppo__off_policy__correction": "truncated"},
        {**ONLINE_DPO, "ppo__max_staleness": 2, "ppo__kl__place": "none"},
        {"ppo__estimator": "rwr", "ppo__kl__controller": "adaptive", "ppo__kl__place": "reward"},
        {"ppo__combined__target": -0.5, "ppo__ptx_coef": 0.1, "ppo__combined__max": 5.0},
        {"ppo__max_failed_scores": 0.05, "ppo__minibatches": 61},  # 3 of 64 may fail
        {
            "ppo__max_failed_scores": 0.05,
            "ppo__minibatches": 60,
            "ppo__estimator": "grpo",
            "ppo__samples_per_prompt": 4,
        },  # 3 failures leave a fourth alone
        {"ppo__minibatches": 64},  # 1% of 64 is none
        {"data__curriculum__column": "level", "data__curriculum__order": "descending"},
        {"ppo__overlong__buffer_tokens": 16, "ppo__overlong__penalty": 2.0},
        {"evaluate__every": 4},
        {"evaluate__every": 4, "method": "dpo", "stage": "ppo"},
        {"evaluate__every": 4, "method": "dpo", "stage": "sft"},
        {"ppo__kl__target": 3.0},  # from which an alarm is raised, whatever the controller
        {"ppo__init_from": "base"},
        {"ppo__kl__place": "k2", "ppo__aggregation": "sequences", "ppo__whiten_advantages": False},
        {"ppo__off_policy__correction": "masked", "ppo__off_policy__low": 0.0, "ppo__off_policy__high": 1.5},
        {"ppo__dual_clip": None, "ppo__value_clip": None, "ppo__target_approx_kl": None, "data__prompt_words": None},
        {"ppo__kl__coef": 0.0, "ppo__gamma": 0.0, "ppo__lam": 1.0},
        {"data__gold": None, "gold_model": "checkpoint"},
        {"data__gold": None, "ppo__gold_rollouts": 0},
        {"data__gold": None, "method": "dpo"},
        *[{"method": method} for method in method_titles()],
        {"method": "ppo", "stage": "preference", "preference__loss": "rank"},
        {"method": "rank", "preference__loss": "rank"},
        {"data__gold": None, "stage": "evaluate"},
        {"stage": "evaluate", "ppo_model": None},
        {
            "engine__tensor_parallel_size": 2,
            "cluster__gpus_per_actor": 2.0,
            "cluster__gpus_per_learner_rank": 1.0,
            "cluster__num_learner_ranks": 2,
        },
        {"cluster__gpus_per_actor": 0.6, "cluster__gpus_per_learner_rank": 0.5},
        {"cluster__gpus_per_actor": 0.25, "stage": "evaluate", "cluster__num_actors": 4},
        {"cluster__gpus_per_learner_rank": 0.5, "stage": "sft"},
        {"cluster__gpus_per_actor": 1.0, "learner__weight_transfer": "shared_memory"},
        {
            "cluster__layout": "colocated",
            "cluster__gpus_per_actor": 0.5,
            "cluster__gpus_per_learner_rank": 0.5,
            "cluster__num_actors": 2,
            "cluster__num_learner_ranks": 2,
        },
    ],
    ids=lambda values: ",".join(values),
)
def test_what_is_allowed(config, values):
    validate(put(config, **values))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "nccl"),
        (
            {"cluster__layout": "colocated", "cluster__gpus_per_actor": 0.5, "cluster__gpus_per_learner_rank": 0.5},
            "ipc",
        ),
        ({"model__lora": LoraConfig()}, "shared_memory"),
        ({"model__lora_by_role__policy": RoleLoraConfig(rank=4)}, "shared_memory"),
        ({"model__lora_by_role__value_model": RoleLoraConfig(rank=4)}, "nccl"),  # which is not sent
        ({"cluster__max_actors": 3}, "shared_memory"),
        ({"cluster__gpus_per_actor": 0.0}, "shared_memory"),
    ],
)
def test_the_transport_that_auto_stands_for(config, values, expected):
    on_gpus = {"cluster__gpus_per_actor": 1.0, "cluster__gpus_per_learner_rank": 1.0}
    assert weight_backend(put(config, **on_gpus | values)) == expected


def test_a_stage_needs_only_the_data_it_reads():
    config = TandemConfig(stage="sft", run_dir="run", cache_dir="cache")
    config.model.path = "model"
    assert conflicts(config) == [
        "data.sft.path must be set for stage sft; found ???; write a file, a directory or a hub id"
    ]
    config.data.sft.path = "sft.jsonl"
    validate(config)


def test_a_given_checkpoint_needs_no_data(config):
    given = put(config, sft_model="sft", proxy_model="proxy", gold_model="gold")
    for source in ("sft", "preferences", "test", "gold"):
        given = put(given, **{f"data__{source}__path": "???"})
    validate(given)
    (line,) = conflicts(put(given, ppo__ptx_coef=0.1))
    assert line.startswith("data.sft.path must be set")


def test_a_null_choice_is_shown_as_it_is_written(config):
    (line,) = conflicts(put(config, ppo__kl__place="k1"))
    assert line == "ppo.kl.place must be one of null, none, reward, k2, k3; found k1; write for example null"
    (line,) = conflicts(put(config, ppo__estimator="grpoo", ppo__init_value_from="policy"))
    assert line.startswith("ppo.estimator must be one of dr_grpo, gae, grpo, online_dpo, raft, reinforce_plus_plus, ")
    assert line.endswith("write grpo")


def examples(count: int) -> list[Example]:
    return [Example([1, 2 + number], [False, True]) for number in range(count)]


def test_examples_must_fill_a_step(config):
    check_amounts(put(config, ppo__ptx_coef=0.1, ppo__ptx_batch_size=9), Inputs({"sft": examples(9)}))
    check_amounts(config, Inputs({"sft": examples(2)}))
    check_amounts(put(config, sft_model="sft"), Inputs())
    check_amounts(put(config, stage="evaluate", ppo__ptx_coef=0.1), Inputs())
    with pytest.raises(ConfigError) as raised:
        check_amounts(put(config, ppo__ptx_coef=0.1, cluster__num_learner_ranks=4), Inputs({"sft": examples(7)}))
    assert str(raised.value).split("\n") == [
        "ppo.ptx_batch_size must be at most the number of usable examples in data.sft (7); found 16; write "
        "ppo.ptx_batch_size=7 or less, or give more examples",
        "data.sft must have an example to train on and one to hold out for each of cluster.num_learner_ranks (4); found 7 "
        "usable; give 8 or more",
    ]


def test_examples_of_another_method_must_fill_a_step(config):
    check_amounts(put(config, method="filtered_sft"), Inputs({"sft": examples(9), "best_sft": examples(2)}))
    with pytest.raises(ConfigError) as raised:
        check_amounts(put(config, method="filtered_sft"), Inputs({"sft": examples(9), "best_sft": examples(1)}))
    assert str(raised.value) == (
        "sft.top_fraction must leave 2 or more different texts of data.preferences to train on and to hold out; found 0.5, "
        "which leaves 1; write a larger one, or give more texts"
    )
    rated = [RatedExample(example, [float(number)]) for number, example in enumerate(examples(3))]
    check_amounts(put(config, stage="preference"), Inputs({"completions": rated, "test_completions": rated}))
    with pytest.raises(
        ConfigError, match=r"^data.test must have at least 2 usable rows for stage preference; found 1$"
    ):
        check_amounts(put(config, stage="preference"), Inputs({"completions": rated, "test_completions": rated[:1]}))


def test_all_conflicts_are_listed_at_once(config):
    broken = put(config, stage="train", ppo__clip=2.0, ppo__sampling__top_p=0.9, learner__zero_stage=4, run_dir="???")
    lines = conflicts(broken)
    assert [line.split()[0] for line in lines] == [
        "run_dir",
        "stage",
        "learner.zero_stage",
        "ppo.clip",
        "ppo.sampling.top_p",
    ]


def test_seeds_and_numbers_of_rows_are_not_negative(config):
    broken = put(config, seed=-1, ppo__seed=-1, evaluate__seed=-1, data__sft__max_rows=-5)
    assert sorted(line.split()[0] for line in conflicts(broken)) == [
        "data.sft.max_rows",
        "evaluate.seed",
        "ppo.seed",
        "seed",
    ]


def test_machine_with_room_is_silent(config):
    assert check_machine(config, free_memory_gib=6.0, cpu_count=2) == []


def test_machine_without_memory_is_refused(config):
    expected = r"free memory must be at least cluster.min_memory_gib \(6.0 GiB\); found 5.9 GiB; write a smaller"
    with pytest.raises(ConfigError, match=expected):
        check_machine(config, free_memory_gib=5.9, cpu_count=2)


def test_threads_beyond_the_cores_are_a_warning(config):
    crowded = put(config, cluster__num_actors=2)
    assert check_machine(crowded, free_memory_gib=8.0, cpu_count=2) == [
        "warning: cluster.num_actors * cluster.threads_per_actor = 2 * 2 threads share 2 cores; write "
        "cluster.threads_per_actor=1"
    ]
    assert (
        check_machine(config, free_memory_gib=8.0, cpu_count=1) == []
    )  # of one process each, which has one thread there
    assert check_machine(put(crowded, cluster__address="auto"), free_memory_gib=8.0, cpu_count=2) == []


def test_closest():
    assert closest("adaptve", ["fixed", "adaptive"]) == "adaptive"
    assert closest("qqq", ["fixed", "adaptive"]) is None
    assert closest("fixed", []) is None


# ---- what nothing reads


def test_a_scorer_that_nothing_starts_is_told(config: TandemConfig) -> None:
    """PPO would train on a reward model instead. Beside a proxy of its own others may stand to choose parts from."""
    rule = {"kind": "function", "function": "rules.py:f"}
    (line,) = conflicts(with_scorers(config, prox=rule))
    assert line.startswith("reward_service.scorers must be proxy, on which PPO trains, gold, or parts of these")
    assert line.endswith("found prox; write reward_service.scorers.proxy in the place of prox")
    validate(with_scorers(config, proxy=rule, other=rule))
    validate(with_scorers(put(config, stage="sft"), prox=rule))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            {"stage": "evaluate", "preference_model": "x"},
            "preference_model must be null with method ppo, whose model is judged",
        ),
        ({"method": "dpo", "ppo_model": "x"}, "ppo_model must be null with method dpo, whose model is judged"),
        ({"stage": "ppo", "ppo_model": "x"}, "ppo_model must be null with stage ppo, which makes it"),
        ({"stage": "evaluate", "preference_model": "x", "ppo_model": "y"}, None),
        ({"method": "dpo", "preference_model": "x", "ppo_model": "y"}, None),
        ({"stage": "sft", "preference_model": "x"}, None),  # of a script that gives all to every stage
    ],
)
def test_a_checkpoint_of_another_method_is_not_judged_in_its_place(
    config: TandemConfig, given: dict[str, str], line: str | None
) -> None:
    changed = put(config, **given)
    if line is None:
        validate(changed)
    else:
        assert any(found.startswith(line) for found in conflicts(changed))


def test_without_a_reward_model_its_limit_binds_nothing(config: TandemConfig) -> None:
    long = put(config, data__max_prompt_tokens=512, engine__max_model_len=1536)
    for sampling in (long.ppo.sampling, long.evaluate.sampling):
        sampling.max_completion_tokens = 1024
    assert any("below reward_service.max_tokens (1024)" in line for line in conflicts(long))
    rule = {"kind": "function", "function": "rules.py:f"}
    validate(with_scorers(long, proxy=rule, gold=rule))
    assert any("below reward_service.max_tokens (1024)" in line for line in conflicts(with_scorers(long, proxy=rule)))


@pytest.mark.parametrize(("value", "is_right"), [(False, True), (True, True), ("auto", True), (0, False), (1, False)])
def test_a_number_is_no_choice_between_true_and_false(config: TandemConfig, value: Any, is_right: bool) -> None:
    changed = put(config, reuse_stages=value)
    if is_right:
        validate(changed)
    else:
        assert conflicts(changed)[0].startswith("reuse_stages must be one of auto, True, False; found")


# ---- scorers and the HTTP side of the reward service


def with_scorers(config: TandemConfig, **scorers: dict[str, Any]) -> TandemConfig:
    return put(config, reward_service__scorers={name: ScorerConfig(**values) for name, values in scorers.items()})


def test_scorers_that_can_be_served(config: TandemConfig) -> None:
    rule = {"kind": "function", "function": "rules.py:f"}
    both = {"kind": "weighted_sum", "parts": ["proxy_model", "rule"], "weights": [1.0, -0.5]}
    validate(with_scorers(config, proxy=both, rule=rule, other={"path": "model"}))
    validate(with_scorers(config, proxy={"path": "model", "append": "<|reward|>"}))
    validate(with_scorers(config, proxy={"kind": "ensemble", "parts": ["proxy_model", "other"]}, other={"path": "m"}))


@pytest.mark.parametrize(
    ("scorers", "message"),
    [
        ({"Big": {"path": "m"}}, "scorers.Big must be a name of lower-case letters"),
        ({"proxy_model": {"path": "m"}}, "other than proxy_model and gold_model; found proxy_model"),
        ({"a": {"kind": "modle", "path": "m"}}, "scorers.a.kind must be one of verifier, model, judge, function"),
        ({"a": {}}, "scorers.a.path must be a checkpoint's directory or a hub id; found null"),
        ({"a": {"path": "m", "read_at": "bos"}}, "scorers.a.read_at must be one of null, eos, last; found bos"),
        ({"a": {"path": "m", "append": ""}}, "scorers.a.append must be null, or a text where"),
        ({"a": {"path": "m", "append": "x", "read_at": "eos"}}, "scorers.a.append must be null, or a text where"),
        ({"a": {"kind": "function"}}, "scorers.a.function must be package.module:name or path/file.py:name; found null"),
        ({"a": {"kind": "function", "function": "rules.py"}}, "scorers.a.function must be"),
        ({"a": {"kind": "function", "function": "r.py:f", "timeout_s": 500.0}}, "below reward_service.deadline_s (120.0)"),
        ({"a": {"kind": "function", "function": "r.py:f", "processes": 0}}, "scorers.a.processes must be at least 1"),
        ({"a": {"kind": "function", "function": "r.py:f", "memory_gib": 0.0}}, "scorers.a.memory_gib must be above 0"),
        ({"a": {"kind": "ensemble", "parts": ["b"]}}, "names among a, gold, gold_model, proxy, proxy_model; found b"),
        ({"a": {"kind": "ensemble", "parts": ["proxy"]}}, "scorers.a.parts must be 2 scorers or more"),
        ({"a": {"kind": "ensemble", "parts": ["gold", "gold"]}}, "scorers.a.parts must be different scorers"),
        ({"a": {"kind": "ensemble", "parts": ["gold", "proxy"], "std_coef": -1.0}}, "scorers.a.std_coef must be 0 or more"),
        ({"a": {"kind": "weighted_sum", "parts": ["gold"]}}, "scorers.a.weights must be 1 numbers, one a part; found []"),
        (
            {"a": {"kind": "weighted_sum", "parts": ["b"], "weights": [1.0]},
             "b": {"kind": "weighted_sum", "parts": ["a"], "weights": [1.0]}},
            "reward_service.scorers must be free of loops; found a, b",
        ),
        (
            {"proxy": {"kind": "weighted_sum", "parts": ["a"], "weights": [1.0]},
             "a": {"kind": "weighted_sum", "parts": ["gold_model"], "weights": [1.0]}},
            "scorers.proxy must be without the gold judge, which PPO never sees; found gold_model",
        ),
    ],
)  # fmt: skip
def test_scorers_that_cannot(config: TandemConfig, scorers: dict[str, dict[str, Any]], message: str) -> None:
    assert any(message in line for line in conflicts(with_scorers(config, **scorers)))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_token(config: TandemConfig, host: str) -> None:
    validate(put(config, reward_service__http__port=8000, reward_service__http__host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "gpu-node", ""])
def test_beyond_loopback_a_token_is_required(config: TandemConfig, host: str, tmp_path: Path) -> None:
    opened = put(config, reward_service__http__port=8000, reward_service__http__host=host)
    [line] = conflicts(opened)
    assert "reward_service.http.token_file must be set where reward_service.http.host is not a loopback address" in line
    (tmp_path / "tokens").write_text("0123456789abcdef\nfedcba9876543210\n")
    validate(put(opened, reward_service__http__token_file=str(tmp_path / "tokens")))


@pytest.mark.parametrize("content", [None, "", "short\n", "0123456789abcdef\nshort\n"])
def test_a_token_file_has_tokens_worth_the_name(config: TandemConfig, content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokens").write_text(content)
    path = str(tmp_path / "tokens")
    [line] = conflicts(put(config, reward_service__http__port=8000, reward_service__http__token_file=path))
    assert "a file with one token of 16 characters or more a line" in line
    assert "short" not in line.replace("shorter", "")


def test_the_service_alone_needs_something_to_serve_and_a_port(config: TandemConfig) -> None:
    with pytest.raises(ConfigError) as raised:
        validate_service(TandemConfig())
    assert "for example proxy_model=CHECKPOINT" in str(raised.value)
    assert "reward_service=http or reward_service.http.port=8000" in str(raised.value)
    validate_service(put(TandemConfig(), proxy_model="m", reward_service__http__port=8000))
    with pytest.raises(ConfigError, match=r"service\.replicas"):
        validate_service(
            put(TandemConfig(), proxy_model="m", reward_service__http__port=8000, reward_service__replicas=0)
        )


def test_rules_alone_want_neither_preferences_nor_a_reward_model(config: TandemConfig) -> None:
    rule = {"kind": "function", "function": "rules.py:f"}
    config = with_scorers(put(config, data__gold=None, ppo__gold_rollouts=0), proxy=rule)
    config.data.preferences.path = config.data.test.path = ""
    for stage in ("pipeline", "ppo", "evaluate"):
        validate(put(config, stage=stage))
    for values in ({"stage": "reward_model"}, {"ppo__init_value_from": "reward_model"}, {"method": "dpo"}):
        lines = conflicts(put(config, **values))
        assert [line.split(" must be set")[0] for line in lines] == ["data.preferences.path", "data.test.path"]


def test_a_gold_judge_made_of_rules(config: TandemConfig) -> None:
    rule = {"kind": "function", "function": "rules.py:f"}
    config = put(config, data__gold=None)
    validate(with_scorers(config, gold=rule))  # ppo.gold_rollouts is 32
    both = {"kind": "weighted_sum", "parts": ["gold_model", "rule"], "weights": [1.0, 1.0]}
    (line,) = conflicts(with_scorers(config, gold=both, rule=rule))
    assert line.startswith(
        "data.gold or gold_model must be set where reward_service.scorers.gold has the part gold_model"
    )
    validate(put(with_scorers(config, gold=both, rule=rule), gold_model="m"))


def refused(config: TandemConfig) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        check_model(config)
    return str(raised.value).split("\n")


def test_nothing_is_longer_than_the_models_positions(config: TandemConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 305}))
    config = put(config, model__path=str(tmp_path), data__max_prompt_tokens=256, reward_model__max_tokens=305)
    model = f"305 positions of {tmp_path} (max_position_embeddings)"
    assert refused(put(config, sft__max_tokens=305)) == [
        f"engine.max_model_len must be at most the {model}; found 512; write engine.max_model_len=305 or less"
    ]
    config = put(config, engine__max_model_len=305)
    assert refused(config) == [
        f"sft.max_tokens must be at most the {model}; found 512; write sft.max_tokens=305 or less"
    ]
    config = put(config, sft__max_tokens=305)
    check_model(config)  # 256 + 48 + 1
    assert refused(put(config, evaluate__sampling__max_completion_tokens=49)) == [
        f"data.max_prompt_tokens + max_completion_tokens + 1 (scoring appends an EOS) must be at most the {model}; found "
        "306; write less of them"
    ]
    # Nothing samples, nothing is trained on preferences.
    check_model(put(config, stage="sft", engine__max_model_len=512))
    assert refused(put(config, method="dpo")) == [
        f"preference.max_tokens must be at most the {model}; found 512; write preference.max_tokens=305 or less"
    ]


@pytest.mark.parametrize(
    ("kind", "limit"), [("longrope", 64), ("dynamic", 1024)], ids=["longrope of Phi-3", "dynamic NTK"]
)
def test_no_row_is_longer_than_where_rope_changes_its_speed(
    config: TandemConfig, tmp_path: Path, kind: str, limit: int
) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "factor": 4.0}
    if kind == "longrope":
        factors = [1.0] * 32  # of each of a head's pairs of dimensions
        rope |= {"original_max_position_embeddings": 64, "short_factor": factors, "long_factor": factors}
    model = {"model_type": "llama", "max_position_embeddings": 1024, "rope_scaling": rope, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(model))
    config = put(config, model__path=str(tmp_path), stage="sft")
    check_model(put(config, sft__max_tokens=limit))
    (line,) = refused(put(config, sft__max_tokens=limit + 1))
    assert f"at most the {limit} positions" in line
    assert f"of rope_type {kind}" in line


def test_the_evaluation_serves_models_of_one_configuration(config: TandemConfig, tmp_path: Path) -> None:
    """Its engines are started once: another base would be served with the rotations of this one."""
    said = {"model_type": "llama", "vocab_size": 64, "rope_theta": 1e4, "tie_word_embeddings": False}
    others = {
        "same": {
            "eos_token_id": 7,
            "max_position_embeddings": 4096,
            "transformers_version": "4.30",
            "use_cache": False,
        },
        "faster": {"rope_theta": 1e6},
        "windowed": {"model_type": "mistral", "sliding_window": 16},
        "tied": {"tie_word_embeddings": True},
        "thinner": {"hidden_size": 64},
    }
    for name, changes in {"base": {}, **others}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(said | changes))
    config = put(config, model__path=str(tmp_path / "base"), proxy_model=str(tmp_path / "base"), data__gold=None)
    config = put(config, sft__max_tokens=64, ppo__gold_rollouts=0)
    for name, what in {
        "faster": "1000000.0",
        "windowed": "mistral",
        "tied": "True",
        "thinner": "64 instead of 4096",
    }.items():
        (line,) = refused(put(config, sft_model=str(tmp_path / name)))
        assert line.startswith(
            f"sft_model={tmp_path / name} must be a model with the settings of model.path={tmp_path / 'base'}"
        )
        assert what in line
        check_model(put(config, sft_model=str(tmp_path / name), stage="ppo"))  # which starts its engines for it
    check_model(put(config, sft_model=str(tmp_path / "same")))


QWEN = {
    "model_type": "qwen2",
    "vocab_size": 64,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 21,
}
WINDOWED = {"use_sliding_window": True, "max_window_layers": 12}


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        ({}, {"unsloth_version": "2025.1", "unsloth_fixed": True, "transformers.js_config": {"dtype": "q4"}}, ""),
        ({}, {"initializer_range": 0.01, "pretraining_tp": 2, "attention_dropout": 0.1, "resid_pdrop": 0.1}, ""),
        ({}, {"max_window_layers": 24, "use_mrope": False, "num_labels": 3, "pad_token_id": 5}, ""),
        ({}, {"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05 instead of 1e-06"),
        ({}, {"rope_theta": 1e6}, "rope_parameters"),
        ({}, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters"),
        ({}, {"num_attention_heads": 8}, "num_attention_heads 8 instead of 16"),
        ({}, {"num_key_value_heads": 4}, "num_key_value_heads 4 instead of 2"),
        ({}, {"head_dim": 64}, "head_dim 64 instead of None"),  # which the class does not declare, and the model reads
        ({}, {"hidden_act": "gelu"}, "hidden_act gelu instead of silu"),
        ({}, {"tie_word_embeddings": True}, "tie_word_embeddings True instead of False"),
        ({}, {"layer_types": ["sliding_attention"] * 24}, "layer_types"),
        ({}, WINDOWED, "layer_types"),
        (WINDOWED, {"sliding_window": 512}, "sliding_window 512 instead of 4096"),
        (WINDOWED, {"max_window_layers": 13}, "layer_types"),
        (WINDOWED, {"unsloth_version": "2025.1"}, ""),
    ],
)
def test_only_what_decides_a_number_tells_configurations_apart(
    config: TandemConfig, tmp_path: Path, base: dict, changes: dict, named: str
) -> None:
    for name, said in (("base", base), ("other", base | changes)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(QWEN | said))
    config = put(config, model__path=str(tmp_path / "base"), proxy_model=str(tmp_path / "base"), data__gold=None)
    config = put(config, sft__max_tokens=64, ppo__gold_rollouts=0, sft_model=str(tmp_path / "other"))
    if named:
        (line,) = refused(config)
        assert named in line
    else:
        check_model(config)


def test_a_reward_model_that_is_given_has_positions_of_its_own(config: TandemConfig, tmp_path: Path) -> None:
    paths = {}
    for name, count in (("policy", 1024), ("judge", 304)):
        paths[name] = str(tmp_path / name)
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_positions": count}))
    config = put(config, model__path=paths["policy"], proxy_model=paths["judge"], data__gold=None)
    value, served = refused(config)
    assert f"must be at most the 304 positions of {paths['judge']} (max_position_embeddings); found 305" in served
    assert value.startswith("engine.max_model_len must be at most the 304 positions")  # the value model starts from it
    (line,) = refused(put(config, ppo__estimator="grpo", ppo__samples_per_prompt=2))
    assert line == served
    # A rule needs no model, and this one is not asked.
    rules = tmp_path / "rules.py"
    rules.write_text("def f(completions): return [0.0]")
    rule = {"kind": "function", "function": f"{rules}:f"}
    check_model(with_scorers(config, proxy=rule))
    assert refused(with_scorers(config, proxy={**rule, "function": f"{tmp_path}/rulse.py:f"})) == [
        f"reward_service.scorers.proxy: {tmp_path}/rulse.py:f: there is no source file {tmp_path}/rulse.py"
    ]


def test_rows_without_what_a_rule_asks_for_are_refused(config: TandemConfig, tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text(
        "def trl(completions, answer, hint=None): ...\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None): ...\n"
        "def ours(texts, rows): ...\n"
        "def reward_func(queries, prompts, labels): ...\n"
    )

    def check(name: str, **rows: str | None) -> None:
        scorers = {"proxy": {"kind": "weighted_sum", "parts": ["rule"], "weights": [1.0]}}
        rule = {"rule": {"kind": "function", "function": f"{tmp_path}/rules.py:{name}"}}
        prompts = {
            source: [Prompt(0, "", (1,), '{"answer": "1"}'), Prompt(4, "", (2,), row)] for source, row in rows.items()
        }
        check_rows(with_scorers(config, **scorers, **rule), Inputs(prompts))

    for source in ("prompts", "eval_prompts"):
        check("trl", **{source: '{"answer": null}'})
        check("ours", **{source: None})
        with pytest.raises(ConfigError) as caught:
            check("trl", **{source: '{"answr": "1"}'})
        assert str(caught.value) == (
            f"reward_service.scorers.rule needs answer of every row, which row 4 of data.{source} does not have; found "
            f"answr; add it to the data, and to data.{source}.keep where that names columns"
        )
    with pytest.raises(ConfigError, match=r"rule needs label of every row, which row 0 of data.prompts does not have"):
        check("reward_func", prompts='{"label": 5}')
    with pytest.raises(
        ConfigError, match=r"rule needs ground_truth .or reward_model with one. of every row, which row 0"
    ):
        check("compute_score", prompts='{"ground_truth": "1"}')
    check_rows(config, Inputs({"prompts": [Prompt(0, "", (1,))]}))


def test_a_rule_in_no_known_form_is_refused(config: TandemConfig, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "gpt2", "n_positions": 1024}))
    config = put(config, model__path=str(tmp_path / "model"), data__gold=None)
    rules = tmp_path / "rules.py"
    rules.write_text(
        "def f(sentence): return 0.0\n"
        "async def g(completions): return [0.0]\n"
        "def h(x): ...\ndef h(completions): return [0.0]\n"
        "def made_of(function): return function\n"
        "@made_of\ndef i(sentence): return 0.0\n"  # its import says so
        "@made_of\ndef k(completions): return [0.0]\n"
        "def j(data_source, solution_str, ground_truth, router): return 0.0\n"
    )

    def with_rule(name: str) -> TandemConfig:
        return with_scorers(config, proxy={"kind": "function", "function": f"{rules}:{name}"})

    for name in ("g", "h", "k"):
        check_model(with_rule(name))
    imported = "must be a function that a process of its own can import and call; found"
    (line,) = refused(with_rule("i"))
    assert f"{rules}:i {imported} UnknownForm: it takes no completions" in line
    for name, why in (("f", "it takes no completions"), ("j", "there is nothing to give it for 'router'")):
        assert refused(with_rule(name)) == [
            f"reward_service.scorers.proxy.function={rules}:{name} must be a function that is called in a known form: "
            f"{why}; accepted are {ACCEPTED}"
        ]
    rules.write_text("async def f(:")
    (line,) = refused(with_rule("f"))
    assert f"{rules}:f {imported} SyntaxError: " in line


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"model_type": "llama", "max_position_embeddings": 128}, 128),
        ({"model_type": "gpt2", "n_positions": 64}, 64),
        ({"model_type": "mpt", "max_seq_len": 96}, 96),
        ({"model_type": "opt", "max_position_embeddings": 48}, 48),
        ({"model_type": "mamba"}, None),
        ({"model_type": "llama", "max_position_embeddings": 128, "seq_len": 90}, 90),
        ({"model_type": "llama", "max_position_embeddings": 128, "max_target_positions": 80}, 80),
        ({"model_type": "cohere", "max_position_embeddings": 128, "model_max_length": 512}, 512),
        (
            {
                "model_type": "llama",
                "max_position_embeddings": 128,
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
            512,
        ),
        (
            {
                "model_type": "llama",
                "max_position_embeddings": 128,
                "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
            },
            256,
        ),
        (
            {
                "model_type": "qwen2",
                "max_position_embeddings": 512,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
            },
            512,
        ),
        (
            {
                "model_type": "llama",
                "max_position_embeddings": 128,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            },
            128,
        ),
        (
            {
                "model_type": "gemma2",
                "max_position_embeddings": 100,
                "rope_scaling": {"rope_type": "linear", "factor": 2.5},
            },
            250,
        ),
        (
            {
                "model_type": "gemma3_text",
                "max_position_embeddings": 256,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            256,
        ),
    ],
)
def test_positions_are_those_that_vllm_finds(tmp_path: Path, model: dict[str, Any], expected: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model))
    found = AutoConfig.from_pretrained(tmp_path).get_text_config()
    assert (count := positions(found)) == (None if expected is None else (expected, count[1] if count else ""))
    architecture = SimpleNamespace(
        derived_max_model_len_and_key=ModelArchConfigConvertorBase(found, found).derive_max_model_len_and_key()
    )
    arguments = (found, architecture, None)
    options = {"disable_sliding_window": False, "sliding_window": None}
    if expected is not None:
        assert vllm_length(*arguments, expected, **options) == expected
        with pytest.raises(ValueError, match="is greater than the derived max_model_len"):
            vllm_length(*arguments, expected + 1, **options)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "fitting"),
    # SmolLM2-135M; Llama-3-8B; one key-value head, copied to each worker.
    [(9, 3, [1, 3, 9]), (32, 8, [1, 2, 4, 8, 16, 32]), (6, 1, [1, 2, 3, 6]), (12, 4, [1, 2, 4, 12])],
)
def test_tensor_parallel_workers_share_the_heads_evenly(
    config: TandemConfig, tmp_path: Path, heads: int, kv_heads: int, fitting: list[int]
) -> None:
    model = {"model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    (tmp_path / "config.json").write_text(json.dumps(model | {"hidden_size": 8 * heads}))
    refused = {}
    for size in range(1, heads + 1):
        try:
            check_model(put(config, model__path=str(tmp_path), engine__tensor_parallel_size=size))
        except ConfigError as error:
            refused[size] = str(error)
    assert sorted({*range(1, heads + 1)} - {*refused}) == fitting
    listed = ", ".join(map(str, fitting))
    assert refused[heads - 1] == (
        f"engine.tensor_parallel_size must divide the model's {heads} attention heads, and divide its {kv_heads} key-value "
        f"heads or be a multiple of them; found {heads - 1}; write one of {listed}, with as many cluster.gpus_per_actor"
    )
    check_model(put(config, model__path=str(tmp_path), engine__tensor_parallel_size=heads - 1, stage="sft"))


def test_a_stage_by_itself_is_refused_for_what_it_reads_alone(config):
    """And a pipeline for everything."""
    wrong = {
        "ppo__rollouts_per_update": 3,
        "ppo__minibatches": 8,
        "ppo__estimator": "other",
        "ppo__sampling__max_completion_tokens": 9000,
        "evaluate__prompts": 1,
        "engine__max_model_len": 0,
        "environment__name": "none",
        "reward_service__replicas": 0,
        "preference__epochs": 0,
        "reward_model__batch_size": 0,
        "checkpoint__keep": 0,
    }
    broken = put(config, **wrong)
    validate(put(broken, stage="sft"))
    found = conflicts(broken)
    for key in wrong:
        assert any(key.replace("__", ".") in line for line in found), key
    assert {line.split()[0] for line in conflicts(put(broken, stage="reward_model"))} == {"reward_model.batch_size"}
    assert {line.split()[0] for line in conflicts(put(broken, stage="preference"))} == {"preference.epochs"}
    lines = conflicts(
        put(broken, stage="sft", sft__epochs=0, ppo__seed=-1, data__sft__max_rows=0, data__test__max_rows=0)
    )
    assert {line.split()[0] for line in lines} == {"sft.epochs", "ppo.seed", "data.sft.max_rows"}
    alone = [
        line.split()[0]
        for line in conflicts(put(broken, stage="evaluate", ppo_model="x", sft_model="x", proxy_model="x"))
    ]
    assert {"evaluate.prompts", "engine.max_model_len", "environment.name", "reward_service.replicas"} <= set(alone)
    assert not {"ppo.estimator", "checkpoint.keep", "preference.epochs"} & set(alone)


def test_the_value_model_has_layers_of_its_own(config, tmp_path):
    from transformers import LlamaConfig

    for name, layers in (("policy", 4), ("proxy", 2)):
        LlamaConfig(num_hidden_layers=layers).save_pretrained(tmp_path / name)
    paths = {"model__path": str(tmp_path / "policy"), "sft_model": str(tmp_path / "policy")}
    given = put(config, stage="ppo", proxy_model=str(tmp_path / "proxy"), ppo__value_trainable_layers=3, **paths)
    with pytest.raises(ConfigError, match=r"ppo\.value_trainable_layers is 3, the model has 2 layers"):
        check_model(given)
    check_model(put(given, ppo__init_value_from="policy"))


def test_a_model_of_another_vocabulary_than_the_tokenizer_is_refused(config, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM)
    for name in ("ours", "other", "short"):
        LlamaConfig(num_hidden_layers=2, vocab_size=600 if name == "short" else 49160).save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "ours")
    tokenizer.add_tokens(["<|one_more|>"])
    tokenizer.save_pretrained(tmp_path / "other")
    given = put(config, stage="ppo", model__path=str(tmp_path / "ours"), proxy_model=str(tmp_path / "ours"))
    check_model(put(given, sft_model=str(tmp_path / "ours")))
    rule = "must be a model with the vocabulary of model.path"
    with pytest.raises(ConfigError, match=rf"sft_model=.*other {rule}=.*ours.*; found another one; write"):
        check_model(put(given, sft_model=str(tmp_path / "other")))
    with pytest.raises(ConfigError, match=rf"sft_model=.*short {rule}.*; found 600 tokens"):
        check_model(put(given, sft_model=str(tmp_path / "short")))
    fine = put(given, sft_model=str(tmp_path / "ours"), proxy_model=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match=rf"proxy_model=.*other {rule}"):  # the value model starts from it
        check_model(put(fine, ppo__init_value_from="reward_model"))


def test_checkpoints_and_layers_of_other_stages_are_not_looked_at(config, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    nowhere = str(tmp_path / "nowhere")
    given = put(config, model__path=str(tmp_path / "model"), proxy_model=nowhere, ppo__trainable_layers=9)
    check_model(put(given, stage="sft"))
    with pytest.raises(ConfigError) as raised:
        check_model(put(given, stage="ppo"))
    assert f"proxy_model={nowhere}: no model can be loaded from there" in str(raised.value)
    assert "ppo.trainable_layers is 9, the model has 2 layers" in str(raised.value)


@pytest.mark.parametrize("section", ["ppo", "evaluate"])
def test_temperatures_that_vllm_would_raise_are_refused(config: TandemConfig, section: str) -> None:
    found = conflicts(put(config, **{f"{section}__sampling__temperature": 0.005}))
    assert any(line.startswith(f"{section}.sampling.temperature must be in [0.01, 2]; found 0.005") for line in found)


@pytest.mark.parametrize(
    ("key", "value"),
    [("evaluate__sampling__top_p", 0), ("evaluate__sampling__min_completion_tokens", -3), ("evaluate__samples", 0)],
)
def test_what_ppo_samples_held_out_prompts_with_is_held_to_its_bounds(
    config: TandemConfig, key: str, value: float
) -> None:
    alone = put(config, stage="ppo", sft_model="sft", proxy_model="proxy", gold_model="gold")
    validate(put(alone, **{key: value}))  # nothing reads it
    found = conflicts(put(alone, evaluate__every=4, **{key: value}))
    assert any(line.startswith(f"{key.replace('__', '.')} must be") for line in found)
