"""wandb down, slow or wrong never slows or ends a run, and its copy is kept offline. A loopback stub is the server."""

import queue
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from contracts.config import LoggerConfig
from contracts.trackers import TrackedRun
from controller.record.tracker_thread import MOST_QUEUED, TrackerThread
from controller.record.trackers.wandb import Wandb, chosen_mode
from tests.conftest import ROOT, wandb_records

INIT_S = 3.0


class Quick(Wandb):
    init_s = INIT_S


ROW = {"stage": "ppo", "step": 1, "wall_s": 2.0, "reward/score_mean": 0.25, "policy/loss": None, "progress/version": 1}


def end(thread: TrackerThread) -> None:
    thread.ask_to_end()
    thread.join()


@contextmanager
def server(answer: str) -> Iterator[str]:
    """A server that never answers ("hang") or answers 500 ("error"); "refuse": nobody listens."""
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if answer == "hang":
                released.wait()
            self.send_response(500)
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: Any) -> None: ...

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{httpd.server_port}"
    if answer == "refuse":
        httpd.server_close()
        yield url
        return
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield url
    released.set()
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No key, no mode, and no settings of whoever runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    return monkeypatch


def test_the_mode_is_wandbs_own_then_follows_the_key(environment: pytest.MonkeyPatch) -> None:
    assert chosen_mode("auto") == "offline"
    environment.setenv("WANDB_API_KEY", "k" * 40)
    assert chosen_mode("auto") == "online"
    environment.setenv("WANDB_MODE", "disabled")
    assert chosen_mode("auto") == "disabled"
    assert chosen_mode("offline") == "offline"  # the configuration is nearer than the environment


@pytest.mark.parametrize("answer", ["hang", "refuse", "error"])
def test_a_server_that_fails_costs_the_run_nothing(
    answer: str, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv("WANDB_API_KEY", "k" * 40)
    with server(answer) as url:
        environment.setenv("WANDB_BASE_URL", url)
        assert chosen_mode("auto") == "online"
        sink = TrackerThread("wandb", Quick, tmp_path, {"name": "demo"}, LoggerConfig(wandb="auto"), "ppo")
        longest = 0.0
        for step in range(1, 101):
            start = time.perf_counter()
            sink.log(ROW | {"step": step, "reward/score_mean": step / 100, "progress/version": step})
            longest = max(longest, time.perf_counter() - start)
        assert longest < 0.1
        start = time.perf_counter()
        end(sink)
        assert time.perf_counter() - start < 2 * INIT_S + 20
    assert [action for action, _ in sink.new_faults()] == ["init"]
    scores = [row["item"]["reward/score_mean"] for row in wandb_records(tmp_path) if row["type"] == "history"]
    assert scores == [step / 100 for step in range(1, 101)]


def test_an_offline_run_reads_back(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_text("w")
    logger = LoggerConfig(group="sweep-1", wandb_text=True, table_every=2)
    sink = TrackerThread("wandb", Wandb, tmp_path, {"name": "demo", "ppo": {"updates": 7}}, logger, "ppo", attempt=2)
    for step in (1, 2, 3):
        sink.log(
            ROW
            | {"step": step, "reward/score_mean": step / 4, "progress/version": step, "ledger/trained": 64 * step}
            | {"mine/share": 0.5}
        )
        sink.samples([{"stage": "ppo", "step": step, "prompt": "p", "completion": "c"}])
    sink.log({"stage": "reward_model/gold", "step": 5, "wall_s": 1.0, "reward_model/loss": 0.5})
    sink.artifact("demo-ppo", "model", str(tmp_path / "model"))
    sink.alert("Clipped", "policy/clipfrac above 0.3")
    end(sink)
    assert sink.new_faults() == []
    found = wandb_records(tmp_path)
    [run] = [row for row in found if row["type"] == "run"]
    assert (run["run_group"], run["job_type"], run["project"]) == ("sweep-1", "ppo", "tandem")
    assert run["run_id"] == f"demo-{tmp_path.name}-a2"
    assert run["config"]["update"]["ppo"] == {"updates": 7}
    axes = {row["glob_name"]: row["step_metric"] for row in found if row["type"] == "metric" and "glob_name" in row}
    assert axes["policy/*"] == axes["kl/*"] == "progress/version"
    assert axes["reward/*"] == "ledger/trained"
    assert axes["perf/*"] == "progress/wall_s"
    loop = ("heldout/*", "combined/*", "ledger/*", "off_policy/*", "staleness/*", "value/*", "online_dpo/*")
    assert {axes[pattern] for pattern in loop} == {"progress/version"}
    assert axes["score/*"] == "ledger/trained"
    assert axes["mine/*"] == "progress/version"  # of an estimator of another package
    # Each stands for metrics that are declared or logged, and those of other stages have their own steps.
    assert not {"adv/*", "async/*", "learner/*", "weights/*", "progress/*", "sft/*", "preference/*", "ppo/*"} & {*axes}
    assert axes["reward_model/gold/*"] == "reward_model/gold/step"
    rows = [row["item"] for row in found if row["type"] == "history"]
    scores = [
        (r["progress/version"], r["ledger/trained"], r["reward/score_mean"]) for r in rows if "ledger/trained" in r
    ]
    assert scores == [(1, 64, 0.25), (2, 128, 0.5), (3, 192, 0.75)]
    assert [r["reward_model/gold/loss"] for r in rows if "reward_model/gold/loss" in r] == [0.5]
    assert sum("samples/table._type" in r for r in rows) == 1  # version 2 alone
    [artifact] = [row for row in found if row["type"] == "artifact" and row["name"] == "demo-ppo"]
    [entry] = artifact["manifest"]["contents"]
    assert entry["ref"] == f"file://{tmp_path}/model/weights"
    assert not list((tmp_path / "wandb").rglob("weights"))
    assert [row["title"] for row in found if row["type"] == "alert"] == ["Clipped"]
    command = re.search(r"`wandb (sync) runs/demo/<run>/(\S+)`", (ROOT / "docs/dashboards.md").read_text())
    assert command is not None
    [later] = tmp_path.glob(command[2])
    sync = [Path(sys.executable).with_name("wandb"), command[1], "--dry-run", later]
    assert "Would sync 1 run(s)" in subprocess.run(sync, capture_output=True, text=True, timeout=60).stderr


def test_an_offline_run_needs_no_key_and_asks_for_none(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert chosen_mode("auto") == "offline"
    sink = TrackerThread("wandb", Quick, tmp_path, {}, LoggerConfig(), "sft")
    end(sink)
    assert sink.new_faults() == []
    assert wandb_records(tmp_path)


class Stuck(Wandb):
    """Its wandb never comes back from init."""

    def _init(self, run: TrackedRun) -> Any:
        threading.Event().wait()


def test_calls_beyond_the_queue_are_counted_not_waited_for(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sink = TrackerThread("wandb", Stuck, tmp_path, {}, LoggerConfig(wandb="offline"), "ppo")
    start = time.perf_counter()
    for _ in range(MOST_QUEUED + 3):
        sink.log(ROW)
    assert time.perf_counter() - start < 30.0  # not for ever
    faults = sink.new_faults()
    assert [action for action, _ in faults] == ["log"] * 3
    assert isinstance(faults[0][1], queue.Full)


def test_text_and_tables_by_request_alone(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: list[dict[str, Any]] = []

    class Recorded(Wandb):
        def _init(self, run: TrackedRun) -> Any:
            return SimpleNamespace(log=sent.append, finish=lambda exit_code: None)

    rows = [[{"stage": "ppo", "step": step, "prompt": "p", "completion": "c"}] for step in range(5)]
    for text, expected in ((False, 0), (True, 3)):
        logger = LoggerConfig(wandb="offline", wandb_text=text, table_every=2)
        sink = TrackerThread("wandb", Recorded, tmp_path, {}, logger, "ppo")
        for row in rows:
            sink.samples(row)
        end(sink)
        assert len(sent) == expected  # steps 0, 2, 4
    assert sent[0]["samples/table"].data == [["c", "p", "ppo", 0]]
    sent.clear()
    sink = TrackerThread("wandb", Recorded, tmp_path, {}, LoggerConfig(wandb="offline", wandb_text=True), "ppo")
    sink.samples([{"step": 0, "row": {"answer": "ü"}}, {"step": 0, "row": {"answer": 5, "hint": None}}])
    end(sink)
    assert sent[0]["samples/table"].data == [['{"answer": "ü"}', 0], ['{"answer": 5, "hint": null}', 0]]


def test_the_port_of_a_closed_server_is_closed() -> None:
    with server("refuse") as url, socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) != 0
