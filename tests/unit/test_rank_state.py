"""A learner rank that goes back to a commit goes on bit for bit, under every ZeRO stage; nothing is copied to write it."""

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.files import durable
from contracts.config import TandemConfig
from contracts.records import Example, TrainingBatch
from controller.loop.training_batches import make_batches
from learner.learner_actor import LearnerActor
from learner.ppo import PPOTask
from learner.rank_state import random_state, set_random_state
from learner.ranks import Ranks
from tests.conftest import make_config
from tests.unit.test_ppo_task import EOS, PTX, ROLLOUTS, SCORES


@pytest.fixture
def make(small_vocab: Path, small_bfloat16: Path, tmp_path: Path, ranks: Ranks) -> Callable[..., PPOTask]:
    def make(
        dtype: str = "float32",
        zero: int = 0,
        change: Callable[[TandemConfig], None] | None = None,
        offload: str = "none",
    ) -> PPOTask:
        model = small_vocab if dtype == "float32" else small_bfloat16
        config = make_config(model, tmp_path, dtype)
        config.learner.zero_stage, config.learner.held_tokens = zero, 0 if zero == 3 else 1000
        config.learner.offload = offload
        config.ppo.optimizer.learning_rate, config.ppo.optimizer.schedule = 1e-3, "linear"
        config.ppo.updates, config.ppo.optimizer.warmup_steps = 8, 2
        config.ppo.trainable_layers, config.ppo.target_approx_kl = 1, None
        if change:
            change(config)
        ptx: list[Example] = PTX if config.ppo.ptx_coef else []
        return PPOTask(ranks, config, config.model.path, config.model.path, (EOS,), ptx)

    return make


def batch(number: int) -> TrainingBatch:
    return make_batches(ROLLOUTS, SCORES, 1, 1, 16, np.random.default_rng(number))[0]


def update(task: PPOTask, number: int, train_policy: bool = True) -> dict[str, float]:
    metrics = task.update(batch(number), 0.1, train_policy)
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


def weights(task: PPOTask) -> dict[str, torch.Tensor]:
    engines = {"policy": task.policy} | ({"value": task.value} if task.value else {})
    return {f"{e}.{n}": w.detach().clone() for e, engine in engines.items() for n, w in engine.named_weights()}


def commit(task: PPOTask, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    task.begin_commit(str(folder))
    return task.state.result()


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adam_counts_the_steps_that_were_taken(dtype: str, zero: int, make: Callable[..., PPOTask]) -> None:
    """DeepSpeed's optimizer for bfloat16 without ZeRO takes one of its own, which is taken back."""

    def decaying(config: TandemConfig) -> None:
        config.ppo.optimizer.weight_decay = 0.5

    task = make(dtype, zero, decaying)
    if zero == 0:  # nothing has decayed yet
        trains = [weight for weight in task.policy.model.parameters() if weight.requires_grad]
        masters = task.policy._masters()
        assert all(torch.equal(m.detach(), w.detach().float()) for m, w in zip(masters, trains, strict=True))
    for number in range(2):
        update(task, number)
        engine = task.policy
        assert {float(engine._adam.state[m]["step"]) for m in engine._masters()} == {float(engine._engine.global_steps)}


@pytest.mark.parametrize(
    ("dtype", "zero", "offload"),
    [
        ("float32", 0, "none"),
        ("bfloat16", 0, "none"),
        ("bfloat16", 2, "none"),
        ("bfloat16", 3, "none"),
        ("bfloat16", 2, "optimizer"),
        ("bfloat16", 3, "parameters"),
    ],
)
def test_a_resumed_rank_goes_on_bit_for_bit(
    dtype: str, zero: int, offload: str, make: Callable[..., PPOTask], tmp_path: Path
) -> None:
    """The unbroken task writes its commit while it trains on."""
    unbroken = make(dtype, zero, offload=offload)
    for number in range(2):
        update(unbroken, number)
    (tmp_path / "step_2").mkdir()
    unbroken.begin_commit(str(tmp_path / "step_2"))
    expected = [update(unbroken, number) for number in (2, 3)]
    assert unbroken.state._writing is not None
    assert unbroken.state._writing.done()  # the update waited for it
    records = unbroken.state.result()
    assert all(durable.problem(tmp_path / "step_2" / name, record) is None for name, record in records.items())

    resumed = make(dtype, zero, offload=offload)
    assert resumed.state.check(str(tmp_path / "step_2"), records) is None
    resumed.load_commit(str(tmp_path / "step_2"))
    assert [update(resumed, number) for number in (2, 3)] == expected
    mine, theirs = weights(resumed), weights(unbroken)
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []


def test_without_the_state_of_adam_it_would_differ(make: Callable[..., PPOTask], tmp_path: Path) -> None:
    """The comparison above can fail: moments and schedule matter on these batches."""
    unbroken, resumed = make(), make()
    update(unbroken, 0)
    records = commit(unbroken, tmp_path / "step_1")
    assert resumed.state.check(str(tmp_path / "step_1"), records) is None
    resumed.load_commit(str(tmp_path / "step_1"))
    resumed.policy._adam.state.clear()
    update(unbroken, 1)
    update(resumed, 1)
    theirs = weights(unbroken)
    assert any(not torch.equal(mine, theirs[name]) for name, mine in weights(resumed).items())


def test_back_to_before_the_first_policy_step(make: Callable[..., PPOTask], tmp_path: Path) -> None:
    """A commit of the value model's warm-up knows no moments of the policy: a task that has some forgets them."""
    unbroken, other = make(), make()
    update(unbroken, 0, train_policy=False)
    commit(unbroken, tmp_path / "step_1")
    expected = update(unbroken, 1)
    for number in (5, 6):
        update(other, number)
    other.load_commit(str(tmp_path / "step_1"))
    assert update(other, 1) == expected


def test_draws_go_on(make: Callable[..., PPOTask], tmp_path: Path) -> None:
    """PPO-ptx draws its examples, and whoever uses torch's generator draws on."""

    def with_ptx(config: TandemConfig) -> None:
        config.ppo.ptx_coef, config.ppo.ptx_batch_size = 0.5, 1

    unbroken = make(change=with_ptx)
    for number in range(2):
        update(unbroken, number)
    commit(unbroken, tmp_path / "step_2")
    expected = [update(unbroken, number) for number in (2, 3, 4)]
    drawn = torch.rand(3), np.random.rand(3)
    resumed = make(change=with_ptx)
    resumed.load_commit(str(tmp_path / "step_2"))
    assert [update(resumed, number) for number in (2, 3, 4)] == expected
    assert torch.equal(torch.rand(3), drawn[0])
    assert np.array_equal(np.random.rand(3), drawn[1])


def test_the_policy_is_a_plain_checkpoint(make: Callable[..., PPOTask], tmp_path: Path) -> None:
    task = make("bfloat16")
    update(task, 0)
    commit(task, tmp_path / "step_1")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "step_1/policy", dtype=torch.bfloat16)
    mine = dict(task.policy.named_weights())
    assert all(torch.equal(p, mine[name]) for name, p in loaded.named_parameters())


def test_a_step_waits_for_the_writer_and_says_so(make: Callable[..., PPOTask], tmp_path: Path, ranks: Ranks) -> None:
    task, actor = make(), LearnerActor(0, 1, on_cpu=True)
    actor._task, actor._ranks = task, ranks
    written, pulses = threading.Event(), list[int | None]()

    def slow_disk(path: str) -> None:
        written.wait(30)
        while not ranks.is_writing:  # the backward pass goes on meanwhile
            time.sleep(0.01)
        pulses.append(actor.pulse())

    task.state._gather = lambda: slow_disk
    (tmp_path / "step_0").mkdir()
    task.begin_commit(str(tmp_path / "step_0"))
    assert task.state._writing is not None
    assert not task.state._writing.done()
    threading.Timer(1.0, written.set).start()
    before, counted = weights(task), actor.pulse()
    update(task, 0)
    assert written.is_set()
    after = actor.pulse()
    assert pulses == [None]
    assert after is not None
    assert counted is not None
    assert after > counted
    loaded = make()
    loaded.load_commit(str(tmp_path / "step_0"))
    assert all(torch.equal(weight, before[name]) for name, weight in weights(loaded).items())


def test_a_failed_write_costs_the_commit_alone(make: Callable[..., PPOTask], tmp_path: Path) -> None:
    task = make()
    task.begin_commit(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError):
        task.state.result()
    update(task, 0)
    commit(task, tmp_path / "step_1")


def test_what_does_not_fit_is_named(make: Callable[..., PPOTask], tmp_path: Path) -> None:
    task = make()
    update(task, 0)
    records = commit(task, tmp_path / "step_1")
    folder = str(tmp_path / "step_1")

    def deeper(config: TandemConfig) -> None:
        config.ppo.trainable_layers = 2

    assert "policy" in str(make(change=deeper).state.check(folder, records))
    without_value = make(change=lambda c: setattr(c.ppo, "estimator", "reinforce_plus_plus"))
    assert without_value.state.check(folder, records) is not None
    assert "not in the manifest" in str(task.state.check(folder, {}))
    task.state._ranks = dataclasses.replace(task.state._ranks, world_size=2)
    assert "is of 1 ranks, the learner has 2" in str(task.state.check(folder, records))
    path = Path(folder) / task.state.file
    path.write_bytes(path.read_bytes()[:-4] + b"torn")
    assert "has SHA-256" in str(task.state.check(folder, records))


def test_a_driver_has_no_part_in_the_draws_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank goes on with as many devices as it had alone. The driver, which draws on none, with any number, also from
    commits that hold the states of some."""
    state = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [state, state])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    old, new = random_state(), random_state(with_devices=False)
    assert (len(old["cuda"]), new["cuda"]) == (2, [])
    with pytest.raises(ValueError, match="random state of 2 devices, this process has 1"):
        set_random_state(old)
    drawn = torch.rand(3)
    for kept in (old, new):
        set_random_state(kept, with_devices=False)
        assert torch.equal(torch.rand(3), drawn)
