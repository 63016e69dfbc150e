"""Whether the models of a run are computed here as their classes compute them, before an engine starts: docs/models.md."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from common.error_text import error_lines
from common.models.adapters import check_fits, split
from common.models.loading import LoadingError, loading_report, refuse_unloaded
from common.models.lora import stored_name, target_modules
from common.models.proof import NoClass, Proof, Unproven
from common.text.tokenizer_proof import OtherTokens, check_tokens
from common.text.tokenizers import load_config, load_tokenizer, pinned
from contracts.checks.check import Check
from contracts.checks.lora_checks import adapted_roles
from contracts.checks.validation import ConfigError
from contracts.config import TandemConfig
from contracts.lora_roles import Role, lora_key, role_model
from contracts.methods import checkpoints_read, reads, results_needed, running_stages, runs
from contracts.scorer_roles import CHECKPOINTS, ROLES, chosen_scorers, reward_model_origin, value_model_key
from contracts.stages import POLICY, REWARD_MODEL
from reward_service.scorer_kind import scorer_kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def check_weights_and_code(config: TandemConfig) -> None:
    """Refuse models that lack weights, or that would not be trained and scored as their classes define them.

    A proof takes a tenth of a second and the report on a checkpoint's weights as long as making its modules without memory.

    Raises:
        ConfigError: naming key and model, what differs and what to write instead.
    """
    policies, scorers = dict(_policies(config)), dict(_scorers(config))
    paths = policies | scorers
    problems = [
        text for key, path in policies.items() if (text := _unloaded(partial(_check_policy, config), key, path))
    ]
    problems += [text for key, path in scorers.items() if (text := _unloaded(_check_scorer, key, path))]
    if problems:
        raise ConfigError("\n".join(problems))
    for key, use in _uses(config):
        path = paths[key]
        found = load_config(path, config.model)
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


def _policies(config: TandemConfig) -> Iterator[tuple[str, str]]:
    yield "model.path", config.model.path
    yield from ((key, path) for key, path in checkpoints_read(config).items() if key not in CHECKPOINTS)


def _scorers(config: TandemConfig) -> Iterator[tuple[str, str]]:
    """The reward models that are not made here."""
    yield from ((key, path) for key, path in checkpoints_read(config).items() if key in CHECKPOINTS)
    if not reads(config, "reward_service"):
        return
    chosen = chosen_scorers(config.reward_service.scorers, dict.fromkeys(ROLES, ""))
    for name, entry in config.reward_service.scorers.items():
        if name in chosen and scorer_kind(entry.kind).is_reward_model:
            yield f"reward_service.scorers.{name}.path", str(entry.path)


def _uses(config: TandemConfig) -> Iterator[tuple[str, str]]:
    """Which key's architecture is used as what."""
    from_base = runs(config, "ppo") and config.ppo.init_from == "base"
    policy = "sft_model" if config.sft_model and not from_base else "model.path"
    running, needed = running_stages(config), results_needed(config)
    if any(stage.trains == POLICY for stage in running):
        yield policy, POLICY
    if any(stage.trains == REWARD_MODEL and needed & stage.checkpoint_keys.keys() for stage in running):
        is_given = reward_model_origin(config) == "sft" and config.sft_model
        yield "sft_model" if is_given else "model.path", REWARD_MODEL
    for key, _ in _scorers(config):
        yield key, "a scorer"
    if runs(config, "ppo") and (value := value_model_key(config)):
        yield value, "the value model"


def _prove(config: TandemConfig, use: str, found: Any) -> Proof:
    from learner.models import prove_policy, prove_scalar, scalar_config
    from reward_service.model import prove_scores

    on_cpu = not config.cluster.gpus_per_learner_rank
    if use == POLICY:
        return prove_policy(found, role_model(config.model, "policy"), config.learner, on_cpu)
    if use == "a scorer":
        return prove_scores(found, on_cpu)
    role: Role = "reward_model" if use == REWARD_MODEL else "value_model"
    return prove_scalar(scalar_config(found), role_model(config.model, role), config.learner, on_cpu)


def checked_tokenizer(config: TandemConfig) -> "Tokenizer":
    """The tokenizer of the run.

    Raises:
        ConfigError: it names no EOS, or makes other tokens than its file.
        OSError, ValueError: it cannot be loaded.
    """
    path = config.model.path
    tokenizer = load_tokenizer(path, config.model)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.path={path}: its tokenizer names no EOS token")
    try:
        check_tokens(pinned(path, config.model), tokenizer)
    except OtherTokens as error:
        raise ConfigError(f"model.path={path}: {error}") from None
    return tokenizer


def _unloaded(check: Callable[[str, str], None], key: str, path: str) -> str | None:
    try:
        check(path, key)
    except LoadingError as error:
        return str(error)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:  # torn files, packages not there
        return f"{key}={path}: no model can be loaded from there: {error_lines(error)[0]}"
    return None


def _check_policy(config: TandemConfig, path: str, key: str) -> None:
    found = load_config(path, config.model)
    if type(found) in AutoModelForCausalLM._model_mapping:  # else remote code, which runs where the model is proved
        base, adapter = split(path)
        made, report = loading_report(AutoModelForCausalLM, base, config=found, revision=config.model.revision_of(path))
        refuse_unloaded(report, base, key, model=made)
        _refuse_other_parts(found, made, path, key)
        if adapter:
            check_fits(made, adapter, key, base)
        adapted = adapted_roles(config) if key == "model.path" else {}
        for role, lora in adapted.items():
            for module in target_modules(made, lora, key=lora_key(config.model, role, "targets")):
                stored_name(made, f"{module}.lora_A.weight")


def _refuse_other_parts(found: Any, made: Any, path: str, key: str) -> None:
    """Refuse a model of several parts whose class for text is another than the one that its config.json names, by which vLLM
    chooses (Qwen3.5, Llama 4): nobody would send the engine its tower for images.

    Raises:
        LoadingError: with what to write instead.
    """
    named, mine = found.architectures or [type(found).__name__], type(made).__name__
    if type(made.config) is type(found) or mine in named:
        return
    parts = ", ".join(name for name in found.sub_configs if name != "text_config")
    what = f"{named[0]} with {parts}, of which {mine} trains the text alone, while vLLM serves all of it"
    instead = (
        f"what save_pretrained() of AutoModelForCausalLM.from_pretrained({path!r}) writes, with its tokenizer beside it"
    )
    raise LoadingError(Check(False, f"{key}={path}", "a model that trains whole", what, instead).message)


def _check_scorer(path: str, key: str) -> None:
    from reward_service.model import check_reward_model

    check_reward_model(path, key)
