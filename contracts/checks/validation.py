"""The checks of a configuration before any process starts: every conflict at once, with rule, value and remedy.

What one key may hold is declared on it and checked by `contracts.checks.check`; here are the relations between keys, one
short list a section. `validate` reads the configuration only, `check_machine` compares it with the machine. Keys that the
schema does not have: `contracts.checks.overrides`.
"""

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from contracts.checks.check import Check, key_checks, shown
from contracts.checks.cluster_checks import cluster_checks, placement_conflicts, stated_nodes
from contracts.checks.deepspeed_checks import deepspeed_checks
from contracts.checks.estimator_checks import estimator_checks
from contracts.checks.lora_checks import lora_checks
from contracts.checks.mixture_checks import mixture_checks
from contracts.checks.rollout_checks import rollout_checks
from contracts.checks.scorer_checks import http_checks, scorer_checks
from contracts.checks.tracker_checks import tracker_conflicts
from contracts.checks.unused_checks import unused_checks
from contracts.config import EvaluateConfig, SamplingConfig, TandemConfig
from contracts.environments import SHIPPED, is_import_path
from contracts.estimators import known_estimator
from contracts.methods import SOURCES, reads, sources_read
from contracts.placement import Resources
from contracts.plugins import closest, names
from contracts.preference_losses import PREFERENCE_LOSSES
from contracts.scorer_roles import scored_by_a_model


class ConfigError(ValueError):
    """The configuration contradicts itself, the schema or the machine. `conflicts` has one text for each."""

    def __init__(self, message: str, conflicts: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.conflicts = list(conflicts) or [message]


def _value(config: Any, key: str) -> Any:
    """The value at a dotted key; None below a section that is null (`data.gold`)."""
    return reduce(lambda section, name: None if section is None else getattr(section, name), key.split("."), config)


def _path_checks(config: TandemConfig) -> list[Check]:
    """Keys that the stage reads and that are still open; directories that are files."""
    source, directory, read = "a file, a directory or a hub id", "a directory", sources_read(config)
    mixed = config.data.prompt_sources if "prompts" in read else {}
    required = [
        (True, "run_dir", config.run_dir, directory),
        (True, "cache_dir", config.cache_dir, directory),
        (True, "model.path", config.model.path, "a checkpoint directory or a hub id"),
        *(
            (name in read, f"data.{name}.path", _value(config, f"data.{name}.path"), source)
            for name in SOURCES
            if name != "prompts" or not config.data.prompt_sources
        ),
        *((True, f"data.prompt_sources.{name}.path", one.path, source) for name, one in mixed.items()),
    ]
    checks = [
        Check(value not in (MISSING, None, ""), key, f"set for stage {config.stage}", value, instead)
        for needed, key, value, instead in required
        if needed
    ]
    for key, value in (("run_dir", config.run_dir), ("cache_dir", config.cache_dir)):
        checks.append(Check(not Path(value or "").is_file(), key, directory, f"the file {value}", "another path"))
    return checks


def _sampling_checks(config: TandemConfig, key: str, sampling: SamplingConfig) -> list[Check]:
    """Completion lengths, and what must hold the longest sequence."""
    longest = config.data.max_prompt_tokens + sampling.max_completion_tokens
    tokens = f"{config.data.max_prompt_tokens} + {sampling.max_completion_tokens} = {longest}"
    length = f"data.max_prompt_tokens + {key}.max_completion_tokens"
    return [
        Check(
            sampling.min_completion_tokens < sampling.max_completion_tokens,
            f"{key}.min_completion_tokens",
            f"below {key}.max_completion_tokens ({sampling.max_completion_tokens})",
            sampling.min_completion_tokens,
            f"{max(0, sampling.max_completion_tokens - 1)} or less",
        ),
        Check(
            longest <= config.engine.max_model_len,
            length,
            f"at most engine.max_model_len ({config.engine.max_model_len})",
            tokens,
            f"engine.max_model_len={longest} or shorter lengths",
        ),
        Check(
            longest < config.reward_service.max_tokens or not scored_by_a_model(config),
            length,
            f"below reward_service.max_tokens ({config.reward_service.max_tokens}), as scoring appends an EOS",
            tokens,
            f"reward_service.max_tokens={longest + 1} or shorter lengths",
        ),
    ]


def _method_checks(config: TandemConfig) -> list[Check]:
    """`method` and `preference.loss` name the loss together."""
    method, loss = config.method, config.preference.loss
    return [
        Check(
            method not in names(PREFERENCE_LOSSES) or loss in (None, method),
            "preference.loss",
            f"null or {method} with method {method}",
            loss,
            f"preference.loss=null, or method={loss}",
        ),
    ]


def _environment_checks(config: TandemConfig) -> list[Check]:
    environment, ppo = config.environment, config.ppo
    trains = reads(config, "ppo")
    estimator, apart = known_estimator(ppo.estimator), environment.reward == "separate" and trains
    samplings = ([ppo.sampling] if trains else []) + ([config.evaluate.sampling] if reads(config, "evaluate") else [])
    longest = min(sampling.max_completion_tokens for sampling in samplings)
    longest = min(longest, environment.max_turn_tokens or longest)
    return [
        Check(
            not (apart and estimator is not None and estimator.needs_groups),
            "environment.reward",
            f"cumulative or per_turn with ppo.estimator {ppo.estimator}, which compares whole conversations",
            environment.reward,
            "environment.reward=cumulative or ppo.estimator=reinforce_plus_plus",
        ),
        Check(
            not (apart and ppo.sampling.min_completion_tokens > 0),
            "ppo.sampling.min_completion_tokens",
            "0 with environment.reward separate: it counts from the start of a conversation",
            ppo.sampling.min_completion_tokens,
            "environment.min_turn_tokens, which counts from the start of every turn",
        ),
        Check(
            environment.min_turn_tokens < longest,
            "environment.min_turn_tokens",
            f"below the longest turn ({longest})",
            environment.min_turn_tokens,
            f"{max(0, longest - 1)} or less",
        ),
        Check(
            environment.name in SHIPPED or is_import_path(environment.name),
            "environment.name",
            f"one of {', '.join(SHIPPED)}, or the import path package.module:Class of your own",
            environment.name,
            closest(environment.name, SHIPPED) or "for example my_package.games:Guess",
        ),
        Check(
            environment.name != "single_turn" or not environment.options,
            "environment.options",
            "empty with environment.name single_turn, which has none",
            ", ".join(environment.options),  # by name: a value may be a secret
            "environment.name as well, for example environment.name=two_turn",
        ),
        Check(
            environment.name != "two_turn" or bool(environment.options.get("chat", False)) == config.data.chat,
            "environment.options.chat",
            f"data.chat ({config.data.chat}) with environment.name two_turn: both speak in the chat template or neither",
            environment.options.get("chat", False),
            f"environment.options.chat={config.data.chat}",
        ),
    ]


def _evaluate_checks(config: TandemConfig) -> list[Check]:
    evaluate = config.evaluate
    most, unused = max(evaluate.pass_at, default=1), EvaluateConfig()
    return [
        Check(
            evaluate.success is None or most <= evaluate.samples,
            "evaluate.samples",
            f"at least the largest number of evaluate.pass_at ({most})",
            evaluate.samples,
            f"evaluate.samples={most} or more, or smaller numbers",
        ),
        *(
            Check(
                evaluate.success is not None or getattr(evaluate, name) == getattr(unused, name),
                f"evaluate.{name}",
                f"{shown(getattr(unused, name))} where evaluate.success is null: no answer is right or wrong",
                getattr(evaluate, name),
                "evaluate.success as well, for example 1.0 with a verifier",
            )
            for name in ("samples", "pass_at", "by")
        ),
    ]


def _learner_checks(config: TandemConfig) -> list[Check]:
    learner, engine, cluster = config.learner, config.engine, config.cluster
    ranks = cluster.num_learner_ranks
    batches = [("sft.batch_size", config.sft.batch_size), ("reward_model.batch_size", config.reward_model.batch_size)]
    batches.append(("preference.batch_size", config.preference.batch_size))
    batches += [("ppo.ptx_batch_size", config.ppo.ptx_batch_size)] if config.ppo.ptx_coef > 0 else []
    samples = reads(config, "ppo")
    longest = config.data.max_prompt_tokens + config.ppo.sampling.max_completion_tokens
    on_cpu = cluster.gpus_per_learner_rank == 0
    return [
        *(
            Check(size >= ranks, key, f"at least cluster.num_learner_ranks ({ranks})", size, f"{ranks} or more")
            for key, size in batches
        ),
        Check(
            not samples or longest <= learner.microbatch_tokens,
            "learner.microbatch_tokens",
            f"at least data.max_prompt_tokens + ppo.sampling.max_completion_tokens ({longest}): one sequence must fit",
            learner.microbatch_tokens,
            f"{longest} or more",
        ),
        Check(
            not (learner.zero_stage == 3 and learner.held_tokens > 0),
            "learner.held_tokens",
            "0 with learner.zero_stage 3, which releases gathered parameters between the passes",
            learner.held_tokens,
            "learner.held_tokens=0 or learner.zero_stage=2",
        ),
        Check(
            config.model.dtype != "float16",
            "model.dtype",
            "bfloat16 or float32: the learner has no loss scaling, without which small float16 gradients vanish",
            config.model.dtype,
            "bfloat16",
        ),
        Check(
            learner.attention != ("flash_attention_2" if on_cpu else "short_causal"),
            "learner.attention",
            f"one for {'CPUs' if on_cpu else 'GPUs'} (cluster.gpus_per_learner_rank {cluster.gpus_per_learner_rank:g})",
            learner.attention,
            "auto",
        ),
        Check(
            engine.tensor_parallel_size <= 1 or cluster.gpus_per_actor >= engine.tensor_parallel_size,
            "engine.tensor_parallel_size",
            f"1, or at most cluster.gpus_per_actor ({cluster.gpus_per_actor})",
            engine.tensor_parallel_size,
            f"1, or cluster.gpus_per_actor={engine.tensor_parallel_size}",
        ),
    ]


def raise_conflicts(checks: list[Check], more: Sequence[str] = ()) -> None:
    conflicts = [check.message for check in checks if not check.holds] + list(more)
    if conflicts:
        count = "1 conflict" if len(conflicts) == 1 else f"{len(conflicts)} conflicts"
        raise ConfigError("\n  - ".join([f"{count} in the configuration:", *conflicts]), conflicts)


def _stage_checks(config: TandemConfig) -> list[Check]:
    """Relations that matter to some of the stages alone."""
    checks: list[Check] = []
    if "prompts" in sources_read(config):
        checks += mixture_checks(config.data)
    if reads(config, "ppo"):
        checks += _sampling_checks(config, "ppo.sampling", config.ppo.sampling)
        checks += [*rollout_checks(config), *estimator_checks(config.ppo)]
    if reads(config, "evaluate"):
        checks += _sampling_checks(config, "evaluate.sampling", config.evaluate.sampling)
        checks += _evaluate_checks(config)
    if reads(config, "environment"):
        checks += _environment_checks(config)
    checks += unused_checks(config)
    return checks + (service_checks(config) if reads(config, "reward_service") else [])


def validate(config: TandemConfig) -> None:
    """Check the values of a configuration that its stage reads, alone and against each other.

    Args:
        config: a `TandemConfig` object; paths that the stage does not read may still be `MISSING`.

    Raises:
        ConfigError: lists every conflict, one a line: the rule, the value found and what to write instead.
    """
    single = [*key_checks(config), *_method_checks(config), *_learner_checks(config)]
    single += [*deepspeed_checks(config), *lora_checks(config)]
    raise_conflicts(
        [
            *_path_checks(config),
            *(check for check in single if reads(config, check.key)),
            *_stage_checks(config),
            *cluster_checks(config),
        ],
        [*placement_conflicts(config, stated_nodes(config)), *tracker_conflicts(config.logger)],
    )


def service_checks(config: TandemConfig) -> list[Check]:
    """Of the scorers and the HTTP side."""
    service = config.reward_service
    return [*scorer_checks(service), *http_checks(service.http)]


def validate_service(config: TandemConfig, serves: bool = True) -> None:
    """As `validate`, of what the reward service reads when it runs alone.

    Args:
        serves: false where its scorers are asked without it.

    Raises:
        ConfigError: lists every conflict.
    """
    service = config.reward_service
    alone = [
        Check(
            bool(config.proxy_model or config.gold_model or service.scorers),
            "reward_service.scorers",
            "set where neither proxy_model nor gold_model is",
            service.scorers,
            "for example proxy_model=CHECKPOINT",
        ),
        Check(
            service.http.port is not None or not serves,
            "reward_service.http.port",
            "set where the service runs alone",
            service.http.port,
            "reward_service=http or reward_service.http.port=8000",
        ),
    ]
    keys = [check for check in key_checks(config) if check.key.startswith(("reward_service.", "cluster."))]
    raise_conflicts([*alone, *keys, *service_checks(config)])


def check_machine(
    config: TandemConfig, free_memory_gib: float, cpu_count: int, nodes: list[Resources] | None = None
) -> list[str]:
    """Compare a configuration with the machine it is to start on.

    Threads are compared for each kind of process on its own, as one phase runs at a time, and only on an embedded
    cluster: a cluster that we join spreads the processes over machines we do not see here. One process has no more threads
    there than cores in any case.

    Args:
        nodes: what an embedded cluster will have; None where we join one.

    Returns:
        Warnings, each beginning with "warning: ".

    Raises:
        ConfigError: free memory is below `cluster.min_memory_gib`, or the nodes cannot hold the processes.
    """
    cluster = config.cluster
    memory = Check(
        free_memory_gib >= cluster.min_memory_gib,
        "free memory",
        f"at least cluster.min_memory_gib ({cluster.min_memory_gib:.1f} GiB)",
        f"{free_memory_gib:.1f} GiB",
        "a smaller cluster.min_memory_gib if the model is small, or end other programs",
    )
    raise_conflicts([memory], placement_conflicts(config, nodes))
    pairs = [
        ("cluster.num_actors", "cluster.threads_per_actor"),
        ("cluster.num_learner_ranks", "cluster.threads_per_learner_rank"),
        ("reward_service.replicas", "cluster.threads_per_reward_replica"),
    ]
    phases = [(*pair, *(_value(config, key) for key in pair)) for pair in pairs]
    return [
        f"warning: {count_key} * {threads_key} = {count} * {threads} threads share {cpu_count} cores; write "
        f"{threads_key}={max(1, cpu_count // count)}"
        for count_key, threads_key, count, threads in phases
        if cluster.address == "local" and count * min(threads, cpu_count) > cpu_count
    ]
