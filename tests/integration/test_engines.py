"""Real vLLM and real DeepSpeed: what the learner publishes is what the engine samples from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from contracts.config import SamplingConfig, TandemConfig
from contracts.records import Assignment, Prompt, Rollout, RolloutRequest
from contracts.weights import PublishReport
from controller.cluster.runtime import Runtime
from controller.loop.training_batches import make_batches
from learner.learner_actor import LearnerGroup
from learner.weight_publisher import BACKEND, WeightPublisher
from learner.weight_sources import CheckpointSource
from tests.conftest import kill, make_config, make_tiny_model
from tests.learners import Learners

EOS = 2
PROMPTS = [Prompt(i, "", (504, 4771, 314, 253, 100 + i, 7 * i + 3)) for i in range(8)]
REQUESTS = [RolloutRequest(0, 0, prompt, seed=1000 + prompt.prompt_id) for prompt in PROMPTS]
SAMPLING = SamplingConfig(max_completion_tokens=12)

pytestmark = pytest.mark.usefixtures("ray_runtime")


def begin(learners: Learners, config: TandemConfig, ranks: int, zero_stage: int) -> LearnerGroup:
    config.cluster.num_learner_ranks, config.learner.zero_stage = ranks, zero_stage
    path = config.model.path
    return learners.begin(config, ranks, "ppo", config, path, path, (EOS,), [])


def rollouts(actor: Any, requests: list[RolloutRequest] = REQUESTS) -> list[Rollout]:
    return ray.get(actor.rollout.remote(requests, SAMPLING, [], 100), timeout=120)


def sequences(samples: list[Rollout]) -> list[tuple[list[int], int]]:
    return [([*r.prompt.token_ids, *r.completion.token_ids.tolist()], len(r.prompt.token_ids)) for r in samples]


def train(group: LearnerGroup, config: TandemConfig, samples: list[Rollout], steps: int = 3) -> dict[str, float]:
    """Updates that reward long words: enough to move every weight."""
    scores = [float(r.completion.token_ids.sum() % 7) for r in samples]
    ranks = config.cluster.num_learner_ranks
    version = int(samples[0].completion.policy_versions[0])
    batches = make_batches(samples, scores, ranks, 1, 128, np.random.default_rng(0), version)
    metrics = {}
    for _ in range(steps):
        metrics = ray.get(group.start_each("update", batches, 0.05, True), timeout=300)[0]
    return metrics


@pytest.fixture(scope="module")
def config_bf16(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TandemConfig:
    config = make_config(tiny_model, tmp_path_factory.mktemp("run"))
    config.ppo.optimizer.learning_rate = 1e-3
    return config


@pytest.fixture(scope="module")
def runtime(config_bf16: TandemConfig, ray_runtime: None) -> Iterator[Runtime]:
    config_bf16.cluster.num_actors, config_bf16.cluster.threads_per_actor = 2, 1
    runtime = Runtime(config_bf16)
    yield runtime
    runtime.release()


@pytest.fixture(scope="module")
def engines(config_bf16: TandemConfig, runtime: Runtime) -> Iterator[list[Any]]:
    with runtime.actors(config_bf16.model.path, BACKEND, (EOS,), None) as actors:
        yield actors


@pytest.fixture
def engine(engines: list[Any]) -> Any:
    return engines[0]


def logprobs(actor: Any, samples: list[Rollout]) -> np.ndarray:
    return np.concatenate(ray.get(actor.token_logprobs.remote(sequences(samples)), timeout=120))


def test_same_request_same_tokens(engine: Any) -> None:
    first, second = rollouts(engine), rollouts(engine, REQUESTS[::-1])[::-1]
    for a, b in zip(first, second, strict=True):
        assert a.key == b.key
        assert a.completion.token_ids.tolist() == b.completion.token_ids.tolist()
    assert len({tuple(r.completion.token_ids.tolist()) for r in first}) > 1


def test_completion_ends_at_eos_or_at_the_limit(engine: Any) -> None:
    for rollout in rollouts(engine):
        completion = rollout.completion
        assert len(completion.behavior_logprobs) == len(completion.token_ids) == len(completion.policy_versions)
        if completion.finish_reason == "stop":
            assert completion.token_ids[-1] == EOS
        else:
            assert len(completion.token_ids) == SAMPLING.max_completion_tokens


def test_logprobs_of_a_sequence_that_fills_the_engine(engine: Any, tiny_model: Path) -> None:
    """`engine.max_model_len` (512) tokens, as a completion of the longest prompt may have; against a plain forward pass."""
    rows = [([(7 * i) % 4000 + 3 for i in range(512)], 500), ([5, 6], 1), ([5, 6, 7], 3), ([9] * 511, 510)]
    found = ray.get(engine.token_logprobs.remote(rows), timeout=120)
    assert [len(row) for row in found] == [12, 1, 0, 1]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for (ids, start), row in zip(rows, found, strict=True):
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        assert row == pytest.approx([expected[t - 1, ids[t]].item() for t in range(start, len(ids))], abs=0.15)


def test_temperature_divides_the_logits(engine: Any) -> None:
    cold = SamplingConfig(max_completion_tokens=12, temperature=0.5)
    samples = ray.get(engine.rollout.remote(REQUESTS, cold, [], 100), timeout=120)
    at_one = ray.get(engine.token_logprobs.remote(sequences(samples)), timeout=120)
    ratio = np.concatenate([r.completion.behavior_logprobs for r in samples]) / np.concatenate(at_one)
    # logits / 0.5 renormalised: not log p / 0.5, so the ratio is spread and not the constant 2.
    assert np.std(ratio) > 0.05
    assert np.concatenate(at_one).mean() < np.concatenate([r.completion.behavior_logprobs for r in samples]).mean()


def test_more_prompt_tokens_than_one_step_takes(engine: Any) -> None:
    long = [RolloutRequest(0, 0, Prompt(i, "", tuple(range(100 + i, 400 + i))), seed=i) for i in range(24)]
    assert {r.key[1] for r in rollouts(engine, long)} == set(range(24))


def test_bad_prompt_fails_alone(engine: Any) -> None:
    too_long = RolloutRequest(0, 0, Prompt(99, "", tuple([5] * 600)), seed=1)
    with pytest.raises(ray.exceptions.RayTaskError, match="512"):
        ray.get(engine.rollout.remote([too_long], SAMPLING, [], 100), timeout=120)
    assert len(rollouts(engine)) == len(REQUESTS)


@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, 0), (2, 0), (2, 2), (2, 3)])
def test_engines_and_learner_agree_after_publish(
    engines: list[Any], learners: Learners, config_bf16: TandemConfig, ranks: int, zero_stage: int
) -> None:
    """bfloat16 and tied embeddings. Each learner is a new publisher, so its versions begin at 0 again."""
    group = begin(learners, config_bf16, ranks, zero_stage)
    group.call("connect", BACKEND, engines)[0].require_all()
    samples = rollouts(engines[0])
    assert {int(v) for r in samples for v in r.completion.policy_versions} == {0}
    before = logprobs(engines[0], samples)
    metrics = train(group, config_bf16, samples, steps=1)
    # Sampler against learner before the update: rounding, as below.
    assert metrics["kl/mismatch_logp_mean"] < 0.05
    assert metrics["kl/mismatch_k3"] < 1e-3
    train(group, config_bf16, samples, steps=2)
    report: PublishReport = group.call("publish", 1)[0]
    report.require_all()
    mine = np.concatenate(group.call("token_logprobs", sequences(samples))[0])
    moved = np.abs(mine - before).mean()
    assert moved > 0.05, "the test must change the weights to see that they arrive"
    for engine in engines:
        # bfloat16 rounding; a stale head or a missed layer shows as a gap of the size of `moved`
        gap = np.abs(mine - logprobs(engine, samples)).mean()
        assert gap < 0.05
        assert gap < moved / 4
        assert {int(v) for r in rollouts(engine) for v in r.completion.policy_versions} == {1}


def test_weights_change_in_flight(engine: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Completions that are under way go on with the new weights, and say so token by token."""
    other = make_tiny_model(tmp_path / "other", torch.bfloat16, tied=True, seed=1)
    old, new = (WeightPublisher(BACKEND, CheckpointSource(str(path))) for path in (tiny_model, other))
    old.connect([engine])
    old.send(500)
    sampling = SamplingConfig(max_completion_tokens=400, min_completion_tokens=400)
    started = engine.assign.remote([Assignment(i, r, ()) for i, r in enumerate(REQUESTS)], sampling)
    ray.get(started, timeout=60)
    assert ray.get(engine.collect.remote(1, 0.5), timeout=60).rollouts == []  # all of them are under way
    new.connect([engine])
    new.send(501)
    delivery = ray.get(engine.collect.remote(len(REQUESTS), 120.0), timeout=150)
    assert [lease for lease, _ in delivery.rollouts] == list(range(len(REQUESTS)))
    samples = [rollout for _, rollout in delivery.rollouts]
    old.connect([engine])
    old.send(502)
    under_old = ray.get(engine.token_logprobs.remote(sequences(samples)), timeout=120)
    for sample, expected in zip(samples, under_old, strict=True):
        versions = sample.completion.policy_versions
        assert len(versions) == 400
        assert np.all(np.diff(versions) >= 0)
        assert set(versions.tolist()) == {500, 501}
        gap = np.abs(sample.completion.behavior_logprobs - np.array(expected))
        assert gap[versions == 500].mean() < 0.05  # rounding
        assert gap[versions == 501].mean() > 0.5  # another model


def test_a_replaced_engine_serves_what_the_others_serve(
    engines: list[Any], learners: Learners, runtime: Runtime, config_bf16: TandemConfig
) -> None:
    group = begin(learners, config_bf16, 1, 0)
    group.call("connect", BACKEND, engines)[0].require_all()
    samples = rollouts(engines[0])
    checkpoint = logprobs(engines[0], samples)
    train(group, config_bf16, samples)
    kill([engines[1]])
    report = group.call("publish", 1)[0]
    assert (sorted(report.loaded), sorted(report.missing)) == ([0], [1])
    survivor = logprobs(engines[0], samples)
    assert np.abs(survivor - checkpoint).mean() > 0.05
    assert runtime.replace_actor(engines, 1, report.update)
    assert np.array_equal(logprobs(engines[1], samples), survivor)
    # The learner overwrites the memory that both have loaded from: that must not show before they load again.
    train(group, config_bf16, samples, steps=1)
    group.call("connect", BACKEND, engines[:1], 1)
    group.call("publish", 2)
    assert np.array_equal(logprobs(engines[1], samples), survivor)
    assert not np.array_equal(logprobs(engines[0], samples), survivor)
    group.call("connect", BACKEND, engines, 2)[0].require_all()
    assert np.array_equal(logprobs(engines[1], samples), logprobs(engines[0], samples))


class Incomplete(CheckpointSource):
    """Leaves one layer out, as a learner would that trains an adapter."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor) for name, tensor in super().__iter__() if "layers.1.mlp" not in name)


def test_an_engine_that_was_sent_too_little_ends_instead_of_sampling(
    engines: list[Any], config_bf16: TandemConfig
) -> None:
    """The module's last test: it costs an engine."""
    publisher = WeightPublisher(BACKEND, Incomplete(config_bf16.model.path))
    publisher.connect(engines[1:])
    report = publisher.send(1)
    assert report is not None
    assert "2 parameters of the engine were not sent, the first is model.layers.1.mlp" in report.missing[0]
    with pytest.raises(ray.exceptions.RayTaskError, match="were not sent"):
        rollouts(engines[1])
    assert len(rollouts(engines[0])) == len(REQUESTS)


@pytest.mark.parametrize(
    ("dtype", "tied", "limit"),
    [
        (torch.float32, True, 1e-3),
        pytest.param(torch.float32, False, 1e-3, marks=pytest.mark.full),  # always run in test_two_turn.py
        pytest.param(torch.bfloat16, False, 0.05, marks=pytest.mark.full),
    ],
    ids=["float32-tied", "float32-untied", "bfloat16-untied"],
)
def test_agreement_to_rounding(
    learners: Learners, tmp_path: Path, dtype: torch.dtype, tied: bool, limit: float
) -> None:
    """The other layouts; all models here have fused qkv and gate_up layers in the engine and none in the learner."""
    name = str(dtype).removeprefix("torch.")
    config = make_config(make_tiny_model(tmp_path / "model", dtype, tied), tmp_path, dtype=name)
    config.ppo.optimizer.learning_rate = 1e-3
    group, runtime = begin(learners, config, 1, 0), Runtime(config)
    try:
        with runtime.actors(config.model.path, BACKEND, (EOS,), None) as actors:
            group.call("connect", BACKEND, actors)
            samples = rollouts(actors[0])
            before = logprobs(actors[0], samples)
            metrics = train(group, config, samples, steps=1)
            if dtype == torch.float32:
                assert metrics["kl/mismatch_logp_max"] < 1e-3  # sampler against learner, before the update
            train(group, config, samples, steps=2)
            group.call("publish", 1)
            mine = np.concatenate(group.call("token_logprobs", sequences(samples))[0])
            theirs = logprobs(actors[0], samples)
            gap = np.abs(mine - theirs)
            assert (gap.max() if dtype == torch.float32 else gap.mean()) < limit
            assert np.abs(mine - before).mean() > 0.05
    finally:
        runtime.release()
