"""What one rank knows of each microbatch of an update before the first optimizer step, and what it makes of it alone."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from common.models.packed_attention import Packed
from contracts.config import PPOConfig
from contracts.estimators import Estimator, chosen_correction
from contracts.records import Microbatch
from learner.advantages import token_rewards, whitening_moments
from learner.losses import aggregation_weights, off_policy_weights
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
    """What is known of one microbatch. Tensors of its forward passes, which are those before the first optimizer step, are
    float32 [B, C], 0 where no token trains."""

    batch: Microbatch
    places: Places
    tokens: int  # that train in its minibatch, over all ranks; at least 1
    sequences: int  # that train in its minibatch, over all ranks; at least 1
    is_first: bool  # it is of the first minibatch, whose step is the first that changes a weight
    is_last: bool  # of its minibatch on this rank
    is_held: bool  # its graph may wait (`learner.held_tokens`), and what shared layers put out is kept
    behavior_logprobs: Tensor = field(init=False)
    ref_logprobs: Tensor = field(init=False)
    proximal_logprobs: Tensor = field(init=False)
    entropy: Tensor = field(init=False)
    old_values: Tensor = field(init=False)  # 0 without a value model
    rewards: Tensor = field(init=False)
    advantages: Tensor = field(init=False)
    returns: Tensor = field(init=False)
    weights: Tensor = field(init=False)  # of each token in the policy's losses
    # float64 [5]: count, sum and sum of squares of the off-policy weights, how many tokens their bounds have changed, and
    # the largest
    corrected: Tensor = field(init=False)
    live: tuple[Tensor, Tensor] | None = None  # policy_logprobs and their entropy with the graph, until used
    # What a backward pass that has been done leaves for the metrics of the step.
    policy_sums: "PolicySums | None" = None
    value_sums: Tensor | None = None  # float64 [2]: loss, clipped tokens

    def __post_init__(self) -> None:
        self.behavior_logprobs = torch.from_numpy(self.batch.behavior_logprobs).to(self.places.mask.device)
        zeros = torch.zeros_like(self.behavior_logprobs)
        self.ref_logprobs = self.proximal_logprobs = self.entropy = self.old_values = zeros


@dataclass
class PolicySums:
    """Over the tokens of a microbatch that train."""

    sums: Tensor  # float64 [6]: clipped tokens, approximate KL, ratios, loss, KL loss, entropy bonus
    ratio_max: Tensor


@torch.no_grad()
def set_rewards(p: Pass, ppo: PPOConfig, estimator: Estimator, kl_coef: float) -> None:
    """Rewards, and where an estimator takes each token by itself, advantages and returns."""
    mask = p.places.mask
    scores = torch.from_numpy(p.batch.scores).to(mask.device)
    in_reward = kl_coef if estimator.kl == "reward" else 0.0
    p.rewards = token_rewards(scores, p.proximal_logprobs, p.ref_logprobs, mask, in_reward)
    if estimator.of_tokens is not None:
        p.advantages, p.returns = estimator.of_tokens(p.rewards, p.old_values, mask, ppo)


@torch.no_grad()
def set_weights(p: Pass, ppo: PPOConfig, estimator: Estimator) -> None:
    """Weight each token: off-policy correction times aggregation."""
    mask, off_policy, budget = p.places.trains, chosen_correction(ppo), ppo.sampling.max_completion_tokens
    weights, changed = off_policy_weights(p.proximal_logprobs, p.behavior_logprobs, mask, **asdict(off_policy))
    largest = weights.max() if weights.numel() else torch.zeros((), device=mask.device)
    p.corrected = torch.cat([whitening_moments(weights, mask), torch.stack([changed.double(), largest.double()])])
    p.weights = weights * aggregation_weights(mask, estimator.aggregation, p.tokens, p.sequences, budget)


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
