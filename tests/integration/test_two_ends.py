"""Real vLLM and real DeepSpeed: a model with two EOS ids ends with either, and learner and engine ban both."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from actors.rollout_actor import start_actors
from actors.turn_scores import score_rollouts
from common.text.end_tokens import end_ids
from contracts.config import EnvironmentConfig, SamplingConfig, TandemConfig
from contracts.records import Prompt, Rollout, RolloutRequest, Score
from controller.cluster.runtime import environments
from controller.loop.rewards import ScoreNormalizer, shaped
from controller.loop.score_metrics import rollout_metrics
from controller.loop.training_batches import make_batches
from learner.learner_actor import LearnerGroup
from tests.conftest import kill, make_config
from tests.learners import Learners

EOS, OTHER = 2, 0
PROMPTS = [Prompt(i, "", (504, 4771, 314, 253, 100 + i, 7 * i + 3)) for i in range(16)]
REQUESTS = [RolloutRequest(0, 0, prompt, seed=1000 + prompt.prompt_id) for prompt in PROMPTS]
ONCE = SamplingConfig(max_completion_tokens=24, min_completion_tokens=8)
TWICE = SamplingConfig(max_completion_tokens=64)
TURNS = EnvironmentConfig(name="two_turn", max_turn_tokens=16, min_turn_tokens=3, options={"chat": True})

pytestmark = pytest.mark.usefixtures("ray_runtime")


class Recorder:
    """A reward service that gives every text 1 and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def score(
        self,
        scorer: str,
        sequences: list[list[int]],
        prompt_tokens: list[int] | None = None,
        prompts: list[Prompt] | None = None,
    ) -> list[Score]:
        self.asked += sequences
        return [Score(1.0)] * len(sequences)


@pytest.fixture(scope="module")
def config(tiny_float32: Path, tmp_path_factory: pytest.TempPathFactory) -> TandemConfig:
    """A model that likes to end, by either token alike."""
    folder = tmp_path_factory.mktemp("ends")
    model = AutoModelForCausalLM.from_pretrained(tiny_float32)
    model.lm_head.weight.data[EOS] *= 12
    model.lm_head.weight.data[OTHER] = model.lm_head.weight.data[EOS]
    model.generation_config = GenerationConfig(eos_token_id=[EOS, OTHER])
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tiny_float32).save_pretrained(folder / "model")
    config = make_config(folder / "model", folder, dtype="float32")
    config.ppo.optimizer.learning_rate = 1e-3
    return config


@pytest.fixture(scope="module")
def ends(config: TandemConfig) -> tuple[int, ...]:
    return end_ids(AutoTokenizer.from_pretrained(config.model.path), config.model, config.data.chat)


@pytest.fixture(params=[(EnvironmentConfig(), ONCE), (TURNS, TWICE)], ids=["single", "two_turn"])
def engines(
    learners: Learners, config: TandemConfig, ends: tuple[int, ...], request: Any
) -> Iterator[tuple[Any, LearnerGroup]]:
    config.environment, config.ppo.sampling = request.param
    envs, path = environments(config.cluster), config.model.path
    anywhere = [{"num_cpus": config.cluster.cpus_per_process}]
    actors = start_actors(
        anywhere, config.cluster, config.model, config.engine, "ray_object", ends, None, envs["actor"], request.param[0]
    )
    try:
        yield actors[0], learners.begin(config, 1, "ppo", config, path, path, ends, [])
    finally:
        kill(actors)


def sampled(actor: Any, sampling: SamplingConfig) -> list[Rollout]:
    return ray.get(actor.rollout.remote(REQUESTS, sampling, [], 100), timeout=120)


def test_both_end_a_turn_and_neither_comes_early(
    engines: tuple[Any, LearnerGroup], config: TandemConfig, ends: tuple[int, ...]
) -> None:
    assert ends == (EOS, OTHER)
    (actor, group), environment, sampling = engines, config.environment, config.ppo.sampling
    at_once = sampled(actor, replace(sampling, min_completion_tokens=0))
    if environment.name == "single_turn":  # without a least length this model ends within a few tokens
        assert min(len(r.completion.token_ids) for r in at_once) <= 3
    rollouts = sampled(actor, sampling)
    last = []
    for rollout in rollouts:
        ids, start = rollout.completion.token_ids.tolist(), 0
        mask = [True] * len(ids) if rollout.completion.loss_mask is None else rollout.completion.loss_mask.tolist()
        turns = [(t.end, t.finish_reason) for t in rollout.turns] or [(len(ids), rollout.completion.finish_reason)]
        for end, reason in turns:
            start += mask[start:].index(True)
            assert (ids[end - 1] in ends) == (reason == "stop")
            assert not set(ids[start : end - 1]) & set(ends)
            least = max(environment.min_turn_tokens, sampling.min_completion_tokens - start)
            assert end - start >= min(least, environment.max_turn_tokens or least)
            last += [ids[end - 1]] if reason == "stop" else []
            start = end
        assert "<|" not in rollout.completion.text
    assert {EOS, OTHER} == set(last)

    # Exactly one end, that which reward models know.
    service = Recorder()
    score_rollouts(service, "proxy", rollouts, ends)
    assert len(service.asked) >= len(rollouts)
    assert all(ids[-1] == EOS and ids[-2] not in ends for ids in service.asked)

    # What was cut off pays the penalty, what ended with either does not.
    for rollout in rollouts:
        rollout.scores["proxy"] = Score(1.0)
        paid = float(np.sum(shaped(rollout, ScoreNormalizer(), config.ppo, environment)))
        if not rollout.turns:
            penalty = config.ppo.missing_eos_penalty * (rollout.completion.token_ids[-1] not in ends)
            assert paid == pytest.approx(1.0 - penalty)

    ended = np.mean([r.completion.finish_reason == "stop" for r in rollouts])
    assert rollout_metrics(rollouts)["completion/eos_frac"] == pytest.approx(ended)

    # The learner's and the reference's log-probabilities are those of the engine.
    rows = [shaped(r, ScoreNormalizer(), config.ppo, environment) for r in rollouts]
    batches = make_batches(rollouts, rows, 1, 1, 128, np.random.default_rng(0))
    metrics = ray.get(group.start_each("update", batches, 0.05, True), timeout=300)[0]
    assert metrics["kl/mismatch_logp_max"] < 1e-3
    assert metrics["kl/ref_seq"] == pytest.approx(0, abs=1e-4)
    assert metrics["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
