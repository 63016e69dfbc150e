"""The thresholds on single metrics: guesses from the literature and from runs of this project, not laws."""

from collections.abc import Iterator

from controller.alarms.alarm import Limit

LIMITS = (
    Limit(
        "policy/approx_kl", "above", 0.05, "Policy updates are large",
        "One update moves the policy further than PPO's trust region allows for.",
        "Lower ppo.optimizer.learning_rate, use fewer epochs, or set ppo.target_approx_kl.",
    ),
    Limit(
        "policy/clipfrac", "above", 0.3, "Much of every batch is clipped",
        "Clipped tokens give no gradient: the update stops learning from them and the step is too large.",
        "Lower the learning rate or ppo.epochs; look at the mismatch first if it is high too.",
    ),
    Limit(
        "policy/ratio_max", "above", 10.0, "A probability ratio exploded",
        "Some token became more than ten times as likely within one update.",
        "Lower the learning rate; check that sampler and learner agree (mismatch k3).",
    ),
    Limit(
        "kl/mismatch_k3", "above", 0.01, "Sampler and learner disagree",
        "vLLM and the learner give the same tokens different probabilities at the same weights. "
        "Rounding in bfloat16 alone gives about 0.002.",
        "Check that the last weight transfer arrived, and that temperature, dtype and attention are the same on both sides.",
    ),
    Limit(
        "kl/mismatch_logp_max", "above", 5.0, "Single tokens with a very different log-probability",
        "At least one token was sampled with a probability that the learner does not confirm at all.",
        "Usually a masking or truncation fault, or weights that did not arrive.",
    ),
    Limit(
        "reward/paid_abs_max", "above", 100.0, "A token is paid out of all proportion",
        "Scores are paid in standard deviations of the first batch's, so a hundred is another unit: the first scores were "
        "nearly equal, or an environment pays in large numbers. The KL penalty counts for nothing beside it, and the "
        "clipped value loss follows slowly.",
        "Look at the first scores (reward/score_std); scale what a rule function or an environment returns to about 1.",
    ),
    Limit(
        "value/explained_var", "below", 0.0, "The value model explains nothing",
        "After 20 updates it predicts returns worse than their mean does, so advantages are mostly noise.",
        "Raise ppo.value_optimizer.learning_rate or ppo.value_warmup_updates; start it from the reward model.",
        after=20,
    ),
    Limit(
        "off_policy/ess", "below", 0.5, "Stale rollouts count for little",
        "The effective sample size is under half of the tokens: a few importance weights carry the batch.",
        "Lower ppo.max_staleness or the learning rate; ppo.off_policy.correction=masked leaves the farthest tokens out.",
    ),
    Limit(
        "rwr/ess", "below", 0.1, "A few completions carry every batch",
        "The weights of reward-weighted regression leave an effective sample of under a tenth of the rollouts.",
        "Raise ppo.rwr.temperature or ppo.rollouts_per_update.",
    ),
    Limit(
        "completion/eos_frac", "below", 0.9, "Completions are cut off",
        "More than one in ten completions reached the token limit without ending.",
        "Raise ppo.missing_eos_penalty or ppo.sampling.max_completion_tokens.",
    ),
    Limit(
        "completion/repeat_frac", "above", 0.3, "Completions repeat themselves",
        "The policy found phrases that score well and says them again and again.",
        "Raise ppo.kl.coef; read the samples.",
    ),
)  # fmt: skip


def limits_of(metric: str) -> Iterator[tuple[float, str]]:
    """(value, text) of the fixed limits on one metric, for its chart."""
    for limit in LIMITS:
        if limit.metric == metric:
            yield limit.limit, "limit" if limit.limit else "no better than the mean"
