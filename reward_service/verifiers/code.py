"""The last fenced block of a completion passes the tests of its row, in processes of its own: reward_service/sandbox.py."""

import ast
import json
from contextlib import suppress
from typing import Any, NamedTuple

from reward_service.sandbox import GRACE_S, Limits, Tests, encloses, outputs, passed
from reward_service.verifier import BadRow, Option, Options, Row, Verified, Verifier, column, flag, one_of
from reward_service.verifiers._answers import fenced

WANTED = "Python with asserts, a list of such texts, or a list of {input, output} for a program that reads and prints"
CONTEXT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


class Wanted(NamedTuple):
    tests: Tests
    outputs: tuple[str, ...]  # of a program, for each input


def read(row: Row, options: Options) -> Wanted:
    name = options["answer"]
    value: Any = column(row, name)
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):  # a list of Python
            value = json.loads(value)
    if isinstance(value, dict) and isinstance(value.get("inputs"), list) and isinstance(value.get("outputs"), list):
        if len(value["inputs"]) != len(value["outputs"]):
            raise BadRow(f"{name} must have as many outputs as inputs; write one for each")
        value = [{"input": i, "output": o} for i, o in zip(value["inputs"], value["outputs"], strict=True)]
    if isinstance(value, str):
        return Wanted(statements(name, [value]), ())
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return Wanted(statements(name, value), ())
    if isinstance(value, list) and value and all(_is_case(one) for one in value):
        return Wanted(Tests(inputs=tuple(one["input"] for one in value)), tuple(one["output"] for one in value))
    raise BadRow(f"{name} must be {WANTED}; write one test or more")


def _is_case(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("input", "output"))


def statements(name: str, sources: list[str]) -> Tests:
    """Each statement that is no import, definition or assignment is a test; so is each function test_*, where nothing calls
    it. Raises BadRow."""
    context: list[ast.stmt] = []
    tests: list[ast.stmt] = []
    for source in sources:
        try:
            body = ast.parse(source).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise BadRow(f"{name} must be {WANTED}; found what is no Python; write valid Python") from None
        for statement in body:
            (context if isinstance(statement, CONTEXT) else tests).append(statement)
    called = {node.func.id for test in tests for node in ast.walk(test) if _calls_name(node)}  # type: ignore[attr-defined]
    functions = [one for one in context if isinstance(one, ast.FunctionDef) and not one.args.args]
    for name_of_test in [one.name for one in functions if one.name.startswith("test") and one.name not in called]:
        tests += ast.parse(f"{name_of_test}()").body
    tests = [test for test in tests if not (isinstance(test, ast.Expr) and isinstance(test.value, ast.Constant))]
    if not tests:
        raise BadRow(f"{name} must be {WANTED}; found no test; write asserts, or a call of the function that has them")
    # The source may have come with line numbers of several texts; what is run is made of the statements alone.
    return Tests("\n".join(map(ast.unparse, context)), tuple(map(ast.unparse, tests)))


def _calls_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def verify(completion: str, right: Wanted, options: Options) -> Verified:
    code = fenced(completion, "python", "python3", "py")
    if code is None and not options["fenced"]:
        code = completion
    if not code or not _compiles(code):
        return {"score": 0.0, "passed": 0.0, "extracted": float(code is not None)}
    limits = Limits(options["seconds"], options["memory_mib"], options["processes"])
    if right.tests.inputs:
        found = outputs(code, right.tests, limits)
        count = sum(_lines(found[number]) == _lines(right.outputs[number]) for number in found)
    else:
        count = len(passed(code, right.tests, limits))
    share = count / max(len(right.tests.inputs), len(right.tests.statements))
    return {"score": share if options["partial"] else float(share == 1), "passed": share, "extracted": 1.0}


def _compiles(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _lines(text: str) -> list[str]:
    """Without the white space at their ends, and empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _number(default: float, least: float, most: float) -> Option:
    rule = f"a number from {least:g} to {most:g}"
    return Option(
        default, rule, lambda n: isinstance(n, int | float) and not isinstance(n, bool) and least <= n <= most,
        f"for example {default:g} (the default)",
    )  # fmt: skip


def _whole(default: int, least: int, most: int) -> Option:
    rule = f"a whole number from {least} to {most}"
    return Option(
        default, rule, lambda n: isinstance(n, int) and not isinstance(n, bool) and least <= n <= most,
        f"for example {default} (the default)",
    )  # fmt: skip


def prepare(options: Options) -> None:
    if not encloses() and options["isolation"] == "required":
        raise OSError(
            "the kernel has no namespaces for this user, which options.isolation=required asks for; write auto"
        )


VERIFIER = Verifier(
    read=read,
    verify=verify,
    prepare=prepare,
    least_timeout_s=lambda options: options["seconds"] + GRACE_S,
    answer="tests",
    options={
        "partial": flag(False),
        "fenced": flag(True),
        "seconds": _number(3.0, 0.1, 600),
        "memory_mib": _whole(512, 64, 1 << 20),
        "processes": _whole(8, 1, 256),
        "isolation": one_of("auto", "required"),
    },
)
