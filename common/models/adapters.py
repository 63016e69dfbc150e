"""Directories of PEFT: an adapter, and the checkpoint that it belongs to.

Beside PEFT's own files (adapter_config.json, adapter_model.safetensors) ours have tokenizer, generation_config.json and
`tandem_adapter.json`: the fingerprint of the base, as one of the same shapes and other weights would load unnoticed, and
what training has set in its configuration. With a config.json of its own transformers would look for a whole model there.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from socket import gethostname
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

from common.files.checkpoint_files import ADAPTER, adapter_base, checkpoint_files
from common.files.fingerprints import checkpoint_fingerprint, file_hashes
from common.models.loading import LoadingError, refuse_quantised
from common.models.lora import (
    ALL,
    KINDS,
    TRAINED,
    adapter_parameters,
    adapter_shapes,
    merged,
    scale,
    stored_name,
)
from contracts.checks.check import Check
from contracts.config import LoraConfig, ModelConfig
from contracts.lora_roles import Role, lora_section, role_model

SETTINGS, WEIGHTS, OURS = ADAPTER, "adapter_model.safetensors", "tandem_adapter.json"
TOKENIZER = "tokenizer_config.json"
PREFIX = "base_model.model."  # of every name in PEFT's files
OF_TRAINING = (".safetensors", ".bin", ".pt", ".pth")  # beside an adapter: weights, states of optimizers
HEAD = "score"  # of a reward model, which trains beside its adapter
# What LoRA may be besides, in PEFT, and is not read here: by its key, what it is when it is not used.
PLAIN: dict[str, Any] = {
    "bias": "none", "fan_in_fan_out": False, "lora_bias": False, "rank_pattern": {}, "alpha_pattern": {},
    "target_parameters": None, "trainable_token_indices": None, "layer_replication": None, "exclude_modules": None,
    "megatron_config": None, "use_qalora": False, "alora_invocation_tokens": None, "arrow_config": None,
}  # fmt: skip
# Beginnings of A and B by name that leave the base as it is; PEFT changes it for others (PiSSA, OLoRA, CorDA, LoftQ), each
# time that it loads one.
INITS = ("gaussian", "eva", "orthogonal")
# What PEFT lists beside the adapter of every classifier, whichever of these it has.
HEADS = {HEAD, "classifier"}


def is_adapter(path: str) -> bool:
    return Path(path, SETTINGS).is_file()


def split(path: str) -> tuple[str, str | None]:
    """(base checkpoint, adapter directory) of an adapter's directory; (path, None) of any other checkpoint.

    Raises:
        LoadingError: the base is not there, or not named.
    """
    if not is_adapter(path):
        return path, None
    if whole := sorted(Path(path).glob("model*.safetensors")):
        rule, found = "a whole model or an adapter of PEFT", f"{whole[0].name} beside {SETTINGS}"
        raise LoadingError(Check(False, path, rule, found, "a directory with one of them").message)
    settings = _settings_of(path)
    named = adapter_base(Path(path))
    if named is None:
        raise LoadingError(
            f"{path} must name the checkpoint that it belongs to; write base_model_name_or_path in {SETTINGS}"
        )
    if _is_missing(named):
        raise LoadingError(
            f"{path} is an adapter of {named}, which is not there; put that checkpoint there, or write where it is as "
            f"base_model_name_or_path in {SETTINGS}"
        )
    if settings.get("revision") not in (None, "main") and not Path(named).is_dir():
        raise LoadingError(
            f"{path} is an adapter of the revision {settings['revision']!r} of {named}; write the directory of that "
            f"revision as base_model_name_or_path in {SETTINGS}"
        )
    return named, path


def require_here(path: str) -> None:
    """For a process that may be on another node than the one where the configuration was checked.

    Raises:
        LoadingError: the checkpoint is no hub id, and not there.
    """
    if _is_missing(path):
        raise LoadingError(
            f"{path} is not on {gethostname()}: a checkpoint must be where every node that loads it sees it by this path"
        )


def _is_missing(path: str) -> bool:
    """Whether it is no hub id, and no directory either."""
    is_place = Path(path).is_absolute() or path.startswith(".") or path.count("/") > 1
    return is_place and not Path(path).is_dir()


def holder(path: str, file: str) -> str:
    """Where `file` of the checkpoint at `path` is read: an adapter that others trained may leave it to its base."""
    return path if not is_adapter(path) or Path(path, file).is_file() else split(path)[0]


def config_of(path: str, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The configuration of a checkpoint; of an adapter that of its base, with what training has set.

    Raises:
        LoadingError: as `split`.
        OSError, ValueError: there is none.
    """
    base, adapter = split(path)
    config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=trust_remote_code)
    for key, value in set_by_training(adapter).items():
        setattr(config, key, value)
    return config


def set_by_training(adapter: str | None) -> dict[str, Any]:
    """What the training of an adapter has set in the configuration of its base, as a reward model's normaliser."""
    return dict(_ours(adapter).get("config", {})) if adapter else {}


def _ours(path: str) -> dict[str, Any]:
    """What `write` has said of an adapter; nothing of those of others."""
    file = Path(path, OURS)
    found = json.loads(file.read_text()) if file.is_file() else {}
    if not isinstance(found, dict):
        raise LoadingError(f"{file} must be as the training wrote it; found {type(found).__name__}")
    return found


def lora_of(path: str) -> LoraConfig:
    """What an adapter's directory says of it.

    Raises:
        LoadingError: it is of another kind than is computed here.
    """
    found = _settings_of(path)
    kind, strange = found.get("peft_type"), [key for key, plain in PLAIN.items() if found.get(key) not in (None, plain)]
    init = found.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in INITS:
        raise LoadingError(
            f"{path} must be an adapter of its base as it is; found init_lora_weights={init}, for which PEFT changes the "
            "base; write one that was saved with path_initial_model_for_weight_conversion"
        )
    if not HEADS.issuperset(found.get("modules_to_save") or ()):
        strange.append("modules_to_save")
    if kind != "LORA" or strange:
        what = f"peft_type {kind}" if kind != "LORA" else strange[0]
        raise LoadingError(
            f"{path} must be a plain adapter of LoRA or DoRA; found {what}; write one that was trained without"
        )
    targets = found.get("target_modules") or []
    return LoraConfig(
        rank=int(found["r"]),
        alpha=float(found["lora_alpha"]),
        targets=[ALL] if targets == ALL else sorted(targets) if isinstance(targets, list) else [str(targets)],
        rslora=bool(found.get("use_rslora")),
        dora=bool(found.get("use_dora")),
    )


def _settings_of(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path, SETTINGS).read_text())
    except (OSError, ValueError) as error:
        raise LoadingError(f"{path}: {SETTINGS} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise LoadingError(f"{path}: {SETTINGS} holds no settings")
    return found


def read_tensors(path: str) -> dict[str, Tensor]:
    """What an adapter's directory holds, by the names of the model's modules: `model.layers.0.mlp.up_proj.lora_A.weight`
    [rank, in], `...lora_B.weight` [out, rank], of DoRA `...lora_magnitude_vector` [out]; `score.weight` of a reward model.

    Raises:
        LoadingError: something else is in it, or there is no such file.
    """
    file = Path(path, WEIGHTS)
    if not file.is_file():
        raise LoadingError(
            f"{path} must hold {WEIGHTS}; found none; write a directory as save_pretrained() of PEFT makes it"
        )
    with safe_open(file, framework="pt") as opened:
        found = {name.removeprefix(PREFIX): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    strange = [n for n in found if n != f"{HEAD}.weight" and not any(f".{kind}" in n for kind in KINDS)]
    if strange:
        raise LoadingError(f"{path} must hold an adapter alone; found {strange[0]} in {WEIGHTS}")
    return found


def on_meta(path: str, model: ModelConfig) -> Any:
    """The language model of a checkpoint or an adapter, without memory: its names and shapes."""
    config = config_of(path, model.trust_remote_code, model.revision_of(path))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code, dtype=torch.float32)


def stored_adapter(path: str, model: ModelConfig) -> dict[str, Tensor]:
    """The tensors of the adapter in the directory `path`, by the modules of its base's checkpoint, which engines read."""
    lm = on_meta(path, model)
    return {stored_name(lm, name): t for name, t in read_tensors(path).items() if ".lora_" in name}


def modules_in(tensors: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name.partition(".lora_")[0] for name in tensors if ".lora_" in name))


@torch.no_grad()
def fill(lm: nn.Module, tensors: dict[str, Tensor], path: str, name: str = TRAINED) -> None:
    """Give the adapter `name` of `lm` the weights of `read_tensors`, each of them.

    Raises:
        LoadingError: one is of a module without this adapter, or of another shape.
    """
    there = adapter_parameters(lm, name)
    for key, tensor in tensors.items():
        if ".lora_" not in key:
            continue
        if key not in there or there[key].shape != tensor.shape:
            found = f"{key} {list(tensor.shape)}"
            wanted = f"which has {list(there[key].shape)}" if key in there else "which has no such module"
            raise LoadingError(f"{path} must be an adapter of this model, {wanted}; found {found}")
        there[key].copy_(tensor)


def misfit(path: str, key: str, model: ModelConfig, memory: Path | None = None, role: Role = "policy") -> str | None:
    """Why the adapter in the directory `path`, which the configuration names at `key`, is not one of the checkpoint
    `model.path` with the settings of the role that it is for, which has adapters; None where it is.

    Raises:
        LoadingError: it cannot be read.
    """
    found, lora, base = lora_of(path), role_model(model, role).lora, model.path
    assert lora is not None
    for name in ("rank", "alpha", "rslora", "dora"):
        mine, its = getattr(lora, name), getattr(found, name)
        if mine != its:
            rule = f"an adapter with the {role.replace('_', ' ')}'s {name}, {mine}"
            instead = f"{lora_section(model, role)}={{{name}:{its}}}"
            return Check(False, f"{key}={path}", rule, its, instead).message
    problem = other_base(path, base, memory)
    if problem:
        instead = "the model.path that it was trained on"
        return Check(False, f"{key}={path}", f"an adapter of model.path={base}", problem, instead).message
    return None


def other_base(path: str, base: str, memory: Path | None = None) -> str | None:
    """Why `base` is not the checkpoint that the adapter was trained on, as far as its directory tells; None where it is.

    PEFT keeps no hash but a name, whose weights count: many a copy has another tokenizer file.
    """
    its, mine = _ours(path).get("base"), None
    if its:
        mine = checkpoint_fingerprint(base, None, memory)
    elif (named := split(path)[0]) != base:
        its, mine = _weights_hash(named, memory), _weights_hash(base, memory)
        if not its or not mine:
            missing, here = (base, named) if its else (named, base)
            return f"{missing} has no weights on this machine to be compared with those of {here}"
    if its == mine:
        return None
    return f"it was trained on a checkpoint with the hash {str(its)[:12]}, {base} has {str(mine)[:12]}"


def _weights_hash(path: str, memory: Path | None) -> str | None:
    """Of all weights of a checkpoint, here or in the hub's cache; None where none are there."""
    if not Path(path).is_dir():
        known = cached_file(path, CONFIG_NAME, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        if known is None:
            return None
        path = str(Path(known).parent)
    weights = [file for file in checkpoint_files(Path(path)) if file.suffix == ".safetensors"]
    return hashlib.sha256("".join(file_hashes(weights, memory)).encode()).hexdigest() if weights else None


def write(
    path: str,
    lora: LoraConfig,
    tensors: dict[str, Tensor],
    base: str,
    fingerprint: str,
    config: dict[str, Any],
    is_reward_model: bool,
) -> None:
    """The files of an adapter.

    Args:
        tensors: as `read_tensors` gives them.
        config: what training has set in the configuration of the base.
    """
    import peft

    root, is_local = Path(path), Path(base).is_dir()
    root.mkdir(parents=True, exist_ok=True)
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,  # type: ignore[arg-type]
        target_modules=modules_in(tensors),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="SEQ_CLS" if is_reward_model else "CAUSAL_LM",
        modules_to_save=[HEAD] if is_reward_model else None,
        base_model_name_or_path=str(Path(base).absolute()) if is_local else base,
        inference_mode=True,
    )
    settings.save_pretrained(path)
    stored = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, root / WEIGHTS, metadata={"format": "pt"})
    (root / OURS).write_text(json.dumps({"base": fingerprint, "config": config}, indent=1) + "\n")


@torch.no_grad()
def merge(lm: nn.Module, path: str) -> None:
    """Add the adapter in the directory `path`, and the head that it may have, to the weights of `lm`, which has no adapters.

    Raises:
        LoadingError: it is not of this model.
    """
    lora, tensors = lora_of(path), read_tensors(path)
    for module, layer in _layers_of(lm, path, lora, tensors).items():
        a, b = (tensors[f"{module}.{kind}.weight"] for kind in KINDS[:2])
        magnitude = tensors.get(f"{module}.{KINDS[2]}")
        layer.weight.copy_(merged(layer.weight, a, b, scale(lora), magnitude))
    if (head := tensors.get(f"{HEAD}.weight")) is not None:
        lm.get_submodule(HEAD).get_parameter("weight").copy_(head)


def _layers_of(lm: nn.Module, path: str, lora: LoraConfig, tensors: dict[str, Tensor]) -> dict[str, nn.Linear]:
    """The layers of `lm` with an adapter in the directory `path`, by name. Raises LoadingError where one does not fit."""
    found: dict[str, nn.Linear] = {}
    modules = dict(lm.named_modules())
    for module in modules_in(tensors):
        layer, shapes = modules.get(module), {k: t.shape for k, t in tensors.items() if k.startswith(f"{module}.lora_")}
        wanted: dict[str, tuple[int, ...]] = {}
        if isinstance(layer, nn.Linear):
            wanted = adapter_shapes(module, layer.weight.shape, lora)
            found[module] = layer
        if shapes != wanted:
            of = type(lm).__name__
            raise LoadingError(f"{path} must be an adapter of {of}; found one of {module}, which does not fit it")
        if layer is getattr(lm, "get_output_embeddings", lambda: None)() and _is_tied(lm):
            raise LoadingError(
                f"{path} must leave {module} as it is: it is {type(lm).__name__}'s embedding too, which merging would move"
            )
    return found


def _is_tied(lm: Any) -> bool:
    return bool(getattr(lm.config.get_text_config(), "tie_word_embeddings", False))


def check_fits(lm: nn.Module, path: str, key: str, base: str) -> None:
    """Refuse an adapter, named by the configuration at `key`, that is not of `lm`, which may be without memory, or that was
    trained on another checkpoint than `base`; one of a reward model without its head, or for a language model.

    Raises:
        LoadingError: naming what does not fit.
    """
    tensors = read_tensors(path)
    _layers_of(lm, path, lora_of(path), tensors)
    head, is_classifier = tensors.get(f"{HEAD}.weight"), "SequenceClassification" in type(lm).__name__
    if not is_classifier and (head is not None or _settings_of(path).get("task_type") == "SEQ_CLS"):
        instead = "one of a language model, or the key of a reward model"
        raise LoadingError(
            Check(False, f"{key}={path}", "an adapter of a language model", "one of a reward model", instead).message
        )
    if is_classifier and (head is None or head.shape[0] != 1):
        found = "none" if head is None else f"one of shape {list(head.shape)}"
        instead = f"one that was trained with modules_to_save=[{HEAD}] and one label"
        raise LoadingError(
            Check(False, f"{key}={path}", f"an adapter with a scalar head {HEAD}.weight", found, instead).message
        )
    if problem := other_base(path, base):
        raise LoadingError(
            Check(False, f"{key}={path}", f"an adapter of {base}", problem, "the base of its training").message
        )


def write_merged(path: str, out: Path) -> None:
    """The adapter in the directory `path` and its base as one plain checkpoint, in the base's own dtype, with the tokenizer
    and the settings of generation that lie beside the adapter, or else beside the base.

    Raises:
        LoadingError: the base is not there, or another one, or of few bits.
    """
    base, _ = split(path)
    if problem := other_base(path, base):
        raise LoadingError(f"{path} does not belong to {base}: {problem}")
    is_reward_model = _settings_of(path).get("task_type") == "SEQ_CLS"
    auto: Any = AutoModelForSequenceClassification if is_reward_model else AutoModelForCausalLM
    config = config_of(path)
    refuse_quantised(config, base, "base_model_name_or_path")
    if is_reward_model:
        config.num_labels, config.problem_type = 1, "regression"  # else vLLM puts scores through a sigmoid
    options: dict[str, Any] = {"config": config, "dtype": "auto", "use_safetensors": True}
    lm = auto.from_pretrained(base, trust_remote_code=False, **options)
    merge(lm, path)
    if lm.can_generate():
        lm.generation_config = GenerationConfig()  # transformers refuses to save what many published ones hold
    lm.save_pretrained(out)
    (out / GENERATION_CONFIG_NAME).unlink(missing_ok=True)  # what stands in for none says that nothing ends a text
    if generation := _file_of(path, GENERATION_CONFIG_NAME):
        shutil.copyfile(generation, out / GENERATION_CONFIG_NAME)
    if _file_of(path, TOKENIZER):
        AutoTokenizer.from_pretrained(holder(path, TOKENIZER), trust_remote_code=False).save_pretrained(out)
    for file in Path(path).iterdir():
        if file.is_file() and file.suffix not in OF_TRAINING and file.name not in (SETTINGS, OURS, CONFIG_NAME):
            shutil.copyfile(file, out / file.name)


def _file_of(path: str, name: str) -> str | None:
    """Of the adapter, or else of its base; None where neither has it."""
    found: str | None = cached_file(holder(path, name), name, _raise_exceptions_for_missing_entries=False)
    return found
