"""Rule functions in processes of their own, so that one that hangs, crashes or grows can be ended without harm to others.

A function takes lists, of items and of columns of their rows, and returns one score an item:

    def right(texts: list[str], rows: list[dict]) -> list[float]: ...

Those written for TRL, verl and OpenRLHF run as they are (reward_service/call_forms.py); one in no known form is refused
before anything starts. It gets up to `batch_size` items a call, fewer of a slow function. Each score is of its item alone.
It may be `async`, and is no generator.
"""

import ast
import asyncio
import json
import math
import os
import re
import secrets
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

from common.error_text import last_line
from common.files.code_digest import foreign_digest, function_digest
from common.files.source_code import function_source, parsed, source_signature, split_function
from contracts.checks.check import Check
from contracts.config import RewardServiceConfig, ScorerConfig
from contracts.plugins import BY_PATH, Kind
from contracts.records import Score, ScoringItem
from reward_service.call_forms import CallForm, UnknownForm, call_form
from reward_service.function_answers import Plain
from reward_service.isolate import KILLS, Failed, Quarantine, isolate
from reward_service.processes import MARK, end_family
from reward_service.scorer_kind import Scorer, ScorerKind, ScorerSpec, Text, text_reader, version_of

# It may share a core with all that starts. After cluster.start_timeout_s, which is more, the service gives up.
START_S = 240.0
CALL_S = 0.1
# An item's entry in each field of a request (call_forms.FIELDS). What is JSON already stays as it is.
JSON_OF: dict[str, Callable[[Text], str]] = {
    "prompts": lambda text: json.dumps(text.prompt),
    "completions": lambda text: json.dumps(text.completion),
    "labels": lambda text: json.dumps(text.label),
    "rows": lambda text: text.row or "null",
    "messages": lambda text: text.messages or "null",
    "completion_ids": lambda text: json.dumps(text.completion_ids),
    "queries": lambda text: json.dumps(text.query),
}


class Function(ScorerKind):
    def checks(self, key: str, entry: ScorerConfig, service: RewardServiceConfig) -> list[Check]:
        form, found = "package.module:name or path/file.py:name", entry.function
        return [
            Check(bool(re.fullmatch(r".+:\w+", found or "")), f"{key}.function", form, found, "rules.py:f"),
            *process_checks(key, entry, service),
        ]

    def problems(self, key: str, entry: ScorerConfig) -> list[str]:
        """As its source says; `import_problems` runs that."""
        try:
            form_in_source(str(entry.function))
        except ValueError as error:
            return [f"{key}: {error}"]
        except UnknownForm as error:
            return [f"{key}.function={entry.function} must be a function that is called in a known form: {error}"]
        return []

    def needs_rows(self, entry: ScorerConfig) -> Callable[[dict[str, Any]], str | None] | None:
        form = form_in_source(str(entry.function))
        return form.lacks_in_data if form else None

    def content(self, entry: ScorerConfig, memory: Path | None = None) -> str:
        return foreign_digest(entry.function) if entry.function else ""

    def named_code(self, entry: ScorerConfig) -> list[tuple[Kind, str]]:
        return [(BY_PATH, entry.function)] if entry.function else []

    def spec(self, name: str, entry: ScorerConfig, service: RewardServiceConfig, tokenizer: str | None) -> ScorerSpec:
        source = entry.function or ""
        return ScorerSpec(
            name,
            entry,
            function_version(source),
            calls=entry.processes * service.most_replicas,
            call_items=entry.batch_size,
            # Far below the time-out, which is one for the whole call: a slow function gets its items one by one.
            call_s=min(CALL_S, entry.timeout_s / 4),
            source=source,
            needs_seam=not has_whole_queries(source),
        )

    def make(self, entry: ScorerConfig, service: RewardServiceConfig, tokenizer: str) -> Scorer:
        return FunctionScorer(entry, tokenizer)


def process_checks(key: str, entry: ScorerConfig, service: RewardServiceConfig) -> list[Check]:
    """The rules on the processes of a scorer."""
    return [
        Check(
            0 < entry.timeout_s < service.deadline_s,
            f"{key}.timeout_s",
            f"above 0 and below reward_service.deadline_s ({service.deadline_s})",
            entry.timeout_s,
            "for example 5.0 (the default)",
        ),
        Check(entry.processes >= 1, f"{key}.processes", "at least 1", entry.processes, "1 (the default)"),
        Check(entry.batch_size >= 1, f"{key}.batch_size", "at least 1", entry.batch_size, "32 (the default)"),
        Check(entry.memory_gib > 0, f"{key}.memory_gib", "above 0", entry.memory_gib, "for example 2.0 (the default)"),
    ]


def form_in_source(function: str) -> CallForm | None:
    """How its source says that a function is called; None where only an import tells.

    Raises:
        ValueError: there is no such source.
        UnknownForm: in no form that is known.
    """
    signature = source_signature(function)
    return None if signature is None else call_form(signature)


def has_whole_queries(function: str) -> bool:
    """Whether it is one of OpenRLHF's whose source reads queries, which are complete, and never names its second
    parameter, the prompts. It is not executed."""
    signature, (_, name) = source_signature(function), split_function(function)
    places = list(signature.parameters) if signature else []
    if places[:1] != ["queries"]:
        return False
    statements = parsed(function_source(function).read_bytes()).body
    own = [s for s in statements if isinstance(s, ast.FunctionDef | ast.AsyncFunctionDef) and s.name == name][-1]
    return not any(isinstance(node, ast.Name) and node.id in places[1:2] for node in ast.walk(own))


def function_version(function: str) -> str:
    """Covers its name, its source file and what that imports from beside it and of Tandem. Raises ValueError without such a
    source."""
    return version_of(function_digest(function))


class FunctionScorer(Scorer):
    """The pool of a rule function, which sees texts."""

    def __init__(self, entry: ScorerConfig, tokenizer: str):
        self._pool = FunctionPool(entry)
        self._texts = text_reader(tokenizer, with_query="queries" in self._pool.wants)

    async def score(self, items: list[ScoringItem], deadline_s: float) -> list[Score]:
        texts: list[Text] = []
        unread: dict[int, Score] = {}
        for index, item in enumerate(items):
            try:
                texts += self._texts([item])
            except Failed as fault:  # it is of this item alone
                unread[index] = Score(None, str(fault))
        answers = await asyncio.gather(*map(asyncio.wrap_future, self._pool.submit(texts, deadline_s)))
        found = (score for answer in answers for score in answer)
        return [unread[index] if index in unread else next(found) for index in range(len(items))]


def import_problems(key: str, entry: ScorerConfig, env: Mapping[str, str]) -> list[str]:
    """Why no process of a function would start, found by starting one: what it imports is not there, or runs on.

    Args:
        env: of a replica, beside the environment of this process.
    """
    try:
        FunctionProcess(entry, env).end()
    except FunctionError as error:
        last = last_line(str(error)).removeprefix(f"{entry.function}: ")
        rule = "a function that a process of its own can import and call"
        return [f"{key}.function={entry.function} must be {rule}; found {last}"]
    return []


class FunctionError(RuntimeError):
    """The function cannot be imported, or is in no form that is known, with the reason."""


class FunctionProcess:
    """One process, which is started again when it had to be ended."""

    runs = "function"

    def __init__(self, entry: ScorerConfig, env: Mapping[str, str] | None = None):
        self._entry = entry
        self._env = dict(env or {})  # beside that of this process
        self._process: subprocess.Popen | None = None
        self._buffer = b""
        self._mark = secrets.token_hex(8)
        self.wants: list[str] = []  # what is sent of an item
        self.start()

    def start(self) -> None:
        """Raises FunctionError."""
        # The caller's path, which Ray extends by the driver's directory.
        env = {**os.environ, **self._env, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), MARK: self._mark}
        self._buffer = b""
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-m", *self._module()],
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
        )
        try:
            reply = self._read(START_S)
        except Failed as fault:
            self.end()
            raise FunctionError(f"{self._name}: its process does not start ({fault})") from None
        if "error" in reply:
            self.end()
            raise FunctionError(f"{self._name}: {reply['error']}")
        self.wants = reply.get("wants", [])

    @property
    def _name(self) -> str:
        return str(self._entry.function)

    def _module(self) -> list[str]:
        """What the process runs: a module and its arguments."""
        return ["reward_service.function_worker", self._name, str(self._entry.memory_gib)]

    def __call__(self, texts: list[Text]) -> list[Plain]:
        """What the function returns. Raises Failed; its process is then ended where that is needed."""
        self._send("{" + ",".join(f'"{field}":[{",".join(map(JSON_OF[field], texts))}]' for field in self.wants) + "}")
        try:
            reply = self._read(self._entry.timeout_s)
        except Failed:
            self.end()
            raise
        if "error" in reply:
            raise Failed(f"poison: {reply['error']}")
        if "refused" in reply:
            raise Failed(reply["refused"])
        return reply["scores"]

    def _send(self, request: str) -> None:
        """Raises Failed, FunctionError."""
        if self._process is None:
            self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.end()
            raise Failed("unavailable: its process ended between two calls") from None

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        end = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise Failed(f"timeout: the {self.runs} took longer than {timeout_s:g} s", is_kill=True)
                piece = os.read(self._process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise Failed("poison: its process ended", is_kill=True)
                self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def end(self) -> None:
        if self._process is not None:
            end_family(self._process, self._mark)
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None and not stream.closed:
                    try:
                        stream.close()
                    except BrokenPipeError:  # what was not written yet went to nobody
                        continue
            self._process = None


class FunctionPool:
    """`entry.processes` processes; calls wait for a free one. Raises FunctionError where the function cannot be imported."""

    process: type[FunctionProcess] = FunctionProcess

    def __init__(self, entry: ScorerConfig):
        self._entry = entry
        self._idle: Queue[FunctionProcess] = Queue()
        self._quarantine: Quarantine[Text] = Quarantine()
        # A process ends with the thread that started it (function_worker.py), so these threads start them all.
        self._threads = ThreadPoolExecutor(entry.processes)
        self.wants: list[str] = []
        for process in self._threads.map(self.process, [entry] * entry.processes):
            self.wants = process.wants
            self._idle.put(process)

    def submit(self, texts: list[Text], deadline_s: float = math.inf) -> list[Future[list[Score]]]:
        """Futures of the scores of each `batch_size` texts, in order. No call of the function begins after the deadline."""
        size, expires = self._entry.batch_size, time.monotonic() + deadline_s
        return [self._threads.submit(self._score, texts[i : i + size], expires) for i in range(0, len(texts), size)]

    def _score(self, texts: list[Text], expires: float) -> list[Score]:
        process, is_down = self._idle.get(), False

        def call(part: list[Text]) -> list[Plain]:
            nonlocal is_down
            try:
                if not is_down:
                    return self._call(process, part, expires)
            except FunctionError:  # nothing is known against the items
                is_down = True
            raise Failed("unavailable: its process does not start")

        try:
            return isolate(call, texts)
        finally:
            self._idle.put(process)

    def _call(self, process: FunctionProcess, texts: list[Text], expires: float) -> list[Plain]:
        if time.monotonic() > expires:
            raise Failed("timeout: no score before the deadline")
        if any(text in self._quarantine for text in texts):
            raise Failed(f"poison: {KILLS} processes of the function had to be ended")
        try:
            return process(texts)
        except Failed as fault:
            if fault.is_kill and len(texts) == 1:
                self._quarantine.count(texts[0])
            raise

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().end()


KIND = Function()
