"""Adapters on two real learner ranks under each stage of ZeRO: the update of one rank, the same engine after a resume."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from common.models.adapters import read_tensors
from contracts.config import LoraByRoleConfig, LoraConfig, RoleLoraConfig, TandemConfig
from contracts.records import TrainingBatch
from controller.cluster.runtime import Runtime
from controller.loop.training_batches import make_batches
from learner.learner_actor import LearnerGroup
from learner.weight_publisher import BACKEND
from tests.conftest import make_config
from tests.integration.test_ranks import EOS, rollouts
from tests.learners import Learners

pytestmark = pytest.mark.usefixtures("ray_runtime")
STAGES = [pytest.param(1, marks=pytest.mark.full), 2, pytest.param(3, marks=pytest.mark.full)]
SAMPLES = rollouts()
SCORES = np.random.default_rng(1).normal(size=len(SAMPLES)).tolist()
SEQUENCES = [([*r.prompt.token_ids, *r.completion.token_ids.tolist()], 2) for r in SAMPLES]


def configured(model: Path, folder: Path, dtype: str) -> TandemConfig:
    config = make_config(model, folder, dtype)
    config.model.lora = LoraConfig(rank=4, alpha=8.0)
    config.model.lora_by_role = LoraByRoleConfig(value_model=RoleLoraConfig(rank=2, targets=["q_proj", "down_proj"]))
    ppo = config.ppo
    ppo.target_approx_kl = ppo.trainable_layers = ppo.value_trainable_layers = None
    # Adam divides by |g| + eps: with a large eps a step stays proportional to small gradients.
    for optimizer in (ppo.optimizer, ppo.value_optimizer):
        optimizer.learning_rate, optimizer.eps = 3e-2, 1e-2
    return config


def begin(learners: Learners, config: TandemConfig, ranks: int, zero: int) -> LearnerGroup:
    config.learner.zero_stage, config.learner.held_tokens = zero, 0 if zero == 3 else 1000
    config.cluster = replace(config.cluster, num_learner_ranks=ranks, threads_per_learner_rank=1)
    path = config.model.path
    return learners.begin(config, ranks, "ppo", config, path, path, (EOS,), [])


def batches(ranks: int, number: int = 0) -> list[TrainingBatch]:
    return make_batches(SAMPLES, SCORES, ranks, 1, 20, np.random.default_rng(number))


def update(group: LearnerGroup, number: int = 0) -> dict[str, float]:
    ranks = len(group.actors)
    metrics = ray.get(group.start_each("update", batches(ranks, number), 0.1, True), timeout=300)
    return {name: value for name, value in metrics[0].items() if not name.startswith("perf/")}


def pids(group: LearnerGroup) -> list[int]:
    return ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in group.actors], timeout=60)


def own_pages(pid: int, model: Path) -> float:
    """KiB of the checkpoint's file that the process has copied by writing to them; others it shares."""
    found, is_file = 0.0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            is_file = words[-1] == f"{model}/model.safetensors"
        elif is_file and words[0] == "Anonymous:":
            found += float(words[1])
    return found


def adapter(group: LearnerGroup, folder: Path) -> dict[str, torch.Tensor]:
    group.call("save", str(folder))
    return read_tensors(str(folder))


@pytest.fixture(scope="module")
def update_of(
    learners: Learners, small_vocab: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, int], Any]:
    """Metrics of both updates and the policy's adapter before and after them, for ranks and a stage of ZeRO."""

    def run(ranks: int, zero: int) -> Any:
        folder = tmp_path_factory.mktemp("update")
        model = shutil.copytree(small_vocab, folder / "model")  # other tests' tasks have written to the pages of theirs
        group = begin(learners, configured(model, folder, "float32"), ranks, zero)
        before = adapter(group, folder / "before")
        metrics = [update(group) for _ in range(2)]  # A has no gradient before B has moved
        assert zero == 3 or [own_pages(pid, model) for pid in pids(group)] == [0] * ranks
        return metrics, before, adapter(group, folder / "after")

    return run


@pytest.fixture(scope="module")
def of_one(update_of: Callable[[int, int], Any]) -> Any:
    return update_of(1, 0)


@pytest.mark.parametrize("zero", STAGES)
def test_two_ranks_make_the_update_of_one(zero: int, of_one: Any, update_of: Callable[[int, int], Any]) -> None:
    metrics, before, after = update_of(2, zero)
    expected, its_before, its_after = of_one
    assert {name: t.shape for name, t in after.items()} == {name: t.shape for name, t in its_after.items()}
    assert all(torch.equal(before[name], its_before[name]) for name in before)
    moved = {name: its_after[name] - its_before[name] for name in its_after}
    for kind in ("lora_A", "lora_B"):
        names = [name for name in moved if kind in name]
        largest = max(moved[name].abs().max().item() for name in names)
        assert largest > 1e-3
        for name in names:
            torch.testing.assert_close(after[name] - before[name], moved[name], rtol=0, atol=1e-3 * largest)
    for found, row in zip(metrics, expected, strict=True):
        assert {"policy/grad_norm", "value/grad_norm", "value/loss"} <= row.keys()
        assert found == pytest.approx(row, rel=1e-3, abs=1e-5)


@pytest.fixture(scope="module")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    config = configured(tiny_model, tmp_path_factory.mktemp("engine"), "bfloat16")
    config.cluster.num_actors, config.cluster.threads_per_actor = 1, 1
    runtime = Runtime(config)
    try:
        with runtime.actors(config.model.path, BACKEND, (EOS,), None) as actors:
            yield actors
    finally:
        runtime.release()


@pytest.mark.parametrize("zero", STAGES)
def test_two_ranks_resume_to_the_bit_and_publish_what_they_have(
    zero: int, engine: list[Any], learners: Learners, tiny_model: Path, tmp_path: Path
) -> None:
    config = configured(tiny_model, tmp_path, "bfloat16")
    group = begin(learners, config, 2, zero)

    def served(version: int) -> tuple[np.ndarray, np.ndarray]:
        """log p by the learner and by the engine that it has published to, float64 [tokens]."""
        group.call("connect", BACKEND, engine, version)[0].require_all()
        mine = np.concatenate(group.call("token_logprobs", SEQUENCES)[0])
        return mine, np.concatenate(ray.get(engine[0].token_logprobs.remote(SEQUENCES), timeout=120))

    begun, _ = served(0)
    for number in range(2):
        update(group, number)
    commit = tmp_path / "step_2"
    commit.mkdir()
    group.call("begin_commit", str(commit))
    records = {name: record for part in group.call("state.result") for name, record in part.items()}
    assert {"rank_0.safetensors", "rank_1.safetensors", "policy/adapter_model.safetensors"} <= records.keys()
    expected = [update(group, number) for number in (2, 3)]
    mine, its = served(1)
    moved = np.abs(mine - begun).mean()
    assert moved > 0.1
    assert np.abs(mine - its).mean() < min(0.05, moved / 4)  # bfloat16
    trained = adapter(group, tmp_path / "unbroken")

    group.restart()
    assert group.votes("state.check", str(commit), records) == [None, None]
    group.call("load_commit", str(commit))
    assert [update(group, number) for number in (2, 3)] == expected
    again = adapter(group, tmp_path / "resumed")
    assert [name for name in trained if not torch.equal(again[name], trained[name])] == []
    assert np.array_equal(served(0), (mine, its))
