"""Which files a piece of Python is made of: its own source and what that imports from beside it.

Imports are read off the source, those inside functions included; nothing is executed. What is imported by a name that is put
together at run time, and files that code reads, are not seen.
"""

import ast
import hashlib
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

TANDEM = Path(__file__).resolve().parents[2]
PACKAGES = ("actors", "common", "contracts", "controller", "learner", "reward_service")
INSTALLED = {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib", "stdlib")}


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed: vllm, for one, has another name on CPU."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def split_function(function: str) -> tuple[str, str]:
    """("package.module" or "path/file.py", name) of "module:name".

    Raises:
        ValueError: where it has another form.
    """
    module, _, name = function.rpartition(":")
    if not module or not name.isidentifier():
        raise ValueError(f"{function!r} is not of the form package.module:function or path/file.py:function")
    return module, name


def function_source(function: str) -> Path:
    """The file of a function or class, found without importing it.

    Raises:
        ValueError: where there is none.
    """
    module, _ = split_function(function)
    if module.endswith(".py"):
        path = Path(module)
    else:
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            spec = None
        path = Path(spec.origin) if spec and spec.origin else Path(module)
    if not path.is_file():
        raise ValueError(f"{function}: there is no source file {path}")
    return path.resolve()


def source_signature(function: str) -> inspect.Signature | None:
    """The signature that the source of a function says, with annotations as texts. It is not executed: None for what is no
    plain `def`, as one with a decorator or what was imported from elsewhere. Raises as `function_source`."""
    file, name = function_source(function), split_function(function)[1]
    try:
        statements = parsed(file.read_bytes()).body
    except SyntaxError:  # for whoever runs it to say
        return None
    made = [s for s in statements if isinstance(s, ast.FunctionDef | ast.AsyncFunctionDef) and s.name == name]
    if not made or made[-1].decorator_list:
        return None
    given = made[-1].args
    plain = [*given.posonlyargs, *given.args]
    defaults = [*[None] * (len(plain) - len(given.defaults)), *given.defaults, *given.kw_defaults]
    kinds: list[Any] = [inspect.Parameter.POSITIONAL_ONLY] * len(given.posonlyargs)
    kinds += [inspect.Parameter.POSITIONAL_OR_KEYWORD] * len(given.args)
    kinds += [inspect.Parameter.KEYWORD_ONLY] * len(given.kwonlyargs)
    parameters = [
        inspect.Parameter(
            argument.arg,
            kind,
            default=inspect.Parameter.empty if default is None else ast.unparse(default),
            annotation=inspect.Parameter.empty if argument.annotation is None else ast.unparse(argument.annotation),
        )
        for argument, kind, default in zip([*plain, *given.kwonlyargs], kinds, defaults, strict=True)
    ]
    if given.vararg:
        parameters.insert(len(plain), inspect.Parameter(given.vararg.arg, inspect.Parameter.VAR_POSITIONAL))
    if given.kwarg:
        parameters.append(inspect.Parameter(given.kwarg.arg, inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters)


def source_digest(function: str) -> str:
    """SHA-256 (hex) over the source of a function or class, "module:name", and of all that it imports from beside it. Of
    Tandem's code there is a digest of its own (common/files/code_digest.py). Raises as `function_source`."""
    digest = hashlib.sha256(split_function(function)[1].encode())
    for file in sorted(own_files(function)):
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def own_files(function: str) -> set[Path]:
    """The source of a function or class, "module:name", and all that it imports from beside it: from the directory of its
    file, from where its package lies, and from the places on Python's path that the file lies below. Nothing of Tandem,
    but for what is named. Raises as `function_source`."""
    entry, module = function_source(function), split_function(function)[0]
    depth = 0 if module.endswith(".py") else module.count(".") + (entry.name == "__init__.py")
    root = entry.parents[depth]
    package = root / module.split(".")[0]
    # A file that is named by its path may be of a package all the same, and import from it by its name.
    above = {Path(place).resolve() for place in sys.path if entry.is_relative_to(Path(place).resolve())} - INSTALLED

    def follows(file: Path) -> bool:
        if root in INSTALLED:  # every package lies beside every other there
            return file.is_relative_to(package)
        return not is_tandem(file)

    return imported_files([entry], {entry.parent, root, *above}, follows)


def is_tandem(file: Path, root: Path = TANDEM) -> bool:
    return file.is_relative_to(root) and file.relative_to(root).parts[0] in PACKAGES


def imported_files(entries: Iterable[Path], roots: Iterable[Path], follows: Callable[[Path], bool]) -> set[Path]:
    """`entries` and every file that they import, directly or not, from below one of `roots`, as far as it `follows`."""
    roots, seen, left = list(roots), set[Path](), list(entries)
    while left:
        file = left.pop()
        seen.add(file)
        found = [file.parent / "__init__.py", file.parent.parent / "__init__.py"]
        found = [package for package in found if package.is_file()] if found[0].is_file() else []
        for dotted, folder in _imports(file, file.read_bytes()):
            for root in roots if folder is None else [folder]:
                found += _files_of(dotted, root)
        left += {new for new in found if new not in seen and follows(new)}
    return seen


def parsed(source: bytes) -> ast.Module:
    """The syntax tree of a file's content.

    Where a run ends by a signal, Python 3.11.7 was seen to make this a SystemError ("recursion depth mismatch": it counts
    the depth of all trees that are being made in one place). So it is made again, and in a thread, which handles no signal.
    """

    def parse() -> ast.Module:
        for _ in range(100):
            with suppress(SystemError):
                return ast.parse(source)
        return ast.parse(source)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(parse).result()


@cache
def _imports(file: Path, source: bytes) -> list[tuple[str, Path | None]]:
    """(dotted name, the directory that it is relative to) of everything that a file may import; None for absolute names.
    The stages of a run have most files in common."""
    found: list[tuple[str, Path | None]] = []
    try:
        nodes: list[ast.AST] = [parsed(source)]
    except SyntaxError:  # for whoever runs it to say
        return found
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            nodes += node.orelse
        elif isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folder = file.parents[node.level - 1] if node.level else None
            base = [node.module] if node.module else []
            found += [(".".join([*base, alias.name]), folder) for alias in node.names]
        else:
            nodes += ast.iter_child_nodes(node)
    return found


def _files_of(dotted: str, root: Path) -> list[Path]:
    """The files that importing a name below `root` executes: each package on the way, and the module. The last part of the
    name may be something in a module."""
    files, folder = list[Path](), root
    for part in dotted.split("."):
        if (module := folder / f"{part}.py").is_file():
            return [*files, module]
        folder /= part
        if (package := folder / "__init__.py").is_file():
            files.append(package)
        elif not folder.is_dir():
            break
    return files
