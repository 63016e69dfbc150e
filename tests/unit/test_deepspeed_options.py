"""What is asked of DeepSpeed: what reaches it, and what is refused before it starts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from contracts.checks.deepspeed_checks import KNOWN, OURS, QUANTISED, deepspeed_checks
from contracts.config import LearnerConfig, TandemConfig
from learner.engine import TrainEngine, deepspeed_config
from learner.models import load_policy
from learner.ranks import Ranks
from tests.conftest import make_config

ZERO = "zero_optimization."


def refused(**learner: Any) -> dict[str, str]:
    config = TandemConfig(learner=LearnerConfig(**learner))
    return {check.key: check.message for check in deepspeed_checks(config) if not check.holds}


def test_the_names_are_deepspeeds() -> None:
    fields = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    named = {name.removeprefix(ZERO) for name in (*KNOWN, *OURS) if name.startswith(ZERO)} | {*QUANTISED}
    assert named <= fields


@pytest.fixture
def engine(small_vocab: Path, tmp_path: Path, ranks: Ranks) -> Callable[..., TrainEngine]:
    def make(**learner: Any) -> TrainEngine:
        config = make_config(small_vocab, tmp_path, "float32")
        config.learner = LearnerConfig(**learner)
        model = load_policy(str(small_vocab), config.model, config.learner, on_cpu=True)
        return TrainEngine(model, config.ppo.optimizer, config.learner, ranks, total_steps=1)

    return make


def test_what_is_written_reaches_deepspeed(engine: Callable[..., TrainEngine]) -> None:
    asked = {"zero_optimization": {"reduce_bucket_size": 12_345, "overlap_comm": True}, "memory_breakdown": True}
    made = engine(zero_stage=2, deepspeed=asked)._engine
    assert made.zero_reduce_bucket_size() == 12_345
    assert (made.zero_overlap_comm(), made.memory_breakdown()) == (True, True)
    assert made.zero_optimization_stage() == 2  # what was not written stays


@pytest.mark.parametrize(("offload", "zero_stage"), [("none", 2), ("optimizer", 2), ("parameters", 3)])
def test_what_is_offloaded(offload: str, zero_stage: int, engine: Callable[..., TrainEngine]) -> None:
    made = engine(zero_stage=zero_stage, offload=offload)._engine
    assert bool(made.zero_offload_optimizer()) == (offload != "none")
    assert bool(made.zero_offload_param()) == (offload == "parameters")


def test_memory_is_pinned_and_communication_overlaps_on_gpus_alone() -> None:
    learner = LearnerConfig(zero_stage=3, offload="parameters")
    zero = {on_cpu: deepspeed_config(learner, torch.bfloat16, on_cpu)["zero_optimization"] for on_cpu in (True, False)}
    assert [zero[on_cpu]["overlap_comm"] for on_cpu in (True, False)] == [False, True]
    for part in ("offload_optimizer", "offload_param"):
        assert [zero[on_cpu][part] for on_cpu in (True, False)] == [
            {"device": "cpu", "pin_memory": False},
            {"device": "cpu", "pin_memory": True},
        ]


@pytest.mark.parametrize(
    ("learner", "key", "message"),
    [
        (
            {"offload": "optimizer"},
            "learner.zero_stage",
            "must be 1 or more with learner.offload optimizer: ZeRO keeps what is offloaded; found 0; write "
            "learner.zero_stage=1, or learner.offload=none",
        ),
        ({"offload": "parameters", "zero_stage": 2}, "learner.zero_stage", "must be 3 or more with learner.offload"),
        ({"checkpointed_layers": 2}, "learner.checkpointed_layers", "null without learner.gradient_checkpointing"),
        ({"deepspeed": {"train_batch_size": 8}}, "learner.deepspeed.train_batch_size", "write sft.batch_size and its"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "learner.deepspeed.bf16", "write model.dtype"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3}}},
            "learner.deepspeed.zero_optimization.stage",
            "must be left to Tandem, which sets it; found 3; write learner.zero_stage",
        ),
        (
            {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}},
            "learner.deepspeed.zero_optimization.offload_optimizer",
            "write learner.offload=optimizer",
        ),
        (
            {"zero_stage": 3, "deepspeed": {"zero_optimization": {"zero_quantized_weights": True}}},
            "learner.deepspeed.zero_optimization.zero_quantized_weights",
            "log-probabilities of quantised weights are not those of the engines",
        ),
        (
            {"zero_stage": 1, "deepspeed": {"zero_optimization": {"reduce_buket_size": 5}}},
            "learner.deepspeed.zero_optimization.reduce_buket_size",
            "found 5; write learner.deepspeed.zero_optimization.reduce_bucket_size",
        ),
        ({"deepspeed": {"autotuning": {}}}, "learner.deepspeed.autotuning", "known to go with the learner"),
        (
            {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 5}}},
            "learner.deepspeed.zero_optimization.reduce_bucket_size",
            "left out with learner.zero_stage 0",
        ),
        (
            {"zero_stage": 2, "deepspeed": {"zero_optimization": {"stage3_max_live_parameters": 5}}},
            "learner.deepspeed.zero_optimization.stage3_max_live_parameters",
            "left out with learner.zero_stage 2; found 5; write learner.zero_stage=3 as well",
        ),
        (
            {"zero_stage": 2, "deepspeed": {"zero_optimization": {"reduce_bucket_size": True}}},
            "learner.deepspeed.zero_optimization.reduce_bucket_size",
            "must be a number from 0 on; found True",
        ),
        (
            {"zero_stage": 2, "deepspeed": {"zero_optimization": {"overlap_comm": "yes"}}},
            "learner.deepspeed.zero_optimization.overlap_comm",
            "must be true or false; found yes",
        ),
        ({"deepspeed": {"zero_optimization": [1]}}, "learner.deepspeed.zero_optimization", "must be"),
        (
            {"zero_stage": 2, "deepspeed": {"zero_optimization.reduce_bucket_size": 5}},
            "learner.deepspeed.zero_optimization.reduce_bucket_size",
            "must be written as DeepSpeed nests it, where a dot begins a section; found 5; write "
            "learner.deepspeed={zero_optimization: {reduce_bucket_size: 5}}",
        ),
        (
            {"deepspeed": {"communication_data_type": "bf16"}},
            "learner.deepspeed.communication_data_type",
            "must be one of fp32; found bf16",
        ),
        (
            {"deepspeed": {"communication_data_type": "float32"}},
            "learner.deepspeed.communication_data_type",
            "must be one of fp32; found float32; write fp32",
        ),
        # DeepSpeed asserts against it where it reduces by scattering, as it does by default.
        ({"deepspeed": {"prescale_gradients": True}}, "learner.deepspeed.prescale_gradients", "known to go with"),
    ],
)
def test_what_is_refused(learner: dict[str, Any], key: str, message: str) -> None:
    found = refused(**learner)
    assert [*found] == [key]
    assert message in found[key]


def test_what_goes_together() -> None:
    zero = {"reduce_bucket_size": 200_000_000, "stage3_prefetch_bucket_size": 0}
    options = {"zero_optimization": zero, "communication_data_type": "fp32", "wall_clock_breakdown": True}
    learner = {"zero_stage": 3, "offload": "parameters", "gradient_checkpointing": True, "checkpointed_layers": 4}
    assert refused(**learner, deepspeed=options) == {}
