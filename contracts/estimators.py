"""What an estimator declares: how scores become the policy's gradient, and what its paper says beside (docs/algorithms.md).
One module each in learner/estimators; of others by import path, as `ppo.estimator=my_package.mine:MINE`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from contracts.config import AGGREGATIONS, KL_PLACES, OffPolicyConfig, PPOConfig
from contracts.metrics import Metric
from contracts.plugins import Kind, UnknownPlugin, find

if TYPE_CHECKING:
    from torch import Tensor

LOSSES = ("clipped", "likelihood")
ESTIMATORS = Kind("estimator", "learner.estimators", "ESTIMATOR")


@dataclass(frozen=True)
class Rollouts:
    """The N rollouts of a global batch, in the same order on every rank; nothing carries a gradient."""

    outcomes: "Tensor"  # float64 [N], the sum of a rollout's rewards
    groups: "Tensor"  # int64 [N], from 0 on, which rollouts share their prompt
    trains: "Tensor"  # bool [N], false for a rollout without a token that trains
    # float64 [N], log pi_prox - log pi_ref, summed over the tokens that train; NaN unless the estimator `reads_log_ratios`
    log_ratios: "Tensor"
    units: "Tensor"  # float64 [N], what each counts in the mean of the loss: its tokens, or 1


# (rewards, values, mask, ppo) -> (advantages, returns): float32 [B, C] of a microbatch, 0 where the bool mask is false.
# Values are those before this batch's updates, 0 without a value model; returns are what the value model fits.
OfTokens = Callable[["Tensor", "Tensor", "Tensor", PPOConfig], tuple["Tensor", "Tensor"]]
# (float64 [N], metrics): the advantage, or by likelihood the coefficient, of all tokens of each rollout.
Found = tuple["Tensor", dict[str, float]]
OfRollouts = Callable[[Rollouts, PPOConfig], Found]


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """One function, and what goes with it; the configuration may choose otherwise in `kl`, `whiten` and `aggregation`.
    The function runs without gradient, on the learner's device; its formula and source are in its docstring."""

    title: str
    of_tokens: OfTokens | None = None
    of_rollouts: OfRollouts | None = None
    has_value_model: bool = False
    needs_groups: bool = False  # compares the rollouts of a prompt
    reads_log_ratios: bool = True  # `of_rollouts`; where it does not, an update may train in its first pass
    kl: str  # the KL penalty: "none", k1 in the "reward" of each token, or a loss term: "k2", "k3"
    whiten: bool = False  # advantages, over the tokens of the global batch
    aggregation: str  # of token losses: `learner.losses.aggregation_weights`
    # clipped: the surrogate of PPO, on advantages | likelihood: -sum_t c_t log pi(t), with neither a ratio nor a clip
    loss: str = "clipped"
    is_expectation: bool = True  # over the policy's own samples: rollouts of an older policy want importance weights
    metrics: tuple[Metric, ...] = ()  # what the function returns
    checks: Callable[[PPOConfig], list[Any]] = lambda ppo: []  # `contracts.checks.check.Check`: what it excludes

    def __post_init__(self) -> None:
        for name, options in (("kl", KL_PLACES), ("aggregation", AGGREGATIONS), ("loss", LOSSES)):
            if (value := getattr(self, name)) not in options:
                raise ValueError(f"{name} of estimator {self.title} must be one of {', '.join(options)}; found {value}")
        if (self.of_tokens is None) == (self.of_rollouts is None):
            raise ValueError(f"estimator {self.title} must have one of of_tokens and of_rollouts")
        if self.has_value_model and self.of_tokens is None:
            raise ValueError(f"estimator {self.title} must have of_tokens, whose returns a value model fits")

    @property
    def has_kl_loss(self) -> bool:
        return self.kl in ("k2", "k3")

    @property
    def is_of_scores(self) -> bool:
        """Whether scores alone decide the advantages: they are known before any forward pass."""
        return self.of_rollouts is not None and not self.reads_log_ratios and self.kl != "reward"

    @property
    def trains_at_once(self) -> bool:
        """Whether a microbatch of the first minibatch can be walked back as soon as its forward pass is done: its advantages
        are known by then, and no value model has its graph in memory beside the policy's."""
        return not self.has_value_model and (self.is_of_scores or (self.of_tokens is not None and not self.whiten))


def find_estimator(name: str) -> Estimator:
    """As declared. Raises UnknownPlugin where there is none of that name."""
    found = find(ESTIMATORS, name)
    if not isinstance(found, Estimator):
        problem = TypeError(f"a {type(found).__name__}, no contracts.estimators.Estimator")
        raise UnknownPlugin(f"estimator {name} is {problem}") from problem
    return found


def known_estimator(name: str | None) -> Estimator | None:
    """The same, but None for an unknown name: for what is asked before the checks have refused it, and of records."""
    try:
        return find_estimator(name or "")
    except UnknownPlugin:
        return None


def chosen_estimator(ppo: PPOConfig) -> Estimator:
    """The estimator of a configuration, with the configuration's own choices where it makes any."""
    paper = find_estimator(ppo.estimator)
    return replace(
        paper,
        kl=ppo.kl.place or paper.kl,
        whiten=paper.whiten if ppo.whiten_advantages is None else ppo.whiten_advantages,
        aggregation=ppo.aggregation or paper.aggregation,
    )


def chosen_correction(ppo: PPOConfig) -> OffPolicyConfig:
    """The off-policy correction of a configuration, with the default for its staleness and estimator."""
    default = "truncated" if ppo.max_staleness and find_estimator(ppo.estimator).is_expectation else "none"
    return replace(ppo.off_policy, correction=ppo.off_policy.correction or default)


def warmup_updates(ppo: PPOConfig) -> int:
    """Updates that fit the value model alone; none where there is no value model."""
    return ppo.value_warmup_updates if find_estimator(ppo.estimator).has_value_model else 0
