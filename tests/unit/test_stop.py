"""Signals as requests: in a process of its own, since handlers belong to a process."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = """
import os, signal, sys, time
from controller.cluster.signals import Interrupted, Stop
stop = Stop(grace_s=0.3)
def tell_twice():
    if "{case}" == "twice":
        os.kill(os.getpid(), signal.{signal})
def run():
    if "{case}" == "outside":
        os.kill(os.getpid(), signal.{signal})
        time.sleep(5)
    if "{case}" == "within Ray":
        try:
            os.kill(os.getpid(), signal.{signal})
            time.sleep(5)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # as ray.get does
    with stop.kept():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as ray.init does
        if "{case}" == "starting Ray":
            os.kill(os.getpid(), signal.{signal})
            time.sleep(5)
    with stop.deferred(lambda: print("told", flush=True)):
        os.kill(os.getpid(), signal.{signal})
        print("goes on", flush=True)
        tell_twice()
        if "{case}" == "late":
            time.sleep(5)
    print("left", flush=True)
    raise Interrupted(stop.signum, "saved")
try:
    with stop.installed():
        run()
except Interrupted as end:
    print(end.message)
    sys.exit(end.exit_code)
"""


@pytest.mark.parametrize(
    ("case", "name", "printed", "code"),
    [
        ("outside", "SIGTERM", "\n", 75),
        ("within Ray", "SIGTERM", "\n", 75),
        ("within Ray", "SIGINT", "\n", 130),
        ("starting Ray", "SIGTERM", "\n", 75),
        ("starting Ray", "SIGINT", "\n", 130),
        ("in time", "SIGTERM", "told\ngoes on\nleft\nsaved\n", 75),
        ("in time", "SIGINT", "told\ngoes on\nleft\nsaved\n", 130),
        ("twice", "SIGINT", "told\ngoes on\n\n", 130),
        ("late", "SIGTERM", "told\ngoes on\nnot done within checkpoint.grace_s (0 s): what happened since", 75),
    ],
)
def test_a_signal(case: str, name: str, printed: str, code: int) -> None:
    program = PROGRAM.format(case=case, signal=name)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == code, done.stderr
    assert done.stdout.startswith(printed), done.stdout
