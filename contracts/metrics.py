"""What each metric is called and what it says, declared once: pages, wandb's workspace and docs/metrics.md read it here.

A metric is a number of a line of metrics.jsonl, named group/name; `<n>` in a name stands for what varies. Those of Tandem
itself are here. An estimator declares its own beside itself, in `metrics`: `contracts.catalogue` has them all.

The meanings say what is computed, and over what: where nothing else is said, over the rollouts of the update that have a
score, or over those of their tokens that the policy sampled. Shares are from 0 to 1.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

ESTIMATOR = "Estimators: what does each have of its own?"


@dataclass(frozen=True)
class Metric:
    name: str
    unit: str
    meaning: str  # sentences
    better: str  # "up" | "down" | "neither"
    panel: str = ESTIMATOR  # the table of docs/metrics.md, and the section of wandb's workspace
    title: str = ""  # of a chart of it alone; empty: it has none

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z_]+(/[a-z_0-9<>]+){1,2}", self.name) or self.better not in ("up", "down", "neither"):
            raise ValueError(f"a metric is named group/name, and better is up, down or neither; found {self}")


REWARD = "Reward: does it improve?"
DRIFT = "Drift: how far from the reference?"
POLICY = "Policy"
VALUE = "Value model"
TEXT = "Text: what does it write?"
ASYNC = "Asynchrony: how old is what trains?"
TIME = "Time: where does it go?"
FAULTS = "Faults: what was tolerated?"
OFFLINE = "Trained on data alone: SFT, reward models, preferences"
EVALUATION = "Evaluation on held-out prompts"

# Scores are in the unit of whoever gave them: a reward model's are standard deviations of the texts that it was trained on.
# Rewards are what tokens are paid: scores less the mean of the run's first ones, over their standard deviation.
SCORE, PAID, SECONDS = "score", "standard deviations of the first scores", "s"

CORE = (
    Metric("reward/score_mean", SCORE, "Mean of the scores that the policy trains for.", "up", REWARD,
        "Learned score"),
    Metric("reward/score_std", SCORE, "Standard deviation of these scores; 0 where it is but rounding. At 0 there is "
        "nothing to learn from.", "neither", REWARD, "Spread of scores"),
    Metric("reward/score_gain", SCORE, "`reward/score_mean` less that of the run's first update.", "up", REWARD),
    Metric("reward/gold_mean", SCORE, "Mean score by the gold judge, which no training sees, of the rollouts that it "
        "is shown (`ppo.gold_rollouts`).", "up", REWARD, "Gold score"),
    Metric("reward/total_mean", f"{PAID}, a sequence", "What the tokens of a rollout are paid together: the score, "
        "the penalty for a missing EOS, and the KL penalty where it is part of the reward. An environment's own "
        "rewards keep their unit.", "up", REWARD),
    Metric("reward/overlong_mean", f"{PAID}, a rollout", "What rollouts are paid less for the tokens that they have in the "
        "buffer before the limit (`ppo.overlong`), mean; 0 where none is that long.", "up", REWARD),
    Metric("reward/equal_groups_frac", "share of groups", "Groups whose scores are all equal, among those sampled for the "
        "update: they teach nothing by comparison. Only of estimators that compare groups.", "down", REWARD,
        "Groups of equal scores"),
    Metric("reward/sampling_rounds", "rounds", "How often the update had its batch filled: 1, or more with "
        "`ppo.dynamic_sampling`.", "down", REWARD),
    Metric("reward/trained_rollouts", "rollouts", "Rollouts that the update trains on: fewer than "
        "`ppo.rollouts_per_update` where scores or siblings fail, or the budget of `ppo.dynamic_sampling` is spent.", "up",
        REWARD),
    Metric("reward/kl_penalty_mean", f"{PAID}, a sequence", "The part of the KL penalty in it: -`kl/coef` x "
        "`kl/ref_seq`. Only where the penalty is part of the reward.", "neither", REWARD),
    Metric("reward/paid_abs_max", PAID, "The largest amount that a token is paid, in either direction and before the "
        "KL penalty.", "neither", REWARD),
    Metric("reward/spread_mean", SCORE, "Disagreement of an ensemble: standard deviation over its parts, mean over "
        "rollouts.", "down", REWARD),
    Metric("reward/spread_max", SCORE, "The same of the rollout on which the parts disagree most.", "down", REWARD),
    Metric("score/<scorer>/<part>", SCORE, "A part of the score, as `score/proxy/format`, where the scorer says what its "
        "scores are made of; mean over the rollouts that have it.", "neither", REWARD),
    Metric("reward/versions", "versions", "How many versions of the scorer gave the scores of the update. Above 1 "
        "they are not on one scale.", "down", REWARD),

    Metric("kl/ref_seq", "nats a sequence", "KL of the policy from the reference before the update: log p - log p_ref "
        "(k1), summed over a sequence. With `environment.reward=separate` a turn is a sequence.", "down", DRIFT,
        "KL from reference"),
    Metric("kl/ref_token", "nats a token", "The same, mean over tokens.", "down", DRIFT),
    Metric("kl/ref_k3", "nats a token", "The same by k3, which is never negative.", "down", DRIFT),
    Metric("kl/coef", f"{PAID} a nat", "Coefficient of the KL penalty in this update.", "neither", DRIFT,
        "KL coefficient"),
    Metric("kl/mismatch_k3", "nats a token", "Sampler against learner at the same weights, by k3: tokens of staleness "
        "0 alone. Rounding in bfloat16 gives about 0.002.", "down", DRIFT, "Sampler against learner"),
    Metric("kl/mismatch_logp_mean", "nats a token", "Mean absolute difference of the two log-probabilities of such a "
        "token.", "down", DRIFT),
    Metric("kl/mismatch_logp_max", "nats", "The largest one.", "down", DRIFT, "Largest single difference of log p"),

    Metric("policy/approx_kl", "nats a token", "KL of the policy from itself before the update (k3), mean over the "
        "optimizer steps, each before it is taken: about 0 at the first.", "neither", POLICY, "Change in one update"),
    Metric("policy/clipfrac", "share of tokens", "Tokens whose loss the clip decides, so that they give no "
        "gradient; of `ppo.objective=cispo` those whose weight it bounds. Mean over the steps. Not by likelihood.",
        "down", POLICY, "Clipped tokens"),
    Metric("policy/ratio_mean", "ratio", "Probability of a token now over that before the update; mean over the "
        "steps.", "neither", POLICY),
    Metric("policy/ratio_max", "ratio", "The largest such ratio of any token at any step.", "neither", POLICY,
        "Largest probability ratio"),
    Metric("policy/entropy", "nats a token", "Entropy of the distribution that a token is sampled from, before the "
        "update, at the sampling temperature.", "neither", POLICY, "Entropy"),
    Metric("policy/loss", "advantage a token", "The policy's loss without its KL term, weights of tokens included; "
        "mean over the steps. By likelihood in nats. It says little of progress.", "neither", POLICY,
        "Loss of the policy"),
    Metric("policy/kl_loss", "nats a token", "The KL term of the loss before its coefficient (k2 or k3); mean over "
        "the steps. Only where the penalty is part of the loss.", "down", POLICY),
    Metric("policy/entropy_bonus", "nats a token", "The entropy in the loss before its coefficient "
        "(`ppo.entropy_coef`): that of `policy/entropy`, of the tokens that train, before each step; mean over the steps.",
        "neither", POLICY),
    Metric("policy/ptx_loss", "nats a token", "The text loss beside it (`ppo.ptx_coef`), before its coefficient; mean "
        "over the steps.", "down", POLICY),
    Metric("policy/grad_norm", "L2 norm before clipping", "Gradient of the policy, all terms of the loss; mean over "
        "the steps.", "neither", POLICY, "Gradient norm of the policy"),
    Metric("policy/optimizer_steps", "steps", "Optimizer steps of the update: fewer than epochs x minibatches where "
        "`ppo.target_approx_kl` ended it.", "neither", POLICY),
    Metric("combined/lambda", "weight of the policy loss", "Lambda of the combined loss in this update "
        "(`ppo.combined`).", "neither", POLICY, "Lambda"),
    Metric("combined/score_mean", f"{PAID}, a rollout", "The mean that is to reach `ppo.combined.target`: what "
        "rollouts are paid, without the KL penalty.", "up", POLICY),

    Metric("value/explained_var", "share of the variance of returns", "1 - Var(R - V) / Var(R) before the update: 1 "
        "is perfect, 0 no better than the mean, below it worse.", "up", VALUE, "Explained variance"),
    Metric("value/loss", "squared returns a token", "Half the squared error of the values, the larger of clipped and "
        "unclipped; mean over the steps.", "down", VALUE, "Loss of the value model"),
    Metric("value/clipfrac", "share of tokens", "Tokens whose value loss the clip decides; mean over the steps.",
        "down", VALUE),
    Metric("value/grad_norm", "L2 norm before clipping", "Gradient of the value model; mean over the steps.",
        "neither", VALUE, "Gradient norm of the value model"),

    Metric("completion/len_mean", "tokens", "Mean length of the completions, observations left out.", "neither", TEXT,
        "Length"),
    Metric("completion/len_p95", "tokens", "Its 95th percentile.", "neither", TEXT),
    Metric("completion/eos_frac", "share of completions", "Completions that ended by themselves.", "up", TEXT,
        "Ends with EOS"),
    Metric("completion/truncated_frac", "share of completions", "The others: cut off at the token limit.", "down",
        TEXT, "Cut off"),
    Metric("completion/distinct_2", "share of bigrams", "Distinct pairs of tokens among all pairs of the update's "
        "completions: low where they resemble each other. Falls with the amount of text.", "up", TEXT,
        "Distinct bigrams"),
    Metric("completion/repeat_frac", "share of 4-grams", "4-grams that occurred in the same completion before; mean "
        "over completions.", "down", TEXT, "Repetition"),
    Metric("completion/turns_mean", "turns", "Turns of a conversation, mean. Only where an environment answers.",
        "neither", TEXT),
    Metric("completion/observation_frac", "share of tokens", "Tokens after the prompt that the environment wrote. "
        "Only where it answers.", "neither", TEXT),

    Metric("staleness/mean", "updates", "Staleness of the update's rollouts: updates between the oldest token of a "
        "rollout group and its training.", "down", ASYNC),
    Metric("staleness/max", "updates", "The largest one; never above `ppo.max_staleness`.", "down", ASYNC),
    Metric("staleness/share_<n>", "share of rollouts", "Rollouts of staleness n.", "neither", ASYNC),
    Metric("staleness/token_mean", "updates", "Mean staleness of the single tokens.", "down", ASYNC),
    Metric("off_policy/ess", "share of tokens", "Effective sample size of the importance weights: 1 where all tokens "
        "count alike.", "up", ASYNC, "Effective sample size"),
    Metric("off_policy/weight_mean", "ratio", "Mean importance weight, after its bounds.", "neither", ASYNC),
    Metric("off_policy/weight_max", "ratio", "The largest one.", "neither", ASYNC),
    Metric("off_policy/truncated_frac", "share of tokens", "Tokens whose weight the cap changed "
        "(`ppo.off_policy.correction=truncated`).", "down", ASYNC),
    Metric("off_policy/masked_frac", "share of tokens", "Tokens left out, as their weight is outside the bounds "
        "(`ppo.off_policy.correction=masked`).", "down", ASYNC),
    Metric("ledger/admitted", "rollouts so far", "Taken from the stream of prompts.", "neither", ASYNC),
    Metric("ledger/leased", "leases so far", "Handed to an actor: again after a loss, twice where hedged.", "neither",
        ASYNC),
    Metric("ledger/hedged", "leases so far", "Handed to a second actor, as the first took too long.", "down", ASYNC),
    Metric("ledger/released", "leases so far", "Sampled again after an actor was lost.", "down", ASYNC),
    Metric("ledger/fenced", "replies so far", "Refused: after another reply, or from an actor that had been given up.",
        "down", ASYNC),
    Metric("ledger/scored", "rollouts so far", "Sampled, and answered by the reward service.", "neither", ASYNC),
    Metric("ledger/trained", "rollouts so far", "Went into exactly one update.", "up", ASYNC),
    Metric("ledger/filtered", "rollouts so far", "Of groups of equal scores, which made room for others "
        "(`ppo.dynamic_sampling`).", "neither", ASYNC),
    Metric("ledger/open", "rollouts", "Neither trained nor set aside at the end of the update.", "neither", ASYNC),
    Metric("ledger/in_flight", "rollouts", "At an actor at the end of the update; hedged ones count twice.", "neither",
        ASYNC),
    Metric("ledger/waiting", "rollouts", "Scored, and in no update yet.", "neither", ASYNC),

    Metric("progress/version", "updates", "Version of the policy after the update.", "neither", TIME),
    Metric("progress/eta_s", SECONDS, "Time left: the updates that are, at the median of the last eight.", "down",
        TIME, "Time left"),
    Metric("perf/step_s", SECONDS, "The whole update: the wait for its rollouts, training, weight transfer.", "down",
        TIME),
    Metric("perf/rollout_s", SECONDS, "Wait of the learner for the rollouts of the update.", "down", TIME),
    Metric("perf/generate_s", SECONDS, "Time of the busiest actor with completions to sample, since the update "
        "before.", "neither", TIME),
    Metric("perf/score_s", SECONDS, "The longest time that an actor spent on answers of the reward service, since the "
        "update before.", "down", TIME),
    Metric("perf/gen_tokens_per_s", "tokens/s", "Tokens that all actors sampled, over `perf/generate_s`.", "up", TIME),
    Metric("perf/train_s", SECONDS, "The learner's part: all passes and optimizer steps, until the last rank is done.",
        "down", TIME),
    Metric("perf/train_tokens_per_s", "tokens/s", "Tokens of prompts and completions that trained, over "
        "`perf/train_s`; in the stages that train on data alone, of the texts of a step.", "up", TIME),
    Metric("perf/reference_s", SECONDS, "On rank 0, of `perf/train_s`: forward passes of the reference.", "down",
        TIME),
    Metric("perf/policy_forward_s", SECONDS, "Forward passes of the policy.", "down", TIME),
    Metric("perf/policy_backward_s", SECONDS, "Its loss and backward passes.", "down", TIME),
    Metric("perf/value_forward_s", SECONDS, "Forward passes of the value model.", "down", TIME),
    Metric("perf/value_backward_s", SECONDS, "Its loss and backward passes.", "down", TIME),
    Metric("perf/ptx_s", SECONDS, "The text loss, both passes.", "down", TIME),
    Metric("perf/optimizer_s", SECONDS, "Optimizer steps, a wait for the writer of a commit included.", "down", TIME),
    Metric("perf/drain_s", SECONDS, "Wait for the actors to finish what they hold (`ppo.weight_update=drain`).",
        "down", TIME),
    Metric("perf/sync_s", SECONDS, "Transfer of the new weights to all actors, as the driver sees it.", "down", TIME),
    Metric("perf/sync_pack_s", SECONDS, "Of it: the sender packs the weights.", "down", TIME),
    Metric("perf/sync_fetch_s", SECONDS, "Of it: the slowest actor gets and checks them, while it generates.", "down",
        TIME),
    Metric("perf/sync_pause_s", SECONDS, "Of it: the longest time that an actor generated nothing.", "down", TIME),
    Metric("perf/commit_s", SECONDS, "How long the loop stood still for commits, since the line before.", "down",
        TIME),

    Metric("fault/actors_lost", "actors so far", "Actors lost and replaced.", "down", FAULTS),
    Metric("fault/actors_silent", "actors so far", "Those among them that were there and did nothing.", "down",
        FAULTS),
    Metric("fault/actors_without_update", "actors", "Actors that new weights did not reach.", "down", FAULTS),
    Metric("fault/rollouts_hedged", "rollouts so far", "Rollouts given to a second actor: as `ledger/hedged`.", "down",
        FAULTS),
    Metric("fault/unscored", "rollouts", "Rollouts without a score.", "down", FAULTS),
    Metric("fault/no_sibling", "rollouts", "Rollouts without a scored sibling.", "down", FAULTS),
    Metric("ledger/quarantined", "rollouts so far", "Set aside with its reason: no sibling, no score.", "down", FAULTS,
        "Quarantined"),
    Metric("fault/learner_restarts", "restarts so far", "Restarts of the learner.", "down", FAULTS),
    Metric("fault/commits_failed", "commits so far", "Commits that failed.", "down", FAULTS),
    Metric("fault/<tracker>", "faults so far", "Faults of a tracker, as `fault/wandb`: its copy of the run has gaps.",
        "down", FAULTS),

    Metric("sft/loss", "nats a token", "Loss of a batch, on the tokens that train; in stage filtered_sft too.", "down",
        OFFLINE, "Training loss"),
    Metric("sft/eval_loss", "nats a token", "The same on held-out texts, before the first and after the last step.",
        "down", OFFLINE, "Held-out loss"),
    Metric("sft/grad_norm", "L2 norm before clipping", "Gradient of the step.", "neither", OFFLINE),
    Metric("reward_model/loss", "nats a pair", "Cross-entropy of the preferences, mean over the pairs of a batch.",
        "down", OFFLINE, "Pair loss"),
    Metric("reward_model/accuracy", "share of pairs", "Pairs of the batch, ties left out, whose preferred text scores "
        "higher; 0 where there is none.", "up", OFFLINE, "Pairs right"),
    Metric("reward_model/score_std", "score before its normaliser", "Standard deviation of the batch's scores.",
        "neither", OFFLINE),
    Metric("reward_model/grad_norm", "L2 norm before clipping", "Gradient of the step.", "neither", OFFLINE),
    Metric("preference/loss", "nats a pair", "Loss of the batch: cross-entropy of the preferences, and the likelihood "
        "term of `preference.nll_coef`.", "down", OFFLINE, "Preference loss"),
    Metric("preference/accuracy", "share of pairs", "Pairs of the batch, ties left out, whose preferred text has the "
        "higher implied score; equal ones count half.", "up", OFFLINE, "Preferred pairs"),
    Metric("preference/margin", "nats x beta", "Implied score of the preferred text less the other's: log p - log "
        "p_ref (dpo), or log p a token (rank).", "up", OFFLINE),
    Metric("preference/token_logprob", "nats a token", "log p of the texts of the batch, preferred or not.", "neither",
        OFFLINE, "Likelihood of the texts"),
    Metric("preference/grad_norm", "L2 norm before clipping", "Gradient of the step.", "neither", OFFLINE),

    Metric("evaluate/gold_gain", SCORE, "Mean score by the gold judge less that of SFT on the same prompts.", "up",
        EVALUATION),
    Metric("evaluate/proxy_gain", SCORE, "The same by the proxy, the scorer that training uses.", "up", EVALUATION),
    Metric("evaluate/win_rate", "share of prompts", "Prompts on which its completion scores higher than SFT's by the "
        "gold judge, or by the proxy where there is none; a tie counts half.", "up", EVALUATION),
    Metric("evaluate/kl", "nats a sequence", "KL from SFT on its own completions: mean of log p - log p_SFT; of "
        "best-of-n its bound.", "down", EVALUATION),
    Metric("evaluate/length_ratio", "ratio", "Its mean length over that of SFT.", "neither", EVALUATION),
    Metric("evaluate/objective", SCORE, "What a sweep maximises: the gold gain, less 0.1 for each nat beyond "
        "`evaluate.max_kl`.", "up", EVALUATION),
)  # fmt: skip


def declared(name: str, metrics: Mapping[str, Metric]) -> Metric | None:
    """The declaration of a metric, by its name or by a name of which a part varies."""
    if name in metrics:
        return metrics[name]
    families = (metric for metric in metrics.values() if "<" in metric.name)
    return next((metric for metric in families if re.fullmatch(re.sub("<.*?>", "[^/]+", metric.name), name)), None)
