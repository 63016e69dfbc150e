"""Supervised fine-tuning: next-token loss on the tokens that the examples mark."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from common.microbatches import cut_microbatches
from common.models.packed_attention import Packed
from contracts.config import TandemConfig
from contracts.records import Example
from learner.adapted_models import trained_policy
from learner.engine import Ranks, TrainEngine
from learner.losses import token_nll_loss
from learner.models import PolicyModel
from learner.saved_model import save_checkpoint


def epoch_batches(count: int, batch_size: int, epochs: int, seed: int, ranks: int) -> list[list[int]]:
    """Row numbers of every step: a new permutation each epoch, the same on every rank; an epoch's last batch may be
    short, and one that is left with a single row, or without a row for every rank, is joined to the one before."""
    batches = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(count).tolist()
        rows = [order[i : i + batch_size] for i in range(0, count, batch_size)]
        if len(rows) > 1 and len(rows[-1]) < max(2, ranks):
            last = rows.pop()
            rows[-1] += last
        batches += rows
    return batches


def example_logprobs(
    engine: Any, examples: Sequence[Example], device: torch.device, prompt_lens: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of the tokens that train in one microbatch, with gradient, and the number of the example each belongs to.
    `prompt_lens` is as in `Packed.of`."""
    packed = Packed.of([e.token_ids for e in examples], device, prompt_lens)
    steps, targets, owners = [], [], []
    for number, example in enumerate(examples):
        for t, trains in enumerate(example.loss_mask):
            if trains and t:
                steps.append(t - 1)  # the position before predicts the token
                targets.append(example.token_ids[t])
                owners.append(number)
    # The dtype is named, as a microbatch may hold no marked token.
    before, what, whose = (torch.tensor(v, dtype=torch.int64, device=device) for v in (steps, targets, owners))
    return engine(packed, packed.at(whose, before), what)[0], whose


def example_nll(engine: Any, examples: list[Example], device: torch.device) -> torch.Tensor:
    """Summed loss in nats of one microbatch, with gradient."""
    logprobs, _ = example_logprobs(engine, examples, device)
    return token_nll_loss(logprobs, torch.ones_like(logprobs, dtype=torch.bool))


def loss_tokens(examples: list[Example]) -> int:
    return sum(sum(e.loss_mask[1:]) for e in examples)


class SFTTask:
    """All ranks hold all examples and take their share of each batch."""

    def __init__(self, ranks: Ranks, config: TandemConfig, examples: list[Example], held_out: list[Example]):
        self.ranks, self.config = ranks, config
        self.examples, self.held_out = examples, held_out
        stage = config.sft
        self.batches = epoch_batches(len(examples), stage.batch_size, stage.epochs, config.seed, ranks.world_size)
        model = trained_policy(config.model.path, config, ranks, config.sft.trainable_layers, has_dropout=True)
        self.engine = TrainEngine(model, config.sft.optimizer, config.learner, ranks, len(self.batches))
        self.model: PolicyModel = model

    def num_steps(self) -> int:
        return len(self.batches)

    def step(self, index: int) -> dict[str, float]:
        """One optimizer step."""
        start = time.perf_counter()
        batch = [self.examples[i] for i in self.batches[index]]
        tokens = loss_tokens(batch)
        cut = cut_microbatches(
            [len(e.token_ids) for e in batch], self.config.learner.microbatch_tokens, self.ranks.world_size
        )[self.ranks.rank]
        total = torch.zeros((), device=self.ranks.device)
        for i, rows in enumerate(cut):
            loss = example_nll(self.engine, [batch[r] for r in rows], self.ranks.device) / tokens
            self.engine.backward(loss, is_last=i == len(cut) - 1)
            total += loss.detach()
        norm = self.engine.step()
        seconds = time.perf_counter() - start
        return {
            "sft/loss": self.ranks.sum(total).item(),
            "sft/grad_norm": norm,
            "perf/train_tokens_per_s": sum(len(e.token_ids) for e in batch) / seconds,
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss in nats a token on the held-out examples."""
        if not self.held_out:
            return {}
        cut = cut_microbatches(
            [len(e.token_ids) for e in self.held_out], self.config.learner.microbatch_tokens, self.ranks.world_size
        )[self.ranks.rank]
        total = torch.zeros((), device=self.ranks.device)
        for rows in cut:
            total += example_nll(self.engine, [self.held_out[r] for r in rows], self.ranks.device)
        return {"sft/eval_loss": self.ranks.sum(total).item() / loss_tokens(self.held_out)}

    def save(self, path: str) -> None:
        save_checkpoint(self.engine, path, self.config.model.path, self.config.model, self.ranks)


TASK = SFTTask
