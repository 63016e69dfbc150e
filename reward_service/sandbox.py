"""Code of a completion, run in processes of its own with limits; docs/verifiers.md says what that does not keep out.

Where the kernel has namespaces for us, it has no network, sees no other process, and can write nothing but a small folder in
memory, which goes with it. Elsewhere there are the limits of a process alone.
"""

import json
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from os import killpg
from pathlib import Path
from typing import Any

from reward_service import sandbox_runner  # imported, so that digests of the code see it
from reward_service.processes import children, end_children
from reward_service.sandbox_runner import BEGUN

RUNNER = Path(sandbox_runner.__file__)
GRACE_S = 1.5  # for what surrounds the tests
BEGIN_S = 60.0  # for the runner to begin, where the cores have other work; whoever waits for an item may wait less


class SandboxError(RuntimeError):
    """The tests could not be run: nothing is known of the code."""


class NotBegun(SandboxError):
    """The runner took too long to begin."""


@dataclass(frozen=True)
class Limits:
    seconds: float  # of all tests together; of CPU, for each process
    memory_mib: int  # address space of each process
    processes: int
    folder_mib: int = 16  # what it writes, and each file


@dataclass(frozen=True)
class Tests:
    """Statements of Python, each a test, after a context; or inputs of a program."""

    context: str = ""
    statements: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()


@cache
def encloses() -> bool:
    """Whether the kernel has namespaces for us. Raises NotBegun, where that is not known."""
    try:
        _run("", Tests(), Limits(1.0, 256, 4), enclose=True)
    except NotBegun:
        raise
    except SandboxError:
        return False
    return True


def passed(code: str, tests: Tests, limits: Limits) -> set[int]:
    """The numbers of the statements that come to their end. Raises SandboxError."""
    word = secrets.token_hex(16)
    told = _run(code, tests, limits, encloses(), word)
    return {int(line.split()[1]) for line in told if line.split()[:1] == [word]} & set(range(len(tests.statements)))


def outputs(code: str, tests: Tests, limits: Limits) -> dict[int, str]:
    """What a program prints for each input, as far as it ends well. Raises SandboxError."""
    told = map(json.loads, _run(code, tests, limits, encloses()))
    return {number: output for number, output in told if output is not None}


def _run(code: str, tests: Tests, limits: Limits, enclose: bool, word: str = "") -> list[str]:
    """What the runner reports. Raises SandboxError."""
    folder, others = tempfile.mkdtemp(prefix="tandem-code-"), children()
    job: dict[str, Any] = {
        "code": code,
        "word": word,
        "enclose": enclose,
        "context": tests.context,
        "tests": tests.statements,
        "inputs": tests.inputs,
        **vars(limits),
    }
    process = subprocess.Popen(
        [sys.executable, "-I", str(RUNNER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        told = _reported(process, json.dumps(job).encode(), limits.seconds)
    finally:
        with suppress(ProcessLookupError):
            killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        end_children(but=others)
        shutil.rmtree(folder, ignore_errors=True)
    if process.returncode > 0 or not told.startswith(BEGUN):
        raise SandboxError(f"the process that runs tests ended with {process.returncode}")
    whole = told[len(BEGUN) : told.rindex(b"\n") + 1]  # the last line may be cut off
    return whole.decode(errors="replace").splitlines()


def _reported(process: subprocess.Popen, job: bytes, seconds: float) -> bytes:
    """What the runner writes until it ends, or its time is over, which counts from where it has begun. Raises NotBegun.

    Its end may be later: code can leave a process behind that holds the pipe open. What is there by then counts.
    """
    told, given, latest = b"", job, time.monotonic() + BEGIN_S
    while True:
        has_begun = told.startswith(BEGUN)
        try:
            return process.communicate(given, timeout=seconds if has_begun else GRACE_S)[0]
        except subprocess.TimeoutExpired as late:
            told, given = late.stdout or b"", b""
        if has_begun:
            return told
        if not told.startswith(BEGUN) and time.monotonic() > latest:
            raise NotBegun(f"the process that runs tests did not begin within {BEGIN_S:g} s")
