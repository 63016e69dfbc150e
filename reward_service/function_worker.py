"""The process that a rule function runs in: one JSON line in, one out. Ended from outside when it takes too long.

Started as `python -m reward_service.function_worker FUNCTION MEMORY_GIB`. What the function prints goes nowhere, since it
may be a text of a completion.
"""

import importlib
import importlib.util
import inspect
import json
import os
import resource
import sys
from asyncio import new_event_loop
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

from reward_service.call_forms import MISSING, CallForm, Logged, Request, call_form, parsed_request
from reward_service.function_answers import Plain, Refused, plain_scores
from reward_service.processes import belong_to_parent, own_channels

LOOP = new_event_loop()  # of async functions, for as long as the process lives


def load(function: str) -> Callable[..., Any]:
    """Raises TypeError for an async generator; whatever its module raises."""
    module_name, _, name = function.rpartition(":")
    if module_name.endswith(".py"):
        # It imports from beside it, as if it were run. Last, as a rule in math.py is no reason to change what others import.
        sys.path.append(str(Path(module_name).resolve().parent))
        spec = importlib.util.spec_from_file_location("reward_functions", module_name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(module_name)
    loaded = getattr(module, name)
    if any(map(inspect.isasyncgenfunction, (loaded, getattr(loaded, "__call__", None)))):  # noqa: B004
        raise TypeError("it must return a list: nobody runs through what it yields; found an async generator")
    return loaded


def scores_of(function: Callable[..., Any], form: CallForm, request: Request) -> list[Plain]:
    """Raises Refused; whatever the function raises."""
    rows, labels = request.get("rows", []), request.get("labels", [])
    if any(row.keys() != rows[0].keys() for row in rows):  # columns are lists of all items: these are asked apart
        raise Refused("wrong_type: rows with different columns")
    for row, label in zip_longest(rows, labels):
        if missing := form.lacks(row, label):
            raise Refused(f"{MISSING}: the function needs {missing}")
    count = max(map(len, request.values()), default=0)
    logged = Logged(count)
    answer = form.call(function, request, logged)
    return plain_scores(LOOP.run_until_complete(answer) if inspect.isawaitable(answer) else answer, count, logged)


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
        form = call_form(inspect.signature(function))
        limit_memory(memory_gib)
    # SystemExit too: the replica that started this process reports it and does not start.
    except BaseException as error:
        answer(replies, {"error": f"{type(error).__name__}: {error}"})
        return
    answer(replies, {"wants": form.wants})
    own = os.getpid()
    for line in requests:
        try:
            reply: dict[str, Any] = {"scores": scores_of(function, form, parsed_request(line, form))}
        except Refused as refused:
            reply = {"refused": str(refused)}
        # The item's error, SystemExit too; its type alone, since its text may quote the completion.
        except BaseException as error:
            reply = {"error": type(error).__name__}
        if os.getpid() != own:
            os._exit(0)  # a copy that the function has made of this process
        answer(replies, reply)


def answer(replies: IO[str], reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
