"""Two `make` commands at once in a fresh clone: one sets up, the other waits. What is installed is a stand-in here."""

import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

STAND_IN = """
import importlib.util, sys, time
from pathlib import Path

script, seconds, result, *arguments = sys.argv[1:]
spec = importlib.util.spec_from_file_location("setup_env", script)
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)

def set_up(extra):
    setup.VENV.mkdir()  # as `python -m venv` in two processes: "Directory not empty", or worse
    (setup.ROOT / "begun").touch()
    time.sleep(float(seconds))
    setup.VENV.rmdir()
    if result == "fails":
        sys.exit("set-up: failed")
    setup.VENV.mkdir()
    setup.READY.write_text(extra)
    print("set up", extra)

setup.set_up = set_up
sys.argv = ["setup_env.py", *arguments]
setup.main()
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "deploy").mkdir()
    shutil.copy(ROOT / "deploy/setup_env.py", tmp_path / "deploy")
    return tmp_path


def module_from_file(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location("setup_env", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(clone: Path, seconds: float, result: str = "works", *arguments: str) -> "subprocess.Popen[str]":
    script = str(clone / "deploy/setup_env.py")
    return subprocess.Popen(
        [sys.executable, "-c", STAND_IN, script, str(seconds), result, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(file: Path) -> None:
    end = time.monotonic() + 20
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.02)


WAITS = "set-up: another set-up of this directory is running: waiting for it\n"


def test_the_second_waits_and_finds_it_ready(clone: Path) -> None:
    first = start(clone, 1.5)
    wait_for(clone / "begun")
    second, third = start(clone, 0), start(clone, 0)
    assert [each.communicate(timeout=30)[0] for each in (first, second, third)] == [
        "set up cpu\n",
        *[f"{WAITS}set-up: it is ready\n"] * 2,
    ]
    assert [each.returncode for each in (first, second, third)] == [0, 0, 0]
    assert (clone / ".venv/.ready").read_text() == "cpu"
    assert sorted(p.name for p in clone.iterdir()) == [".venv", "begun", "deploy"]  # no lock file is left


def test_the_second_sets_up_what_the_first_could_not(clone: Path) -> None:
    first = start(clone, 1.0, "fails")
    wait_for(clone / "begun")
    second = start(clone, 0)
    assert (first.communicate(timeout=30)[0], second.communicate(timeout=30)[0]) == (
        "set-up: failed\n",
        f"{WAITS}set up cpu\n",
    )


def test_a_killed_set_up_holds_nobody(clone: Path) -> None:
    first = start(clone, 60)
    wait_for(clone / "begun")
    first.kill()
    first.wait()
    (clone / ".venv").rmdir()
    assert start(clone, 0).communicate(timeout=30)[0] == "set up cpu\n"


def test_alone_it_is_set_up_again(clone: Path) -> None:
    """`python deploy/setup_env.py` repairs; and make asks for it when pyproject.toml has changed."""
    assert start(clone, 0).communicate(timeout=30)[0] == "set up cpu\n"
    shutil.rmtree(clone / ".venv")
    assert start(clone, 0, "works", "--extra", "gpu").communicate(timeout=30)[0] == "set up gpu\n"


@pytest.mark.parametrize(
    ("system", "version", "said"),
    [
        ("darwin", (3, 11, 9), "Linux is needed"),
        ("win32", (3, 11, 9), "WSL 2"),
        ("linux", (3, 10, 1), "Python 3.11 is"),
    ],
)
def test_another_system_or_python_is_refused_before_anything_is_installed(
    system: str, version: tuple[int, ...], said: str, clone: Path, tmp_path: Path
) -> None:
    """Which lacks modules that set-up uses."""
    lacks = tmp_path / "lacks"
    lacks.mkdir()
    for name in ("fcntl", "tomllib"):
        (lacks / f"{name}.py").write_text("raise ImportError\n")
    code = f"import runpy, sys; sys.platform, sys.version_info = {system!r}, {version}; "
    code += "sys.argv = [sys.argv[1]]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(clone / "deploy/setup_env.py")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(lacks)})
    assert done.returncode == 1
    assert done.stderr.startswith("set-up: ")
    assert said in done.stderr
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize(
    ("there", "asked", "clears"), [("cpu", "gpu", True), ("cpu", "cpu", False), ("gpu", "cpu", True)]
)
@pytest.mark.parametrize("is_whole", [True, False])
def test_an_environment_of_the_other_engines_is_made_anew(
    there: str, asked: str, clears: bool, is_whole: bool, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To pip, PyTorch for a CPU is the version that a GPU's engines ask for."""
    setup = module_from_file(clone / "deploy/setup_env.py")
    done: list[tuple[str, ...]] = []
    monkeypatch.setattr(setup, "run", lambda *command: done.append(command))
    monkeypatch.setattr(setup, "install", lambda extra: done.append((extra,)))
    setup.VENV.mkdir()
    (setup.VENV / ".extra").write_text(there)
    if is_whole:
        setup.READY.write_text(there)
    setup.set_up(asked)
    assert ("--clear" in done[0]) == clears
    assert (asked,) in done
    assert setup.READY.read_text() == asked
