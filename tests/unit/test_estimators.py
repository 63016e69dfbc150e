"""Advantage estimators: by hand, against plain loops, and whole updates of a policy without a value model in float64."""

import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from common.files.source_code import PACKAGES
from contracts.checks.estimator_checks import estimator_checks
from contracts.checks.validation import ConfigError
from contracts.config import PPOConfig, TandemConfig
from contracts.estimators import ESTIMATORS, chosen_estimator, find_estimator, warmup_updates
from contracts.interfaces import NonFiniteError
from contracts.methods import method_title
from contracts.plugins import UnknownPlugin, names
from contracts.records import Completion, Prompt, Rollout, TrainingBatch
from controller.loop.training_batches import make_batches
from controller.pipeline.ingredients import own_source
from learner.advantages import whiten, whitening_moments
from learner.estimators.gae import gae
from learner.passes import Pass
from learner.ppo import PPOTask
from learner.ranks import Ranks
from tests.conftest import ROOT, compared, make_config

quick = settings(max_examples=40, deadline=None)
GROUPED = ("grpo", "dr_grpo", "rloo")


# ---- the advantages alone


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # Group 0 has outcomes 1, 2, 6: mean 3, unbiased variance (4 + 1 + 9) / 2 = 7. Group 1 has 5 and 5.
        ("grpo", [-2 / math.sqrt(7), -1 / math.sqrt(7), 3 / math.sqrt(7), 0, 0]),
        ("dr_grpo", [-2, -1, 3, 0, 0]),
        # Against the others: 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2
        ("rloo", [-3, -1.5, 4.5, 0, 0]),
    ],
)
def test_groups_by_hand(estimator: str, expected: list[float]) -> None:
    # Rows in any order; outcomes in several parts (turns), and a hole in the mask whose reward is garbage.
    groups = [0, 1, 0, 0, 1]
    rewards = torch.tensor([[1.0, 99, 0], [5, 0, 0], [0.5, 1.5, 0], [0, 0, 6], [2, 0, 3]])
    mask = torch.tensor([[True, False, True], [True] * 3, [True, True, False], [True] * 3, [True, False, True]])
    found = compared(estimator, rewards, mask, groups)
    rows = [expected[0], expected[3], expected[1], expected[2], expected[4]]
    torch.testing.assert_close(found, torch.where(mask, torch.tensor(rows)[:, None], 0.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", [0.7, 1e3, 1e6])
def test_outcomes_that_differ_by_rounding_are_equal(level: float) -> None:
    """One unit in the last place of float32: divided by its own deviation it would be 0.7, at any level above 1."""
    outcomes = torch.tensor([[level], [level * (1 + torch.finfo(torch.float32).eps)], [level]])
    assert outcomes[0] != outcomes[1]
    assert not compared("grpo", outcomes, torch.ones(3, 1, dtype=torch.bool), [0, 0, 0]).any()


def test_alone_in_a_group_is_no_better_than_expected() -> None:
    for estimator in GROUPED:
        # Row 1 has no token that trains: nothing that the policy did there can be compared.
        mask = torch.tensor([[True, True], [False, False]])
        assert not compared(estimator, torch.tensor([[3.0, 4.0], [9.0, 9.0]]), mask, [0, 0]).any()
        assert compared(estimator, torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), [0, 0]).shape == (2, 0)


@quick
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3)),
        min_size=1,
        max_size=9,
    )
)
def test_groups_against_loops(rows: list[tuple[int, list[float]]]) -> None:
    rewards = torch.tensor([r for _, r in rows])
    # The numbers of a batch's groups have no gap.
    present = sorted({g for g, _ in rows})
    for estimator in GROUPED:
        found = compared(estimator, rewards, torch.ones_like(rewards).bool(), [present.index(g) for g, _ in rows])
        for i, (group, own) in enumerate(rows):
            others = [sum(r) for j, (g, r) in enumerate(rows) if g == group and j != i]
            everyone = [sum(own), *others]
            mean = sum(everyone) / len(everyone)
            expected = sum(own) - mean
            if estimator == "rloo" and others:
                expected = sum(own) - sum(others) / len(others)
            if estimator == "grpo":
                squares = sum((x - mean) ** 2 for x in everyone)
                expected /= math.sqrt(squares / max(len(everyone) - 1, 1)) + 1e-6
            assert found[i].tolist() == pytest.approx([expected] * 3, rel=1e-3, abs=1e-3)


def test_reward_to_go_by_hand() -> None:
    """REINFORCE++: what is still to come, over the holes of the mask, whitened over the batch."""
    # gamma 0.5: 3; 2 + 1.5; 1 + 1.75. The hole holds garbage.
    mask = torch.tensor([[True, True, False, True]])
    rewards = torch.tensor([[1.0, 2.0, math.nan, 3.0]]).where(mask, 0.0)
    to_go, _ = gae(rewards, torch.zeros(1, 4), mask, 0.5, 1.0)
    assert to_go.tolist() == [[2.75, 3.5, 0.0, 3.0]]
    # mean 37/12, deviations -4/12, 5/12, -1/12: unbiased variance 42/144/2 = 7/48
    expected = torch.tensor([[-4.0, 5.0, 0.0, -1.0]]) / 12 / math.sqrt(7 / 48)
    torch.testing.assert_close(whiten(to_go, mask, whitening_moments(to_go, mask)), expected, rtol=1e-4, atol=1e-4)


def test_a_module_that_exits_where_it_is_imported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script without its guard: the run would end with that code, and no word."""
    (tmp_path / "exits_at_import.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UnknownPlugin, match="estimator exits_at_import:MINE: SystemExit: 0; write"):
        find_estimator("exits_at_import:MINE")


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(UnknownPlugin, match=r"'gea' is no estimator; write gae, or package\.module:NAME"):
        chosen_estimator(PPOConfig(estimator="gea"))
    with pytest.raises(UnknownPlugin, match=r"estimator math:pi is a float, no contracts\.estimators\.Estimator"):
        find_estimator("math:pi")
    with pytest.raises(ValueError, match="kl of estimator Mine must be one of none, reward, k2, k3; found K3"):
        replace(find_estimator("grpo"), title="Mine", kl="K3")
    with pytest.raises(ValueError, match="estimator PPO must have one of of_tokens and of_rollouts"):
        replace(find_estimator("gae"), of_tokens=None)
    with pytest.raises(ValueError, match="estimator GRPO must have of_tokens, whose returns a value model fits"):
        replace(find_estimator("grpo"), has_value_model=True)


def test_the_configuration_overrides_the_paper() -> None:
    ppo = PPOConfig(estimator="grpo")
    assert chosen_estimator(ppo) == find_estimator("grpo")
    assert warmup_updates(ppo) == 0
    assert warmup_updates(PPOConfig()) == 2
    ppo.kl.place, ppo.whiten_advantages, ppo.aggregation = "reward", True, "tokens"
    found = chosen_estimator(ppo)
    assert (found.needs_groups, found.has_value_model) == (True, False)
    assert (found.kl, found.whiten, found.aggregation) == ("reward", True, "tokens")
    assert not chosen_estimator(PPOConfig(whiten_advantages=False)).whiten


# ---- whole updates, against the same in float64, one token at a time

EOS, BETA = 2, 0.3
COMPLETIONS = [[403, 94, 15, EOS], [33, 444, 9, 9, 9, 7], [21, 22, EOS], [300], [460, 470, EOS, 480, 490], [8, 8]]
SCORES = [1.5, -0.7, 0.2, -2.0, 0.9, 0.4]
PROMPTS = {1: (5, 61, 302), 2: (9,)}
NUMBERS = [1, 2, 1, 2, 1, 1]  # two prompts, four and two completions


def rollout(i: int) -> Rollout:
    count = len(COMPLETIONS[i])
    logprobs = -np.linspace(3, 9, count, dtype=np.float32)
    sampled = Completion(
        np.array(COMPLETIONS[i], dtype=np.int32), logprobs, np.zeros(count, dtype=np.int32), "stop", ""
    )
    return Rollout((0, NUMBERS[i], i), Prompt(NUMBERS[i], "", PROMPTS[NUMBERS[i]]), sampled)


ROLLOUTS = [rollout(i) for i in range(len(COMPLETIONS))]


CUT_OFF = (1, 4)  # what `mask_truncated` leaves out, one of each prompt


def batch_of(budget: int, holes: bool = False, mask_truncated: bool = False) -> TrainingBatch:
    """`holes`: the second token of every completion is an observation. `mask_truncated`: CUT_OFF are."""
    rollouts = ROLLOUTS
    if holes:
        masks = [np.arange(len(tokens)) != 1 for tokens in COMPLETIONS]
        rollouts = [
            replace(r, completion=replace(r.completion, loss_mask=mask))
            for r, mask in zip(ROLLOUTS, masks, strict=True)
        ]
    ends = ["length" if i in CUT_OFF else "stop" for i in range(len(rollouts))]
    rollouts = [
        replace(r, completion=replace(r.completion, finish_reason=end)) for r, end in zip(rollouts, ends, strict=True)
    ]
    (batch,) = make_batches(rollouts, SCORES, 1, 1, budget, np.random.default_rng(0), mask_truncated=mask_truncated)
    return batch


@pytest.fixture
def config(small_vocab: Path, tmp_path: Path) -> TandemConfig:
    config = make_config(small_vocab, tmp_path, dtype="float32")
    ppo = config.ppo
    ppo.epochs, ppo.target_approx_kl, ppo.samples_per_prompt = 2, None, 4
    ppo.optimizer.learning_rate, ppo.optimizer.eps, ppo.optimizer.max_grad_norm = 1e-3, 1e-3, 1e9
    return config


@pytest.fixture
def make_task(ranks: Ranks) -> Callable[[TandemConfig], PPOTask]:
    """A fresh task whose reference differs from its policy. The value checkpoint does not exist: nothing may read it."""

    def make(config: TandemConfig) -> PPOTask:
        task = PPOTask(ranks, config, config.model.path, "no/such/value/model", (EOS,), [])
        generator = torch.Generator().manual_seed(7)
        for parameter in task.reference.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        return task

    return make


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().double().clone() for name, p in model.lm.named_parameters()}


def plain_whitened(ppo: PPOConfig, rows: list[list[float]]) -> list[list[float]]:
    """Over the tokens that train of the batch, or of each prompt."""
    result = []
    for i, row in enumerate(rows):
        together = [j for j in range(len(rows)) if ppo.whiten_over == "batch" or NUMBERS[j] == NUMBERS[i]]
        together = [j for j in together if not (ppo.mask_truncated and j in CUT_OFF)]
        flat = np.array([x for j in together for x in rows[j]])
        spread = math.sqrt(flat.var(ddof=1) + 1e-8) if len(together) > 1 else math.inf
        result.append([(x - flat.mean()) / spread for x in row])
    return result


def plain_advantages(ppo: PPOConfig, rewards: list[list[float]]) -> list[list[float]]:
    estimator = ppo.estimator
    totals = [sum(row) for row in rewards]
    if estimator == "reinforce_plus_plus":
        return plain_whitened(ppo, [[sum(row[t:]) for t in range(len(row))] for row in rewards])
    result = []
    for i, row in enumerate(rewards):
        group = [totals[j] for j in range(len(totals)) if NUMBERS[j] == NUMBERS[i]]
        others = [totals[j] for j in range(len(totals)) if NUMBERS[j] == NUMBERS[i] and j != i]
        advantage = {
            "grpo": (totals[i] - np.mean(group)) / (np.std(group, ddof=1) + 1e-6),
            "dr_grpo": totals[i] - np.mean(group),
            "rloo": totals[i] - np.mean(others),
        }[estimator]
        result.append([float(advantage)] * len(row))
    return plain_whitened(ppo, result) if ppo.whiten_advantages else result


def plain_likelihood(
    ppo: PPOConfig, totals: list[float], now: list[list[torch.Tensor]], ref: list[list[float]], w: list[list[float]]
) -> torch.Tensor:
    """The loss of RAFT, RWR and online DPO as their papers write it, with gradient."""
    likelihood = [sum(a * x for a, x in zip(v, row, strict=True)) for v, row in zip(w, now, strict=True)]
    if ppo.estimator == "raft":
        kept = [max((i for i in range(6) if NUMBERS[i] == n), key=lambda i: totals[i]) for n in (1, 2)]
        return -sum(likelihood[i] for i in kept) / sum(len(now[i]) for i in kept)
    if ppo.estimator == "rwr":
        share = np.exp(np.array(totals) / ppo.rwr.temperature)
        return -sum(s * x for s, x in zip(share / share.sum(), likelihood, strict=True))
    ratio = [sum(row) - sum(q) for row, q in zip(now, ref, strict=True)]
    # By the scores: of the four of prompt 1 rollout 0 is best and 2 worst, of the two of prompt 2 it is 1 and 3.
    losses = [-torch.log(torch.sigmoid(ppo.dpo_beta * (ratio[b] - ratio[v]))) for b, v in ((0, 2), (1, 3))]
    return sum(losses) / 2


def plain_objective(ppo: PPOConfig, now: list[torch.Tensor], old: list[float], t: int, a: float) -> torch.Tensor:
    """The loss of token t of a completion, as the papers write it."""
    low, high = {"clip": (0.2, 0.2), "gspo": (3e-4, 4e-4), "cispo": (math.inf, 0.2)}[ppo.objective]
    low, high = ppo.clip_low or low, ppo.clip_high or high
    rho = torch.exp(now[t] - old[t])
    if ppo.objective == "cispo":
        return -min(max(rho.item(), 1 - low), 1 + high) * a * now[t]
    if ppo.objective == "gspo":  # not in the form of GSPO-token
        rho = torch.exp(sum(p - q for p, q in zip(now, old, strict=True)) / len(now))
    loss = torch.maximum(-a * rho, -a * rho.clamp(1 - low, 1 + high))
    return torch.minimum(loss, torch.tensor(-3 * a).double()) if a < 0 else loss


def plain_update(task: PPOTask, holes: bool) -> tuple[Any, dict[str, float]]:
    """The policy after all epochs, and metrics."""
    ppo, n = task.config.ppo, len(ROLLOUTS)
    options: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": "eager"}
    policy, reference = (AutoModelForCausalLM.from_pretrained(task.config.model.path, **options) for _ in range(2))
    reference.load_state_dict(weights_of(task.reference))

    def logprobs(model: Any, i: int) -> list[torch.Tensor]:
        prompt = PROMPTS[NUMBERS[i]]
        every = torch.log_softmax(model(torch.tensor([[*prompt, *COMPLETIONS[i]]])).logits[0], -1)
        where = [t for t in range(len(COMPLETIONS[i])) if not (holes and t == 1)]
        return [every[len(prompt) + t - 1, COMPLETIONS[i][t]] for t in where]

    with torch.no_grad():
        old = [[x.item() for x in logprobs(policy, i)] for i in range(n)]
        ref = [[x.item() for x in logprobs(reference, i)] for i in range(n)]
    sampled = [r.completion.behavior_logprobs.astype(np.float64).tolist() for r in ROLLOUTS]
    sampled = [[x for t, x in enumerate(row) if not (holes and t == 1)] for row in sampled]
    likelihood = ppo.estimator in ("raft", "rwr", "online_dpo")
    in_reward = ppo.estimator in ("rloo", "reinforce_plus_plus") or ppo.kl.place == "reward"
    in_loss = ppo.estimator in ("grpo", "dr_grpo") or ppo.kl.place == "k3"
    rewards = [[-BETA * (p - q) * in_reward for p, q in zip(a, b, strict=True)] for a, b in zip(old, ref, strict=True)]
    for row, score in zip(rewards, SCORES, strict=True):
        row[-1] += score
    advantages = rewards if likelihood else plain_advantages(ppo, rewards)
    trained = [i for i in range(n) if not (ppo.mask_truncated and i in CUT_OFF)]
    tokens, n_trained = sum(len(old[i]) for i in trained), len(trained)
    raw = [[math.exp(p - b) for p, b in zip(x, y, strict=True)] for x, y in zip(old, sampled, strict=True)]
    bound = {
        "none": lambda w: 1.0,
        "truncated": lambda w: min(w, ppo.off_policy.cap),
        "masked": lambda w: w if ppo.off_policy.low <= w <= ppo.off_policy.high else 0.0,
    }[ppo.off_policy.correction]
    weights = [[bound(w) for w in row] for row in raw]
    adam = torch.optim.AdamW(
        policy.parameters(), lr=ppo.optimizer.learning_rate, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0
    )
    losses = []
    for _ in range(ppo.epochs):
        total = torch.zeros((), dtype=torch.float64)
        now = [logprobs(policy, i) for i in range(n)]
        if likelihood:
            total = total + plain_likelihood(ppo, [sum(row) for row in rewards], now, ref, weights)
        for i in trained:
            for t, logprob in enumerate(now[i]):
                loss = plain_objective(ppo, now[i], old[i], t, advantages[i][t]) * (not likelihood)
                if in_loss:
                    loss = loss + BETA * (torch.exp(ref[i][t] - logprob) - 1 + logprob - ref[i][t])
                share = {
                    "grpo": 1 / tokens if ppo.aggregation == "tokens" else 1 / n_trained / len(old[i]),
                    "dr_grpo": 1 / n_trained / ppo.sampling.max_completion_tokens,
                    "rloo": 1 / n_trained,
                    "reinforce_plus_plus": 1 / tokens,
                    "raft": 1 / tokens,
                    "rwr": 1 / n_trained,
                    "online_dpo": 1 / n_trained,
                }
                total = total + weights[i][t] * share[ppo.estimator] * loss
        adam.zero_grad()
        total.backward()
        losses.append(total.item())
        adam.step()
    w = np.array([x for row in weights for x in row])
    return policy, {
        "loss": sum(losses) / len(losses),
        "off_policy/ess": w.sum() ** 2 / (len(w) * (w**2).sum()),
        "off_policy/weight_mean": w.mean(),
        "off_policy/weight_max": w.max(),
        f"off_policy/{ppo.off_policy.correction}_frac": np.mean([bound(x) != x for row in raw for x in row]),
    }


PAPERS = ["grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "raft", "rwr"]


@pytest.mark.parametrize(
    ("estimator", "correction", "holes", "place"),
    [
        *((e, c, h, None) for e in PAPERS for c, h in [("none", False), ("truncated", True), ("masked", False)]),
        ("raft", "none", False, "k3"),
        ("rwr", "none", True, "reward"),
        ("online_dpo", "none", False, None),
        ("online_dpo", "none", True, None),
    ],
)
def test_update_equals_the_papers(
    estimator: str,
    correction: str,
    holes: bool,
    place: str | None,
    config: TandemConfig,
    make_task: Callable[[TandemConfig], PPOTask],
) -> None:
    config.ppo.estimator, config.ppo.off_policy.correction, config.ppo.kl.place = estimator, correction, place
    config.ppo.rwr.temperature = 0.8
    config.ppo.epochs = 1 if estimator == "online_dpo" else 2
    task = make_task(config)
    before = weights_of(task.policy.model)
    expected, numbers = plain_update(task, holes)
    for budget, held_tokens in (
        (1000, 0),
        (1, 9),
    ):  # one microbatch; one for each sequence, some with their graphs kept
        config.learner.held_tokens = held_tokens
        task = make_task(config)
        metrics = task.update(batch_of(budget, holes), BETA, train_policy=True)
        mine, theirs = weights_of(task.policy.model), dict(expected.named_parameters())
        step = max((theirs[name] - before[name]).abs().max().item() for name in before)
        assert step > 1e-5
        assert max((mine[name] - theirs[name]).abs().max().item() for name in mine) < 2e-3 * step
        loss = metrics.get("online_dpo/loss", metrics["policy/loss"]) + BETA * metrics.get("policy/kl_loss", 0.0)
        assert loss == pytest.approx(numbers["loss"], rel=1e-3, abs=1e-5)
        assert ("policy/kl_loss" in metrics) == (estimator in ("grpo", "dr_grpo") or place == "k3")
        assert ("policy/clipfrac" in metrics) == (estimator in PAPERS[:4])
        found = {name: value for name, value in metrics.items() if name.startswith("off_policy/")}
        if correction == "none":
            assert found == {}
        else:
            del numbers["loss"]
            assert found == pytest.approx(numbers, rel=1e-3)
            assert 0 < found["off_policy/ess"] < 0.99
            assert 0 < found[f"off_policy/{correction}_frac"] < 1
            numbers["loss"] = loss


def cispo(ppo: PPOConfig) -> None:
    ppo.objective, ppo.clip_high = "cispo", 0.02


def clip_higher(ppo: PPOConfig) -> None:
    ppo.clip_low, ppo.clip_high, ppo.aggregation = 0.01, 0.03, "tokens"


def gspo(ppo: PPOConfig) -> None:
    ppo.objective = "gspo"


def gspo_and_what_is_cut_off(ppo: PPOConfig) -> None:
    gspo(ppo)
    ppo.mask_truncated = True


def without_what_is_cut_off(ppo: PPOConfig) -> None:
    clip_higher(ppo)
    ppo.mask_truncated = True


def budget_without_what_is_cut_off(ppo: PPOConfig) -> None:
    ppo.estimator, ppo.mask_truncated, ppo.clip = "dr_grpo", True, 0.01
    ppo.clip_low = ppo.clip_high = 0.01


def group_mean_and_deviation_of_the_batch(ppo: PPOConfig) -> None:
    ppo.estimator, ppo.whiten_advantages, ppo.clip_low, ppo.clip_high = "dr_grpo", True, 0.01, 0.02


def whitened_by_group(ppo: PPOConfig) -> None:
    ppo.estimator, ppo.whiten_over, ppo.clip_low, ppo.clip_high = "reinforce_plus_plus", "group", 0.01, 0.02


def whitened_without_what_is_cut_off(ppo: PPOConfig) -> None:
    whitened_by_group(ppo)
    ppo.whiten_over, ppo.mask_truncated = "batch", True


def whitened_by_group_of_which_one_is_left(ppo: PPOConfig) -> None:
    """Of the second prompt, whose other completion was cut off: it is compared with nothing."""
    whitened_by_group(ppo)
    ppo.mask_truncated = True


CHANGES = [
    cispo,
    clip_higher,
    gspo,
    gspo_and_what_is_cut_off,
    without_what_is_cut_off,
    budget_without_what_is_cut_off,
    group_mean_and_deviation_of_the_batch,
    whitened_by_group,
    whitened_without_what_is_cut_off,
    whitened_by_group_of_which_one_is_left,
]


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_update_equals_the_objectives(
    change: Callable[[PPOConfig], None],
    holes: bool,
    config: TandemConfig,
    make_task: Callable[[TandemConfig], PPOTask],
) -> None:
    """After the first step of three, so that the bounds are at work; with observations inside the completions, too."""
    config.ppo.estimator, config.ppo.epochs, config.ppo.off_policy.correction = "grpo", 3, "none"
    config.ppo.optimizer.learning_rate = 3e-3
    change(config.ppo)
    task = make_task(config)
    before = weights_of(task.policy.model)
    expected, numbers = plain_update(task, holes)
    theirs = dict(expected.named_parameters())
    step = max((theirs[name] - before[name]).abs().max().item() for name in before)
    assert step > 1e-5
    for budget, held_tokens in ((1000, 0), (1, 9)):
        config.learner.held_tokens = held_tokens
        task = make_task(config)
        batch = batch_of(budget, holes, config.ppo.mask_truncated)
        metrics = task.update(batch, BETA, train_policy=True)
        mine = weights_of(task.policy.model)
        assert max((mine[name] - theirs[name]).abs().max().item() for name in mine) < 2e-3 * step
        loss = metrics["policy/loss"] + BETA * metrics.get("policy/kl_loss", 0.0)
        assert loss == pytest.approx(numbers["loss"], rel=1e-3, abs=1e-5)
        assert 0 < metrics["policy/clipfrac"] < 1


def test_without_a_value_model_there_is_nothing_of_it(
    config: TandemConfig, make_task: Callable[[TandemConfig], PPOTask]
) -> None:
    config.ppo.estimator, config.learner.held_tokens = "grpo", 1000
    task = make_task(config)
    assert task.value is None
    metrics = task.update(batch_of(1), BETA, train_policy=True)
    assert [name for name in metrics if "value" in name] == []
    with pytest.raises(ValueError, match="grpo has no value model"):
        task.update(batch_of(1), BETA, train_policy=False)


def whitened(ppo: PPOConfig) -> None:
    ppo.whiten_advantages = True


def without_comparison(ppo: PPOConfig) -> None:
    ppo.kl.place, ppo.whiten_advantages = "none", False


def with_kl_in_the_reward(ppo: PPOConfig) -> None:
    ppo.kl.place = "reward"


def as_it_is(ppo: PPOConfig) -> None:
    pass


def corrected(ppo: PPOConfig) -> None:
    ppo.kl.place, ppo.off_policy.correction, ppo.entropy_coef = "k3", "truncated", 0.1


@pytest.mark.parametrize(
    ("estimator", "change", "at_once"),
    [
        ("grpo", corrected, True),
        ("grpo", with_kl_in_the_reward, False),
        ("dr_grpo", whitened, True),
        ("rloo", corrected, True),
        ("rloo", as_it_is, False),
        ("raft", as_it_is, True),
        ("rwr", as_it_is, True),
        ("reinforce_plus_plus", without_comparison, True),
        ("reinforce_plus_plus", as_it_is, False),
        ("online_dpo", as_it_is, False),
        ("gae", without_comparison, False),  # the value model's graph is there
    ],
)
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_what_can_be_trained_in_the_first_pass_is_the_same_to_the_bit(
    estimator: str,
    change: Callable[[PPOConfig], None],
    at_once: bool,
    zero_stage: int,
    config: TandemConfig,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if it were walked back when all microbatches are known. No graph waits, and no forward pass is run again: of two
    minibatches of three microbatches the first needs none beyond the first pass; the value model never does."""
    config.ppo.estimator, config.ppo.epochs, config.learner.zero_stage = estimator, 1, zero_stage
    config.ppo.optimizer.learning_rate = 1e-3
    change(config.ppo)
    (batch,) = make_batches(ROLLOUTS, SCORES, 1, 2, 1, np.random.default_rng(0))
    assert [len(minibatch) for minibatch in batch.minibatches] == [3, 3]
    found = []
    for is_first in (True, False):
        if not is_first:
            monkeypatch.setattr(Pass, "is_first", property(lambda self: False, lambda self, value: None), raising=False)
        task = PPOTask(ranks, config, config.model.path, config.model.path, (EOS,), [])
        engines = [task.policy, *([task.value] if task.value else [])]
        calls: list[Any] = []
        for engine in engines:
            engine.model.register_forward_hook(lambda network, *_, seen=calls: seen.append(network))
        metrics = task.update(batch, BETA, train_policy=True)
        weights = [torch.cat([p.flatten() for _, p in engine.named_weights()]) for engine in engines]
        found.append(({k: v for k, v in metrics.items() if not k.startswith("perf/")}, weights))
        assert calls.count(task.policy.model) == 6 + 3 + 3 * (not (at_once and is_first))
        assert task.value is None or calls.count(task.value.model) == 6 + 3 + 3 * (not is_first)
    assert found[0][0] == found[1][0]
    assert all(torch.equal(one, two) for one, two in zip(found[0][1], found[1][1], strict=True))


def test_an_estimator_that_reads_more_than_it_says_is_refused(
    config: TandemConfig, make_task: Callable[[TandemConfig], PPOTask]
) -> None:
    config.ppo.estimator, config.ppo.epochs = "online_dpo", 1
    task = make_task(config)
    task.estimator = replace(task.estimator, reads_log_ratios=False)
    before = weights_of(task.policy.model)
    with pytest.raises(NonFiniteError):
        task.update(batch_of(1), BETA, train_policy=True)
    assert all(torch.equal(before[name], w) for name, w in weights_of(task.policy.model).items())


def test_a_correction_of_gae_leaves_the_value_model_alone(config: TandemConfig, ranks: Ranks) -> None:
    """Weights are for the policy's gradient; the value model fits what it sees."""
    heads = []
    for correction in ("none", "masked"):
        config.ppo.off_policy.correction, config.ppo.off_policy.low = correction, 0.0
        config.ppo.off_policy.high = 1e-9 if correction == "masked" else 5.0  # every token masked
        task = PPOTask(ranks, config, config.model.path, config.model.path, (EOS,), [])
        before = weights_of(task.policy.model)
        metrics = task.update(batch_of(1000), BETA, train_policy=True)
        assert task.value is not None
        heads.append(weights_of(task.value.model))
        moved = any(not torch.equal(before[name], w) for name, w in weights_of(task.policy.model).items())
        assert moved == (correction == "none")
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert (metrics["off_policy/ess"], metrics["off_policy/masked_frac"]) == (0.0, 1.0)


def test_what_the_likelihoods_were_made_of(config: TandemConfig, make_task: Callable[[TandemConfig], PPOTask]) -> None:
    ppo = config.ppo
    ppo.epochs, ppo.dpo_beta, ppo.rwr.temperature = 1, 0.5, 2.0
    ppo.estimator = "raft"
    assert make_task(config).update(batch_of(1), BETA, train_policy=True)["raft/kept_frac"] == 2 / 6
    ppo.estimator = "rwr"
    metrics = make_task(config).update(batch_of(1), BETA, train_policy=True)
    share = np.exp(np.array(SCORES) / 2)
    assert metrics["rwr/ess"] == pytest.approx(share.sum() ** 2 / (6 * (share**2).sum()))
    assert metrics["rwr/weight_max"] == pytest.approx(6 * share.max() / share.sum())
    ppo.estimator = "online_dpo"
    task = make_task(config)
    task.reference.load_state_dict(task.policy.model.state_dict())
    metrics = task.update(batch_of(1), BETA, train_policy=True)  # the policy is its reference still
    found = {name: value for name, value in metrics.items() if name.startswith("online_dpo/")}
    assert found == pytest.approx(
        {"online_dpo/pairs": 2, "online_dpo/loss": math.log(2), "online_dpo/margin_mean": 0, "online_dpo/accuracy": 0}
    )
    metrics = task.update(batch_of(1), BETA, train_policy=True)
    assert metrics["online_dpo/margin_mean"] > 0
    assert metrics["online_dpo/accuracy"] == 1


@pytest.mark.parametrize("estimator", ["raft", "rwr", "online_dpo"])
def test_what_is_not_a_number_is_not_compared(
    estimator: str, config: TandemConfig, make_task: Callable[[TandemConfig], PPOTask]
) -> None:
    """The best of a group with NaN in it could be any."""
    config.ppo.estimator, config.ppo.epochs = estimator, 1
    task = make_task(config)
    before = weights_of(task.policy.model)
    scores = [*SCORES[:5], math.nan]
    (batch,) = make_batches(ROLLOUTS, scores, 1, 1, 1000, np.random.default_rng(0))
    with pytest.raises(NonFiniteError, match="a score or a log-probability is not finite"):
        task.update(batch, BETA, train_policy=True)
    assert all(torch.equal(before[name], w) for name, w in weights_of(task.policy.model).items())


# ---- estimators of others


def test_the_example_of_the_docs_trains(
    config: TandemConfig,
    make_task: Callable[[TandemConfig], PPOTask],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A package of somebody's own, named by its import path alone: checked, trained with, and part of the stage's code."""
    section = (ROOT / "docs/extending.md").read_text().split("\n## An estimator\n")[1]
    source = section.split("```python\n")[1].split("```")[0]
    module = tmp_path / "my_package/mine.py"
    module.parent.mkdir()
    module.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    config.ppo.estimator = "my_package.mine:MINE"
    assert all(check.holds for check in estimator_checks(config.ppo))
    assert method_title("ppo", config.ppo.estimator) == "Median baseline"
    config.ppo.samples_per_prompt = 1
    ours, theirs = (check.message for check in estimator_checks(config.ppo) if not check.holds)
    assert ours.endswith("found 1; write ppo.samples_per_prompt=4 or ppo.estimator=reinforce_plus_plus")
    assert theirs.startswith("ppo.samples_per_prompt must be at least 3 with a median for a baseline")

    task = make_task(config)
    before = weights_of(task.policy.model)
    metrics = task.update(batch_of(1), 0.0, train_policy=True)
    # Scores of prompt 1: 1.5, 0.2, 0.9, 0.4, with median 0.65; of prompt 2: -0.7, -2.0, with median -1.35.
    assert metrics["median/advantage_abs"] == pytest.approx((0.85 + 0.45 + 0.25 + 0.25 + 0.65 + 0.65) / 6)
    assert any(not torch.equal(before[name], weight) for name, weight in weights_of(task.policy.model).items())

    made = own_source("ppo.estimator", config.ppo.estimator)
    module.write_text(source.replace("quantile(0.5)", "quantile(0.4)"))
    assert own_source("ppo.estimator", config.ppo.estimator) != made
    module.unlink()
    with pytest.raises(ConfigError, match=r"ppo\.estimator: my_package\.mine:MINE: there is no source file"):
        own_source("ppo.estimator", config.ppo.estimator)


def test_an_import_path_that_leads_nowhere_is_a_conflict() -> None:
    (found,) = (
        check.message for check in estimator_checks(PPOConfig(estimator="nobodys.mine:MINE")) if not check.holds
    )
    assert found.endswith(
        "or the import path package.module:NAME of your own; found nobodys.mine:MINE (No module named 'nobodys'); "
        "write for example gae"
    )
    (found,) = (check.message for check in estimator_checks(PPOConfig(estimator="math:pi")) if not check.holds)
    assert "found math:pi (a float, no contracts.estimators.Estimator)" in found


def test_no_code_asks_for_an_estimator_by_name() -> None:
    """But for the default of the configuration: what a name means is in its module."""
    quoted = re.compile(f"[\"']({'|'.join(names(ESTIMATORS))})[\"']")
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    lines = [(file.relative_to(ROOT), line.strip()) for file in files for line in file.read_text().splitlines()]
    assert [f"{file}: {line}" for file, line in lines if quoted.search(line)] == [
        'contracts/config.py: estimator: str = key("gae", free="estimator_checks look for it")'
    ]


def test_declarations_are_read_without_torch() -> None:
    """By whoever checks a configuration, on a machine that submits."""
    code = (
        "import sys; from contracts.estimators import *; from contracts.plugins import names;"
        "[find_estimator(name) for name in names(ESTIMATORS)]; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
