"""`python -m actors.leave` on a process that is called as a rollout actor's. With Ray: tests/nodes/test_nodes.py."""

import signal
import subprocess
import sys

import psutil
import pytest

from actors import leave

WAITS = "import signal; signal.signal(signal.SIGTERM, signal.SIG_{}); print('up', flush=True); signal.pause()"


@pytest.mark.parametrize(
    ("handler", "code", "told"), [("DFL", 0, "1 rollout actors have left\n"), ("IGN", 1, "1 have not")]
)
def test_actors_are_asked_and_waited_for(
    handler: str, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [f"{leave.TITLE}.serve", "-c", WAITS.format(handler)]
    with subprocess.Popen(command, executable=sys.executable, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        mine = psutil.Process(process.pid)
        assert mine in leave.rollout_actors()
        monkeypatch.setattr(leave, "rollout_actors", lambda: [mine])  # those of other tests stay
        monkeypatch.setattr(leave, "drain", lambda within_s: "no Ray is there")
        assert leave.main(["--within", "1"]) == code
        process.send_signal(signal.SIGKILL)
    out, err = capsys.readouterr()
    assert told in out
    assert "Ray does not drain this node, and may start other actors here: no Ray is there" in err
