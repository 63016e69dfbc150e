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
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from os import killpg
from pathlib import Path
from typing import Any

from reward_service.processes import children, end_children

RUNNER = Path(__file__).with_name("sandbox_runner.py")
GRACE_S = 1.5  # for what surrounds the tests


class SandboxError(RuntimeError):
    """The tests could not be run: nothing is known of the code."""


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
    """Whether the kernel has namespaces for us."""
    try:
        _run("", Tests(), Limits(1.0, 256, 4), enclose=True)
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
        told, _ = process.communicate(json.dumps(job).encode(), timeout=limits.seconds + GRACE_S)
    except subprocess.TimeoutExpired:
        told = b""
    finally:
        with suppress(ProcessLookupError):
            killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        end_children(but=others)
        shutil.rmtree(folder, ignore_errors=True)
    if process.returncode > 0:
        raise SandboxError(f"the process that runs tests ended with {process.returncode}")
    return told.decode(errors="replace").splitlines()
