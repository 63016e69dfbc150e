"""The curated workspace: what it shows exists, and it is saved once (a loopback stub records the calls)."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from contracts.catalogue import catalogue
from controller.report import wandb_workspace as dashboard

ROOT = Path(__file__).parents[2]


@contextmanager
def wandb_stub(calls: list[dict[str, Any]]) -> Iterator[str]:
    """Answers what wandb's client asks before a view is saved, and takes the view."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            call = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            calls.append(call)
            viewer = {"id": "1", "username": "me", "entity": "team", "flags": "{}", "teams": {"edges": []}}
            view = {"view": {"id": "VmlldzoxMjM=", "name": "abc123"}, "inserted": True}
            body = json.dumps({"data": {"viewer": viewer, "serverInfo": {}, "upsertView": view}}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def run(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    variables = {"NETRC": str(tmp_path / "none"), "WANDB_DIR": str(tmp_path), **variables}
    command = [sys.executable, "-m", "controller.dashboard", *arguments]
    return subprocess.run(command, cwd=ROOT, env=kept | variables, capture_output=True, text=True, timeout=120)


def test_it_is_saved_with_one_mutation(tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []
    with wandb_stub(calls) as url:
        done = run(tmp_path, "team/tandem", WANDB_BASE_URL=url, WANDB_API_KEY="k" * 40)
    assert done.returncode == 0, done.stderr
    assert "workspace: " in done.stdout
    assert "team/tandem" in done.stdout
    saved = [call for call in calls if "upsertView" in call["query"]]
    assert len(saved) == 1
    variables = saved[0]["variables"]
    assert (variables["entityName"], variables["projectName"]) == ("team", "tandem")
    assert (variables["displayName"], variables["type"]) == ("Tandem", "project-view")
    bank = json.loads(variables["spec"])["section"]["panelBankConfig"]
    titles = [section["name"] for section in bank["sections"]]
    assert titles[:3] == ["Reward: does it improve?", "Drift: how far from the reference?", "Runs compared"]
    plots = [panel["config"] for section in bank["sections"] for panel in section["panels"]]
    drawn = {metric for plot in plots for metric in plot.get("metrics", [])}
    assert set(dashboard.metrics_shown()) <= drawn
    lines = [plot for plot in plots if plot.get("metrics")]
    assert lines
    axes = ("progress/version", "ledger/trained", "progress/wall_s", "sft/step")
    assert all(plot["xAxis"] in axes for plot in lines)


def test_without_a_key_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, "team/tandem", WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "wandb did not take it" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_project_without_its_entity_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert dashboard.main(["tandem"]) == 2
    assert "write ENTITY/PROJECT" in capsys.readouterr().err


def test_every_metric_on_it_is_one_that_the_code_logs() -> None:
    """What is declared is logged (test_catalogue.py). A renamed metric would leave an empty panel."""
    assert set(dashboard.metrics_shown()) - set(catalogue()) == set()


def test_its_sections_are_panels_of_the_catalogue() -> None:
    panels = {metric.panel for metric in catalogue().values()}
    assert {section["panel"] for section in dashboard.layout()["sections"]} - panels == {"Before PPO"}
