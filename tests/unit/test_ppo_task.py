"""A PPO update by DeepSpeed on one rank against the same update in float64, one sequence and one token at a time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from common.models.packed_attention import Packed
from contracts.config import TandemConfig
from contracts.interfaces import NonFiniteError
from contracts.records import Example, Rollout, TrainingBatch
from controller.loop.training_batches import make_batches
from learner.passes import Places, over_steps
from learner.ppo import PPOTask
from learner.ranks import Ranks
from tests.conftest import make_config
from tests.rollouts import rollout

EOS = 2  # the pad token too
ENDS = (EOS, 1)  # what ends a completion, and may not be sampled early
KL_COEF = 0.1
Weights = dict[str, torch.Tensor]


ROLLOUTS = [
    rollout(0, [5, 61, 302], [403, 94, 15, EOS]),
    rollout(1, [9], [33, 444, 9, 9, 9, 120, 7]),
    rollout(2, [17, EOS, 18], [21, 22, EOS]),  # an EOS inside the prompt
    rollout(3, [40, 41, 42, 43, 44], [300]),
    rollout(4, [88, 89], [460, 470, EOS, 480, 490]),  # and one inside the completion
]
SCORES = [1.5, -0.7, 0.2, -2.0, 0.9]
# Nothing of it trains.
EMPTY = rollout(3, [88, 89], [])


@pytest.fixture
def config(small_vocab: Path, tmp_path: Path) -> TandemConfig:
    config = make_config(small_vocab, tmp_path, dtype="float32")
    config.ppo.optimizer.learning_rate = 1e-3
    config.ppo.value_optimizer.learning_rate = 2e-3
    config.ppo.value_optimizer.head_learning_rate = 5e-3
    config.ppo.target_approx_kl = None
    # Adam divides by |g| + eps: with a large eps a step stays proportional to small gradients, rounding errors included.
    config.ppo.optimizer.eps = config.ppo.value_optimizer.eps = 1e-3
    return config


@pytest.fixture
def make_task(ranks: Ranks) -> Callable[..., PPOTask]:
    """A fresh task whose reference differs from its policy, so that the KL is not zero."""

    def make(config: TandemConfig, noise: float = 0.02, ptx: list[Example] | None = None) -> PPOTask:
        path = config.model.path
        task = PPOTask(ranks, config, path, path, ENDS, ptx or [])
        generator = torch.Generator().manual_seed(7)
        for parameter in task.reference.parameters():
            parameter.data += noise * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        return task

    return make


def batch_of(
    rollouts: list[Rollout], budget: int = 1000, minibatches: int = 1, scores: list[float] | None = None
) -> TrainingBatch:
    (batch,) = make_batches(rollouts, scores or SCORES, 1, minibatches, budget, np.random.default_rng(0))
    return batch


def weights_of(engine: Any) -> Weights:
    model = engine.model if hasattr(engine, "model") else engine
    return {name: p.detach().double().clone() for name, p in model.lm.named_parameters()}


def assert_same(mine: Weights, theirs: Weights, before: Weights, tolerance: float) -> None:
    """No weight differs by more than `tolerance` of the largest step that any weight has taken."""
    assert mine.keys() == theirs.keys() == before.keys()
    step = max((theirs[name] - before[name]).abs().max().item() for name in before)
    assert step > 1e-5
    worst = max(((mine[name] - theirs[name]).abs().max().item(), name) for name in mine)
    assert worst[0] <= tolerance * step, f"{worst[1]} differs by {worst[0]:.2e} after steps of {step:.2e}"


# ---- the same update, written plainly


class PlainPPO:
    """Policy, reference and value model of a task as Hugging Face models in float64 with eager attention."""

    def __init__(self, task: PPOTask):
        self.config = task.config
        options: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": "eager"}
        path = task.config.model.path
        self.policy = AutoModelForCausalLM.from_pretrained(path, **options)
        self.reference = AutoModelForCausalLM.from_pretrained(path, **options)
        self.value = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, **options)
        for plain, theirs in ((self.policy, task.policy), (self.reference, task.reference), (self.value, task.value)):
            plain.load_state_dict(weights_of(theirs))
            plain.train()
        ppo = self.config.ppo

        def adam(parameters: Any, options: Any) -> torch.optim.AdamW:
            betas = (options.betas[0], options.betas[1])
            rate = options.learning_rate
            return torch.optim.AdamW(parameters, lr=rate, betas=betas, eps=options.eps, weight_decay=0.0)

        head, rest = self.value.score.weight, ppo.value_optimizer
        groups = [{"params": list(self.value.model.parameters())}, {"params": [head], "lr": rest.head_learning_rate}]
        self.adams = [adam(self.policy.parameters(), ppo.optimizer), adam(groups, rest)]

    def logprobs(self, model: Any, r: Rollout) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """log p of each completion token, and the entropy of its distribution."""
        ids, start = [*r.prompt.token_ids, *r.completion.token_ids.tolist()], len(r.prompt.token_ids)
        logits = model(torch.tensor([ids])).logits[0] / self.config.ppo.sampling.temperature
        result, entropies = [], []
        for t in range(start, len(ids)):
            row = logits[t - 1].clone()
            if t - start < self.config.ppo.sampling.min_completion_tokens:
                row[list(ENDS)] = -math.inf
            p = torch.softmax(row, 0)
            result.append(torch.log(p[ids[t]]))
            entropies.append(-(p[p > 0] * p[p > 0].log()).sum())
        return result, entropies

    def values(self, r: Rollout) -> list[torch.Tensor]:
        ids, start = [*r.prompt.token_ids, *r.completion.token_ids.tolist()], len(r.prompt.token_ids)
        hidden = self.value.model(torch.tensor([ids])).last_hidden_state[0]
        return [hidden[t - 1] @ self.value.score.weight[0] for t in range(start, len(ids))]

    def advantages(self, rollouts: list[Rollout], scores: list[float]) -> dict[str, Any]:
        """Everything that is known before the first step, by rollout and token."""
        ppo = self.config.ppo
        known: dict[str, list[list[float]]] = {k: [] for k in ("old", "ref", "v", "adv", "ret", "reward", "entropy")}
        with torch.no_grad():
            for r, score in zip(rollouts, scores, strict=True):
                logprobs, entropies = self.logprobs(self.policy, r)
                old = [float(x) for x in logprobs]
                ref = [float(x) for x in self.logprobs(self.reference, r)[0]]
                v = [float(x) for x in self.values(r)]
                entropies = [float(x) for x in entropies]
                rewards = [-KL_COEF * (p - q) for p, q in zip(old, ref, strict=True)]
                if rewards:
                    rewards[-1] += score
                advs: list[float] = []
                advantage = following = 0.0
                for reward, value in zip(reversed(rewards), reversed(v), strict=True):
                    advantage = reward + ppo.gamma * following - value + ppo.gamma * ppo.lam * advantage
                    following = value
                    advs.insert(0, advantage)
                returns = [a + value for a, value in zip(advs, v, strict=True)]
                for key, row in zip(known, (old, ref, v, advs, returns, rewards, entropies), strict=True):
                    known[key].append(row)
        flat = np.array([a for row in known["adv"] for a in row])
        mean, std = flat.mean(), math.sqrt(flat.var(ddof=1) + 1e-8)
        known["adv"] = [[(a - mean) / std for a in row] for row in known["adv"]]
        return known

    def update(
        self, rollouts: list[Rollout], scores: list[float], ptx: list[Example] | None = None
    ) -> dict[str, float]:
        """All epochs with one minibatch each. Returns the metrics that the task returns."""
        ppo, known = self.config.ppo, self.advantages(rollouts, scores)
        tokens = sum(len(r.completion.token_ids) for r in rollouts)
        steps = []
        for _ in range(ppo.epochs):
            policy_loss, value_loss, entropy = torch.zeros(3, dtype=torch.float64)
            clipped = value_clipped = 0
            ratios = []
            for i, r in enumerate(rollouts):
                logprobs, entropies = self.logprobs(self.policy, r)
                entropy = entropy + sum(entropies)
                now = zip(logprobs, self.values(r), strict=True)
                for t, (logprob, value) in enumerate(now):
                    a, low, high = known["adv"][i][t], 1 - ppo.clip, 1 + ppo.clip
                    ratio = torch.exp(logprob - known["old"][i][t])
                    loss, rho = -a * ratio, ratio.item()
                    if (a > 0 and rho > high) or (a < 0 and rho < low):
                        loss, clipped = torch.tensor(-a * min(max(rho, low), high)).double(), clipped + 1
                    if a < 0 and ppo.dual_clip and rho > ppo.dual_clip:
                        loss = torch.tensor(-a * ppo.dual_clip).double()
                    policy_loss = policy_loss + loss
                    ratios.append(rho)
                    target, old = known["ret"][i][t], known["v"][i][t]
                    square = (value - target) ** 2
                    if ppo.value_clip and abs(value.item() - old) > ppo.value_clip:
                        near = old + math.copysign(ppo.value_clip, value.item() - old)
                        if (near - target) ** 2 > square.item():
                            square, value_clipped = torch.tensor((near - target) ** 2).double(), value_clipped + 1
                    value_loss = value_loss + square / 2
            step = {
                "policy/loss": policy_loss.item() / tokens,
                "policy/clipfrac": clipped / tokens,
                "policy/approx_kl": sum(r - 1 - math.log(r) for r in ratios) / tokens,
                "policy/ratio_mean": sum(ratios) / tokens,
                "policy/ratio_max": max(ratios),
                "value/loss": value_loss.item() / tokens,
                "value/clipfrac": value_clipped / tokens,
            }
            if ppo.entropy_coef:
                step["policy/entropy_bonus"] = entropy.item() / tokens
            total = ppo.combined.initial * (policy_loss - ppo.entropy_coef * entropy) / tokens
            if ptx:
                nll = plain_nll(self.policy, ptx)
                step["policy/ptx_loss"] = nll.item()
                total = total + ppo.ptx_coef * nll
            for name, loss, adam, model in (
                ("policy", total, self.adams[0], self.policy),
                ("value", value_loss / tokens, self.adams[1], self.value),
            ):
                adam.zero_grad()
                loss.backward()
                limit = ppo.optimizer.max_grad_norm if name == "policy" else ppo.value_optimizer.max_grad_norm
                step[f"{name}/grad_norm"] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
                adam.step()
            steps.append(step)
        metrics = {name: sum(s[name] for s in steps) / len(steps) for name in steps[0]}
        metrics["policy/ratio_max"] = max(s["policy/ratio_max"] for s in steps)
        return metrics | self.describe(rollouts, known, tokens)

    def describe(self, rollouts: list[Rollout], known: dict[str, Any], tokens: int) -> dict[str, float]:
        def flat(name: str) -> np.ndarray:
            return np.array([x for row in known[name] for x in row])

        behavior = np.concatenate([r.completion.behavior_logprobs for r in rollouts]).astype(np.float64)
        kl, gap = flat("old") - flat("ref"), flat("old") - behavior
        returns = flat("ret")
        return {
            "kl/ref_seq": kl.sum() / len(rollouts),
            "kl/ref_token": kl.sum() / tokens,
            "kl/ref_k3": (np.exp(-kl) - 1 + kl).sum() / tokens,
            # k3 of sampler against learner: E under the sampler of r - 1 - log r with r = learner / sampler.
            "kl/mismatch_k3": (np.exp(gap) - 1 - gap).sum() / tokens,
            "kl/mismatch_logp_mean": np.abs(gap).sum() / tokens,
            "kl/mismatch_logp_max": np.abs(gap).max(),
            "policy/entropy": flat("entropy").sum() / tokens,
            "reward/total_mean": flat("reward").sum() / len(rollouts),
            "value/explained_var": 1 - (returns - flat("v")).var(ddof=1) / returns.var(ddof=1),
        }


def plain_nll(model: Any, examples: list[Example]) -> torch.Tensor:
    """Mean loss a marked token, one example at a time."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for example in examples:
        logprobs = torch.log_softmax(model(torch.tensor([example.token_ids])).logits[0], -1)
        for t in range(1, len(example.token_ids)):
            if example.loss_mask[t]:
                total, tokens = total - logprobs[t - 1, example.token_ids[t]], tokens + 1
    return total / tokens


PTX = [
    Example([5, 6, 7, 8, EOS], [False, False, True, True, True]),
    Example([90, 91, 92], [True, True, True]),  # nothing predicts the first token
    Example([3, EOS, 11, 12], [False, False, False, True]),
]


def plain(config: TandemConfig) -> None:
    pass


def several_epochs(config: TandemConfig) -> None:
    config.ppo.epochs = 3
    config.ppo.optimizer.learning_rate = 2e-3  # moves the policy and its values beyond the clips


def other_constants(config: TandemConfig) -> None:
    config.ppo.epochs, config.ppo.gamma, config.ppo.lam, config.ppo.clip = 2, 0.9, 0.5, 0.1
    config.ppo.dual_clip = config.ppo.value_clip = None
    config.ppo.optimizer.max_grad_norm, config.ppo.value_optimizer.max_grad_norm = 0.5, 2.0
    config.learner.held_tokens = 15  # some microbatches are held, others are not


def cooler_and_without_early_eos(config: TandemConfig) -> None:
    config.ppo.sampling.temperature, config.ppo.sampling.min_completion_tokens = 0.7, 2


def with_ptx(config: TandemConfig) -> None:
    config.ppo.ptx_coef, config.ppo.ptx_batch_size, config.learner.microbatch_tokens = 0.5, 3, 8


def with_lambda(config: TandemConfig) -> None:
    with_ptx(config)
    config.ppo.combined.initial, config.ppo.optimizer.max_grad_norm = 0.25, 0.5


def with_entropy(config: TandemConfig) -> None:
    several_epochs(config)
    cooler_and_without_early_eos(config)
    config.ppo.entropy_coef, config.ppo.combined.initial = 0.3, 0.5
    config.learner.held_tokens = 15


@pytest.mark.parametrize(
    "change",
    [with_entropy, plain, several_epochs, other_constants, cooler_and_without_early_eos, with_ptx, with_lambda],
)
def test_update_equals_plain_ppo(
    change: Callable[[TandemConfig], None], config: TandemConfig, make_task: Callable[..., PPOTask]
) -> None:
    change(config)
    ptx = PTX if config.ppo.ptx_coef else []
    task = make_task(config, ptx=ptx)
    mine = PlainPPO(task)
    before = weights_of(task.policy), weights_of(task.value)
    rollouts = [*ROLLOUTS, EMPTY]
    expected = mine.update(rollouts, [*SCORES, 4.0], ptx)
    batch, multiplier = batch_of(rollouts, 16, scores=[*SCORES, 4.0]), config.ppo.combined.initial
    metrics = task.update(batch, KL_COEF, train_policy=True, policy_coef=multiplier)
    found = {name: value for name, value in metrics.items() if name in expected}
    assert found == pytest.approx(expected, rel=2e-4, abs=2e-5)
    assert metrics["staleness/token_mean"] == 0
    alone = {"policy/optimizer_steps", "staleness/token_mean"}
    assert set(metrics) - set(expected) == alone | {k for k in metrics if k.startswith("perf/")}
    assert metrics["policy/optimizer_steps"] == config.ppo.epochs
    if change is several_epochs:
        assert min(expected["policy/clipfrac"], expected["value/clipfrac"]) > 0  # both clips were at work
    assert_same(weights_of(task.policy), dict(mine.policy.named_parameters()), before[0], 2e-3)
    assert_same(weights_of(task.value), dict(mine.value.named_parameters()), before[1], 2e-3)


# ---- what must not matter


def updated(task: PPOTask, budget: int, minibatches: int = 1) -> tuple[dict[str, float], Weights, Weights]:
    metrics = task.update(batch_of(ROLLOUTS, budget, minibatches), KL_COEF, train_policy=True)
    return metrics, weights_of(task.policy), weights_of(task.value)


def test_any_partition_gives_the_same_update(config: TandemConfig, make_task: Callable[..., PPOTask]) -> None:
    config.ppo.epochs, config.ppo.minibatches = 2, 2
    assert [len(m) for m in batch_of(ROLLOUTS, 1, 2).minibatches] == [3, 2]
    assert [len(m) for m in batch_of(ROLLOUTS, 1000, 2).minibatches] == [1, 1]
    first = make_task(config)
    before = weights_of(first.policy), weights_of(first.value)
    metrics, policy, value = updated(first, 1000, 2)
    for budget in (1, 12):
        others = updated(make_task(config), budget, 2)
        assert_same(others[1], policy, before[0], 1e-3)
        assert_same(others[2], value, before[1], 1e-3)
        scalars = {k: v for k, v in metrics.items() if not k.startswith("perf/")}
        assert {k: others[0][k] for k in scalars} == pytest.approx(scalars, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_graphs_and_recomputed_ones_agree_exactly(
    dtype: str, config: TandemConfig, small_bfloat16: Path, make_task: Callable[..., PPOTask]
) -> None:
    if dtype == "bfloat16":
        config = replace(config, model=replace(config.model, path=str(small_bfloat16), dtype=dtype))
    config.ppo.epochs, config.ppo.minibatches = 2, 2
    results = []
    for held_tokens in (0, 1000):
        config.learner.held_tokens = held_tokens
        results.append(updated(make_task(config), 8, 2))
    for recomputed, held in zip(results[0][1:], results[1][1:], strict=True):
        assert all(torch.equal(recomputed[name], held[name]) for name in recomputed)


@pytest.mark.parametrize(("zero_stage", "offload"), [(1, "none"), (2, "none"), (1, "optimizer"), (2, "optimizer")])
def test_sharding_changes_nothing(
    zero_stage: int, offload: str, config: TandemConfig, make_task: Callable[..., PPOTask]
) -> None:
    task = make_task(config)
    before = weights_of(task.policy), weights_of(task.value)
    _, policy, value = updated(task, 8)
    config.learner.zero_stage, config.learner.held_tokens, config.learner.offload = zero_stage, 1000, offload
    _, sharded_policy, sharded_value = updated(make_task(config), 8)
    assert_same(sharded_policy, policy, before[0], 1e-3)
    assert_same(sharded_value, value, before[1], 1e-3)


# ---- single properties


def test_the_first_step_starts_at_ratio_one_and_no_kl(config: TandemConfig, make_task: Callable[..., PPOTask]) -> None:
    metrics = make_task(config, noise=0.0).update(batch_of(ROLLOUTS, 8), KL_COEF, train_policy=True)
    assert metrics["policy/ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert metrics["policy/ratio_max"] == pytest.approx(1, abs=1e-6)
    assert metrics["policy/approx_kl"] == pytest.approx(0, abs=1e-9)
    assert metrics["policy/clipfrac"] == metrics["value/clipfrac"] == 0
    assert metrics["kl/ref_seq"] == pytest.approx(0, abs=1e-6)
    # Without a KL the rewards are the scores.
    assert metrics["reward/total_mean"] == pytest.approx(sum(SCORES) / len(SCORES), abs=1e-6)


def test_what_is_cut_off_teaches_the_value_model_nothing_either(
    config: TandemConfig, make_task: Callable[..., PPOTask]
) -> None:
    """Without whitening, the update is that of a batch without it; a minibatch of nothing else changes no weight."""
    config.ppo.whiten_advantages, config.ppo.mask_truncated = False, True
    ended = [
        replace(r, completion=replace(r.completion, finish_reason="stop" if i % 2 else "length"))
        for i, r in enumerate(ROLLOUTS)
    ]
    every, kept = ended, ended[1::2]
    found = []
    for rollouts, scores in ((every, SCORES), (kept, SCORES[1::2])):
        for budget in (8, 1000):
            task = make_task(config)
            before = weights_of(task.policy), weights_of(task.value)
            (batch,) = make_batches(rollouts, scores, 1, 1, budget, np.random.default_rng(0), mask_truncated=True)
            metrics = task.update(batch, KL_COEF, train_policy=True)
            found.append((weights_of(task.policy), weights_of(task.value), metrics))
    for policy, value, metrics in found[1:]:
        assert_same(policy, found[0][0], before[0], 1e-3)
        assert_same(value, found[0][1], before[1], 1e-3)
        for name in ("policy/loss", "value/loss", "policy/ratio_mean", "policy/grad_norm"):
            assert metrics[name] == pytest.approx(found[0][2][name], rel=1e-3, abs=1e-6)
    assert found[0][2]["kl/ref_seq"] != pytest.approx(found[2][2]["kl/ref_seq"], rel=1e-2)  # metrics are of all

    config.ppo.optimizer.learning_rate = config.ppo.value_optimizer.learning_rate = 1e-3
    task = make_task(config)
    policy, value = weights_of(task.policy), weights_of(task.value)
    (batch,) = make_batches(every, SCORES, 1, 5, 8, np.random.default_rng(0), mask_truncated=True)
    idle = next(i for i, tokens in enumerate(batch.global_loss_tokens) if not tokens)
    alone = TrainingBatch(batch.minibatches[idle : idle + 1], [0], [0], batch.global_sequences[idle : idle + 1])
    # Of one rollout the numbers begin at 0.
    alone.minibatches[0][0].rows[:], alone.minibatches[0][0].groups[:] = 0, 0
    metrics = task.update(alone, KL_COEF, train_policy=True)
    assert metrics["policy/loss"] == metrics["value/loss"] == metrics["policy/grad_norm"] == 0
    assert all(torch.equal(policy[name], w) for name, w in weights_of(task.policy).items())
    assert all(torch.equal(value[name], w) for name, w in weights_of(task.value).items())


def test_value_warm_up_leaves_the_policy_alone(config: TandemConfig, make_task: Callable[..., PPOTask]) -> None:
    config.learner.held_tokens = 1000
    task = make_task(config)
    policy, value, reference = weights_of(task.policy), weights_of(task.value), weights_of(task.reference)
    metrics = task.update(batch_of(ROLLOUTS, 8), KL_COEF, train_policy=False)
    assert all(torch.equal(policy[name], w) for name, w in weights_of(task.policy).items())
    moved = {name for name, w in weights_of(task.value).items() if not torch.equal(value[name], w)}
    assert moved == value.keys()
    assert "policy/loss" not in metrics
    task.update(batch_of(ROLLOUTS, 8), KL_COEF, train_policy=True)
    assert not torch.equal(policy["lm_head.weight"], weights_of(task.policy)["lm_head.weight"])
    assert all(torch.equal(reference[name], w) for name, w in weights_of(task.reference).items())


def test_value_model_fits_what_it_sees(config: TandemConfig, make_task: Callable[..., PPOTask]) -> None:
    task = make_task(config)
    losses = [task.update(batch_of(ROLLOUTS), KL_COEF, train_policy=False)["value/loss"] for _ in range(6)]
    assert losses[-1] < 0.2 * losses[0]


def test_policy_learns_to_prefer_what_scores(config: TandemConfig, make_task: Callable[..., PPOTask]) -> None:
    """Two completions of one prompt: the good one becomes likelier, the bad one less likely."""
    config.ppo.kl.coef = 0.0
    pair = [rollout(0, [7, 8], [100, 101, EOS]), rollout(1, [7, 8], [200, 201, EOS])]
    task = make_task(config, noise=0.0)

    def likelihoods() -> list[float]:
        ids = [([*r.prompt.token_ids, *r.completion.token_ids.tolist()], 2) for r in pair]
        return [sum(row) for row in task.token_logprobs(ids)]

    before = likelihoods()
    for _ in range(3):
        task.update(batch_of(pair, scores=[2.0, -2.0]), 0.0, train_policy=True)
    good, bad = (now - then for now, then in zip(likelihoods(), before, strict=True))
    assert good > 0.1
    assert bad < -0.1


def test_token_logprobs_equal_a_plain_forward_pass(config: TandemConfig, make_task: Callable[..., PPOTask]) -> None:
    config.ppo.sampling.temperature = 0.5  # does not count: these are compared with the engine's at temperature 1
    task = make_task(config)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    sequences = [([5, 6, 7, EOS, 9], 2), ([1, 2], 1)]
    for (ids, start), found in zip(sequences, task.token_logprobs(sequences), strict=True):
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        assert found == pytest.approx([logprobs[t - 1, ids[t]].item() for t in range(start, len(ids))], abs=1e-5)


@pytest.mark.parametrize("end", ENDS)
def test_what_ends_is_banned_in_learner_and_reference(
    end: int, config: TandemConfig, make_task: Callable[..., PPOTask]
) -> None:
    rollouts = [rollout(0, [5, 6], [10, 11, 12]), rollout(1, [7], [13, 14])]

    def kl(min_completion_tokens: int) -> float:
        config.ppo.sampling.min_completion_tokens = min_completion_tokens
        task = make_task(config, noise=0.0)
        task.reference.lm.lm_head.weight.data[end] *= -8  # reference and policy differ in it alone
        return task.update(batch_of(rollouts, scores=[0.0, 1.0]), KL_COEF, train_policy=False)["kl/ref_k3"]

    assert kl(3) == pytest.approx(0, abs=1e-9)  # every token is early
    assert kl(0) > 1e-7


def test_early_tokens_count_from_the_completion_and_from_every_turn() -> None:
    """Against a walk over the tokens, one at a time."""
    masks = ["11111", "110001111", "1", "1110111011", ""]
    rollouts = []
    for number, mask in enumerate(masks):
        row = rollout(number, [5, 6], [10] * len(mask))
        row.completion.loss_mask = np.array([c == "1" for c in mask], dtype=bool)
        rollouts.append(row)
    batch = batch_of(rollouts, scores=[np.zeros(len(mask), dtype=np.float32) for mask in masks])
    for least, of_turn in ((0, 0), (3, 0), (0, 2), (0, 1), (7, 2), (1, 4)):
        expected = []
        for mb in batch.minibatches[0]:
            for row in mb.loss_mask:
                in_turn = 0
                for t, trains in enumerate(row):
                    in_turn = in_turn + 1 if trains else 0
                    if trains:
                        expected.append(t < least or 0 < in_turn <= of_turn)
        found = [Places(mb, torch.device("cpu")).early(least, of_turn) for mb in batch.minibatches[0]]
        if least == of_turn == 0:
            assert found == [None] * len(found)
        else:
            assert torch.cat([row for row in found if row is not None]).tolist() == expected
            assert 0 < sum(expected) < len(expected) or least == 7


def test_a_score_that_is_not_a_number_stops_before_the_step(
    config: TandemConfig, make_task: Callable[..., PPOTask]
) -> None:
    for whiten, train_policy in ((True, True), (False, False)):
        config.ppo.whiten_advantages = whiten
        task = make_task(config)
        policy, value = weights_of(task.policy), weights_of(task.value)
        with pytest.raises(NonFiniteError):
            task.update(batch_of(ROLLOUTS, 8, scores=[*SCORES[:4], math.nan]), KL_COEF, train_policy)
        assert all(torch.equal(policy[name], w) for name, w in weights_of(task.policy).items())
        assert all(torch.equal(value[name], w) for name, w in weights_of(task.value).items())


@pytest.mark.parametrize(("dtype", "zero_stage"), [("float32", 0), ("float32", 2), ("bfloat16", 0), ("bfloat16", 2)])
def test_a_gradient_that_is_not_a_number_is_not_taken(
    dtype: str, zero_stage: int, config: TandemConfig, small_bfloat16: Path, make_task: Callable[..., PPOTask]
) -> None:
    """A finite loss may have one: that of sqrt(0 * w) is 0, its gradient inf * 0."""
    if dtype == "bfloat16":
        config = replace(config, model=replace(config.model, path=str(small_bfloat16), dtype=dtype))
    config.learner.zero_stage = zero_stage
    task = make_task(config)
    policy = weights_of(task.policy)
    packed = Packed.of([[5, 6, 7]], task.ranks.device)
    logprobs, _ = task.policy(packed, torch.tensor([0, 1]), torch.tensor([6, 7]))
    task.policy.backward((0 * logprobs.sum()).sqrt(), is_last=True)
    with pytest.raises(NonFiniteError, match="gradient"):
        task.policy.step()
    assert all(torch.equal(policy[name], w) for name, w in weights_of(task.policy).items())


@pytest.mark.parametrize(
    ("minibatches", "target", "steps"),
    [
        (1, 1e-6, 2),  # the first epoch starts at ratio 1, the second sees the move
        (1, 1e6, 4),
        (1, None, 4),
        (5, 1e-6, 5),  # the second minibatch has seen it: the first epoch is whole all the same
        (5, 1e6, 20),
    ],
)
def test_no_epoch_begins_where_the_policy_has_moved_enough(
    minibatches: int, target: float | None, steps: int, config: TandemConfig, make_task: Callable[..., PPOTask]
) -> None:
    config.ppo.epochs, config.ppo.minibatches, config.ppo.target_approx_kl = 4, minibatches, target
    metrics = make_task(config).update(batch_of(ROLLOUTS, minibatches=minibatches), KL_COEF, train_policy=True)
    assert metrics["policy/optimizer_steps"] == steps


def test_every_rollout_trains_however_early_an_update_ends(
    config: TandemConfig, make_task: Callable[..., PPOTask]
) -> None:
    """The ledger calls them all trained. A token that no other rollout has moves with it: its row of the embeddings."""
    config.ppo.epochs, config.ppo.minibatches, config.ppo.target_approx_kl = 3, 5, 1e-9
    task = make_task(config)
    before = weights_of(task.policy)["model.embed_tokens.weight"]
    task.update(batch_of(ROLLOUTS, minibatches=5), KL_COEF, train_policy=True)
    moved = (weights_of(task.policy)["model.embed_tokens.weight"] - before).abs().sum(dim=1) > 0
    assert moved[[61, 444, 18, 44, 460]].all()  # of the rollouts 0 to 4
    assert not moved[500]


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_linear_schedule_ends_with_the_run_however_few_steps_an_update_takes(
    warmup: int, config: TandemConfig, make_task: Callable[..., PPOTask]
) -> None:
    ppo = config.ppo
    ppo.updates, ppo.value_warmup_updates, ppo.epochs, ppo.minibatches = 2, warmup, 4, 2
    ppo.optimizer.schedule = ppo.value_optimizer.schedule = "linear"

    def rates(task: PPOTask) -> tuple[float, float]:
        """Of the next step, as shares of the configured ones."""
        assert task.value is not None
        policy, value = (engine.state()[1]["rates"][0] for engine in (task.policy, task.value))
        return policy / ppo.optimizer.learning_rate, value / ppo.value_optimizer.learning_rate

    found: dict[float, list[tuple[float, float]]] = {}
    taken: dict[float, float] = {}
    for target in (1e-9, 1e6):
        ppo.target_approx_kl = target
        task = make_task(config)
        batch = batch_of(ROLLOUTS, minibatches=2)
        found[target], taken[target] = [rates(task)], 0.0
        for index in range(warmup + ppo.updates):
            metrics = task.update(batch, KL_COEF, train_policy=index >= warmup)
            taken[target] += metrics["policy/optimizer_steps"]
            found[target].append(rates(task))
    assert taken[1e-9] == warmup * 8 + 2 * 2 < taken[1e6] == (warmup + 2) * 8
    assert found[1e-9] == found[1e6]
    if warmup:
        policy, value = [1.0, 1.0, 0.5, 0.0], [1.0, 2 / 3, 1 / 3, 0.0]
    else:
        policy = value = [1.0, 0.5, 0.0]
    assert [row[0] for row in found[1e-9]] == pytest.approx(policy)
    assert [row[1] for row in found[1e-9]] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(("target", "steps"), [(1e6, range(9)), (1e-9, (0, 1, 3, 4, 6, 7))])
def test_rates_warm_up_by_the_steps_of_the_schedule(
    target: float, steps: Sequence[int], config: TandemConfig, make_task: Callable[..., PPOTask]
) -> None:
    """The first step is taken with a share of the rate and not with none; one that an early end leaves out counts."""
    ppo = config.ppo
    ppo.updates, ppo.value_warmup_updates, ppo.epochs, ppo.target_approx_kl = 3, 0, 3, target
    ppo.optimizer.schedule, ppo.optimizer.warmup_steps, ppo.value_optimizer.warmup_steps = "linear", 4, 2
    task = make_task(config)
    taken: dict[str, list[float]] = {"policy": [], "value": []}
    for name, rates in taken.items():
        engine = getattr(task, name)
        engine.before_step = lambda engine=engine, rates=rates: rates.append(engine.state()[1]["rates"][0])
    for _ in range(ppo.updates):
        task.update(batch_of(ROLLOUTS), KL_COEF, train_policy=True)
    # Shares of the configured rates: of the policy's what is warm times what the line leaves.
    policy = [1 / 4, 2 / 4 * 8 / 9, 3 / 4 * 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 2 / 9, 1 / 9]
    value = [1 / 2, *[1.0] * 8]
    assert taken["policy"] == pytest.approx([ppo.optimizer.learning_rate * policy[step] for step in steps])
    assert taken["value"] == pytest.approx([ppo.value_optimizer.learning_rate * value[step] for step in steps])


def test_metrics_of_several_steps() -> None:
    steps = [{"policy/ratio_max": 1.0, "policy/loss": 1.0}, {"policy/ratio_max": 12.0, "policy/loss": 2.0}]
    assert over_steps([*steps, {"policy/ratio_max": 2.0, "policy/loss": 6.0}]) == {
        "policy/ratio_max": 12.0,
        "policy/loss": 3.0,
    }


def test_a_microbatch_without_a_training_token(config: TandemConfig, make_task: Callable[..., PPOTask]) -> None:
    """An empty completion alone in its microbatch adds nothing."""
    task = make_task(config)
    before = weights_of(task.policy), weights_of(task.value)
    _, policy, value = updated(task, 1)
    other = make_task(config)
    batch = batch_of([*ROLLOUTS, EMPTY], 1, scores=[*SCORES, 9.0])
    assert any(not mb.loss_mask.any() for mb in batch.minibatches[0])
    other.update(batch, KL_COEF, train_policy=True)
    assert_same(weights_of(other.policy), policy, before[0], 1e-3)
    assert_same(weights_of(other.value), value, before[1], 1e-3)


def test_only_the_top_layers_train(config: TandemConfig, make_task: Callable[..., PPOTask]) -> None:
    config.ppo.trainable_layers = config.ppo.value_trainable_layers = 1
    task = make_task(config)
    policy, value = weights_of(task.policy), weights_of(task.value)
    task.update(batch_of(ROLLOUTS, 8), KL_COEF, train_policy=True)
    for before, after, head in ((policy, task.policy, "lm_head.weight"), (value, task.value, "score.weight")):
        moved = {name for name, w in weights_of(after).items() if not torch.equal(before[name], w)}
        assert moved == {n for n in before if n.startswith("model.layers.1.")} | {"model.norm.weight", head}


def test_a_saved_policy_is_a_normal_checkpoint(
    config: TandemConfig, tmp_path: Path, make_task: Callable[..., PPOTask]
) -> None:
    task = make_task(config)
    task.update(batch_of(ROLLOUTS, 8), KL_COEF, train_policy=True)
    task.save(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert saved.state_dict().keys() == task.policy.model.lm.state_dict().keys()
    assert all(torch.equal(w.double(), weights_of(task.policy)[name]) for name, w in saved.named_parameters())
    ids = [5, 6, 7, EOS, 9, 10]
    logprobs = torch.log_softmax(saved(torch.tensor([ids])).logits[0], -1)
    found = task.token_logprobs([(ids, 1)])[0]
    assert found == pytest.approx([logprobs[t - 1, ids[t]].item() for t in range(1, len(ids))], abs=1e-5)


def test_weights_cannot_be_published_before_actors_are_connected(
    config: TandemConfig, make_task: Callable[..., PPOTask]
) -> None:
    with pytest.raises(RuntimeError, match="connect"):
        make_task(config).publish(1)


def test_mismatch_is_that_of_completions_which_the_present_weights_sampled(
    config: TandemConfig, make_task: Callable[..., PPOTask]
) -> None:
    """Against older tokens the policy differs because it has learnt; those behind them saw the cache of older weights."""
    task, tokens = make_task(config), [([5, 61, 302], [403, 94, 15, EOS]), ([9], [33, 444]), ([7], [12, 13, EOS])]
    rollouts = [rollout(i, *of) for i, of in enumerate(tokens)]
    for r, versions in zip(rollouts, ([3, 3, 4, 5], [4, 5], [5, 5, 5]), strict=True):
        r.completion.policy_versions = np.array(versions, dtype=np.int32)
    (now,) = task.token_logprobs([([*tokens[2][0], *tokens[2][1]], 1)])
    gaps = np.array(now) - rollouts[2].completion.behavior_logprobs
    (batch,) = make_batches(rollouts, [1.0, 2.0, 3.0], 1, 1, 100, np.random.default_rng(0), policy_version=5)
    metrics = task.update(batch, KL_COEF, train_policy=False)
    assert metrics["staleness/token_mean"] == pytest.approx((2 + 2 + 1 + 1) / 9)
    assert metrics["kl/mismatch_logp_mean"] == pytest.approx(np.mean(np.abs(gaps)), rel=1e-4)
    assert metrics["kl/mismatch_logp_max"] == pytest.approx(np.max(np.abs(gaps)), rel=1e-4)
    (batch,) = make_batches(rollouts, [1.0, 2.0, 3.0], 1, 1, 100, np.random.default_rng(0), policy_version=6)
    assert [name for name in task.update(batch, KL_COEF, train_policy=False) if "mismatch" in name] == []
