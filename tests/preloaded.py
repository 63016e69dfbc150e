"""Programs in forks of one process that has imported what they import: for tests that start many, and not to see them start.

    with preloaded() as python:
        done = python(["train.py", "ppo.clip=2"])  # as subprocess.run([sys.executable, "train.py", "ppo.clip=2"]) has it

The program's file is run as `__main__` in a process of its own, which begins with the modules and ends as any other does.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT

Python = Callable[[list[str]], subprocess.CompletedProcess[str]]


@contextmanager
def preloaded() -> Iterator[Python]:
    """What runs a program of this repository with its arguments, one at a time."""
    command = [sys.executable, "-m", "tests.preloaded"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        asked, answered = server.stdin, server.stdout
        assert asked is not None
        assert answered is not None

        def python(words: list[str]) -> subprocess.CompletedProcess[str]:
            with tempfile.TemporaryDirectory() as folder:
                asked.write(json.dumps([folder, *words]) + "\n")
                asked.flush()
                code = int(answered.readline())
                printed = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
            return subprocess.CompletedProcess(words, code, *printed)

        yield python
        asked.close()


def serve() -> None:
    """Every line of the input is a program; every line of the output its exit code."""
    for name in ("controller.pipeline.pipeline", "learner.models", "train", "wandb"):
        importlib.import_module(name)

    for line in sys.stdin:
        folder, *words = json.loads(line)
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), number)
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
