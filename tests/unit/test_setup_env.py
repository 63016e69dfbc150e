"""Two `make` commands at once in a fresh clone: one sets up, the other waits. What is installed is a stand-in here."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

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
