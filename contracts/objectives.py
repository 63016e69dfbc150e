"""What an objective declares: how advantages and the ratio of two policies become a loss (docs/algorithms.md). One module
each in learner/objectives; an estimator whose loss is a likelihood has none."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from contracts.config import PPOConfig
from contracts.plugins import Kind, find, names

if TYPE_CHECKING:
    from torch import Tensor

OBJECTIVES = Kind("objective", "learner.objectives", "OBJECTIVE")


class Clip(NamedTuple):
    """The ratio is held within [1 - low, 1 + high]; the loss of a bad token within `dual` times its advantage."""

    low: float
    high: float
    dual: float | None


# (policy_logprobs, proximal_logprobs, advantages, mask, clip, weights), each [B, C] but the clip -> the sum over the mask
# and the statistics of `learner.losses.policy_loss`. A row is a whole sequence: microbatches never cut one.
Loss = Callable[["Tensor", "Tensor", "Tensor", "Tensor", Clip, "Tensor"], tuple["Tensor", dict[str, "Tensor"]]]


@dataclass(frozen=True, kw_only=True)
class Objective:
    title: str
    loss: Loss
    clip_low: float | None = None  # as the paper has them, where the configuration says null; None: ppo.clip
    clip_high: float | None = None


def objective_names() -> tuple[str, ...]:
    """Of ours."""
    return names(OBJECTIVES)


def find_objective(name: str) -> Objective:
    """As declared. Raises UnknownPlugin where there is none of that name."""
    found: Objective = find(OBJECTIVES, name)
    return found


def chosen_clip(ppo: PPOConfig) -> Clip:
    """The bounds of a configuration, with those of its objective where it says nothing."""

    def first(*bounds: float | None) -> float:
        return next(bound for bound in (*bounds, ppo.clip) if bound is not None)

    paper = find_objective(ppo.objective)
    return Clip(first(ppo.clip_low, paper.clip_low), first(ppo.clip_high, paper.clip_high), ppo.dual_clip)
