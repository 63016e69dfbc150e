"""Rule functions in processes of their own, so that one that hangs, crashes or grows can be ended without harm to others.

A function takes lists and returns one number an item, as TRL's reward functions do:

    def brevity(completions: list[str], **_) -> list[float]: ...

It is given `prompts`, `completions` and `labels` as far as it names them. It is no generator, and it is refused where
it is `async`: nobody awaits what it returns.
"""

import json
import os
import selectors
import subprocess
import sys
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Queue
from typing import Any

from contracts.config import ScorerConfig
from contracts.records import Score
from reward_service.isolate import Failed, isolate

START_S = 60.0
KILLS = 2  # processes that an item may take down before nobody tries it again
REMEMBERED_ITEMS = 10_000

Text = tuple[str, str, str | None]  # prompt, completion, label


class FunctionError(RuntimeError):
    """The function cannot be imported, or must be awaited, with the reason."""


class FunctionProcess:
    """One process, which is started again when it had to be ended."""

    def __init__(self, entry: ScorerConfig):
        self._entry = entry
        self._process: subprocess.Popen | None = None
        self._buffer = b""
        self.start()

    def start(self) -> None:
        """Raises FunctionError."""
        entry = self._entry
        command = [sys.executable, "-m", "reward_service.function_worker", str(entry.function), str(entry.memory_gib)]
        # The caller's path, which Ray extends by the driver's directory.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._buffer = b""
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=env)
        try:
            reply = self._read(START_S)
        except Failed as fault:
            self.end()
            raise FunctionError(f"{entry.function}: its process does not start ({fault})") from None
        if "error" in reply:
            self.end()
            raise FunctionError(f"{entry.function}: {reply['error']}")

    def __call__(self, texts: list[Text]) -> list[float]:
        """What the function returns. Raises Failed; its process is then ended where that is needed."""
        if self._process is None:
            self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        prompts, completions, labels = (list(column) for column in zip(*texts, strict=True))
        request = json.dumps({"prompts": prompts, "completions": completions, "labels": labels})
        try:
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.end()
            raise Failed("unavailable: its process ended between two calls") from None
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

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        end = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise Failed(f"timeout: the function took longer than {timeout_s:g} s", is_kill=True)
                piece = os.read(self._process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise Failed("poison: its process ended", is_kill=True)
                self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None and not stream.closed:
                    try:
                        stream.close()
                    except BrokenPipeError:  # what was not written yet went to nobody
                        continue
            self._process = None


class FunctionPool:
    """`entry.processes` processes; calls wait for a free one. Raises FunctionError where the function cannot be imported."""

    def __init__(self, entry: ScorerConfig):
        self._entry = entry
        self._idle: Queue[FunctionProcess] = Queue()
        self._kills: OrderedDict[Text, int] = OrderedDict()
        # A process ends with the thread that started it (function_worker.py), so these threads start them all.
        self._threads = ThreadPoolExecutor(entry.processes)
        for process in self._threads.map(FunctionProcess, [entry] * entry.processes):
            self._idle.put(process)

    def submit(self, texts: list[Text]) -> list[Future[list[Score]]]:
        """Futures of the scores of each `batch_size` texts, in order."""
        size = self._entry.batch_size
        return [self._threads.submit(self._score, texts[i : i + size]) for i in range(0, len(texts), size)]

    def _score(self, texts: list[Text]) -> list[Score]:
        process = self._idle.get()
        try:
            return isolate(lambda part: self._call(process, part), texts)
        finally:
            self._idle.put(process)

    def _call(self, process: FunctionProcess, texts: list[Text]) -> list[float]:
        if any(self._kills.get(text, 0) >= KILLS for text in texts):
            raise Failed(f"poison: {KILLS} processes of the function had to be ended")
        try:
            return process(texts)
        except Failed as fault:
            if fault.is_kill and len(texts) == 1:
                self._kills[texts[0]] = self._kills.get(texts[0], 0) + 1
                while len(self._kills) > REMEMBERED_ITEMS:
                    self._kills.popitem(last=False)
            raise

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().end()
