"""What one rank knows of each microbatch of an update before the first optimizer step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from common.models.packed_attention import Packed
from contracts.records import Microbatch
from learner.shared_trunk import Below


class Places:
    """Where the training tokens of a microbatch lie. The state before completion token t of row b is position
    prompt_len + t - 1, which both predicts the token and carries V(s_t)."""

    def __init__(self, mb: Microbatch, device: torch.device, shares_prompts: bool = False):
        """`shares_prompts`: of neighbours in a group the prompt is in the packed row once."""
        self.packed = Packed.of(mb.sequences, device, mb.prompt_lens if shares_prompts else None)
        self.mask = torch.from_numpy(mb.loss_mask).to(device)  # bool [B, C]
        self.rows, self.steps = self.mask.nonzero(as_tuple=True)
        place = torch.from_numpy(mb.prompt_lens).to(device)[self.rows] + self.steps
        self.select = self.packed.at(self.rows, place - 1)  # [M], into the packed row
        self.targets = self.packed.input_ids[0, self.packed.at(self.rows, place)]
        # bool [B, C], of sequences that train: `mask` has those of sequences, too, that are only compared with
        self.trains = self.mask & torch.from_numpy(mb.trains).to(device)[:, None]
        self.below = Below()  # what the layers that networks share put out

    def spread(self, flat: Tensor) -> Tensor:
        """[M] -> [B, C], 0 where no token trains; differentiable."""
        return torch.zeros(self.mask.shape, dtype=flat.dtype, device=flat.device).index_put(
            (self.rows, self.steps), flat
        )

    def early(self, min_completion_tokens: int, min_turn_tokens: int) -> Tensor | None:
        """Which of the M tokens were sampled while no turn could end (None: never): the first of a completion, and the
        first of every turn, which begins with the completion or behind an observation."""
        if not (min_completion_tokens or min_turn_tokens):
            return None
        every = torch.arange(self.mask.shape[1], device=self.mask.device)
        before_turn = torch.where(self.mask, -1, every).cummax(1).values[self.rows, self.steps]
        return (self.steps < min_completion_tokens) | (self.steps - before_turn <= min_turn_tokens)


@dataclass
class Pass:
    """What is known of one microbatch before the first optimizer step. Tensors are float32 [B, C], 0 where no token
    trains."""

    batch: Microbatch
    places: Places
    ref_logprobs: Tensor
    proximal_logprobs: Tensor
    behavior_logprobs: Tensor
    old_values: Tensor  # 0 without a value model
    entropy: Tensor
    # policy_logprobs, their entropy and values with their graphs, until used
    live: tuple[Tensor, Tensor, Tensor | None] | None
    is_held: bool = False  # it is one of those whose graphs were kept
    weights: Tensor = field(default_factory=lambda: torch.empty(0))  # of each token in the policy's losses
    rewards: Tensor = field(default_factory=lambda: torch.empty(0))
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    returns: Tensor = field(default_factory=lambda: torch.empty(0))


def over_steps(steps: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of an update from those of its optimizer steps: the largest of maxima (`..._max`), the mean of all else."""
    columns = {name: [step[name] for step in steps] for name in steps[0]}
    return {name: max(row) if name.endswith("_max") else sum(row) / len(row) for name, row in columns.items()}


class Timer:
    """Seconds of the parts of an update. A GPU only queues what a call asks for, so events in its queue are read there."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._parts: list[tuple[str, Any, Any]] = []  # name, mark at its start, mark at its end

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._mark()
        yield
        self._parts.append((name, start, self._mark()))

    @property
    def seconds(self) -> dict[str, float]:
        """By name; waits on a GPU until all of it is done."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for name, start, end in self._parts:
            found[name] = found.get(name, 0.0) + (start.elapsed_time(end) / 1e3 if self._on_gpu else end - start)
        return found

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
