"""Whether the models of a run are computed here as their classes compute them, before an engine starts: docs/models.md."""

from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from contracts.config import TandemConfig
from contracts.estimators import chosen_estimator
from contracts.loading import LoadingError, loading_report, refuse_unloaded
from contracts.methods import GIVEN, results_needed, runs
from contracts.proof import NoClass, Proof, Unproven
from contracts.scorers import starts_value_model
from contracts.validation import ConfigError

SCORES = ("proxy_model", "gold_model")
TRAINING = ("sft", "filtered_sft", "preference", "ppo")


def check_weights_and_code(config: TandemConfig) -> None:
    """Refuse models that lack weights, or that would not be trained and scored as their classes define them.

    A proof takes a tenth of a second and the report on a checkpoint's weights as long as making its modules without memory.

    Raises:
        ConfigError: naming key and model, what differs and what to write instead.
    """
    problems = [problem for key, path in _named(config) if (problem := _unloaded(config, key, path))]
    for key, use in _uses(config):
        path = config.model.path if key == "model.path" else getattr(config, key)
        found = _read(config, key, path)
        try:
            _prove(config, use, found)
        except NoClass as error:
            problems.append(f"{key}={path}: {error}, which {use} needs; write {_instead(use)}")
        except Unproven as error:
            problems.append(
                f"{key}={path}: {use} of {found.model_type} would not compute what its class in transformers computes "
                f"({error}); write {_instead(use)}, or learner.attention=auto"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _instead(use: str) -> str:
    return "another model" + (", or ppo.estimator=grpo, which has none" if use == "the value model" else "")


def _named(config: TandemConfig) -> Iterator[tuple[str, str]]:
    yield "model.path", config.model.path
    for key in GIVEN.values():
        if path := getattr(config, key):
            yield key, path


def _uses(config: TandemConfig) -> Iterator[tuple[str, str]]:
    """Which key's architecture is used as what."""
    policy = "sft_model" if config.sft_model else "model.path"
    if any(runs(config, stage) for stage in TRAINING):
        yield policy, "the policy"
    makes_scores = {f"reward_model/{name}" for name in ("proxy", "gold")} & results_needed(config)
    if runs(config, "reward_model") and makes_scores:
        yield "model.path", "a reward model"
    for key in SCORES:
        if getattr(config, key):
            yield key, "a scorer"
    if runs(config, "ppo") and chosen_estimator(config.ppo).has_value_model:
        scores = "proxy_model" if config.proxy_model else "model.path"
        yield scores if starts_value_model(config) else policy, "the value model"


def _prove(config: TandemConfig, use: str, found: Any) -> Proof:
    from learner.models import prove_policy, prove_scalar, scalar_config
    from reward_service.model import prove_scores

    on_cpu = not config.cluster.gpus_per_learner_rank
    if use == "the policy":
        return prove_policy(found, config.model, config.learner, on_cpu)
    if use == "a scorer":
        return prove_scores(found, on_cpu)
    return prove_scalar(scalar_config(found), config.model, config.learner, on_cpu)


def _unloaded(config: TandemConfig, key: str, path: str) -> str | None:
    kind = AutoModelForSequenceClassification if key in SCORES else AutoModelForCausalLM
    found = _read(config, key, path)
    if key in SCORES:
        found.num_labels = 1
    if type(found) not in kind._model_mapping:  # remote code, or a class that is not there: told where it is used
        return None
    try:
        model, report = loading_report(kind, path, config=found, revision=_revision(config, key))
        refuse_unloaded(report, path, key, model=model)
    except LoadingError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"{key}={path}: its weights cannot be read: {error}"
    return None


def _read(config: TandemConfig, key: str, path: str) -> Any:
    return AutoConfig.from_pretrained(
        path, revision=_revision(config, key), trust_remote_code=config.model.trust_remote_code
    )


def _revision(config: TandemConfig, key: str) -> str | None:
    return config.model.revision if key == "model.path" else None
