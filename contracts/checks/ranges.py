"""What single keys of the configuration may hold: ranges of numbers and choices among names."""

from collections.abc import Callable, Iterable
from datetime import date
from typing import Any, NamedTuple

from contracts.estimators import AGGREGATIONS, KL_PLACES
from contracts.methods import SOURCES
from contracts.plugins import names
from contracts.preference_losses import PREFERENCE_LOSSES
from contracts.stages import method_titles, stage_names


def _under(parents: Iterable[str], *names: str) -> tuple[str, ...]:
    return tuple(f"{parent}.{name}" for parent in parents for name in names)


def _is_day(value: str) -> bool:
    try:
        date.fromisoformat(value)
    except ValueError:
        return False
    return True


OPTIMIZERS = (*_under(("sft", "reward_model", "preference", "ppo"), "optimizer"), "ppo.value_optimizer")
SAMPLINGS = ("ppo.sampling", "evaluate.sampling")


class Range(NamedTuple):
    """One rule on the values of several keys."""

    rule: str
    holds: Callable[[Any], bool]
    keys: tuple[str, ...]


RANGES = [
    Range(
        "at least 1",
        lambda value: value >= 1,
        (
            "data.max_prompt_tokens",
            *_under(("sft", "reward_model", "preference"), "epochs", "batch_size", "max_tokens"),
            *_under(("reward_model", "preference"), "eval_pairs"),
            *_under(
                ["ppo"], "updates", "rollouts_per_update", "samples_per_prompt", "epochs", "minibatches", "score_batch"
            ),
            *_under(["ppo"], "ptx_batch_size", "kl.horizon"),
            "ppo.off_policy.cap",
            *_under(SAMPLINGS, "max_completion_tokens"),
            "evaluate.bootstrap_samples",
            *_under(["engine"], "max_num_seqs", "max_model_len", "tensor_parallel_size"),
            "learner.microbatch_tokens",
            "checkpoint.max_failures",
            *_under(["reward_service"], "replicas", "batch_tokens", "max_tokens", "max_queued_items", "http.max_items"),
            *_under(["cluster"], "num_actors", "num_learner_ranks"),
            "logger.table_every",
            *_under(["cluster"], "threads_per_actor", "threads_per_learner_rank", "threads_per_reward_replica"),
        ),
    ),
    Range("at least 2, as the newest commit may turn out bad", lambda value: value >= 2, ("checkpoint.keep",)),
    Range("at least 2, as the best of one is SFT", lambda value: value >= 2, ("evaluate.best_of_n",)),
    Range("at least 2, as one prompt has no confidence interval", lambda value: value >= 2, ("evaluate.prompts",)),
    Range(
        "0 or more",
        lambda value: value >= 0,
        (
            *_under(OPTIMIZERS, "weight_decay", "warmup_steps"),
            *_under(["ppo"], "kl.coef", "ptx_coef", "missing_eos_penalty", "value_warmup_updates", "gold_rollouts"),
            "ppo.max_staleness",
            "ppo.combined.initial",
            "checkpoint.every",
            *_under(["cluster"], "max_actor_restarts", "max_learner_restarts"),
            *_under(SAMPLINGS, "min_completion_tokens"),
            "environment.min_turn_tokens",
            "learner.held_tokens",
            "reward_service.cache_items",
            *_under(["cluster"], "gpus_per_actor", "gpus_per_learner_rank", "gpus_per_reward_replica"),
            *_under(["cluster"], "cpus_per_process", "min_memory_gib"),
            "logger.samples_per_update",
            "seed",
            "evaluate.seed",
        ),
    ),
    Range(
        "above 0",
        lambda value: value > 0,
        (
            *_under(OPTIMIZERS, "learning_rate", "eps", "max_grad_norm"),
            *_under(SAMPLINGS, "temperature"),
            "ppo.kl.target",
            *_under(["ppo"], "rwr.temperature", "dpo_beta", "combined.learning_rate", "combined.max"),
            *_under(["evaluate"], "max_length_change", "max_kl"),
            "engine.kv_cache_gib",
            "checkpoint.grace_s",
            *_under(["reward_service"], "deadline_s", "golden_tolerance", "http.max_body_mib", "http.max_pending_mib"),
            *_under(["cluster"], "object_store_gib", "start_timeout_s", "step_timeout_s", "publish_timeout_s"),
            *_under(["cluster"], "actor_silence_s", "learner_silence_s", "hedge_after_s"),
            "logger.heartbeat_s",
        ),
    ),
    Range(
        "null or above 0",
        lambda value: value is None or value > 0,
        (
            *_under(OPTIMIZERS, "head_learning_rate"),
            *_under(["ppo"], "value_clip", "target_approx_kl"),
            "preference.beta",
            "cluster.cpus_per_node",
        ),
    ),
    Range(
        "null or 0 or more",
        lambda value: value is None or value >= 0,
        ("cluster.gpus_per_node", "preference.nll_coef", "ppo.seed"),
    ),
    Range(
        "null or at least 1",
        lambda value: value is None or value >= 1,
        (
            "data.prompt_words",
            *_under([f"data.{name}" for name in SOURCES], "max_rows"),
            *_under(("sft", "preference", "ppo"), "trainable_layers"),
            "cluster.num_nodes",
            "environment.max_turn_tokens",
        ),
    ),
    Range(
        "null or 0 (the head alone) or more",
        lambda value: value is None or value >= 0,
        ("reward_model.trainable_layers", "ppo.value_trainable_layers"),
    ),
    Range(
        "in [0, 1]",
        lambda value: 0 <= value <= 1,
        ("ppo.gamma", "ppo.lam", "data.max_bad_rows", "ppo.max_failed_scores", "evaluate.min_eos_share"),
    ),
    Range("in [0, 1), as tokens with w = 1 must train", lambda value: 0 <= value < 1, ("ppo.off_policy.low",)),
    Range("above 1, as tokens with w = 1 must train", lambda value: value > 1, ("ppo.off_policy.high",)),
    Range("in (0, 1)", lambda value: 0 < value < 1, ("ppo.clip",)),
    Range(
        "in (0, 1]",
        lambda value: 0 < value <= 1,
        ("sft.top_fraction", "evaluate.sampling.top_p", "engine.gpu_memory_utilization"),
    ),
    Range("null or above 1", lambda value: value is None or value > 1, ("ppo.dual_clip",)),
    Range(
        "1, as the log-probabilities of a truncated, renormalised distribution bias the policy ratio",
        lambda value: value == 1,
        ("ppo.sampling.top_p",),
    ),
    Range("a day as 2026-01-31", _is_day, ("model.template_date",)),
    Range(
        "two numbers in [0, 1)",
        lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
        _under(OPTIMIZERS, "betas"),
    ),
]

DTYPES = ("auto", "bfloat16", "float16", "float32")
# Of a function: what it returns where a configuration is checked, and import paths of what it names.
CHOICES: dict[str, tuple[Any, ...] | Callable[[], tuple[Any, ...]]] = {
    "stage": lambda: ("pipeline", *stage_names()),
    "method": lambda: tuple(method_titles()),
    "preference.loss": (None, *names(PREFERENCE_LOSSES)),
    "model.dtype": DTYPES,
    "reward_service.dtype": DTYPES,
    "ppo.aggregation": (None, *AGGREGATIONS),
    "ppo.weight_update": ("in_flight", "drain"),
    "ppo.off_policy.correction": (None, "none", "truncated", "masked"),
    "ppo.kl.controller": ("fixed", "adaptive"),
    "ppo.kl.place": (None, *KL_PLACES),
    "checkpoint.resume": ("auto", "never"),
    "reuse_stages": ("auto", True, False),
    "ppo.init_from": ("sft", "base"),
    "ppo.init_value_from": (None, "reward_model", "policy"),
    "cluster.layout": ("disaggregated", "colocated"),
    "environment.reward": ("cumulative", "per_turn", "separate"),
    "learner.zero_stage": (0, 1, 2, 3),
    "learner.attention": ("auto", "sdpa", "eager", "short_causal", "flash_attention_2"),
    "learner.weight_transfer": ("auto", "shared_memory", "ray_object", "nccl", "ipc"),
    "logger.wandb": ("auto", "offline", "online", "disabled"),
    **dict.fromkeys(_under(OPTIMIZERS, "schedule"), ("constant", "linear")),
    **dict.fromkeys(
        [f"data.{source}.format" for source in SOURCES],
        ("auto", "text", "prompt", "prompt_completion", "messages", "pair", "rated"),
    ),
}
