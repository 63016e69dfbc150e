"""The advantage estimators by name, with what their papers say beside the advantage itself: docs/algorithms.md."""

from dataclasses import dataclass, replace

from contracts.config import OffPolicyConfig, PPOConfig


@dataclass(frozen=True)
class Estimator:
    """What goes with an estimator; the configuration may choose otherwise in `kl`, `whiten` and `aggregation`."""

    title: str
    has_value_model: bool
    needs_groups: bool  # compares the rollouts of a prompt
    kl: str  # the KL penalty: "none", k1 in the "reward" of each token, or a loss term: "k2", "k3"
    whiten: bool  # advantages, over the tokens of the global batch
    aggregation: str  # of token losses: `learner.losses.aggregation_weights`
    # clipped: the surrogate of PPO, on advantages | likelihood: coefficients times log-likelihood, `learner.likelihood`
    loss: str = "clipped"
    is_expectation: bool = True  # over the policy's own samples: rollouts of an older policy want importance weights

    @property
    def has_kl_loss(self) -> bool:
        return self.kl in ("k2", "k3")


ESTIMATORS = {
    "gae": Estimator("PPO", True, False, "reward", True, "tokens"),
    "grpo": Estimator("GRPO", False, True, "k3", False, "sequences"),
    "dr_grpo": Estimator("Dr. GRPO", False, True, "k3", False, "budget"),
    "rloo": Estimator("RLOO", False, True, "reward", False, "sequence_sums"),
    "reinforce_plus_plus": Estimator("REINFORCE++", False, False, "reward", True, "tokens"),
    "raft": Estimator("RAFT", False, True, "none", False, "tokens", "likelihood"),
    "rwr": Estimator("RWR", False, False, "none", False, "sequence_sums", "likelihood"),
    "online_dpo": Estimator(
        "Online DPO", False, True, "none", False, "sequence_sums", "likelihood", is_expectation=False
    ),
}


def chosen_estimator(ppo: PPOConfig) -> Estimator:
    """The estimator of a configuration, with the configuration's own choices where it makes any."""
    paper = ESTIMATORS[ppo.estimator]
    return replace(
        paper,
        kl=ppo.kl.place or paper.kl,
        whiten=paper.whiten if ppo.whiten_advantages is None else ppo.whiten_advantages,
        aggregation=ppo.aggregation or paper.aggregation,
    )


def chosen_correction(ppo: PPOConfig) -> OffPolicyConfig:
    """The off-policy correction of a configuration, with the default for its staleness and estimator."""
    default = "truncated" if ppo.max_staleness and ESTIMATORS[ppo.estimator].is_expectation else "none"
    return replace(ppo.off_policy, correction=ppo.off_policy.correction or default)


def warmup_updates(ppo: PPOConfig) -> int:
    """Updates that fit the value model alone; none where there is no value model."""
    return ppo.value_warmup_updates if ESTIMATORS[ppo.estimator].has_value_model else 0
