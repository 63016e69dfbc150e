"""What is summed over ranks, on two real ones: group statistics, whitening, weights and denominators."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from contracts.config import PPOConfig
from contracts.interfaces import NonFiniteError
from contracts.methods import chosen_preference
from contracts.records import Completion, Prompt, RatedText, Rollout
from controller.loop.training_batches import make_batches
from learner.learner_actor import LearnerGroup
from tests.conftest import make_config
from tests.learners import Learners
from tests.unit.test_preference import pairs

EOS = 2
GROUPS, SAMPLES = 3, 4
PAIRS = pairs(6)
TEXTS = [text for pair in PAIRS for text in (pair.chosen, pair.rejected)]
Outcome = tuple[np.ndarray, dict[str, float]]  # how far outputs of a model have moved, and the metrics of the last step


def rollouts() -> list[Rollout]:
    """Three prompts with four completions each, of 1 to 9 tokens; the sampler's log-probabilities are made up."""
    rng = np.random.default_rng(0)
    result = []
    for prompt_id, sample in np.ndindex(GROUPS, SAMPLES):
        count = int(rng.integers(1, 10))
        tokens, logprobs = rng.integers(3, 500, count), -rng.uniform(2, 9, count)
        completion = Completion(
            tokens.astype(np.int32),
            logprobs.astype(np.float32),
            np.zeros(count, dtype=np.int32),
            "length" if sample == 1 else "stop",
            "",
        )
        result.append(Rollout((0, prompt_id, sample), Prompt(prompt_id, "", (7, 50 + prompt_id)), completion))
    return result


def check_finite_flag(group: LearnerGroup, batches: list[Any]) -> None:
    """The loss of one rank alone is not a number: both give up before the step, and both can go on."""
    bad = copy.deepcopy(batches)
    bad[1].minibatches[0][0].behavior_logprobs[:] = np.nan
    first, second = group.start_each("update", bad, 0.1, True)
    with pytest.raises(NonFiniteError, match="the loss of another rank is not finite"):
        ray.get(first, timeout=60)
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        ray.get(second, timeout=60)
    assert all("rank" in line for line in group.stacks().splitlines() if line.startswith("----"))


def assert_same(first: Outcome, *others: Outcome) -> None:
    moved, one = first
    assert np.abs(moved).mean() > 0.02
    names = {name for name in one if not name.startswith("perf/")}
    for other, two in others:
        assert np.abs(other - moved).max() < 1e-3 * np.abs(moved).max()
        mine = {name: one[name] for name in names}
        assert {name: two[name] for name in names} == pytest.approx(mine, rel=1e-3, abs=1e-5)


def by_rloo(ppo: PPOConfig) -> None:
    ppo.estimator, ppo.aggregation, ppo.whiten_advantages = "rloo", "sequences", True
    ppo.off_policy.correction, ppo.epochs, ppo.mask_truncated = "truncated", 2, True
    ppo.ptx_coef, ppo.ptx_batch_size = 0.5, 5


def by_online_dpo(ppo: PPOConfig) -> None:
    ppo.estimator, ppo.dpo_beta = "online_dpo", 0.5


def by_import_path(ppo: PPOConfig) -> None:
    ppo.estimator, ppo.objective, ppo.entropy_coef = "tests.stand_ins:REINFORCE", "gspo", 0.1
    ppo.whiten_advantages, ppo.whiten_over, ppo.epochs = True, "group", 2


@pytest.mark.parametrize("choose", [by_rloo, by_online_dpo, by_import_path])
def test_two_ranks_make_the_update_of_one(
    choose: Callable[[PPOConfig], None], learners: Learners, small_vocab: Path, tmp_path: Path
) -> None:
    config = make_config(small_vocab, tmp_path, dtype="float32")
    ppo, samples = config.ppo, rollouts()
    ppo.samples_per_prompt, ppo.target_approx_kl = SAMPLES, None
    choose(ppo)
    config.learner.microbatch_tokens = 20  # of the examples of PPO-ptx, which makes several
    # Adam divides by |g| + eps: with a large eps a step stays proportional to small gradients.
    ppo.optimizer.learning_rate, ppo.optimizer.eps = 1e-2, 1e-2
    scores = np.random.default_rng(1).normal(size=len(samples)).tolist()
    sequences = [([*r.prompt.token_ids, *r.completion.token_ids.tolist()], 2) for r in samples]
    path, outcomes = config.model.path, []
    for ranks in (1, 2):
        group = learners.begin(config, ranks, "ppo", config, path, path, (EOS,), TEXTS)
        rng = np.random.default_rng(0)
        batches = make_batches(samples, scores, ranks, 1, 20, rng, mask_truncated=ppo.mask_truncated)
        if ranks == 2:  # the siblings of a prompt are on both
            for prompt_id in range(GROUPS):
                assert all(any(prompt_id in mb.groups for mb in b.minibatches[0]) for b in batches)
        before: Any = np.concatenate(group.call("token_logprobs", sequences)[0])
        # The first update moves the policy from its reference, so that the second has a KL in its rewards.
        metrics = [ray.get(group.start_each("update", batches, 0.1, True))[0] for _ in range(2)]
        after = np.concatenate(group.call("token_logprobs", sequences)[0])
        outcomes.append((after - before, metrics[1]))
        if ranks == 2 and ppo.estimator == "rloo":
            check_finite_flag(group, batches)
    assert_same(*outcomes)
    one = outcomes[0][1]
    assert abs(one["kl/ref_seq"]) > 1e-3
    assert ("policy/ptx_loss" in one) == (ppo.ptx_coef > 0)
    if ppo.estimator == "rloo":
        assert 0 < one["off_policy/ess"] < 0.9
    elif choose == by_import_path:
        assert one["reinforce/outcome_mean"] == pytest.approx(one["reward/total_mean"], rel=1e-5)
    else:
        assert one["online_dpo/pairs"] == GROUPS
        assert one["online_dpo/accuracy"] > 0


def test_two_ranks_learn_the_preferences_of_one(learners: Learners, small_vocab: Path, tmp_path: Path) -> None:
    """The texts of a pair lie on different ranks, and each rank computes the reference of its own share."""
    config = make_config(small_vocab, tmp_path, dtype="float32")
    config.learner.microbatch_tokens, config.preference.batch_size = 20, 6
    config.preference.optimizer.learning_rate, config.preference.optimizer.eps = 1e-3, 1e-2
    outcomes = []
    for ranks in (1, 2):
        group = learners.begin(config, ranks, "preference", config, chosen_preference(config), config.model.path, PAIRS)
        before = np.array(group.call("logprobs", TEXTS)[0])
        group.call("compute_reference", 0, len(PAIRS))
        metrics = [group.call("step", 0)[0] for _ in range(2)]
        outcomes.append((np.array(group.call("logprobs", TEXTS)[-1]) - before, metrics[1]))
    assert_same(*outcomes)


def test_a_reward_model_is_the_same_by_any_ranks_microbatches_and_zero(
    learners: Learners, small_vocab: Path, tmp_path: Path
) -> None:
    """All texts of the batch are compared with all. One backward pass goes through several forward passes, between which
    ZeRO-3 gives the weights back."""
    config = make_config(small_vocab, tmp_path, dtype="float32")
    optimizer, config.reward_model.batch_size = config.reward_model.optimizer, len(TEXTS)
    optimizer.learning_rate, optimizer.eps = 1e-3, 1e-2
    ratings = np.random.default_rng(2).integers(-4, 5, (len(TEXTS), 3)).tolist()
    items = [RatedText("", text.token_ids, mine) for text, mine in zip(TEXTS, ratings, strict=True)]
    sequences, outcomes = [text.token_ids for text in TEXTS], []
    for ranks, budget, stage in ((1, 4096, 0), (1, 20, 0), (2, 4096, 0), *((2, 20, stage) for stage in range(4))):
        config.learner.microbatch_tokens, config.learner.zero_stage = budget, stage
        group = learners.begin(config, ranks, "reward_model", config, config.model.path, items)
        before = np.array(group.call("score", sequences)[0])
        metrics = [group.call("step", 0)[0] for _ in range(2)]
        outcomes.append((np.array(group.call("score", sequences)[-1]) - before, metrics[1]))
    assert_same(*outcomes)


def test_two_ranks_imitate_as_one(learners: Learners, small_vocab: Path, tmp_path: Path) -> None:
    config = make_config(small_vocab, tmp_path, dtype="float32")
    config.learner.microbatch_tokens, config.sft.batch_size = 20, len(TEXTS)
    config.sft.optimizer.learning_rate, config.sft.optimizer.eps = 1e-3, 1e-2
    outcomes = []
    for ranks in (1, 2):
        group = learners.begin(config, ranks, "sft", config, TEXTS, TEXTS)

        def losses(group: LearnerGroup = group) -> np.ndarray:
            return np.array([group.call("evaluate", i, i + 2)[-1][0] for i in range(0, len(TEXTS), 2)])

        before = losses()
        metrics = [group.call("step", 0)[0] for _ in range(2)]
        outcomes.append((losses() - before, metrics[1]))
    assert_same(*outcomes)
