"""Log-probabilities and loss of supervised examples, a microbatch at a time."""

from collections.abc import Iterable, Sequence
from itertools import compress
from typing import Any

import torch

from common.models.packed_attention import Packed
from contracts.records import Example
from learner.losses import token_nll_loss


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


def taught_tokens(examples: Iterable[Example]) -> set[int]:
    """The tokens that train, each once."""
    return set().union(*(compress(e.token_ids, e.loss_mask) for e in examples))
