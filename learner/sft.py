"""Supervised fine-tuning: next-token loss on the tokens that the examples mark."""

import time

import numpy as np
import torch

from common.microbatches import cut_microbatches
from contracts.config import TandemConfig
from contracts.records import Example
from learner.adapted_models import trained_policy
from learner.engine import TrainEngine
from learner.examples import example_nll, loss_tokens, taught_tokens
from learner.models import PolicyModel
from learner.ranks import Ranks
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
    def evaluate(self, start: int, stop: int) -> tuple[float, int]:
        """Of the held-out examples from `start` to `stop`, an example for each rank at least: nats, and their tokens."""
        examples = self.held_out[start:stop]
        cut = cut_microbatches(
            [len(e.token_ids) for e in examples], self.config.learner.microbatch_tokens, self.ranks.world_size
        )[self.ranks.rank]
        total = torch.zeros((), device=self.ranks.device)
        for rows in cut:
            total += example_nll(self.engine, [examples[r] for r in rows], self.ranks.device)
        return self.ranks.sum(total).item(), loss_tokens(examples)

    def save(self, path: str) -> None:
        source, taught = self.config.model.path, taught_tokens(self.examples)
        save_checkpoint(self.engine, path, source, self.config.model, self.ranks, taught=taught)


TASK = SFTTask
