"""Base, SFT and what `method` made of it on held-out prompts, judged: docs/preference.md, evaluation.json."""

from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from common.files.code_digest import code_digest, package_versions
from common.strict_json import json_text
from contracts.config import TandemConfig
from contracts.environments import SHIPPED
from contracts.methods import method_stage
from contracts.plugins import closest
from contracts.scorer_roles import chosen_scorers, judges
from contracts.stages import Reading, Stage
from controller.data.kept_columns import source_of
from controller.record.status_file import read_status

if TYPE_CHECKING:
    from controller.data.inputs import Inputs
    from controller.evaluation.kept_answers import KeptAnswers
    from controller.pipeline.context import StageContext

MAX_SOURCES = 50  # that evaluate.by tells apart
PROMPTS = Reading(
    "eval_prompts",
    "eval_prompts",
    "load_some_prompts",
    ("evaluate.sampling.max_completion_tokens", "engine.max_model_len", "evaluate.prompts", "evaluate.seed"),
)


def column_problems(config: TandemConfig, data: "Inputs") -> list[str]:
    column = config.evaluate.by
    there = sorted({name for prompt in data[PROMPTS.item] for name in prompt.columns})
    if column is None:
        return []
    if column in there:
        values = {source_of(prompt, column) for prompt in data[PROMPTS.item]}
        rule = f"evaluate.by must name a column with at most {MAX_SOURCES} values, each a row of tables"
        return [f"{rule}; found {len(values)} in {column!r}"] if len(values) > MAX_SOURCES else []
    near = closest(column, there)
    return [
        f"evaluate.by must name a column that travels with the prompts of data.eval_prompts (data.eval_prompts.keep); found "
        f"{column!r}{f', did you mean {near!r}?' if near else ''}; there are {', '.join(there) or 'none'}"
    ]


def is_edited(config: TandemConfig) -> bool:
    """Whether Tandem's code has changed since the run began: what samples and scores may be either."""
    return read_status(config.run_dir).facts.get("code") != code_digest()


def kept_answers(
    context: "StageContext", shared: dict[str, str], scorers: dict[str, str | None], ends: tuple[int, ...]
) -> "KeptAnswers | None":
    """None where something decides answers or scores that has no fingerprint: scorers that are no reward models, code that
    has changed since the run began, an environment of the user's. `shared` has the fingerprints of base and SFT."""
    from controller.evaluation.kept_answers import KeptAnswers

    config = context.config
    chosen = chosen_scorers(config.reward_service.scorers, scorers)
    if config.environment.name not in SHIPPED or any(
        entry.kind != "model" or not entry.path for entry in chosen.values()
    ):
        return None
    if is_edited(config):
        return None
    judges = {name: context.fingerprint(str(entry.path)) for name, entry in chosen.items()}
    sections: dict[str, Any] = {
        "environment": config.environment,
        "engine": config.engine,
        "service": config.reward_service,
    }
    cluster, evaluate = config.cluster, config.evaluate
    return KeptAnswers(
        config.cache_dir,
        {name: asdict(section) for name, section in sections.items()}
        | {
            "models": shared | judges,
            "prompts": context.data_fingerprint("eval_prompts"),
            "sampling": [asdict(evaluate.sampling), evaluate.seed, evaluate.samples, ends],
            "remote_code": config.model.trust_remote_code,
            "computed": [config.model.dtype, cluster.num_actors, cluster.threads_per_actor, cluster.gpus_per_actor],
            "packages": package_versions(),
        },
    )


def run(context: "StageContext") -> dict[str, Any]:
    from common.files.durable import replace_text
    from controller.evaluation.judging import REFERENCE, Judged, judge_models, sample_rows, summarize
    from controller.record.evaluation import evaluation_metrics
    from learner.weight_publisher import BACKEND

    config, log = context.config, context.log
    trained = method_stage(config)
    models = {"base": config.model.path} | ({config.method: context.checkpoint(trained)} if trained else {})
    models[REFERENCE] = context.checkpoint("sft")
    scorers = context.reward_models(judges(config))
    ends = context.end_ids(models.values(), "eval_prompts")
    shared = {name: context.fingerprint(models[name]) for name in ("base", REFERENCE)}
    answers = kept_answers(context, shared, scorers, ends)
    known: dict[str, Judged] = {}
    if answers and config.reuse_stages is not False:
        known = {name: found for name in shared if (found := answers.find(shared[name]))}
    context.start_ray()
    with ExitStack() as engines:
        with context.phase("starting the reward service and vLLM"):
            client = context.runtime.service(scorers)
            actors = engines.enter_context(context.runtime.actors(models["base"], BACKEND, ends, client))
            context.runtime.wait_for_service()
            context.require_proofs()
        with log.phase(context.result, "evaluation"):
            prompts = context.data["eval_prompts"]
            if known:
                context.progress.line(f"  {', '.join(known)}: judged answers of an earlier run")
            judged = judge_models(config, models, prompts, actors, list(scorers), context.progress, known)
        if answers and not is_edited(config):
            for name in shared.keys() - known.keys():
                if judged[name].is_scored:  # else a judge that was away for a while would be so for good
                    answers.keep(shared[name], judged[name])
    result = summarize(judged, list(scorers), config)
    numbers = evaluation_metrics(result, config.evaluate.max_kl)
    context.log_step(0, {f"evaluate/{name}": value for name, value in numbers.items()})
    log.samples(sample_rows(judged, list(scorers)))
    replace_text(context.path, json_text(result, indent=1) + "\n")
    return result


STAGE = Stage(
    name="evaluate",
    title="Evaluation",
    inputs=lambda context: {},  # it is made anew every time
    run=run,
    position=90,
    methods={"best_of_n": "Best of n", "none": "SFT alone"},  # which train nothing
    starts_from=("sft", "reward_model"),
    results={},
    report="evaluation.json",
    reads=lambda config, role: [PROMPTS],
    keys=("evaluate",),
    problems=column_problems,
    samples=True,
    trains="",
)
