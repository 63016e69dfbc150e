"""The loop, PPO and its relatives: `controller.loop.controller` on the learner, the actors and the reward service."""

from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from contracts.config import CurriculumConfig, RewardServiceConfig, TandemConfig
from contracts.environments import is_import_path
from contracts.estimators import ESTIMATORS, chosen_estimator, warmup_updates
from contracts.lora_roles import role_model
from contracts.methods import method_config, method_title, sources_read
from contracts.objectives import OBJECTIVES
from contracts.placement import actor_bounds, is_elastic
from contracts.plugins import BY_PATH, Kind
from contracts.scorer_roles import ROLES, SCORER_KINDS, chosen_scorers, judges, scoring_models, starts_value_model
from contracts.stages import Reading, Stage
from contracts.transports import TRANSPORTS, weight_backend
from controller.data.prompts import curriculum_problems
from controller.stages.evaluate import PROMPTS as HELD_OUT
from controller.stages.evaluate import column_problems
from controller.stages.sft import TEXTS

if TYPE_CHECKING:
    from controller.commits.commit_store import Commit
    from controller.data.inputs import Inputs
    from controller.pipeline.context import StageContext

PROMPTS = Reading("prompts", "prompts", "load_prompts", ("ppo.sampling.max_completion_tokens", "engine.max_model_len"))


def reads(config: TandemConfig, role: str) -> list[Reading]:
    held_out = [HELD_OUT] if config.evaluate.every is not None else []
    return [*([TEXTS] if config.ppo.ptx_coef > 0 else []), PROMPTS, *held_out]


def mixture_weights(config: TandemConfig) -> dict[str, float]:
    """Of each source of the prompts; empty where every prompt counts the same."""
    return {name: source.weight for name, source in config.data.prompt_sources.items() if source.weight is not None}


def problems(config: TandemConfig, data: "Inputs") -> list[str]:
    ppo, count = config.ppo, len(data["sft"])
    found = column_problems(config, data) if config.evaluate.every is not None else []
    found += curriculum_problems(data["prompts"], config.data.curriculum)
    if ppo.ptx_coef <= 0 or count >= ppo.ptx_batch_size:
        return found
    return [
        *found,
        f"ppo.ptx_batch_size must be at most the number of usable examples in data.sft ({count}); found "
        f"{ppo.ptx_batch_size}; write ppo.ptx_batch_size={count} or less, or give more examples",
    ]


def plugins(config: TandemConfig) -> list[tuple[Kind, str]]:
    from reward_service.scorer_kind import scorer_kind

    ppo, environment = config.ppo, config.environment.name
    found = [(ESTIMATORS, ppo.estimator), (OBJECTIVES, ppo.objective), (TRANSPORTS, weight_backend(config))]
    found += [(BY_PATH, environment)] if is_import_path(environment) else []
    for entry in chosen_scorers(config.reward_service.scorers, dict.fromkeys(ROLES)).values():
        found += [(SCORER_KINDS, entry.kind), *scorer_kind(entry.kind).named_code(entry)]
    return found


def scored_roles(config: TandemConfig) -> tuple[str, ...]:
    """The roles that PPO asks for scores."""
    return judges(config) if config.ppo.gold_rollouts else ROLES[:1]


def inputs(context: "StageContext") -> dict[str, Any]:
    from controller.pipeline.ingredients import unseen

    checkpoints = {
        key: context.fingerprint(context.checkpoint(result)) if result else None
        for key, result in _starts_from(context.config).items()
    }
    return {**_settings(context), **checkpoints, **unseen(context.config)}


def _starts_from(config: TandemConfig) -> dict[str, str | None]:
    """The results of earlier stages that PPO has anything of, by what they are among its inputs."""

    def reward_model(role: str) -> str | None:
        is_value = role == "proxy" and starts_value_model(config)
        scores = role in scored_roles(config) and role in scoring_models(config)
        return f"reward_model/{role}" if is_value or scores else None

    return {"policy": config.ppo.init_from, **{role: reward_model(role) for role in ROLES}}


def _settings(context: "StageContext") -> dict[str, Any]:
    """The inputs that no earlier stage makes, and that a commit has too."""
    from controller.pipeline.ingredients import environment_hidden, own_source
    from controller.record.redaction import redacted

    config = context.config
    # Only where there is one: a new key would set the commits of before aside.
    source, batch_tokens = own_source("ppo.estimator", config.ppo.estimator), config.reward_service.batch_tokens
    own: dict[str, Any] = {"estimator_source": source} if source else {}
    own |= {"environment_hidden": hidden} if (hidden := environment_hidden(config)) else {}
    # What a text is scored beside decides the last bits of its score.
    own |= {"batch_tokens": batch_tokens} if batch_tokens != RewardServiceConfig().batch_tokens else {}
    own |= {"weights": weights} if (weights := mixture_weights(config)) else {}
    own |= _value_adapters(config)
    own |= {"curriculum": config.data.curriculum} if config.data.curriculum != CurriculumConfig() else {}
    return context.common_inputs() | {
        "ppo": config.ppo,
        **own,
        "environment": redacted(asdict(config.environment)),
        "environment_source": own_source("environment.name", config.environment.name),
        "engine": config.engine,
        # Log-probabilities depend in their last bits on what is sampled beside them.
        "actors": "elastic" if is_elastic(config.cluster) else config.cluster.num_actors,
        "prompts": context.data_fingerprint("prompts"),
        "ptx": context.data_fingerprint("sft") if config.ppo.ptx_coef else None,
        "scorers": redacted({n: asdict(s) for n, s in config.reward_service.scorers.items()}),
    }


def _value_adapters(config: TandemConfig) -> dict[str, Any]:
    """Of the value model, where they are others than the policy's."""
    policy, value = (role_model(config.model, role).lora for role in ("policy", "value_model"))
    if value == policy or not chosen_estimator(config.ppo).has_value_model:
        return {}
    return {"value_lora": value}


def check(context: "StageContext") -> None:
    """Compare the commits in the run directory with what is known before earlier stages have run."""
    from common.flatten import flat
    from contracts.checks.validation import ConfigError

    config, seen, unknown = context.config, _settings(context), set[str]()
    if not config.checkpoint.every or config.checkpoint.resume == "never":
        return
    for key, result in _starts_from(config).items():
        try:
            seen[key] = context.fingerprint(context.checkpoint(result)) if result else None
        except ConfigError:  # it is still to be made
            unknown.add(key)
    context.directory.check(flat(seen, keeps_empty=False), unknown)


def run(context: "StageContext") -> dict[str, Any]:
    from common.flatten import flat
    from controller.commits.commit_store import RunFacts
    from controller.commits.resume import require_scorers
    from controller.data.prompts import PromptStream
    from controller.loop.controller import PPOController
    from controller.loop.fleet import Fleet
    from controller.loop.held_out import HeldOut
    from controller.pipeline.ingredients import UNSEEN
    from controller.record.redaction import redacted
    from controller.record.scale_file import asked_for
    from controller.start_checks.engine_checks import first_publish

    config, runtime, progress = method_config(context.config), context.runtime, context.progress
    # Of a commit `require_scorers` compares what scored, and a run with a new key for the same service is the same run.
    seen = {name: value for name, value in inputs(context).items() if name not in UNSEEN}
    identity = flat(seen, keeps_empty=False)
    commit = _find_commit(context, identity)
    policy = context.checkpoint(config.ppo.init_from)
    scorers = context.reward_models(scored_roles(config))
    value = context.checkpoint("reward_model/proxy") if starts_value_model(config) else policy
    backend, ends = weight_backend(config), context.end_ids([policy], "prompts")
    ptx = context.data["sft"] if config.ppo.ptx_coef else []
    stream = PromptStream(
        context.data["prompts"],
        config.ppo.samples_per_prompt,
        config.seed,
        mixture_weights(config),
        config.data.curriculum,
    )
    context.start_ray()
    with ExitStack() as engines:
        learner = engines.enter_context(runtime.learner("ppo", config, policy, value, ends, ptx))
        # Side by side: each spends most of its start importing and reading.
        with context.phase("starting reward service, vLLM and learner"):
            client = runtime.service(scorers)
            actors = engines.enter_context(runtime.actors(policy, backend, ends, client))
            runtime.wait_for_service()
            learner.wait_ready()
            context.require_proofs()
            first_publish(
                learner,
                backend,
                actors,
                model=role_model(config.model, "policy").at(policy),
                prompts=context.data["prompts"],
                max_model_len=config.engine.max_model_len,
                timeout_s=config.cluster.start_timeout_s,
            )
        restarts, num_actors = config.cluster.max_actor_restarts, config.cluster.num_actors
        fleet = Fleet(
            actors,
            learner,
            backend,
            runtime.replace_actor,
            restarts,
            progress.line,
            room=runtime.room(),
            most=max(actor_bounds(config.cluster)),
            wanted=lambda: asked_for(context.log.run_dir) or num_actors,
        )
        about = RunFacts(
            identity,
            redacted(asdict(config)),
            client.versions,
            code=_code(context),
            sources=sorted(sources_read(config)),
        )
        controller = PPOController(
            config,
            stream,
            fleet,
            learner,
            context.log,
            progress,
            "gold" in scorers,
            about,
            context.stop,
            HeldOut(context.data["eval_prompts"], config.evaluate),
        )
        if commit:
            require_scorers(commit, client.versions)
            with context.phase(f"going on from {commit.path}, after update {commit.step}"):
                controller.restore(commit)
        title, updates = method_title("ppo", config.ppo.estimator), config.ppo.updates
        with context.phase(f"{title}: {updates} updates of {config.ppo.rollouts_per_update} rollouts"):
            controller.run()
        learner.call("save", str(context.path))
        controller.complete_ledger()
        ended = {"versions": controller.version, "learner_peak_gib": learner.peak_memory_gib()}
        return ended | {"scorers": client.versions}


def _code(context: "StageContext") -> str:
    from common.files.fingerprints import json_digest
    from controller.pipeline.stage_cache import code_of, edited_code

    return json_digest(code_of(context.config, context.result) | edited_code(context.config, context.result))[:16]


def _find_commit(context: "StageContext", identity: dict[str, Any]) -> "Commit | None":
    """Where the loop goes on; what an earlier attempt has logged and not committed goes."""
    from common.files.code_digest import package_versions
    from controller.commits.resume import other_versions

    commit = None
    if context.config.checkpoint.every:
        with context.progress.phase("looking for commits"):
            config, code = context.config, _code(context)
            last = config.ppo.updates + warmup_updates(config.ppo)

            def is_stale(commit: "Commit") -> bool:
                is_other = config.reuse_stages is not True and commit.run.code not in (None, code)
                return commit.step >= last and (config.reuse_stages is False or is_other)

            commit = context.directory.find(config.checkpoint.resume, identity, is_stale)
    else:
        context.directory.set_aside("checkpoint.every=0")
    if commit is None:
        context.log.forget(context.result)
    else:
        context.log.cut(context.result, commit.driver_state()[0]["logs"])
        other_versions(commit, package_versions(), context.progress.line)
    return commit


STAGE = Stage(
    name="ppo",
    title="PPO",
    inputs=inputs,
    run=run,
    position=30,
    methods={"ppo": "PPO"},
    starts_from=("sft", "reward_model"),
    results={"": "ppo_model"},
    reads=reads,
    keys=("ppo",),
    # With held-out prompts it samples and judges as an evaluation does.
    keys_to_run=lambda config: ("checkpoint", "evaluate.every" if config.evaluate.every is None else "evaluate"),
    roles=lambda config: {"proxy"} if starts_value_model(config) else set(),
    problems=problems,
    check=check,
    samples=True,
    resumes=True,
    task="ppo",
    plugins=plugins,
    # Rule functions are run by name; vLLM finds the weight transfer by an entry point.
    code=(
        "actors/rollout_actor.py",
        "actors/weight_transfer.py",
        "reward_service/app.py",
        "reward_service/function_worker.py",
        "reward_service/verifier_worker.py",
    ),
)
