"""DPO and ranking by log-likelihood: hand-worked numbers, float64 loops, and one gradient of any cut."""

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.models.packed_attention import Packed
from contracts.config import TandemConfig
from contracts.methods import chosen_preference
from contracts.preference_losses import find_preference_loss
from contracts.records import Example, ExamplePair, RatedExample
from learner.pair_losses import pair_metrics, pair_preferences, preference_loss
from learner.preference import PreferenceTask, batch_examples
from learner.ranks import Ranks
from tests.conftest import make_config


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_by_hand() -> None:
    """One pair: log-ratios 3 and -1 nats, beta 0.5: a margin of 2."""
    preferences, known = pair_preferences([1.0])
    logprobs, reference = torch.tensor([-7.0, -21.0]), torch.tensor([-10.0, -20.0])
    loss, scores, coefficients = preference_loss(
        logprobs, reference, torch.tensor([3, 9]), preferences, known, "dpo", 0.5
    )
    assert scores.tolist() == [1.5, -0.5]
    assert loss.item() == pytest.approx(-math.log(sigmoid(2.0)), rel=1e-6)
    # d loss / d log pi(y_w) = -beta * sigmoid(-margin): equation 7 of the paper, without its expectation.
    assert coefficients.tolist() == pytest.approx([-0.5 * sigmoid(-2.0), 0.5 * sigmoid(-2.0)], rel=1e-6)


def test_rank_by_hand() -> None:
    """-8 nats over 4 tokens and -3 over 1, beta 2: scores -4 and -6."""
    preferences, known = pair_preferences([0.75])
    loss, scores, coefficients = preference_loss(
        torch.tensor([-8.0, -3.0]), torch.zeros(2), torch.tensor([4, 1]), preferences, known, "rank", 2.0
    )
    assert scores.tolist() == [-4.0, -6.0]
    assert loss.item() == pytest.approx(-0.75 * math.log(sigmoid(2.0)) - 0.25 * math.log(sigmoid(-2.0)), rel=1e-6)
    slope = sigmoid(2.0) - 0.75
    assert coefficients.tolist() == pytest.approx([slope * 2 / 4, -slope * 2 / 1], rel=1e-6)


def test_the_reference_cancels_what_is_not_learnt() -> None:
    """Before the first step every score is 0, and the loss log 2, whatever the texts."""
    preferences, known = pair_preferences([1.0, 0.0])
    logprobs = torch.tensor([-5.0, -90.0, -1.0, -2.0])
    loss, scores, _ = preference_loss(logprobs, logprobs, torch.ones(4), preferences, known, "dpo", 0.1)
    assert scores.tolist() == [0.0] * 4
    assert loss.item() == pytest.approx(math.log(2))


def test_likelihood_of_the_preferred_text_by_hand() -> None:
    """As above, and 0.5 of 0.75 x 2 nats a token of the first text and 0.25 x 3 of the second."""
    preferences, known = pair_preferences([0.75])
    given = torch.tensor([-8.0, -3.0]), torch.zeros(2), torch.tensor([4, 1]), preferences, known, "rank", 2.0
    without, _, slopes = preference_loss(*given)
    loss, scores, coefficients = preference_loss(*given, nll_coef=0.5)
    assert scores.tolist() == [-4.0, -6.0]
    assert loss.item() - without.item() == pytest.approx(0.5 * (0.75 * 2 + 0.25 * 3), rel=1e-6)
    assert (coefficients - slopes).tolist() == pytest.approx([-0.5 * 0.75 / 4, -0.5 * 0.25 / 1], rel=1e-5)


@pytest.mark.parametrize("nll_coef", [0.0, 0.3])
@pytest.mark.parametrize("loss", ["dpo", "rank"])
def test_against_loops_in_float64(loss: str, nll_coef: float) -> None:
    rng = np.random.default_rng(0)
    count, beta = 7, 0.7
    logprobs, reference, tokens = -rng.uniform(1, 9, count), -rng.uniform(1, 9, count), rng.integers(1, 9, count)
    preferences, known = rng.uniform(size=(count, count)), rng.uniform(size=(count, count)) < 0.7
    scores = [
        beta * (a - b) if loss == "dpo" else beta * a / t for a, b, t in zip(logprobs, reference, tokens, strict=True)
    ]
    losses, slopes, likelihood = [], np.zeros(count), np.zeros(count)
    for i, j in combinations(range(count), 2):
        if known[i, j]:
            p, q = preferences[i, j], sigmoid(scores[i] - scores[j])
            nll = -p * logprobs[i] / tokens[i] - (1 - p) * logprobs[j] / tokens[j]
            losses.append(-p * math.log(q) - (1 - p) * math.log(1 - q) + nll_coef * nll)
            slopes[i] += q - p
            slopes[j] -= q - p
            likelihood[i] -= nll_coef * p / tokens[i]
            likelihood[j] -= nll_coef * (1 - p) / tokens[j]
    slopes *= beta / len(losses) / (1 if loss == "dpo" else tokens)
    slopes += likelihood / len(losses)
    found = preference_loss(
        *(torch.tensor(x, dtype=torch.float64) for x in (logprobs, reference, tokens, preferences)),
        torch.tensor(known), loss, beta, nll_coef,
    )  # fmt: skip
    assert found[0].item() == pytest.approx(np.mean(losses), rel=1e-6)
    assert found[2].tolist() == pytest.approx(slopes.tolist(), rel=1e-5)


def test_without_a_known_pair_nothing_moves() -> None:
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    loss, _, coefficients = preference_loss(
        -torch.ones(3), torch.zeros(3), torch.ones(3), torch.full((3, 3), 0.5), nothing, "dpo", 0.1
    )
    assert loss.item() == 0.0
    assert coefficients.tolist() == [0.0] * 3


def test_another_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="'ipo' is no preference loss; write dpo"):
        find_preference_loss("ipo")


def test_metrics_by_hand() -> None:
    """Of three pairs that are no tie: right with a margin of 2, a tie of scores, wrong with 1."""
    preferences = torch.full((4, 4), 0.5)
    preferences[0, 1], preferences[0, 2], preferences[1, 3] = 0.9, 0.1, 1.0
    scores = torch.tensor([2.0, 0.0, 2.0, 1.0])
    accuracy, margin = pair_metrics(scores, preferences, torch.ones(4, 4, dtype=torch.bool))
    assert accuracy == pytest.approx((1 + 0.5 + 0) / 3)
    assert margin == pytest.approx((2 + 0 - 1) / 3)
    ties = torch.full((4, 4), 0.5)
    assert np.isnan(pair_metrics(scores, ties, torch.ones(4, 4, dtype=torch.bool))).all()


# ---- the task


def example(rng: np.random.Generator, prompt: list[int]) -> Example:
    completion = [*rng.integers(3, 500, int(rng.integers(1, 12))).tolist(), 2]
    return Example(prompt + completion, [False] * len(prompt) + [True] * len(completion))


def pairs(count: int) -> list[ExamplePair]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 500, 4).tolist() for _ in range(count)]
    return [ExamplePair(example(rng, p), example(rng, p), preference=(1.0, 0.8)[i % 2]) for i, p in enumerate(prompts)]


def rated(count: int) -> list[RatedExample]:
    rng = np.random.default_rng(1)
    return [RatedExample(example(rng, [7, 8]), rng.integers(-4, 5, 5).tolist()) for _ in range(count)]


def task_of(
    config: TandemConfig, ranks: Ranks, items: Any, loss: str = "dpo", budget: int = 4096, held: int = 0
) -> PreferenceTask:
    config.preference.loss, config.preference.batch_size = loss, len(items)
    config.learner.microbatch_tokens, config.learner.held_tokens = budget, held
    # Adam divides by |g| + eps: with a large eps a step stays proportional to the gradient.
    config.preference.optimizer.learning_rate, config.preference.optimizer.eps = 1e-3, 1e-2
    task = PreferenceTask(ranks, config, chosen_preference(config), config.model.path, items)
    task.compute_reference(0, len(items))
    return task


@pytest.fixture
def config(small_vocab: Path, tmp_path: Path) -> TandemConfig:
    return make_config(small_vocab, tmp_path, dtype="float32")


@pytest.mark.parametrize("items", [pairs(6), rated(9)], ids=["pairs", "rated"])
@pytest.mark.parametrize("loss", ["dpo", "rank"])
def test_one_step_of_any_cut(config: TandemConfig, ranks: Ranks, items: Any, loss: str) -> None:
    """Microbatches that part the texts of a pair, graphs kept, kept in part and recomputed: one step."""
    texts = batch_examples(items)[0]
    outcomes = []
    for budget, held in ((4096, 0), (4096, 4096), (20, 0), (20, 40), (1, 0)):
        task = task_of(config, ranks, items, loss, budget, held)
        before = np.array(task.logprobs(texts))
        metrics = [task.step(0) for _ in range(2)]  # in the second the policy has left its reference
        outcomes.append((np.array(task.logprobs(texts)) - before, metrics))
    moved, metrics = outcomes[0]
    assert np.abs(moved).mean() > 0.02
    if loss == "dpo":
        assert metrics[0]["preference/loss"] == pytest.approx(math.log(2), rel=1e-4)
        assert metrics[0]["preference/margin"] == pytest.approx(0, abs=1e-4)
    assert metrics[1]["preference/loss"] < metrics[0]["preference/loss"]
    for other, found in outcomes[1:]:
        assert np.abs(other - moved).max() < 1e-3 * np.abs(moved).max()
        for name in ("loss", "accuracy", "margin", "grad_norm", "token_logprob"):
            assert found[1][f"preference/{name}"] == pytest.approx(metrics[1][f"preference/{name}"], rel=1e-3)


def test_gradient_is_that_of_the_loss_itself(config: TandemConfig, ranks: Ranks) -> None:
    """Against autograd through plain transformers code, text by text."""
    from transformers import AutoModelForCausalLM

    items = pairs(3)
    task = task_of(config, ranks, items, "dpo")
    config.preference.optimizer.max_grad_norm = 1e9
    task.step(0)
    norm = task.step(0)["preference/grad_norm"]
    # The same again from the weights of before the second step: all by hand.
    reference = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    policy = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)

    def logprob(model: Any, text: Example) -> torch.Tensor:
        ids = torch.tensor([text.token_ids])
        table = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return table[torch.tensor(text.loss_mask[1:])].sum()

    def loss_of(model: Any) -> torch.Tensor:
        terms = []
        for pair in items:
            with torch.no_grad():
                anchor = logprob(reference, pair.chosen) - logprob(reference, pair.rejected)
            margin = 0.1 * (logprob(model, pair.chosen) - logprob(model, pair.rejected) - anchor)
            terms.append(-pair.preference * F.logsigmoid(margin) - (1 - pair.preference) * F.logsigmoid(-margin))
        return torch.stack(terms).mean()

    adam = torch.optim.AdamW(policy.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-2, weight_decay=0.0)
    norms = []
    for _ in range(2):
        adam.zero_grad()
        loss_of(policy).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item())
        adam.step()
    assert norm == pytest.approx(norms[1], rel=1e-3)


def test_the_texts_of_a_pair_have_their_prompt_once(
    config: TandemConfig, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose numbers are those of each text alone: `test_one_step_of_any_cut`."""
    items, rows = pairs(6), []
    make = Packed.of
    monkeypatch.setattr(Packed, "of", lambda *arguments: rows.append(made := make(*arguments)) or made)
    task = task_of(config, ranks, items)
    texts = batch_examples(items)[0]
    rows.clear()
    task.logprobs(texts)
    assert [row.input_ids.shape[1] for row in rows] == [sum(len(e.token_ids) for e in texts) - 6 * 4]


def test_prompts_do_not_count(config: TandemConfig, ranks: Ranks) -> None:
    task = task_of(config, ranks, pairs(2))
    text = Example([5, 6, 7, 8, 2], [False, False, False, True, True])
    alone = [Example([5, 6, 7, 8], [False, False, False, True]), Example([5, 6, 7, 8, 2], [False] * 4 + [True])]
    [both] = task.logprobs([text])
    assert both == pytest.approx(sum(task.logprobs(alone)), rel=1e-5)
