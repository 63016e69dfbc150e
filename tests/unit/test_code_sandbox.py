"""Code of completions in its sandbox: what it cannot do, what counts as passing, and that nothing of it stays."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from reward_service import sandbox
from reward_service.sandbox import GRACE_S, RUNNER, Limits, SandboxError, Tests, outputs, passed
from reward_service.verifier import find_verifier

LIMITS = Limits(seconds=3.0, memory_mib=256, processes=8)
SLEEP = "87654.321"
TRUE = Tests(statements=("assert f(1) == 2",))
needs_namespaces = pytest.mark.skipif(not sandbox.encloses(), reason="the kernel has no namespaces for this user")


@pytest.fixture(params=["namespaces", "limits alone"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways in which code is run."""
    if request.param == "limits alone":
        monkeypatch.setattr(sandbox, "encloses", lambda: False)
    elif not sandbox.encloses():
        pytest.skip("the kernel has no namespaces for this user")
    return request.param


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    before = set(Path(tempfile.gettempdir()).glob("tandem-code-*"))
    yield
    assert set(Path(tempfile.gettempdir()).glob("tandem-code-*")) <= before
    deadline = time.monotonic() + 5
    while any(p.info["cmdline"] and str(RUNNER) in p.info["cmdline"] for p in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def neighbour() -> Iterator[None]:
    """A process of whoever asks, and what that has started, are none of the sandbox's business."""
    with subprocess.Popen(["sh", "-c", "sleep 300 & wait"], start_new_session=True) as process:
        yield
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("code", "passes"),
    [
        ("def f(x): return x + 1", True),
        ("def f(x): print('noise', flush=True); return x + 1", True),
        ("def f(x): return 3", False),
        ("def g(x): return x + 1", False),
        ("raise ValueError", False),
        ("exit()", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("def f(x):\n    import os\n    os._exit(0)", False),
        ("def f(x): raise SystemExit(0)", False),
        ("def f(x):\n    import os\n    print('0 0', flush=True); os.write(1, b'0 0\\n'); os._exit(0)", False),
        ("import os\nif os.fork(): os._exit(0)\ndef f(x): return 3", False),
        ("import atexit\natexit.register(print, '0 0')\ndef f(x): return 3", False),
        ("import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGKILL)", False),
        ("def f(x): return f(x)", False),
        ("def f(x): return len(bytearray(1 << 30))", False),
        ("def f(x): return open('big', 'wb').write(b'1' * (64 << 20)) and 2", False),
        ("def f(x): return [open('/dev/null') for _ in range(100)] and 2", False),
        ("open('small', 'w').write('1')\ndef f(x): return 1 + int(open('small').read())", True),
        ("def f(x): return 2 if input() else 2", False),
    ],
)  # fmt: skip
def test_what_passes(code: str, passes: bool, place: str) -> None:
    assert passed(code, TRUE, LIMITS) == ({0} if passes else set())


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "def f(x):\n    while True: pass",
        "import time\ndef f(x): time.sleep(60)",
        "import time\nfrom signal import *\nsignal(SIGTERM, SIG_IGN)\nsignal(SIGXCPU, SIG_IGN)\ntime.sleep(60)",
    ],
)  # fmt: skip
def test_what_takes_too_long_is_ended(code: str, place: str) -> None:
    start = time.monotonic()
    assert passed(code, TRUE, Limits(1.0, 256, 8)) == set()
    assert time.monotonic() - start < 1.0 + GRACE_S + 1


def test_a_test_that_hangs_leaves_time_to_the_others(place: str) -> None:
    tests = Tests("from time import sleep", ("assert f(1) == 2", "assert f(0) == 1", "assert f(2) == 3"))
    code = "import time\ndef f(x):\n    if x == 0: time.sleep(60)\n    return x + 1"
    assert passed(code, tests, LIMITS) == {0, 2}


def test_the_last_test_has_all_the_time_that_is_left(place: str) -> None:
    code, limits = "import time\ndef f(x):\n    time.sleep(1.2)\n    return x + 1", Limits(2.0, 256, 8)
    assert passed(code, Tests(statements=("assert f(1) == 2",)), limits) == {0}
    assert outputs("import time\ntime.sleep(1.2)\nprint(input())", Tests(inputs=("1\n",)), limits) == {0: "1\n"}


def test_tests_do_not_see_one_another(place: str) -> None:
    tests = Tests("", ("seen.append(1)\nassert len(seen) == 1", "seen.append(1)\nassert len(seen) == 1"))
    assert passed("seen = []", tests, LIMITS) == {0, 1}


def test_outputs_of_programs(place: str) -> None:
    tests = Tests(inputs=("1 2\n", "x\n", "3 4\n"))
    assert outputs("a, b = map(int, input().split())\nprint(a + b)", tests, LIMITS) == {0: "3\n", 2: "7\n"}
    assert outputs("print('é', end='')\nexit()", tests, LIMITS) == dict.fromkeys(range(3), "é")
    assert outputs("print(1)\nexit(1)", tests, LIMITS) == {}
    assert outputs("while True: print('x' * 1000)", tests, LIMITS) == {}


def test_expected_outputs_are_not_where_the_program_runs(place: str) -> None:
    """It prints all that it can find in its own process; the answer is not in it."""
    verifier = find_verifier("code")
    options = verifier.chosen(None, {})
    code = (
        "import gc, re, sys\nfound, frame = '', sys._getframe()\n"
        "while frame: found += repr(frame.f_locals); frame = frame.f_back\n"
        "found += repr(gc.get_objects())\nprint(*re.findall(r'zebra-[0-9]+', found)[:1])"
    )
    row = {"tests": [{"input": "1", "output": "zebra-93571"}]}
    right = verifier.right(row, options)
    assert verifier.verify(f"```python\n{code}\n```", right, options) == {"score": 0.0, "passed": 0.0, "extracted": 1.0}


def test_partial_and_whole(place: str) -> None:
    verifier = find_verifier("code")
    row = {"tests": "def check(g):\n    assert g(1) == 2\ncheck(f)\nassert f(2) == 3\ndef test_f(): assert f(5) == 5"}
    answer = "```python\ndef f(x): return x + 1\n```"
    for options, score in (({}, 0.0), ({"partial": True}, 2 / 3)):
        chosen = verifier.chosen(None, options)
        found = verifier.verify(answer, verifier.right(row, chosen), chosen)
        assert found == {"score": score, "passed": 2 / 3, "extracted": 1.0}


@needs_namespaces
def test_it_reaches_neither_network_nor_files_nor_processes(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"""
import os, socket, signal
def fails(work):
    try: work()
    except OSError: return True
    return False
def connect(): socket.create_connection(("127.0.0.1", {port}), 2)
def write(): open({str(tmp_path / "evil")!r}, "w")
def remove(): os.remove({str(tmp_path / "precious")!r})
def kill(): os.kill({os.getpid()}, 0)
def remount():
    import ctypes
    if ctypes.CDLL(None).mount(b"tmpfs", b"/mnt", b"tmpfs", 0, None): raise OSError
"""
        (tmp_path / "precious").write_text("kept")
        names = ("connect", "write", "remove", "kill", "remount")
        tests = Tests("", tuple(f"assert fails({name})" for name in names))
        assert passed(code, tests, LIMITS) == set(range(len(names)))
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


@needs_namespaces
def test_a_fork_bomb_and_what_gets_away_end_with_it() -> None:
    started = f"subprocess.Popen(['sleep', '{SLEEP}'], start_new_session=True)"
    sleeper = f"import subprocess\ndef f(x):\n    {started}\n    return x + 1"
    assert passed(sleeper, Tests("", ("assert f(1) == 2", "assert f(2) == 3")), LIMITS) == {0, 1}
    assert [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", SLEEP]] == []
    start = time.monotonic()
    bomb = Tests("", ("bomb()", "assert f(1) == 2"))
    code = "import os\ndef bomb():\n    while True: os.fork()\ndef f(x): return x + 1"
    assert passed(code, bomb, LIMITS) <= {1}
    assert time.monotonic() - start < LIMITS.seconds + GRACE_S + 1


def test_where_tests_cannot_be_run_nothing_is_said_of_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runner = tmp_path / "runner.py"
    runner.write_text("raise OSError")
    monkeypatch.setattr(sandbox, "RUNNER", runner)
    monkeypatch.setattr(sandbox, "encloses", lambda: False)
    with pytest.raises(SandboxError):
        passed("def f(x): return x + 1", TRUE, LIMITS)


@pytest.mark.parametrize("begins", [False, True])
def test_a_runner_that_does_not_begin_says_nothing_of_the_code(
    begins: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that has begun and reports nothing leaves every test open for the code to have failed."""
    runner = tmp_path / "runner.py"
    runner.write_text(f"import os, time\nif {begins}: os.write(1, b'begun\\n')\ntime.sleep(60)")
    monkeypatch.setattr(sandbox, "RUNNER", runner)
    monkeypatch.setattr(sandbox, "encloses", lambda: False)
    if begins:
        assert passed("def f(x): return x + 1", TRUE, Limits(0.5, 256, 8)) == set()
        return
    monkeypatch.setattr(sandbox, "BEGIN_S", 2.0)
    with pytest.raises(SandboxError, match="did not begin within 2 s"):
        passed("def f(x): return x + 1", TRUE, Limits(0.5, 256, 8))


def test_the_time_of_the_tests_begins_with_the_runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Here it begins after 2 s: what is reported 1 s later is within the time, and half a line behind it is no report."""
    runner = tmp_path / "runner.py"
    write = "os.write(1, b'begun\\n'); time.sleep(1); os.write(1, b'[0, \"1\"]\\n[1, \"2')"
    runner.write_text(f"import os, time\ntime.sleep(2); {write}; time.sleep(60)")
    monkeypatch.setattr(sandbox, "RUNNER", runner)
    monkeypatch.setattr(sandbox, "encloses", lambda: False)
    assert outputs("", Tests(inputs=("", "")), Limits(1.4, 256, 8)) == {0: "1"}


def test_a_runner_that_does_not_begin_says_nothing_of_the_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runner = tmp_path / "runner.py"
    runner.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(sandbox, "RUNNER", runner)
    monkeypatch.setattr(sandbox, "BEGIN_S", 0.5)
    with pytest.raises(sandbox.NotBegun):
        sandbox.encloses.__wrapped__()


def test_a_process_that_outlives_the_tests_takes_no_pass_back(place: str) -> None:
    """Without namespaces it goes on, and holds what the runner reports on open."""
    code = "import os, time\nif not os.fork(): time.sleep(30)\ndef f(x): return x + 1"
    assert passed(code, TRUE, LIMITS) == {0}


def test_required_isolation_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = find_verifier("code")
    monkeypatch.setattr("reward_service.verifiers.code.encloses", lambda: False)
    assert verifier.prepare is not None
    verifier.prepare(verifier.chosen(None, {}))
    with pytest.raises(OSError, match=r"options\.isolation=required"):
        verifier.prepare(verifier.chosen(None, {"isolation": "required"}))


def test_the_runner_needs_nothing_but_the_standard_library() -> None:
    """It is started with -I, away from our sources."""
    job = '{"enclose": false, "code": "", "tests": [], "inputs": [], "context": "", "word": "w"'
    job += ', "seconds": 1, "memory_mib": 256, "processes": 8, "folder_mib": 1}'
    done = subprocess.run([sys.executable, "-I", "-S", str(RUNNER)], input=job, text=True, cwd="/", capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "begun\n", "")
