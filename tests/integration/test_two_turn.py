"""Real vLLM and real DeepSpeed: two-turn conversations are sampled, masked, trained and published."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.environment import environment_maker
from actors.rollout_actor import start_actors
from contracts.config import EnvironmentConfig, SamplingConfig
from contracts.records import Prompt, Rollout, RolloutRequest, Score
from controller.cluster.runtime import environments
from controller.loop.rewards import ScoreNormalizer, shaped
from controller.loop.training_batches import make_batches
from tests.conftest import kill, make_config
from tests.learners import Learners

EOS = 2
PROMPTS = [Prompt(i, "", (504, 4771, 314, 253, 100 + i, 7 * i + 3)) for i in range(8)]
REQUESTS = [RolloutRequest(0, 0, prompt, seed=1000 + prompt.prompt_id) for prompt in PROMPTS]
SAMPLING = SamplingConfig(max_completion_tokens=24)
ENVIRONMENT = EnvironmentConfig(
    name="two_turn",
    reward="per_turn",
    max_turn_tokens=6,
    min_turn_tokens=2,
    options={"follow_up": "And now shorter.", "score_first": True},
)

pytestmark = pytest.mark.usefixtures("ray_runtime")


def played(actor: Any) -> list[Rollout]:
    return ray.get(actor.rollout.remote(REQUESTS, SAMPLING, [], 100), timeout=120)


def sequences(rollouts: list[Rollout]) -> list[tuple[list[int], int]]:
    return [([*r.prompt.token_ids, *r.completion.token_ids.tolist()], len(r.prompt.token_ids)) for r in rollouts]


def sampled(rows: list[Any], rollouts: list[Rollout]) -> np.ndarray:
    return np.concatenate([np.array(row)[r.completion.loss_mask] for row, r in zip(rows, rollouts, strict=True)])


def places_in_turn(rollout: Rollout) -> np.ndarray:
    """Of each sampled token, how many of its turn came before it."""
    first = rollout.turns[0]
    count = len(rollout.completion.sampled_ids)
    return np.concatenate([np.arange(first.end), np.arange(count - first.end)])


def check_form(rollouts: list[Rollout], told: list[int], version: int) -> None:
    for request, rollout in zip(REQUESTS, rollouts, strict=True):
        completion, (first, second) = rollout.completion, rollout.turns
        assert (rollout.key, rollout.fault, completion.loss_mask is not None) == (request.key, None, True)
        ids, end = completion.token_ids.tolist(), first.end
        assert ids[end : end + len(told)] == told
        mask = [True] * end + [False] * len(told) + [True] * (second.end - end - len(told))
        assert completion.loss_mask.tolist() == mask
        assert len(ids) == len(mask) == len(completion.behavior_logprobs) == len(completion.policy_versions)
        assert 3 <= end <= 6  # the EOS is not counted
        assert 3 <= second.end - end - len(told) <= 6
        assert not completion.behavior_logprobs[~completion.loss_mask].any()
        assert (completion.behavior_logprobs[completion.loss_mask] <= 0).all()
        assert set(completion.policy_versions.tolist()) == {version}


@pytest.fixture
def eager(tiny_float32: Path, tmp_path: Path) -> Path:
    """A model that likes to end: at a fifth or so of the positions EOS is nearly certain."""
    model = AutoModelForCausalLM.from_pretrained(tiny_float32)
    model.lm_head.weight.data[EOS] *= 12
    model.save_pretrained(tmp_path / "eager")
    AutoTokenizer.from_pretrained(tiny_float32).save_pretrained(tmp_path / "eager")
    return tmp_path / "eager"


def test_two_turns_through_engine_and_learner(learners: Learners, eager: Path, tmp_path: Path) -> None:
    config = make_config(eager, tmp_path, dtype="float32")
    config.environment, config.ppo.optimizer.learning_rate = ENVIRONMENT, 1e-3
    envs = environments(config.cluster)
    anywhere = [{"num_cpus": config.cluster.cpus_per_process}]
    actors = start_actors(
        anywhere, config.cluster, config.model, config.engine, "ray_object", (EOS,), None, envs["actor"], ENVIRONMENT
    )
    path = config.model.path
    try:
        group = learners.begin(config, 1, "ppo", config, path, path, (EOS,), [])
        group.call("connect", "ray_object", actors)
        tokenizer = AutoTokenizer.from_pretrained(path)
        told = tokenizer("\nAnd now shorter.\n", add_special_tokens=False)["input_ids"]
        rollouts = played(actors[0])
        check_form(rollouts, told, version=0)
        assert all("And now shorter." in r.completion.text for r in rollouts)
        again = played(actors[0])
        assert [r.completion.token_ids.tolist() for r in again] == [r.completion.token_ids.tolist() for r in rollouts]
        # The turns of a rollout are sampled with different seeds, and from different contexts.
        assert len({tuple(r.completion.sampled_ids.tolist()) for r in rollouts}) > 1

        assert {"stop", "length"} == {turn.finish_reason for r in rollouts for turn in r.turns}

        # Every sampled token has the log-probability that engine and learner give it in the whole sequence, but where EOS
        # was masked: there what is recorded is larger, and the learner's update has to know (kl/mismatch below).
        recorded = sampled([r.completion.behavior_logprobs for r in rollouts], rollouts)
        learner = sampled(group.call("token_logprobs", sequences(rollouts))[0], rollouts)
        engine = sampled(ray.get(actors[0].token_logprobs.remote(sequences(rollouts)), timeout=120), rollouts)
        free = np.concatenate([place >= ENVIRONMENT.min_turn_tokens for place in map(places_in_turn, rollouts)])
        assert np.abs(recorded - learner)[free].max() < 1e-3
        assert np.abs(engine - learner).max() < 1e-3
        assert (recorded - learner)[~free].min() > -1e-3
        assert (recorded - learner)[~free].max() > 1

        for rollout in rollouts:
            for turn in rollout.turns:
                turn.score = Score(turn.end % 5 - 1.75)
            rollout.scores["proxy"] = Score(sum(turn.score.value for turn in rollout.turns))
        rows = [shaped(r, ScoreNormalizer(), config.ppo, config.environment) for r in rollouts]
        paid = [np.flatnonzero(row).tolist() for row in rows]
        assert paid == [[turn.end - 1 for turn in r.turns] for r in rollouts]
        batches = make_batches(rollouts, rows, 1, 1, 64, np.random.default_rng(0))
        assert batches[0].global_loss_tokens == [len(recorded)]
        metrics = ray.get(group.start_each("update", batches, 0.05, True), timeout=300)[0]
        assert metrics["kl/mismatch_logp_max"] < 1e-3
        assert metrics["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert metrics["kl/ref_seq"] == pytest.approx(0, abs=1e-4)
        # Without a KL the rewards of a conversation are its scores.
        assert metrics["reward/total_mean"] == pytest.approx(np.mean([row.sum() for row in rows]), abs=1e-4)

        group.call("publish", 1)
        moved = sampled(group.call("token_logprobs", sequences(rollouts))[0], rollouts)
        theirs = sampled(ray.get(actors[0].token_logprobs.remote(sequences(rollouts)), timeout=120), rollouts)
        assert np.abs(moved - learner).mean() > 0.01
        assert np.abs(moved - theirs).max() < 1e-3
        check_form(played(actors[0]), told, version=1)
    finally:
        kill(actors)


def test_an_import_path_is_found_in_a_worker() -> None:
    @ray.remote(num_cpus=0.1)
    def kind() -> str:
        config = EnvironmentConfig(name="tests.unit.test_environments:Scripted")
        return type(environment_maker(config, type("Tokenizer", (), {}))()).__name__

    assert ray.get(kind.remote(), timeout=120) == "Scripted"
