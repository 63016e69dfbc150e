"""Rows in which the completions of a group have their prompt once, against each sequence for itself."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.microbatches import cut_microbatches
from common.models.forward import hidden_states, knows_shared_prompts
from common.models.packed_attention import MAX_TOKENS, Packed
from contracts.config import LearnerConfig, ModelConfig, TandemConfig
from controller.loop.training_batches import make_batches
from learner.models import load_policy
from learner.passes import Places
from learner.ppo import PPOTask
from learner.ranks import Ranks
from tests.conftest import make_config
from tests.rollouts import rollout
from tests.tiny_models import TINY, make

CPU = torch.device("cpu")
# Windows, caps, sinks, learnt positions, mixtures, layers of two kinds; and padded layouts, which share nothing.
NAMES = (
    "llama",
    "gpt2",
    "qwen3",
    "mistral-window",
    "gemma2-window",
    "gemma3-window",
    "gpt_oss",
    "mixtral",
    "cohere2-window",
    "opt",
)
PADDED = ("bloom", "lfm2")
PROMPTS = ([5, 61, 30, 7, 8, 9, 10, 11, 12, 13], [9], [40, 41, 42])


def rows_of(seed: int = 3) -> tuple[list[list[int]], list[int]]:
    """Groups of 3, 1 and 4, one completion empty, one longer than any window."""
    drawn = np.random.default_rng(seed)
    lengths = ((4, 0, 21), (2,), (1, 3, 3, 6))
    rows = [[*p, *drawn.integers(3, 290, n)] for p, counts in zip(PROMPTS, lengths, strict=True) for n in counts]
    return [list(map(int, row)) for row in rows], [10, 10, 10, 1, 3, 3, 3, 3]


def test_a_row_by_hand() -> None:
    packed = Packed.of([[1, 2, 3, 7, 8], [1, 2, 3, 9], [4, 5], [1, 2, 3, 6], [1, 2, 3]], CPU, [3, 3, 1, 3, 3])
    assert packed.input_ids.tolist() == [[1, 2, 3, 7, 8, 9, 4, 5, 1, 2, 3, 6]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 0, 1, 2, 3]]
    assert packed.siblings == [(0, 2, 3), (3, 2, 3)]  # neighbours alone
    assert packed.places.tolist() == [0, 1, 2, 3, 4, 8, 10, 11, 15, 16, 17, 18]
    assert packed.last.tolist() == [4, 5, 7, 11, 10]
    assert packed.at(torch.tensor([1, 1, 4]), torch.tensor([2, 3, 0])).tolist() == [2, 5, 8]


@pytest.mark.parametrize("lens", [[3, 2], [0, 0], [2, 3]])
def test_other_prompts_are_not_shared(lens: list[int]) -> None:
    """The same tokens behind a shorter prompt, and no prompt at all."""
    packed = Packed.of([[1, 2, 3, 4], [1, 2, 3, 5]], CPU, lens)
    assert (packed.siblings, packed.input_ids.shape[1]) == ([], 8)


@pytest.mark.parametrize("name", [*NAMES, *PADDED])
def test_numbers_and_gradients_are_those_of_whole_sequences(name: str, tmp_path: Path) -> None:
    assert name in TINY
    make(name, seed=1).save_pretrained(tmp_path)
    rows, prompts = rows_of()
    total = sum(map(len, rows))
    gradients, outputs = [], []
    for prompt_lens in (None, prompts):
        network = load_policy(str(tmp_path), ModelConfig(dtype="float32"), LearnerConfig(), on_cpu=True)
        shares = knows_shared_prompts(network.lm, network.layout)
        assert shares == (name not in PADDED)
        if not shares:
            return
        packed = Packed.of(rows, CPU, prompt_lens)
        assert packed.input_ids.shape[1] == (total if prompt_lens is None else total - 2 * 10 - 3 * 3)
        # Of every completion token, as in an update; the first one is told by the shared prompt's last.
        which = [(b, step) for b, (row, n) in enumerate(zip(rows, prompts, strict=True)) for step in range(n, len(row))]
        b, step = torch.tensor(which).T
        found, entropy = network(packed, packed.at(b, step - 1), packed.input_ids[0, packed.at(b, step)])
        weights = torch.sin(torch.arange(len(found)))  # none cancels another
        (found * weights + entropy).sum().backward()
        outputs.append(found.detach())
        gradients.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
    assert outputs[0].std() > 0.1
    assert (outputs[0] - outputs[1]).abs().max() < 1e-4
    assert gradients[0].keys() == gradients[1].keys()
    for key, expected in gradients[0].items():
        assert (gradients[1][key] - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item()), key


def test_prompts_beyond_the_short_kernel(small_vocab: Path) -> None:
    """Where torch's attention takes over."""
    network = load_policy(str(small_vocab), ModelConfig(dtype="float32"), LearnerConfig(), on_cpu=True)
    prompt = torch.randint(3, 500, (MAX_TOKENS + 40,), generator=torch.Generator().manual_seed(1)).tolist()
    rows, lens = [[*prompt, 5, 6, 7], [*prompt, 9], [*prompt[:3], 4]], [len(prompt)] * 2 + [3]
    plain, shared = (Packed.of(rows, CPU, prompts) for prompts in (None, lens))
    assert shared.input_ids.shape[1] == plain.input_ids.shape[1] - len(prompt)
    with torch.no_grad():
        expected, found = (hidden_states(network.lm, packed, network.layout) for packed in (plain, shared))
    assert (found[shared.last] - expected[plain.last]).abs().max() < 1e-4


def test_a_shared_prompt_rounds_no_worse_in_bfloat16(small_vocab: Path) -> None:
    """The gradient of 24 completions of one prompt against float32's: as near as without sharing."""
    drawn = np.random.default_rng(0)
    prompt = drawn.integers(3, 500, 30).tolist()
    rows = [[*prompt, *drawn.integers(3, 500, 5).tolist()] for _ in range(24)]

    def gradient(dtype: str, prompt_lens: list[int] | None) -> torch.Tensor:
        network = load_policy(str(small_vocab), ModelConfig(dtype=dtype), LearnerConfig(), on_cpu=True)
        packed = Packed.of(rows, CPU, prompt_lens)
        b = torch.arange(24).repeat_interleave(5)
        step = 30 + torch.arange(5).repeat(24)
        network(packed, packed.at(b, step - 1), packed.input_ids[0, packed.at(b, step)])[0].sum().backward()
        # Of keys and values, which all completions see, in the lowest layer.
        return torch.cat(
            [p.grad.float().flatten() for n, p in network.named_parameters() if "layers.0" in n and "_proj" in n]
        )

    exact = gradient("float32", None)
    apart, shared = (gradient("bfloat16", lens) for lens in (None, [30] * 24))
    errors = [((g - exact).norm() / exact.norm()).item() for g in (apart, shared)]
    assert 0 < errors[1] < 1.25 * errors[0] < 0.1


@pytest.mark.parametrize("estimator", ["grpo", "gae"])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_an_update_is_that_of_whole_sequences(
    estimator: str, minibatches: int, small_vocab: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: TandemConfig = make_config(small_vocab, tmp_path, dtype="float32")
    config.ppo.estimator, config.ppo.samples_per_prompt, config.ppo.minibatches = estimator, 3, minibatches
    config.ppo.optimizer.learning_rate = config.ppo.value_optimizer.learning_rate = 1e-3
    config.ppo.optimizer.eps = config.ppo.value_optimizer.eps = 1e-3  # steps proportional to small gradients
    drawn = np.random.default_rng(4)
    rollouts = [
        rollout(p, prompt, drawn.integers(3, 500, drawn.integers(1, 6)).tolist(), sample=s)
        for p, prompt in enumerate(PROMPTS)
        for s in range(3)
    ]
    tokens: list[int] = []
    init = Places.__init__

    def counting(self: Places, *args: object) -> None:
        init(self, *args)  # type: ignore[arg-type]
        tokens.append(self.packed.input_ids.shape[1])

    monkeypatch.setattr(Places, "__init__", counting)
    results = []
    for shares in (True, False):
        tokens.clear()
        task = PPOTask(ranks, config, str(small_vocab), str(small_vocab), (2,), [])
        assert task.shares_prompts
        task.shares_prompts = shares
        batch = make_batches(rollouts, list(drawn_scores()), 1, minibatches, 1000, np.random.default_rng(0))[0]
        metrics = task.update(batch, 0.1, train_policy=True)
        engines = [task.policy, *([task.value] if task.value else [])]
        results.append((metrics, [p.detach().clone() for e in engines for p in e.model.parameters()], sum(tokens)))
    (found, weights, shared), (expected, whole, apart) = results
    assert apart == sum(r.num_tokens for r in rollouts)
    # In two minibatches, siblings are apart now and then.
    assert shared == apart - 2 * sum(map(len, PROMPTS)) if minibatches == 1 else shared < apart
    for key in expected:
        if not key.startswith("perf/"):
            assert found[key] == pytest.approx(expected[key], abs=2e-5, rel=2e-4), key
    for one, two in zip(weights, whole, strict=True):
        assert (one - two).abs().max() < 2e-5


def drawn_scores() -> np.ndarray:
    return np.random.default_rng(5).normal(size=9)


def test_siblings_travel_together() -> None:
    """As far as the budget allows; every sequence once, whatever the groups are."""
    drawn = np.random.default_rng(1)
    for _ in range(200):
        count, ranks = int(drawn.integers(2, 40)), int(drawn.integers(1, 3))
        groups = drawn.integers(0, drawn.integers(1, 9), count).tolist()
        lengths = drawn.integers(1, 50, count).tolist()
        cut = cut_microbatches(lengths, int(drawn.integers(20, 300)), ranks, groups)
        flat = [row for rank in cut for part in rank for row in part]
        assert sorted(flat) == list(range(count))
        assert len({len(rank) for rank in cut}) == 1
    groups = [0, 1, 0, 1, 0, 1]
    assert cut_microbatches([9, 2, 3, 4, 1, 8], 100, 1, groups) == [[[1, 3, 5, 4, 2, 0]]]
    assert sorted(map(sorted, cut_microbatches([9, 2, 3, 4, 1, 8], 14, 1, groups)[0])) == [[0, 2, 4], [1, 3, 5]]
