"""What can be known of models and data before an engine starts, beyond the configuration itself."""

import re
from pathlib import Path
from typing import Any

from common.error_text import error_lines
from common.models.adapters import split
from common.models.loading import LoadingError, refuse_quantised
from common.text.tokenizers import load_config, pinned, vocabulary
from contracts.checks.check import Check
from contracts.checks.validation import ConfigError
from contracts.config import TandemConfig
from contracts.methods import checkpoints_read, results_needed, running_stages
from contracts.placement import needs
from contracts.scorer_roles import CHECKPOINTS, value_model_key
from controller.data.inputs import Inputs
from controller.start_checks.adapter_checks import adapter_problems
from controller.start_checks.kv_cache import too_small
from controller.start_checks.lengths import too_long
from controller.start_checks.service_checks import service_problems
from learner.shared_trunk import BESIDE_LAYERS

# Of a configuration; what is served does not depend on these: they are of training, of other tools, or of older versions.
NOT_SERVED = BESIDE_LAYERS - {"tie_word_embeddings"} | {
    "max_position_embeddings", "initializer_range", "pretraining_tp", "output_router_logits", "router_aux_loss_coef",
}  # fmt: skip
DROPS = re.compile("dropout|layerdrop|_pdrop$")
# What transformers asks a configuration for, whether its class declares it or not (masking_utils.py, the models' attention).
READ_UNDECLARED = {"head_dim", "is_causal", "layer_types", "per_layer_config", "sliding_window", "attention_chunk_size"}


def check_model(config: TandemConfig) -> None:
    """Refuse a model that cannot be loaded, before anything starts.

    Raises:
        ConfigError: naming the key and what is wrong.
    """
    keys = {"model.path": config.model.path, **checkpoints_read(config)}
    problems = []
    for key, path in keys.items():
        try:
            problems += adapter_problems(config, key, path)
            found = load_config(path, config.model)
            refuse_quantised(found, path, key)
            problems += _too_many_layers(config, key, getattr(found.get_text_config(), "num_hidden_layers", None))
            problems += _other_vocabulary(config, key, path, found) or _other_settings(config, key, path, found)
            if key == "model.path":
                problems += _undivided_heads(config, found.get_text_config()) + too_small(config, found)
            problems += too_long(config, key, path, found.get_text_config())
        except LoadingError as error:
            problems.append(str(error))
        except (OSError, ValueError, KeyError) as error:
            reason = error_lines(error)[0][:200]
            exists = "" if Path(path).exists() else " (no such directory; a hub id needs network access)"
            problems.append(f"{key}={path}: no model can be loaded from there{exists}: {reason}")
    problems += service_problems(config)
    if problems:
        raise ConfigError("\n".join(problems))


def check_amounts(config: TandemConfig, data: Inputs) -> None:
    """Refuse stages whose data is not what they need: fewer examples than one of their steps takes, no such column.

    Raises:
        ConfigError: naming the key, the number found and what to write instead.
    """
    needed = results_needed(config)
    # What has no result to be given, as the evaluation, is always made.
    made = [s for s in reversed(running_stages(config)) if not s.results or needed & s.checkpoint_keys.keys()]
    if problems := dict.fromkeys(text for stage in made for text in stage.problems(config, data)):
        raise ConfigError("\n".join(problems))


def _other_vocabulary(config: TandemConfig, key: str, path: str, found: Any) -> list[str]:
    """Of what the learner or the engines read prompts with, which the tokenizer of `model.path` has encoded."""
    if key == "model.path" or (key in CHECKPOINTS and key != value_model_key(config)):
        return []
    own, ours = (vocabulary(pinned(p, config.model)) for p in (split(path)[0], config.model.path))
    size = getattr(found.get_text_config(), "vocab_size", None)
    is_short = ours is not None and size is not None and size <= max(ours.values())
    if not is_short and (own is None or ours is None or own == ours):
        return []
    rule = f"a model with the vocabulary of model.path={config.model.path}, whose tokenizer encodes all texts"
    other = f"{size} tokens" if is_short else "another one"
    return [Check(False, f"{key}={path}", rule, other, f"model.path={path} as well").message]


def _other_settings(config: TandemConfig, key: str, path: str, found: Any) -> list[str]:
    """Of a policy that is evaluated: the engines are started for `model.path` and get weights alone, so that rotations,
    windows and all else that decides a number would be those of `model.path`."""
    is_policy = key != "model.path" and key not in CHECKPOINTS
    if not is_policy or not any(stage.name == "evaluate" for stage in running_stages(config)):
        return []
    ours, its = (_deciding(c) for c in (load_config(config.model.path, config.model), found))
    differ = sorted(name for name in ours.keys() | its.keys() if ours.get(name) != its.get(name))
    differ.sort(key=lambda name: name != "model_type")
    if not differ:
        return []
    rule = f"a model with the settings of model.path={config.model.path}, with which the evaluation serves both"
    said = "; ".join(f"{name} {its.get(name)} instead of {ours.get(name)}" for name in differ[:3])
    return [Check(False, f"{key}={path}", rule, said, f"model.path={path} as well").message]


def _deciding(config: Any) -> dict[str, Any]:
    """What decides what a model computes when it is served. Of transformers' own classes the keys that they declare, not
    what a tool has left there; of others all, as only their code knows what it reads."""
    said, kind = config.to_dict(), type(config)
    known = {*kind().to_dict(), *READ_UNDECLARED} if kind.__module__.startswith("transformers.models.") else said.keys()
    windows = said.get("layer_types") or ("sliding_attention",)
    beside = NOT_SERVED if "sliding_attention" in windows else NOT_SERVED | {"max_window_layers"}
    return {
        name: _deciding(part) if hasattr(part := getattr(config, name, None), "to_dict") else value
        for name, value in said.items()
        if name in known - beside and not DROPS.search(name)
    }


def _too_many_layers(config: TandemConfig, key: str, layers: int | None) -> list[str]:
    sections = dict.fromkeys(key for stage in running_stages(config) for key in stage.keys if "." not in key)
    keys = [*(f"{section}.trainable_layers" for section in sections), "learner.checkpointed_layers"]
    keys = keys if key == "model.path" else []
    keys += ["ppo.value_trainable_layers"] if "ppo" in sections and key == value_model_key(config) else []
    return [
        f"{key} is {value}, the model has {layers} layers: write at most {layers}, or null for all"
        for key in keys
        if layers is not None and (value := _value(config, key)) is not None and value > layers
    ]


def _value(config: TandemConfig, key: str) -> int | None:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name, None)


def _undivided_heads(config: TandemConfig, model: Any) -> list[str]:
    """vLLM gives each of the tensor-parallel workers as many attention heads, and key-value heads by their number or, where
    there are fewer of these, copies of each (vllm/model_executor/models/llama.py)."""
    size, heads = config.engine.tensor_parallel_size, getattr(model, "num_attention_heads", None)
    if heads is None or not needs(config)[0].count:
        return []
    kv_heads = getattr(model, "num_key_value_heads", None) or heads

    def divides(n: int) -> bool:
        return heads % n == 0 and max(kv_heads, n) % min(kv_heads, n) == 0

    if divides(size):
        return []
    sizes = ", ".join(str(n) for n in range(1, heads + 1) if divides(n))
    return [
        f"engine.tensor_parallel_size must divide the model's {heads} attention heads, and divide its {kv_heads} "
        f"key-value heads or be a multiple of them; found {size}; write one of {sizes}, with as many "
        "cluster.gpus_per_actor"
    ]
