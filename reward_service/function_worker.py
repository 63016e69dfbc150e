"""The process that a rule function runs in: one JSON line in, one out. Ended from outside when it takes too long.

Started as `python -m reward_service.function_worker FUNCTION MEMORY_GIB`. What the function prints goes nowhere, since it
may be a text of a completion.
"""

import importlib
import importlib.util
import inspect
import json
import resource
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

from reward_service.processes import belong_to_parent, own_channels


def load(function: str) -> Callable[..., Any]:
    """Raises TypeError for what must be awaited; whatever its module raises."""
    module_name, _, name = function.rpartition(":")
    if module_name.endswith(".py"):
        spec = importlib.util.spec_from_file_location("reward_functions", module_name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(module_name)
    loaded = getattr(module, name)
    kinds = (inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    if any(is_kind(one) for is_kind in kinds for one in (loaded, getattr(loaded, "__call__", None))):  # noqa: B004
        raise TypeError(
            "it must be a plain function: nobody awaits what it returns; found an async one; write it without async"
        )
    return loaded


def arguments_for(function: Callable[..., Any], request: dict[str, list]) -> dict[str, list]:
    """What the function asks for: prompts, completions and labels by these names, or all of them with `**kwargs`."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return request
    return {name: request[name] for name in (p.name for p in parameters) if name in request}


class Refused(ValueError):
    """What a function returned is no list of numbers; the text is an item's error, "code: detail"."""


def plain_scores(value: Any) -> list[int | float]:
    """What a function returned as numbers that JSON can carry, those of numpy and torch as Python's.

    Raises:
        Refused: where it is something else.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list | tuple):
        raise Refused(_wrong_type(value, "a list"))
    return [_number(item) for item in value]


def _number(value: Any) -> int | float:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused(_wrong_type(value, "a number"))
    try:
        float(value)
    except OverflowError:
        raise Refused("non_finite: an integer beyond the range of float") from None
    return value


def _wrong_type(value: Any, wanted: str) -> str:
    hint = ""
    if inspect.isawaitable(value) or inspect.isasyncgen(value):
        hint = ": nobody awaits it, write the function without async"
    elif isinstance(value, Iterator):
        hint = ": nobody runs through it, return list(...) of it"
    return f"wrong_type: {type(value).__name__} instead of {wanted}{hint}"


def limit_memory(gib: float) -> None:
    """Address space beyond what the imports took: a function that grows gets a MemoryError of its own."""
    with open("/proc/self/statm") as statm:
        taken = int(statm.read().split()[0]) * resource.getpagesize()
    limit = taken + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(function_name: str, memory_gib: float) -> None:
    belong_to_parent()
    requests, replies = own_channels()
    try:
        function = load(function_name)
        limit_memory(memory_gib)
    except Exception as error:  # the replica that started this process reports it and does not start
        answer(replies, {"error": f"{type(error).__name__}: {error}"})
        return
    answer(replies, {"ready": True})
    for line in requests:
        try:
            answer(replies, {"scores": plain_scores(function(**arguments_for(function, json.loads(line))))})
        except Refused as refused:
            answer(replies, {"refused": str(refused)})
        except Exception as error:  # the item's error; its type alone, since its text may quote the completion
            answer(replies, {"error": type(error).__name__})


def answer(replies: IO[str], reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
