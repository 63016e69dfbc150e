"""Learning from conversations: advantages by hand, and a whole update against float64, one sampled token at a time."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from contracts.config import TandemConfig
from contracts.records import Completion, Prompt, Rollout, Score, Turn
from controller.loop.rewards import ScoreNormalizer, shaped
from controller.loop.training_batches import make_batches
from learner.advantages import token_rewards
from learner.estimators.gae import gae
from learner.ppo import PPOTask
from learner.ranks import Ranks
from tests.conftest import compared, make_config

EOS, BETA, NAN = 2, 0.1, math.nan


def mask_of(*lengths: int) -> list[bool]:
    """Turns and observations in turn: 2, 1, 3 is two sampled, one observed, three sampled."""
    return [i % 2 == 0 for i, length in enumerate(lengths) for _ in range(length)]


# ---- advantages by hand


def advantages_of(rewards: list[float], values: list[float], mask: list[bool], gamma: float, lam: float) -> list[float]:
    found, _ = gae(torch.tensor([rewards]), torch.tensor([values]), torch.tensor([mask]), gamma, lam)
    return found[0].tolist()


def test_two_turns_by_hand() -> None:
    # Turns of two and one token, two observed between them. gamma 0.9, lambda 0.5, so gamma * lambda = 0.45.
    # per turn:   delta_2 = 2 - 0.3 = 1.7             A_2 = 1.7
    #             delta_1 = 1 + 0.9 * 0.3 - 0.4 = 0.87   A_1 = 0.87 + 0.45 * 1.7 = 1.635
    #             delta_0 = 0.9 * 0.4 - 0.5 = -0.14      A_0 = -0.14 + 0.45 * 1.635 = 0.59575
    # cumulative: A_2 = 3 - 0.3 = 2.7; A_1 = 0.27 - 0.4 + 0.45 * 2.7 = 1.085; A_0 = -0.14 + 0.45 * 1.085 = 0.34825
    mask, values = mask_of(2, 2, 1), [0.5, 0.4, NAN, NAN, 0.3]
    per_turn = gae(torch.tensor([[0, 1.0, 0, 0, 2.0]]), torch.tensor([values]), torch.tensor([mask]), 0.9, 0.5)
    torch.testing.assert_close(per_turn[0], torch.tensor([[0.59575, 1.635, 0, 0, 1.7]]))
    torch.testing.assert_close(per_turn[1], torch.tensor([[1.09575, 2.035, 0, 0, 2.0]]))
    cumulative = advantages_of([0, 0, 0, 0, 3.0], values, mask, 0.9, 0.5)
    assert cumulative == pytest.approx([0.34825, 1.085, 0, 0, 2.7])


def test_the_example_of_the_documentation() -> None:
    values, mask = [0.1, 0.1, NAN, 0.1], mask_of(2, 1, 1)
    assert advantages_of([0, 1.0, 0, 2.0], values, mask, 1.0, 1.0) == pytest.approx([2.9, 2.9, 0, 1.9])
    assert advantages_of([0, 0, 0, 3.0], values, mask, 1.0, 1.0) == pytest.approx([2.9, 2.9, 0, 2.9])


def test_an_advantage_flows_back_over_an_observation_and_never_forward() -> None:
    mask = mask_of(2, 3, 2)
    base = advantages_of([0, 1.0, 0, 0, 0, 0, 2.0], [0.0] * 7, mask, 1.0, 0.9)
    later = advantages_of([0, 1.0, 0, 0, 0, 0, 5.0], [0.0] * 7, mask, 1.0, 0.9)
    # 3 more at the end: times 0.9 for each sampled token before it, whatever the length of the observation
    assert [b - a for a, b in zip(base, later, strict=True)] == pytest.approx([3 * 0.9**3, 3 * 0.9**2, 0, 0, 0, 2.7, 3])
    earlier = advantages_of([0, 4.0, 0, 0, 0, 0, 2.0], [0.0] * 7, mask, 1.0, 0.9)
    assert [b - a for a, b in zip(base, earlier, strict=True)] == pytest.approx([2.7, 3, 0, 0, 0, 0, 0])


@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(st.integers(1, 3), min_size=1, max_size=5).filter(lambda parts: len(parts) % 2),
    gamma=st.floats(0.1, 1),
    lam=st.floats(0, 1),
    seed=st.integers(0, 2**20),
)
def test_advantages_are_those_of_a_loop_over_turns(parts: list[int], gamma: float, lam: float, seed: int) -> None:
    mask, rng = mask_of(*parts), np.random.default_rng(seed)
    rewards, values = (rng.normal(size=len(mask)).astype(np.float32) * np.array(mask) for _ in range(2))
    # In float64, turn by turn from the back; what is carried is the first state of the turn after.
    expected: list[float] = []
    after_value = after_advantage = 0.0
    position = len(mask)
    for part, length in reversed(list(enumerate(parts))):
        position -= length
        if part % 2:
            expected = [0.0] * length + expected
            continue
        row: list[float] = []
        for t in range(position + length - 1, position - 1, -1):
            delta = float(rewards[t]) + gamma * after_value - float(values[t])
            after_advantage = delta + gamma * lam * after_advantage
            after_value = float(values[t])
            row.insert(0, after_advantage)
        expected = row + expected
    assert advantages_of(rewards.tolist(), values.tolist(), mask, gamma, lam) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_groups_compare_sums_wherever_the_scores_are_paid(estimator: str) -> None:
    # Outcomes 3, 1 and 2 without KL: Dr. GRPO 1, -1, 0; GRPO divides by the std 1; RLOO 3 - 1.5, 1 - 2.5, 2 - 2
    mask = torch.tensor([mask_of(2, 1, 1), mask_of(1, 2, 1), [True, True, False, False]])
    expected = {"grpo": [1, -1, 0], "dr_grpo": [1, -1, 0], "rloo": [1.5, -1.5, 0]}[estimator]
    zeros = torch.zeros(3, 4)
    for scores in ([[0, 1, 0, 2], [-1, 0, 0, 2], [0, 2, 0, 0]], [[0, 0, 0, 3], [0, 0, 0, 1], [0, 2, 0, 0]]):
        rewards = token_rewards(torch.tensor(scores).float(), zeros, zeros, mask, kl_coef=0.1)
        found = compared(estimator, rewards, mask, [0, 0, 0])
        torch.testing.assert_close(found, torch.where(mask, torch.tensor(expected)[:, None].float(), 0.0))


# ---- a whole update


def conversation(number: int, parts: list[list[int]], scores: list[float]) -> Rollout:
    """Turns and observations in turn. Where nothing was sampled, the sampler's log-probabilities are garbage."""
    ids, mask = [token for part in parts for token in part], np.array(mask_of(*map(len, parts)))
    logprobs = np.where(mask, -np.linspace(1, 9, len(ids)), 50.0).astype(np.float32)
    ends = np.cumsum([len(part) for part in parts])[::2]
    turns = [Turn(int(end), "stop", None, Score(score)) for end, score in zip(ends, scores, strict=True)]
    versions = np.zeros(len(ids), dtype=np.int32)
    completion = Completion(np.array(ids, dtype=np.int32), logprobs, versions, "stop", "", loss_mask=mask)
    rollout = Rollout((0, number, 0), Prompt(number, "", (5, 61 + number, 302)), completion)
    return replace(rollout, turns=turns if len(turns) > 1 else [], scores={"proxy": Score(sum(scores))})


ROLLOUTS = [
    conversation(0, [[403, 94, EOS], [15, 16], [33, EOS]], [0.5, 1.0]),
    conversation(1, [[9], [33, EOS, 444, 9], [9, 120, 7], [8], [300, EOS]], [-1.0, 0.3, 2.0]),
    conversation(2, [[21, 22, EOS]], [0.2]),  # a single turn beside them
    conversation(3, [[88, EOS], [460], [EOS]], [-0.4, -0.7]),
]


class Plain:
    """The task's models as Hugging Face models in float64; only positions that were sampled are ever looked at."""

    def __init__(self, task: PPOTask):
        self.ppo = task.config.ppo
        options: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": "eager"}
        path = task.config.model.path
        self.policy, self.reference = (AutoModelForCausalLM.from_pretrained(path, **options) for _ in range(2))
        self.value = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, **options)
        assert task.value is not None
        pairs = ((self.policy, task.policy.model), (self.reference, task.reference), (self.value, task.value.model))
        for mine, theirs in pairs:
            mine.load_state_dict({n: p.detach().double() for n, p in theirs.lm.named_parameters()})

    def states(self, r: Rollout) -> tuple[list[int], list[int]]:
        """Token ids, and the places of those that were sampled."""
        start, mask = len(r.prompt.token_ids), r.completion.loss_mask
        assert mask is not None
        ids = [*r.prompt.token_ids, *r.completion.token_ids.tolist()]
        return ids, [start + t for t in range(len(mask)) if mask[t]]

    def logprobs(self, model: Any, r: Rollout) -> list[torch.Tensor]:
        ids, places = self.states(r)
        logits = model(torch.tensor([ids])).logits[0]
        return [torch.log_softmax(logits[t - 1], 0)[ids[t]] for t in places]

    def values(self, r: Rollout) -> list[torch.Tensor]:
        ids, places = self.states(r)
        hidden = self.value.model(torch.tensor([ids])).last_hidden_state[0]
        return [hidden[t - 1] @ self.value.score.weight[0] for t in places]

    def update(self, rollouts: list[Rollout], paid: list[dict[int, float]]) -> dict[str, float]:
        """One step. `paid`: by number of the sampled token, from 0, what is paid there."""
        ppo, tokens = self.ppo, 0
        rows: list[tuple[list[torch.Tensor], list[torch.Tensor], list[float], list[float]]] = []
        kl_sum = reward_sum = gap = 0.0
        for r, scores in zip(rollouts, paid, strict=True):
            logprobs, values = self.logprobs(self.policy, r), self.values(r)
            with torch.no_grad():
                ref = self.logprobs(self.reference, r)
            kl = [p.item() - q.item() for p, q in zip(logprobs, ref, strict=True)]
            rewards = [-BETA * kl[i] + scores.get(i, 0.0) for i in range(len(kl))]
            advantages = [0.0] * len(kl)
            following = advantage = 0.0
            for i in reversed(range(len(kl))):
                advantage = rewards[i] + ppo.gamma * following - values[i].item() + ppo.gamma * ppo.lam * advantage
                following, advantages[i] = values[i].item(), advantage
            returns = [a + v.item() for a, v in zip(advantages, values, strict=True)]
            rows.append((logprobs, values, advantages, returns))
            tokens, kl_sum, reward_sum = tokens + len(kl), kl_sum + sum(kl), reward_sum + sum(rewards)
            sampled = r.completion.behavior_logprobs[r.completion.loss_mask]
            gap += sum(abs(p.item() - float(b)) for p, b in zip(logprobs, sampled, strict=True))
        flat = np.array([a for _, _, row, _ in rows for a in row])
        mean, std = flat.mean(), math.sqrt(flat.var(ddof=1) + 1e-8)
        policy_loss = value_loss = torch.zeros((), dtype=torch.float64)
        for logprobs, values, advantages, returns in rows:
            for p, v, a, target in zip(logprobs, values, advantages, returns, strict=True):
                # The ratio is 1 in the first step, so that no clip is at work.
                policy_loss = policy_loss - (a - mean) / std * torch.exp(p - p.detach()) / tokens
                value_loss = value_loss + (v - target) ** 2 / 2 / tokens
        for loss, model, options in (
            (policy_loss, self.policy, ppo.optimizer),
            (value_loss, self.value, ppo.value_optimizer),
        ):
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
            torch.optim.AdamW(
                model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), eps=options.eps, weight_decay=0.0
            ).step()
        return {
            "value/loss": value_loss.item(),
            "kl/ref_seq": kl_sum / len(rollouts),
            "kl/ref_token": kl_sum / tokens,
            "kl/mismatch_logp_mean": gap / tokens,
            "reward/total_mean": reward_sum / len(rollouts),
        }


@pytest.fixture
def config(small_vocab: Path, tmp_path: Path) -> TandemConfig:
    config = make_config(small_vocab, tmp_path, dtype="float32")
    ppo = config.ppo
    ppo.gamma, ppo.lam, ppo.missing_eos_penalty = 0.95, 0.8, 0.0
    ppo.optimizer.learning_rate = ppo.value_optimizer.learning_rate = 1e-3
    # Adam divides by |g| + eps: with a large eps a step stays proportional to small gradients, rounding errors included.
    ppo.optimizer.eps = ppo.value_optimizer.eps = 1e-3
    return config


# What is paid by number of the sampled token: turn ends of ROLLOUTS counted without the observations.
PAID = {
    "per_turn": [{2: 0.5, 4: 1.0}, {0: -1.0, 3: 0.3, 5: 2.0}, {2: 0.2}, {1: -0.4, 2: -0.7}],
    "cumulative": [{4: 1.5}, {5: 1.3}, {2: 0.2}, {2: -1.1}],
}


@pytest.mark.parametrize(("placing", "budget"), [("per_turn", 1000), ("per_turn", 1), ("cumulative", 1)])
def test_an_update_equals_a_plain_loop(placing: str, budget: int, config: TandemConfig, ranks: Ranks) -> None:
    """Partitions included: all conversations in one microbatch, or each in its own."""
    config.environment.reward = placing
    task = PPOTask(ranks, config, config.model.path, config.model.path, (EOS,), [])
    generator = torch.Generator().manual_seed(7)
    for parameter in task.reference.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    plain = Plain(task)
    assert task.value is not None
    engines = ((task.policy, plain.policy), (task.value, plain.value))
    before = [{n: p.detach().double().clone() for n, p in engine.model.lm.named_parameters()} for engine, _ in engines]
    expected = plain.update(ROLLOUTS, PAID[placing])
    rows = [shaped(r, ScoreNormalizer(), config.ppo, config.environment) for r in ROLLOUTS]
    (batch,) = make_batches(ROLLOUTS, rows, 1, 1, budget, np.random.default_rng(0))
    assert batch.global_loss_tokens == [5 + 6 + 3 + 3]
    metrics = task.update(batch, BETA, train_policy=True)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=2e-4, abs=2e-5)
    for start, (engine, theirs) in zip(before, engines, strict=True):
        wanted = {name: p.detach() for name, p in theirs.named_parameters()}
        step = max((wanted[name] - start[name]).abs().max().item() for name in start)
        assert step > 1e-5
        for name, p in engine.model.lm.named_parameters():
            assert (p.detach().double() - wanted[name]).abs().max().item() < 2e-3 * step, name
