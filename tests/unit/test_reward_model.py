"""Supervised training (SFT, reward model) against plain loops, and what serves the scores against transformers."""

import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from common.models.loading import LoadingError
from contracts.config import TandemConfig
from contracts.records import Example, PreferencePair, RatedText
from contracts.scoring import scoring_ids
from learner.ranks import Ranks
from learner.reward_model import RewardModelTask
from learner.sft import SFTTask, epoch_batches
from reward_service.model import RewardModel, check_reward_model
from tests.conftest import make_config

EOS = 2  # the pad token too
MEAN, STD = 0.75, 0.5  # of the fixture `classifier`


def texts(count: int, seed: int = 0) -> list[list[int]]:
    """Scoring inputs of 2 to 20 tokens, some with an EOS inside."""
    rng = random.Random(seed)
    return [scoring_ids([rng.randrange(1, 512) for _ in range(rng.randint(1, 19))], EOS) for _ in range(count)]


def plain_scores(path: Path, sequences: list[list[int]]) -> list[float]:
    """Raw scores by transformers in float64, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")
    model.config.pad_token_id = None  # else its pooling takes the EOS for padding
    with torch.no_grad():
        return [model(torch.tensor([s])).logits.item() for s in sequences]


@pytest.fixture
def config(small_vocab: Path, tmp_path: Path) -> TandemConfig:
    return make_config(small_vocab, tmp_path, dtype="float32")


# ---- what serves


@pytest.mark.parametrize("batch_tokens", [1, 30, 1000])
def test_served_scores_equal_transformers_one_by_one(batch_tokens: int, classifier: Path) -> None:
    sequences = texts(24)
    scores = RewardModel(str(classifier), "float32", batch_tokens).score(sequences)
    assert all(s.error is None for s in scores)
    expected = [(raw - MEAN) / STD for raw in plain_scores(classifier, sequences)]
    assert [s.value for s in scores] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_identical_texts_tie(dtype: str, classifier: Path) -> None:
    sequences = texts(12)
    scores = RewardModel(str(classifier), dtype, 40).score([*sequences, *reversed(sequences)])
    assert [s.value for s in scores[:12]] == [s.value for s in reversed(scores[12:])]
    assert len({s.value for s in scores}) == 12


def test_a_text_is_scored_at_its_eos(classifier: Path) -> None:
    ended, open_end = [7, 8, 9, EOS], [7, 8, 9]
    found = [s.value for s in RewardModel(str(classifier), "float32").score([ended, open_end])]
    expected = [(raw - MEAN) / STD for raw in plain_scores(classifier, [ended, open_end])]
    assert found == pytest.approx(expected, abs=1e-4)
    assert abs(expected[0] - expected[1]) > 0.01


def test_a_bad_item_costs_only_itself(classifier: Path) -> None:
    good = texts(3)
    model = RewardModel(str(classifier), "float32", max_tokens=20)
    scores = model.score([good[0], [], good[1], [5] * 21, [5, 512], good[2], [-1, 5], [5] * 20])
    assert [s.error for s in scores] == [
        None, "empty", None, "too_long: 21 tokens, the limit is 20", "out_of_vocabulary", None, "out_of_vocabulary",
        None,
    ]  # fmt: skip
    assert [s.value is None for s in scores] == [s.error is not None for s in scores]
    assert [scores[i].value for i in (0, 2, 5)] == pytest.approx([s.value for s in model.score(good)], abs=1e-5)
    assert model.score([]) == []
    assert [s.error for s in model.score([[], []])] == ["empty", "empty"]


def test_an_item_beyond_the_positions_costs_only_itself(tmp_path: Path) -> None:
    """GPT-2 learns its positions and has no more of them: one index beyond fails its whole batch."""
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16, num_labels=1, pad_token_id=0)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    inputs = [[5] * 16, [5] * 17, [7] * 3, [9] * 15]
    scores = RewardModel(str(tmp_path), "float32").score(inputs)
    error = "too_long: 17 tokens as the model reads it, which has 16 positions (max_position_embeddings)"
    assert [s.error for s in scores] == [None, error, None, None]
    expected = plain_scores(tmp_path, [inputs[i] for i in (0, 2, 3)])
    assert [s.value for s in scores if s.error is None] == pytest.approx(expected, abs=1e-5)
    # The reading may write more behind an input.
    longer = RewardModel(str(tmp_path), "float32", reading=lambda ids: ((*ids, 1, 2), len(ids) + 1)).score(inputs)
    assert [s.code for s in longer] == ["too_long", "too_long", None, "too_long"]


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_score_does_not_follow_the_longest_text_of_its_batch(kind: str, tmp_path: Path) -> None:
    """transformers turns all rows of a batch by its longest, where that is beyond the original positions."""
    rope: dict[str, Any] = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
    if kind == "longrope":
        rope |= {"original_max_position_embeddings": 16, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64 if kind == "longrope" else 16, initializer_range=0.5, rope_parameters=rope,
        pad_token_id=0,
    )  # fmt: skip
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    model = RewardModel(str(tmp_path), "float32")
    short, longest, beyond = [5, 6, 7, 8, 9, 10, 11, 12], [*range(3, 19)], [*range(3, 20)]
    scores = model.score([short, longest, beyond])
    named = f"original_max_position_embeddings of rope_type {kind}"
    assert scores[2].error == f"too_long: 17 tokens as the model reads it, which has 16 positions ({named})"
    assert [s.value for s in scores[:2]] == pytest.approx(plain_scores(tmp_path, [short, longest]), abs=1e-5)
    assert model._forward([tuple(short), tuple(beyond)])[0] != pytest.approx(scores[0].value, abs=1e-3)
    # The reading may write more behind an input.
    longer = RewardModel(str(tmp_path), "float32", reading=lambda ids: ((*ids, 1), len(ids))).score([short, longest])
    assert [s.code for s in longer] == [None, "too_long"]


def test_a_score_that_is_not_a_number_is_an_error(classifier: Path, tmp_path: Path) -> None:
    shutil.copytree(classifier, tmp_path / "broken")
    weights = load_file(classifier / "model.safetensors")
    weights["model.embed_tokens.weight"][42] = math.nan
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    scores = RewardModel(str(tmp_path / "broken"), "float32").score([[5, 42, EOS], [5, 6, EOS]])
    assert (scores[0].value, scores[0].error) == (None, "non_finite")
    expected = (plain_scores(classifier, [[5, 6, EOS]])[0] - MEAN) / STD
    assert scores[1].value == pytest.approx(expected, abs=1e-4)  # the neighbour in the same row is unharmed


def test_a_model_without_a_single_label_is_refused(small_vocab: Path, classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(
        LoadingError, match=r"found no score\.weight .*stage=reward_model leaves one"
    ):  # a language model
        RewardModel(str(small_vocab))
    two = AutoModelForSequenceClassification.from_pretrained(small_vocab, num_labels=2)
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(LoadingError, match=r"\(it has \[2, 128\]\); write a reward model with one label"):
        RewardModel(str(tmp_path / "two"))
    RewardModel(str(classifier))


def test_a_head_of_another_name_or_class_is_refused(classifier: Path, tmp_path: Path) -> None:
    """Today's transformers would fill the head with random numbers, or the class has no such head."""
    shutil.copytree(classifier, tmp_path / "renamed")
    weights = load_file(classifier / "model.safetensors")
    weights["value_head.weight"] = weights.pop("score.weight")
    save_file(weights, tmp_path / "renamed" / "model.safetensors", {"format": "pt"})
    bert = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1)
    BertForSequenceClassification(bert).save_pretrained(tmp_path / "bert")
    for name, message in (
        ("renamed", r"value_head\.weight renamed to score\.weight"),
        ("bert", "with a linear layer `score` over a causal backbone; found BertForSequenceClassification"),
    ):
        with pytest.raises(LoadingError, match=message):
            RewardModel(str(tmp_path / name))
        with pytest.raises(LoadingError, match=rf"^proxy_model=.*{message}"):
            check_reward_model(str(tmp_path / name), "proxy_model")


# ---- training a reward model


@pytest.fixture
def make_task(config: TandemConfig, ranks: Ranks) -> Callable[..., RewardModelTask]:
    def make(examples: list, batch_size: int = 32, epochs: int = 1) -> RewardModelTask:
        stage = config.reward_model
        stage.batch_size, stage.epochs = batch_size, epochs
        stage.optimizer.learning_rate, stage.optimizer.head_learning_rate = 1e-3, 1e-2
        return RewardModelTask(ranks, config, config.model.path, examples)

    return make


def rated(sequences: list[list[int]], ratings: list[list[float]]) -> list[RatedText]:
    return [RatedText("", ids, r) for ids, r in zip(sequences, ratings, strict=True)]


@pytest.mark.parametrize("microbatch_tokens", [20, 4096])
def test_loss_over_rated_texts(
    microbatch_tokens: int, config: TandemConfig, make_task: Callable[..., RewardModelTask]
) -> None:
    config.learner.microbatch_tokens = microbatch_tokens
    sequences, ratings = texts(4), [[1, 2, 3], [2], [0, 0, 4, 4], [-1, 3]]
    task = make_task(rated(sequences, ratings))  # type: ignore[arg-type]
    scores = task.score(sequences)
    losses, right, decided = [], 0, 0
    order = task.batches[0]
    for i in range(4):
        for j in range(i):
            wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in ratings[i] for b in ratings[j]]
            p, q = sum(wins) / len(wins), 1 / (1 + math.exp(scores[j] - scores[i]))
            losses.append(-p * math.log(q) - (1 - p) * math.log(1 - q))
            decided += p != 0.5
            right += p != 0.5 and (scores[i] > scores[j]) == (p > 0.5)
    metrics = task.step(0)
    assert sorted(order) == [0, 1, 2, 3]
    assert metrics["reward_model/loss"] == pytest.approx(sum(losses) / 6, abs=1e-5)
    assert metrics["reward_model/accuracy"] == pytest.approx(right / decided)
    assert metrics["reward_model/score_std"] == pytest.approx(np.std(scores, ddof=1), abs=1e-5)


def test_loss_over_stored_pairs_compares_their_halves_alone(make_task: Callable[..., RewardModelTask]) -> None:
    chosen, rejected, preferences = texts(3), texts(3, seed=1), [1.0, 0.8, 0.5]
    pairs = [PreferencePair(*row) for row in zip(chosen, rejected, preferences, strict=True)]
    task = make_task(pairs)
    margins = [a - b for a, b in zip(task.score(chosen), task.score(rejected), strict=True)]
    expected = sum(
        p * math.log1p(math.exp(-m)) + (1 - p) * math.log1p(math.exp(m))
        for m, p in zip(margins, preferences, strict=True)
    )
    metrics = task.step(0)
    assert metrics["reward_model/loss"] == pytest.approx(expected / 3, abs=1e-5)
    assert metrics["reward_model/accuracy"] == pytest.approx(sum(m > 0 for m in margins[:2]) / 2)


def test_a_pair_weighs_as_much_as_two_rated_texts(make_task: Callable[..., RewardModelTask]) -> None:
    better, worse = texts(2)
    one = make_task([PreferencePair(better, worse, 1.0)]).step(0)
    other = make_task(rated([better, worse], [[5.0], [1.0]])).step(0)
    assert one["reward_model/loss"] == pytest.approx(other["reward_model/loss"], rel=1e-6)
    assert one["reward_model/grad_norm"] == pytest.approx(other["reward_model/grad_norm"], rel=1e-5)


@pytest.mark.parametrize("kind", ["rated", "pairs"])
def test_a_plain_signal_is_learnt_saved_and_served(
    kind: str, make_task: Callable[..., RewardModelTask], tmp_path: Path
) -> None:
    """Texts with token 42 are better. The saved scores have mean 0 and variance 1, and are those that are served."""

    def pairs(count: int, seed: int) -> list[tuple[list[int], list[int]]]:
        rng = random.Random(seed)
        plain = [[t for t in ids if t != 42] for ids in texts(2 * count, seed)]
        good = [[*ids[: (cut := rng.randrange(len(ids)))], 42, *ids[cut:]] for ids in plain[:count]]
        return list(zip(good, plain[count:], strict=True))

    train, held_out = pairs(64, 1), pairs(100, 2)
    if kind == "pairs":
        examples: list = [PreferencePair(*pair) for pair in train]
    else:
        examples = [item for good, bad in train for item in rated([good, bad], [[2.0], [-1.0]])]
    task = make_task(examples, batch_size=16, epochs=6 if kind == "pairs" else 4)

    def accuracy() -> float:
        good, bad = (task.score([pair[i] for pair in held_out]) for i in (0, 1))
        return sum(a > b for a, b in zip(good, bad, strict=True)) / len(held_out)

    assert accuracy() < 0.8
    for i in range(task.num_steps()):
        task.step(i)
    assert accuracy() > 0.9

    task.save(str(tmp_path / "saved"))
    sequences = [ids for pair in train for ids in pair]
    scores = [s.value for s in RewardModel(str(tmp_path / "saved"), "float32").score(sequences)]
    assert np.mean(scores) == pytest.approx(0, abs=1e-3)
    assert np.std(scores) == pytest.approx(1, abs=1e-3)
    raw = np.array(task.score(sequences))  # the task itself has no normaliser: it began from a language model
    assert scores == pytest.approx(((raw - raw.mean()) / raw.std()).tolist(), abs=1e-3)
    coarse = [s.value for s in RewardModel(str(tmp_path / "saved"), "bfloat16").score(sequences)]
    assert np.abs(np.array(coarse) - np.array(scores)).mean() < 0.05


def test_training_goes_on_from_a_saved_reward_model(
    config: TandemConfig, classifier: Path, make_task: Callable[..., RewardModelTask], tmp_path: Path
) -> None:
    config.model.path = str(classifier)
    sequences = texts(8)
    task = make_task(rated(sequences, [[float(i)] for i in range(8)]))
    expected = [(raw - MEAN) / STD for raw in plain_scores(classifier, sequences)]
    assert task.score(sequences) == pytest.approx(expected, abs=1e-4)
    task.save(str(tmp_path / "saved"))  # untrained: only the normaliser is new
    served = [s.value for s in RewardModel(str(tmp_path / "saved"), "float32").score(sequences)]
    assert np.mean(served) == pytest.approx(0, abs=1e-4)
    assert np.std(served) == pytest.approx(1, abs=1e-4)


def test_equal_scores_leave_the_normaliser_without_a_scale(
    make_task: Callable[..., RewardModelTask], tmp_path: Path
) -> None:
    """Of 33 equal numbers numpy's deviation is rounding, which a served score would be divided by."""
    [text] = texts(1)
    task = make_task(rated([text] * 33, [[1.0]] * 33))
    task.save(str(tmp_path / "saved"))
    assert AutoConfig.from_pretrained(tmp_path / "saved").score_std == 1.0
    other = texts(2, seed=3)
    raw = task.score([text, *other])
    served = [s.value for s in RewardModel(str(tmp_path / "saved"), "float32").score([text, *other])]
    assert served == pytest.approx([value - raw[0] for value in raw], abs=1e-4)


# ---- supervised fine-tuning

EXAMPLES = [
    Example([5, 6, 7, 8, EOS], [False, False, True, True, True]),
    Example([90, 91, EOS, 92], [True, True, True, True]),  # nothing predicts the first token
    Example([3, EOS, 11, 12, 13, 14, 15], [False, False, False, True, False, True, True]),
    Example([400, 401], [False, True]),
]


def plain_sft(path: Path, examples: list[Example]) -> tuple[float, dict[str, torch.Tensor], float]:
    """Loss a token, gradients and their norm, in float64 and one example at a time."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for example in examples:
        logits = model(torch.tensor([example.token_ids])).logits[0]
        for t in range(1, len(example.token_ids)):
            if example.loss_mask[t]:
                total = total - torch.log_softmax(logits[t - 1], 0)[example.token_ids[t]]
                tokens += 1
    (total / tokens).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return total.item() / tokens, gradients, math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))


@pytest.mark.parametrize("microbatch_tokens", [1, 8, 4096])
def test_sft_step_equals_a_plain_loop(microbatch_tokens: int, config: TandemConfig, ranks: Ranks) -> None:
    config.learner.microbatch_tokens = microbatch_tokens
    # Adam's first step is rate * g / (|g| + eps): with a huge eps it shows the gradient.
    config.sft.optimizer.eps, config.sft.optimizer.learning_rate = 1e3, 1e3
    config.sft.optimizer.max_grad_norm = 1e9
    task = SFTTask(ranks, config, EXAMPLES, EXAMPLES[2:])
    before = {name: p.detach().clone() for name, p in task.model.lm.named_parameters()}
    loss, gradients, norm = plain_sft(Path(config.model.path), EXAMPLES)
    held_out, _, _ = plain_sft(Path(config.model.path), EXAMPLES[2:])
    nats, tokens = task.evaluate(0, len(EXAMPLES) - 2)
    assert nats / tokens == pytest.approx(held_out, abs=1e-5)
    metrics = task.step(0)
    assert metrics["sft/loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["sft/grad_norm"] == pytest.approx(norm, rel=1e-4)
    for name, p in task.model.lm.named_parameters():
        torch.testing.assert_close((before[name] - p.detach()).double(), gradients[name], atol=1e-3 * norm, rtol=0.02)


def test_what_is_masked_trains_nothing(config: TandemConfig, ranks: Ranks) -> None:
    """Which token stands under a false mask at the end does not matter: nothing that trains follows it."""
    losses = []
    for last in (13, 77):
        examples = [Example([5, 6, 7, last], [False, True, True, False]), EXAMPLES[0]]
        task = SFTTask(ranks, config, examples, [])
        losses.append(task.step(0))
    assert losses[0]["sft/loss"] == losses[1]["sft/loss"]
    assert losses[0]["sft/grad_norm"] == pytest.approx(losses[1]["sft/grad_norm"], rel=1e-6)


def test_a_microbatch_without_a_marked_token(config: TandemConfig, ranks: Ranks) -> None:
    config.learner.microbatch_tokens = 1
    task = SFTTask(ranks, config, [*EXAMPLES, Example([7], [True])], [])
    assert task.step(0)["sft/loss"] == pytest.approx(plain_sft(Path(config.model.path), EXAMPLES)[0], abs=1e-5)


def test_sft_imitates_and_saves(config: TandemConfig, ranks: Ranks, tmp_path: Path) -> None:
    config.sft.epochs, config.sft.optimizer.learning_rate = 12, 1e-2
    task = SFTTask(ranks, config, EXAMPLES[:1], EXAMPLES[:1])
    before, _ = task.evaluate(0, 1)
    for step in range(task.num_steps()):
        task.step(step)
    assert task.evaluate(0, 1)[0] < 0.1 * before
    task.save(str(tmp_path / "saved"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)[0].tolist() == [5, 6, 7, 8, EOS]


@pytest.mark.parametrize(
    ("count", "ranks", "sizes"),
    [
        *[(10, 1, [4, 4, 2]), (9, 1, [4, 5]), (13, 1, [4, 4, 5]), (5, 1, [5]), (4, 1, [4]), (1, 1, [1]), (3, 1, [3])],
        # A last batch that cannot feed every rank joins the one before.
        *[(10, 2, [4, 4, 2]), (10, 3, [4, 6]), (11, 4, [4, 7]), (12, 4, [4, 4, 4])],
    ],
)
def test_an_epoch_takes_every_row_once(count: int, ranks: int, sizes: list[int]) -> None:
    batches = epoch_batches(count, 4, 2, seed=0, ranks=ranks)
    assert [len(b) for b in batches] == 2 * sizes
    first, second = batches[: len(sizes)], batches[len(sizes) :]
    for epoch in (first, second):
        assert sorted(row for batch in epoch for row in batch) == list(range(count))
    assert count < 5 or first != second
    assert epoch_batches(count, 4, 2, seed=0, ranks=ranks) == batches
