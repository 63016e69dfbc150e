"""The HTTP client against a server that answers as it is told: which answers are tried again, when, and for which items."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from reward_service import client as retries
from reward_service.http_client import HttpClient

Answer = tuple[int, dict[str, str], Any]  # status, headers, JSON body


def ok(body: dict[str, Any]) -> Answer:
    """Every item scored by its text's length."""
    items = [{"id": i, "status": "ok", "reward": float(len(item["text"])), "raw": 1.0, "tokens": 1, "truncated": False,
              "cached": False} for i, item in enumerate(body["items"])]  # fmt: skip
    return 200, {}, {"version": "v1", "items": items}


def refused(status: int, code: str = "overloaded", **headers: str) -> Callable[[dict[str, Any]], Answer]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda body: (status, names, {"error": {"code": code, "message": f"because of {code}"}})


class Scripted:
    """Answers the n-th request as `script[n]` says, and every later one as the last."""

    def __init__(self) -> None:
        self.script: list[Callable[[dict[str, Any]], Answer] | None] = [ok]
        self.bodies: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                step = outer.script[min(len(outer.bodies), len(outer.script) - 1)]
                outer.bodies.append(body)
                outer.tokens.append(self.headers.get("Authorization"))
                if step is None:  # the connection ends without an answer
                    self.close_connection = True
                    return
                status, headers, content = step(body)
                payload = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def server() -> Iterator[Scripted]:
    started = Scripted()
    yield started
    started.stop()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", slept.append)
    return slept


def texts(*values: str) -> list[dict[str, Any]]:
    return [{"text": value} for value in values]


def test_scores_and_what_is_said_of_them(server: Scripted) -> None:
    scores = HttpClient(server.url, "a-token").score(texts("abc", "a"), "proxy", "v1")
    assert [(s.value, s.raw, s.version) for s in scores] == [(3.0, 1.0, "v1"), (1.0, 1.0, "v1")]
    [body] = server.bodies
    assert (body["model"], body["version"], body["items"]) == ("proxy", "v1", texts("abc", "a"))
    assert 0 < body["deadline_ms"] <= 120_000
    assert server.tokens == ["Bearer a-token"]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_passing_faults_are_tried_again(server: Scripted, pauses: list[float], status: int) -> None:
    server.script = [refused(status), refused(status), ok]
    assert HttpClient(server.url).score(texts("abc"))[0].value == 3.0
    assert len(server.bodies) == 3
    assert 0.1 <= pauses[0] <= 0.2 <= pauses[1] <= 0.4


def test_the_service_says_for_how_long(server: Scripted, pauses: list[float]) -> None:
    server.script = [refused(503, Retry_After="7"), refused(503, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT"), ok]
    assert HttpClient(server.url).score(texts("abc"))[0].value == 3.0
    assert pauses[0] == 7.0
    assert pauses[1] < 1


def test_connections_that_are_refused_or_lost_are_tried_again(server: Scripted, pauses: list[float]) -> None:
    server.script = [None, lambda body: (200, {}, b"no json"), ok]
    assert HttpClient(server.url).score(texts("abc"))[0].value == 3.0
    assert len(pauses) == 2


def test_only_the_items_that_failed_are_sent_again(server: Scripted, pauses: list[float]) -> None:
    def some(body: dict[str, Any]) -> Answer:
        status, headers, content = ok(body)
        content["items"][0] = {"id": 0, "status": "error", "code": "timeout", "retryable": True, "detail": "late"}
        content["items"][2] = {"id": 2, "status": "error", "code": "poison", "retryable": False}
        return status, headers, content

    server.script = [some, ok]
    scores = HttpClient(server.url).score(texts("a", "bb", "ccc"))
    assert [body["items"] for body in server.bodies] == [texts("a", "bb", "ccc"), texts("a")]
    assert [(s.value, s.error) for s in scores] == [(1.0, None), (2.0, None), (None, "poison")]


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, ValueError), (401, PermissionError), (404, LookupError), (410, LookupError), (413, ValueError)],
)
def test_what_no_retry_helps_is_raised_with_its_reason(server: Scripted, status: int, error: type[Exception]) -> None:
    server.script = [refused(status, "that")]
    with pytest.raises(error, match=f"HTTP {status}: because of that"):
        HttpClient(server.url).score(texts("abc"))
    assert len(server.bodies) == 1


def test_after_the_budget_there_is_an_error_and_no_score(server: Scripted) -> None:
    server.script = [refused(503)]
    scores = HttpClient(server.url, budget_s=0.3).score(texts("abc", "a"))
    assert [(s.value, s.error) for s in scores] == [(None, "unavailable: HTTP 503 overloaded")] * 2
    nobody = HttpClient("http://127.0.0.1:9", budget_s=0.3).score(texts("abc"))
    assert (nobody[0].value, nobody[0].error) == (None, "unavailable: ConnectionError")


def test_many_items_are_several_requests(server: Scripted) -> None:
    scores = HttpClient(server.url, request_items=2).score(texts("a", "bb", "ccc", "dddd", "eeeee"))
    assert [s.value for s in scores] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [len(body["items"]) for body in server.bodies] == [2, 2, 1]


def test_an_answer_of_the_wrong_length_is_no_answer(server: Scripted, pauses: list[float]) -> None:
    def short(body: dict[str, Any]) -> Answer:
        status, headers, content = ok(body)
        return status, headers, content | {"items": content["items"][:1]}

    server.script = [short, ok]
    assert [s.value for s in HttpClient(server.url).score(texts("a", "bb"))] == [1.0, 2.0]
    assert len(server.bodies) == 2
