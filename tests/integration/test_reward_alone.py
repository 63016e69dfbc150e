"""`python -m reward_service` as a user starts it: it serves, takes new tokens and checkpoints on SIGHUP, ends on SIGTERM."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from common.processes.network_interface import free_port
from reward_service.__main__ import main
from reward_service.http_client import HttpClient
from tests.conftest import ROOT, SMOLLM
from tests.unit.test_scorer_kinds import write_package

FIRST, SECOND = "the-first-token-0123456789", "the-second-token-0123456789"
TEXT = [{"text": "A warm, funny film"}]


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "reward_service", "reward_service=http", "cache_dir=unused", *overrides]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def checkpoint(reward_model: Path, folder: Path) -> Path:
    path = folder / "checkpoint"
    shutil.copytree(reward_model, path)
    for file in SMOLLM.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


@pytest.fixture(scope="module")
def alone(checkpoint: Path, folder: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """With a reward model, a rule, and the example of docs/extending.md, without a file of ours that knows of it."""
    write_package(folder)
    (folder / "tokens").write_text(FIRST + "\n")
    port = free_port()
    process = subprocess.Popen(
        command(
            f"proxy_model={checkpoint}", f"reward_service.http.port={port}", "reward_service.dtype=float32",
            f"reward_service.http.token_file={folder}/tokens", "cluster.threads_per_reward_replica=1",
            "+reward_service.scorers={brief: {kind: function, function: 'reward_service.rules:brevity'}, "
            "mine: {kind: 'my_package.keywords:MINE', options: {words: [warm, funny]}}}",
        ),
        cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving proxy ("), line + (process.stderr.read() if process.stderr else "")
    yield process, f"http://127.0.0.1:{port}"
    if process.poll() is None:
        process.kill()


def test_a_kind_of_another_package_is_served_and_replaced(alone: tuple[subprocess.Popen, str], folder: Path) -> None:
    process, url = alone
    assert process.stdout is not None
    client = HttpClient(url, FIRST, budget_s=30)
    before = client.score([*TEXT, {"text": "A warm film"}, {"text": "A film"}], "mine")
    assert [score.value for score in before] == [1.0, 0.5, 0.0]
    assert {model["id"]: model["kind"] for model in client.models()}["mine"] == "my_package.keywords:MINE"
    module = folder / "my_package/keywords.py"
    module.write_text(module.read_text().replace("/ len(words)", ""))
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline().startswith("now serving proxy (")
    after = client.score(TEXT, "mine")[0]
    assert (after.value, after.version == before[0].version) == (2.0, False)


def test_it_serves_reloads_and_ends(alone: tuple[subprocess.Popen, str], checkpoint: Path, folder: Path) -> None:
    """The last test of the service."""
    process, url = alone
    assert process.stdout is not None
    client = HttpClient(url, FIRST, budget_s=30)
    before = client.score(TEXT)[0]
    assert before.value is not None
    assert client.score(TEXT, "brief")[0].value == 0.0

    (folder / "tokens").write_text(f"{FIRST}\n{SECOND}\n")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"score_mean": 10.5}))
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline().startswith("now serving proxy (")
    after = HttpClient(url, SECOND, budget_s=30).score(TEXT)[0]
    assert after.value == pytest.approx(before.value - 5, abs=1e-4)
    assert after.version != before.version
    assert client.score(TEXT)[0].value == after.value

    (checkpoint / "config.json").write_text("{")
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline().startswith("nothing has changed: ")
    assert client.score([{"text": "Another film"}])[0].value is not None

    (checkpoint / "config.json").write_text(json.dumps(config | {"score_mean": 10.5}))
    for file, part in ((checkpoint / "tokenizer.json", slice(0, -100)), (folder / "tokens", slice(0, 0))):
        whole = file.read_bytes()
        file.write_bytes(whole[part] + b"\xff\xfe")
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline().startswith("nothing has changed: ")
        file.write_bytes(whole)
        assert client.score([{"text": f"A film after {file.name}"}])[0].version == after.version
    metrics = requests.get(url + "/metrics", headers={"Authorization": f"Bearer {FIRST}"}, timeout=5).text
    assert 'tandem_reward_reloads_total{result="failed"} 3.0' in metrics

    (checkpoint / "config.json").write_text(json.dumps(config | {"score_mean": 10.5}))
    (folder / "tokens").write_text(f"{SECOND}\n")
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline().startswith("now serving")
    with pytest.raises(PermissionError):
        client.score(TEXT)

    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert psutil.wait_procs(children, timeout=30)[1] == []
    with pytest.raises(requests.ConnectionError):
        requests.get(url + "/healthz", timeout=5)


@pytest.mark.full
def test_without_a_reward_model_and_a_token(tmp_path: Path) -> None:
    write_package(tmp_path)
    port = free_port()
    scorers = '{proxy: {kind: "my_package.keywords:MINE", options: {words: [warm, funny]}}}'
    overrides = (f"model.path={SMOLLM}", f"reward_service.http.port={port}", f"+reward_service.scorers={scorers}")
    process = subprocess.Popen(
        command(*overrides), cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("serving proxy ("), line + (process.stderr.read() if process.stderr else "")
        client = HttpClient(f"http://127.0.0.1:{port}", budget_s=30)
        assert [score.value for score in client.score([{"text": "A warm film"}, {"text": "A film"}])] == [0.5, 0.0]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "for example proxy_model=CHECKPOINT"),
        (["proxy_model=/no/such/model"], "proxy: "),
        (["proxy_model=m", "reward_service.http.host=0.0.0.0"], "reward_service.http.token_file must be set where"),
        (["proxy_model=m", "reward_service.htp.port=1"], "write reward_service.http.port"),
    ],
)
def test_what_cannot_be_served_is_refused(
    overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", command(*overrides)[2:])
    assert main() == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_a_refusal_is_an_exit_code() -> None:
    done = subprocess.run(command(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("\nThe reward service cannot start:\n")
    assert "Traceback" not in done.stderr
