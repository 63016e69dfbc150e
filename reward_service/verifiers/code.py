"""The last fenced block of a completion passes the tests of its row, in processes of its own: reward_service/sandbox.py."""

import ast
import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from reward_service.sandbox import GRACE_S, Limits, Tests, encloses, outputs, passed
from reward_service.sandbox_runner import OUTPUT_BYTES
from reward_service.verifier import BadRow, Option, Options, Row, Verified, Verifier, column, flag, one_of
from reward_service.verifiers._answers import answered, fenced

WANTED = "Python with asserts, a list of such texts, or a list of {input, output} for a program that reads and prints"
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITION = (ast.Import, ast.ImportFrom, *FUNCTION, ast.ClassDef)
CONTEXT = (*DEFINITION, ast.Assign, ast.AnnAssign)
# What data sets write in tests that call a function: its name, or the kind of test.
NAMES = ("fn_name", "func_name", "function_name", "entry_point")
CALLS = ("functional", "function_call")
INPUT_BYTES = Limits.folder_mib << 20  # of the file that it is read from


class Wanted(NamedTuple):
    tests: Tests
    outputs: tuple[str, ...]  # of a program, for each input


def read(row: Row, options: Options) -> Wanted:
    name = options["answer"]
    value: Any = column(row, name)
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):  # as Python writes a list of texts
                value = ast.literal_eval(value)
    if any(map(_calls_by_name, value if isinstance(value, list) else [value])):
        raise BadRow(
            f"{name} must be {WANTED}; found tests that call a function by its name, which are not run; write asserts in "
            "their place, for example assert f(1, 2) == 3"
        )
    if isinstance(value, dict) and isinstance(value.get("inputs"), list) and isinstance(value.get("outputs"), list):
        if len(value["inputs"]) != len(value["outputs"]):
            raise BadRow(f"{name} must have as many outputs as inputs; write one for each")
        value = [{"input": i, "output": o} for i, o in zip(value["inputs"], value["outputs"], strict=True)]
    if isinstance(value, str):
        return Wanted(statements(name, [value]), ())
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return Wanted(statements(name, value), ())
    if isinstance(value, list) and value and all(_is_case(one) for one in value):
        if any(_bytes(case["input"]) > INPUT_BYTES for case in value):
            raise BadRow(f"{name} must have inputs of at most {INPUT_BYTES} bytes of UTF-8; write shorter ones")
        if any(_bytes("\n".join(_lines(case["output"]))) > OUTPUT_BYTES for case in value):
            raise BadRow(f"{name} must have outputs of at most {OUTPUT_BYTES} bytes of UTF-8; write shorter ones")
        return Wanted(Tests(inputs=tuple(one["input"] for one in value)), tuple(one["output"] for one in value))
    raise BadRow(f"{name} must be {WANTED}; write one test or more")


def _is_case(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("input", "output"))


def _calls_by_name(value: Any) -> bool:
    """Whether a test has arguments and a result, as LiveCodeBench's and APPS' may, where a program's has what it reads and
    prints."""
    if not isinstance(value, dict):
        return False
    is_call = value.get("testtype") in CALLS or value.get("type") in CALLS or any(map(value.get, NAMES))
    return is_call or _calls_by_name(value.get("metadata"))


def _bytes(text: str) -> float:
    try:
        return len(text.encode())
    except UnicodeEncodeError:  # half a character, which no program reads or prints
        return math.inf


def statements(name: str, sources: list[str]) -> Tests:
    """The tests of a row. Those of a text are its statements with an assert, its calls of functions that have some, and its
    functions test_*, where nothing calls them; a text without any has each call and statement that is no definition or
    assignment, as it may raise.

    What stands before a test in its text comes before it, and so do definitions and assignments of earlier texts. Earlier
    tests come too where the text has something that they may have changed.

    Raises:
        BadRow: there is no test, or one that would not be run.
    """
    before: list[ast.stmt] = []  # of earlier texts
    tests: list[list[ast.stmt]] = []
    for source in sources:
        body = _body(name, source)
        functions = [one for one in [*before, *body] if isinstance(one, FUNCTION)]
        asserting = {one.name for one in functions if _has_assert(one)}
        ours = [one for one in body if not isinstance(one, CONTEXT)]
        chosen = [one for one in ours if _has_assert(one) or _calls(one) & asserting]
        alone = _uncalled_tests(name, body, ours)
        if not chosen and not alone:
            # A comparison without an assert would hold whatever it says.
            chosen = [one for one in ours if not isinstance(one, ast.Expr) or isinstance(one.value, ast.Call)]
        has_state = any(not isinstance(one, DEFINITION) for one in body if one not in chosen)
        own = [*before]
        for statement in body:
            if statement not in chosen:
                own.append(statement)
                continue
            tests.append([*own, statement])
            if has_state:
                own.append(ast.Try([statement], [ast.ExceptHandler(None, None, [ast.Pass()])], [], []))
        tests += [[*own, call] for call in alone]
        before += [one for one in body if isinstance(one, CONTEXT)]
    if not tests:
        raise BadRow(f"{name} must be {WANTED}; found no test; write asserts, or a call of the function that has them")
    shared = 0
    while all(len(test) > shared + 1 and test[shared] is tests[0][shared] for test in tests):
        shared += 1
    return Tests(_text(tests[0][:shared]), tuple(_text(test[shared:]) for test in tests))


def _text(body: list[ast.stmt]) -> str:
    # The source may have come with line numbers of several texts; what is run is made of the statements alone.
    return "\n".join(ast.unparse(ast.fix_missing_locations(statement)) for statement in body)


def _body(name: str, source: str) -> list[ast.stmt]:
    """Statements, those under `if __name__ == "__main__":` among them, without the call of a framework's main."""
    try:
        found = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise BadRow(f"{name} must be {WANTED}; found what is no Python; write valid Python") from None
    body: list[ast.stmt] = []
    for statement in found:
        is_guard = isinstance(statement, ast.If) and "__name__" in {n.id for n in _inside(statement.test, ast.Name)}
        body += statement.body if is_guard else [statement]  # type: ignore[attr-defined]
    return [
        one
        for one in body
        if not (isinstance(one, ast.Expr) and re.match(r"(?:unittest|pytest)\.main\(", ast.unparse(one)))
    ]


def _uncalled_tests(name: str, body: list[ast.stmt], ours: list[ast.stmt]) -> list[ast.stmt]:
    """Calls of the functions test_* that nothing calls. Raises BadRow for tests that are not to be called so."""
    called = {call for statement in ours for call in _calls(statement)}
    found: list[ast.stmt] = []
    for one in body:
        methods = [f for f in one.body if isinstance(f, FUNCTION)] if isinstance(one, ast.ClassDef) else []
        is_test = isinstance(one, FUNCTION) and one.name.startswith("test") and one.name not in called
        needs_more = is_test and (isinstance(one, ast.AsyncFunctionDef) or _needs_arguments(one))  # type: ignore[arg-type]
        if needs_more or any(method.name.startswith("test") for method in methods):
            raise BadRow(
                f"{name} must be {WANTED}; found {one.name}, "  # type: ignore[attr-defined]
                "which a framework would have to call; write asserts, or functions test_* without arguments"
            )
        if is_test:
            found += ast.parse(f"{one.name}()").body  # type: ignore[attr-defined]
    return found


def _needs_arguments(function: ast.FunctionDef) -> bool:
    of = function.args
    return len(of.posonlyargs) + len(of.args) > len(of.defaults) or any(default is None for default in of.kw_defaults)


def _inside(node: ast.AST, kind: type) -> Iterator[Any]:
    """Nodes of a kind, which are not in definitions within."""
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if isinstance(one, kind):
            yield one
        if one is node or not isinstance(one, (*FUNCTION, ast.ClassDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(one)


def _has_assert(statement: ast.stmt) -> bool:
    return any(_inside(statement, ast.Assert))


def _calls(statement: ast.stmt) -> set[str]:
    """Names of the functions that a statement calls."""
    return {call.func.id for call in _inside(statement, ast.Call) if isinstance(call.func, ast.Name)}


def verify(completion: str, right: Wanted, options: Options) -> Verified:
    answer = answered(completion)
    code = fenced(answer, "python", "py")
    if code is None and not options["fenced"]:
        code = answer
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
