"""Whether a checkpoint has the weights of the model that was made from it.

transformers fills what a checkpoint lacks with random numbers, other ones at each load, drops what it has beyond, and goes
on. Its report on both (`from_pretrained(..., output_loading_info=True)`) is judged here, for every model that is loaded.
"""

import math
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from common.files.checkpoint_files import checkpoint_files
from contracts.checks.check import Check

SHOWN = 4  # names in a message
BLOCK = 4096  # rows of a matrix that are compared at a time
MIN_STD = 1e-6  # of scores before their normaliser; `stage=reward_model` writes 1 where all are equal
# Tables that a model computes itself and that checkpoints of older releases have on disk.
COMPUTED = re.compile(r"(^|\.)(inv_freq|(cos|sin)_cached|(attn|attention)\.(masked_)?bias|position_ids)$")


class LoadingError(ValueError):
    """A checkpoint does not have the weights of the model that is made from it."""


def refuse_adapter(path: str, key: str) -> None:
    """Refuse a directory with an adapter of PEFT where whole models train: transformers would load it where PEFT is
    installed and else the model without it, and vLLM never loads it.

    Raises:
        LoadingError: with what to write instead.
    """
    if Path(path, "adapter_config.json").exists():
        instead = (
            "model.lora={...} as it was trained, or what `python -m controller.export ADAPTER OUT --merged` makes of it"
        )
        raise LoadingError(Check(False, f"{key}={path}", "a whole model", "an adapter of PEFT", instead).message)


def refuse_quantised(config: Any, path: str, key: str) -> None:
    """Refuse weights of few bits: they do not train, and what is published has other shapes.

    Raises:
        LoadingError: with what to write instead.
    """
    for part in (config, config.get_text_config()):
        said = getattr(part, "quantization_config", None)
        if said:
            method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
            found = f"quantization_config of {getattr(method, 'value', method)}"
            instead = "the checkpoint that it was quantised from, or one that is dequantised"
            rule = "a model in float32, bfloat16 or float16"
            raise LoadingError(Check(False, f"{key}={path}", rule, found, instead).message)


def normaliser(config: Any, path: str, key: str) -> tuple[float, float]:
    """Mean and standard deviation by which a checkpoint's scores are normalised; 0 and 1 where its configuration has none.

    Raises:
        LoadingError: where one is no number, or the standard deviation so small that it only enlarges rounding.
    """
    found = [getattr(config, name, None) for name in ("score_mean", "score_std")]
    mean, std = (default if value is None else value for value, default in zip(found, (0.0, 1.0), strict=True))
    for name, value, least in (("score_mean", mean, -math.inf), ("score_std", std, MIN_STD)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        if not is_number or value < least:
            rule = "a finite number" if name == "score_mean" else f"a finite number, {MIN_STD:g} or more"
            where = f"{name} in the config.json of {key}={path}"
            raise LoadingError(Check(False, where, rule, value, "what training wrote").message)
    return float(mean), float(std)


def loading_report(kind: Any, path: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model of `kind` (an AutoModel class) without memory for its weights, and the loading report: what the real load
    would say, in the time that it takes to make the modules, whatever their size.

    Raises:
        OSError: where there is no such checkpoint, or its weights are no safetensors.
        ValueError: where `kind` has no class for it, or its files are not all its own.
    """
    if Path(path).is_dir():
        checkpoint_files(Path(path))
    options |= {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    return kind.from_pretrained(path, trust_remote_code=False, use_safetensors=True, **options)


def refuse_unloaded(
    info: dict[str, Any], path: str, key: str, allowed_new: tuple[str, ...] = (), model: Any = None
) -> None:
    """Refuse a model that is not the checkpoint's.

    Every weight of the model must come from the checkpoint. A weight of the checkpoint that the model does not know means
    that the two compute something different where it lies inside a part that the model has (a bias that the configuration
    switches off, a layer too many, the scales of a quantised matrix). It means nothing where it belongs to a part beside
    the model's own, such as the LM head of a checkpoint that is loaded with a scalar head, a value head or a vision tower.

    Args:
        info: transformers' loading report.
        path: of the checkpoint, as the user wrote it.
        key: of the configuration that named it.
        allowed_new: weights that this load makes anew on purpose, by full name.
        model: what was loaded, which tells the two kinds of unknown weights apart; None refuses both.

    Raises:
        LoadingError: naming the weights, and what to write instead.
    """
    shapes = {name: (list(found), list(wanted)) for name, found, wanted in info["mismatched_keys"]}
    missing = sorted({*info["missing_keys"], *shapes} - set(allowed_new))
    unknown = sorted(info["unexpected_keys"])
    if model is not None and not missing:
        unknown = [name for name in unknown if not COMPUTED.search(name) and _is_inside(model, name)]
    if not missing and not unknown:
        _refuse_untied(model, path, key)
        return
    found = [f"no {_listed(missing, shapes)}"] if missing else []
    found += [f"{_listed(unknown)}, which the model does not know"] if unknown else []
    rule = "a checkpoint with every weight of its model and none beyond"
    instead = _instead(missing, unknown, bool(shapes))
    raise LoadingError(Check(False, f"{key}={path}", rule, " and ".join(found), instead).message)


def _refuse_untied(model: Any, path: str, key: str) -> None:
    """transformers keeps two different matrices that the configuration ties, with a warning; vLLM takes one for both."""
    if model is None:
        return
    is_empty = model.device.type == "meta"
    files = _files_of_weights(Path(path)) if is_empty else {}  # values that the model does not have, the files do
    for name, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if is_empty:
            differ = _are_stored_differently(files, _stored_name(model, name), _stored_name(model, source))
        else:
            differ = model.get_parameter_or_buffer(name) is not model.get_parameter_or_buffer(source)
        if differ:
            rule, found = "a checkpoint that fits tie_word_embeddings=true", f"a {name} other than {source}"
            instead = "tie_word_embeddings=false into its config.json"
            raise LoadingError(Check(False, f"{key}={path}", rule, found, instead).message)


def _stored_name(model: Any, name: str) -> tuple[str, str]:
    """The names that a weight may have in a checkpoint: with the backbone's prefix or, as GPT-2's own, without."""
    return name, name.removeprefix(f"{model.base_model_prefix}.")


def _files_of_weights(path: Path) -> dict[str, Path]:
    """Where each weight of a checkpoint's directory lies. Of a hub id, and of other files than safetensors, nothing is known
    here; the learner sees it when it loads them."""
    found: dict[str, Path] = {}
    for file in sorted(path.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def _are_stored_differently(files: dict[str, Path], *names: tuple[str, ...]) -> bool:
    """Whether both weights are in the files, with different values; up to the first block of rows that differs."""
    known = [next((name for name in each if name in files), None) for each in names]
    first, second = known
    if first is None or second is None or first == second:
        return False
    with safe_open(files[first], framework="pt") as one, safe_open(files[second], framework="pt") as other:
        a, b = one.get_slice(first), other.get_slice(second)
        if a.get_shape() != b.get_shape():
            return True
        rows = range(0, a.get_shape()[0], BLOCK)
        return not all(torch.equal(a[i : i + BLOCK].float(), b[i : i + BLOCK].float()) for i in rows)


def _is_inside(model: Any, name: str) -> bool:
    """Whether a weight's name lies within a module of the model, and not beside the modules of its top and its backbone."""
    backbone = getattr(model, model.base_model_prefix, model)
    first, *rest = name.removeprefix(f"{model.base_model_prefix}.").split(".")
    return bool(rest) and any(first in dict(top.named_children()) for top in (model, backbone))


def _listed(names: list[str], shapes: dict[str, tuple[list[int], list[int]]] | None = None) -> str:
    def one(name: str) -> str:
        if shapes and name in shapes:
            return f"{name} of shape {shapes[name][1]} (it has {shapes[name][0]})"
        return name

    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(one, names[:SHOWN])) + more


def _instead(missing: list[str], unknown: list[str], has_shapes: bool) -> str:
    """What may have happened, from the names alone."""
    prefixes = {name.removesuffix(key) for key in missing for name in unknown if name.endswith(f".{key}")}
    if len(prefixes) == 1 and len(missing) > 1:
        return (
            f"a checkpoint whose names do not begin with {prefixes.pop()} (of PEFT: save the model after "
            "merge_and_unload(); else rename the weights and save them again)"
        )
    if missing == ["score.weight"] and has_shapes:
        return "a reward model with one label"
    if missing == ["score.weight"]:
        heads = [name for name in unknown if "head" in name and not name.startswith("lm_head")]
        if heads:
            return f"the checkpoint again with {heads[0]} renamed to score.weight, if that is its scalar head"
        return "a reward model's checkpoint (stage=reward_model leaves one); this one has no scalar head"
    if missing:
        return "a complete checkpoint, saved by save_pretrained() of the class that its config.json names"
    return "a checkpoint whose config.json fits its weights (layers, biases, quantisation)"
