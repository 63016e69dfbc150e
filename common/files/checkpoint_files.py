"""Which files a load of a checkpoint reads: those of its directory, all of which are in its fingerprint, and no others.

A link among them may lead to a file of the same directory or into the blobs of a hub cache, which are named by their
content; the directory itself may be one. Weights are safetensors: `pytorch_model.bin` is a pickle, which transformers reads
with PyTorch's restricted unpickler (weights_only). That has had holes before; nothing is unpickled here.
"""

import json
from pathlib import Path, PurePosixPath

from contracts.scoring import GOLDEN_FILE

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"  # of PEFT


def counts(name: PurePosixPath) -> bool:
    """Whether a file decides what a checkpoint is. Golden scores, model cards and hidden files do not."""
    return name.name != GOLDEN_FILE and name.suffix != ".md" and not any(part.startswith(".") for part in name.parts)


def is_inside(name: str) -> bool:
    """Whether the name of a file, relative to a directory, names one below it by the way of no other directory."""
    path = PurePosixPath(name)
    return bool(path.parts) and path.as_posix() == name and not path.is_absolute() and ".." not in path.parts


def checkpoint_files(root: Path) -> list[Path]:
    """The files that decide what the checkpoint in the directory `root` is.

    Raises:
        ValueError: naming a file that a load would read, or leave, although it is not of this checkpoint.
    """
    files = sorted(file for file in root.rglob("*") if counts(PurePosixPath(file.relative_to(root))))
    for link in (file for file in files if file.is_symlink()):
        if not _may_be_followed(root.resolve(), link.resolve()):
            raise ValueError(
                f"{link} must be a file, or a link to one of the same directory or of a hub cache; it leads to "
                f"{link.resolve()}; write a copy in its place"
            )
    _check_weights(root)
    return [file for file in files if file.is_file()]


def weight_files(root: Path) -> list[Path]:
    """The safetensors files of the weights in the directory `root`, as transformers chooses them: those of the index, or
    `model.safetensors`. What else lies there (an original format, an adapter) is none of them.

    Raises:
        FileNotFoundError: there is none.
    """
    index, one = root / INDEX, root / "model.safetensors"
    found = [one] if one.exists() else sorted(root / name for name in _named_by(index)) if index.exists() else []
    if not found:
        raise FileNotFoundError(f"{root} has neither {one.name} nor {INDEX}")
    return found


def adapter_base(root: Path) -> str | None:
    """The checkpoint that an adapter of PEFT says it belongs to: a directory, or else a hub id or what is not there; None
    of another checkpoint, and where nothing is said.

    Raises:
        ValueError: what the adapter says cannot be read.
    """
    if not (root / ADAPTER).is_file():
        return None
    try:
        named = json.loads((root / ADAPTER).read_text())["base_model_name_or_path"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{root / ADAPTER} cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(named, str) or not named:
        return None
    return str(root / named) if not Path(named).is_dir() and (root / named).is_dir() else named


def _may_be_followed(root: Path, target: Path) -> bool:
    """As transformers' and huggingface_hub's `models--OWNER--NAME/snapshots/COMMIT/FILE -> ../../blobs/HASH`."""
    is_blob = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
    return is_blob or (target.is_file() and target.is_relative_to(root))


def _check_weights(root: Path) -> None:
    there = {file.name for file in root.glob("model*.safetensors")}
    pickles = sorted(file.name for file in root.glob("pytorch_model*.bin"))
    if pickles and not any(root.glob("*.safetensors")):
        raise ValueError(
            f"{root} must hold its weights as safetensors; found {pickles[0]}, a pickle, which may run code when "
            "it is read; where you trust it, load it with transformers and write what save_pretrained() makes of it"
        )
    index = root / INDEX
    if not index.exists():
        named = {"model.safetensors"} if "model.safetensors" in there else there
    else:
        named = _named_by(index)
        if strange := sorted(name for name in named if not is_inside(name) or not counts(PurePosixPath(name))):
            raise ValueError(
                f"{index} must name files of its own directory; found {strange[0]!r}; write a checkpoint with all its files"
            )
    if foreign := sorted(there - named):
        raise ValueError(
            f"{root} must hold one set of weights; found {foreign[0]} beside {INDEX if index.exists() else 'another'}"
            "; write a directory without it"
        )


def _named_by(index: Path) -> set[str]:
    try:
        named = set(json.loads(index.read_text())["weight_map"].values())
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{index} cannot be read: {type(error).__name__}: {error}") from None
    if strange := [name for name in named if not isinstance(name, str)]:
        raise ValueError(
            f"{index} must name files; found {strange[0]!r}; write a checkpoint as save_pretrained() makes it"
        )
    return named
