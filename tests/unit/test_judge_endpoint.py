"""A judge at an address, against a server that answers as it is told: what is tried again, read, refused."""

import asyncio
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.processes.network_interface import free_port
from contracts.config import JudgeConfig
from contracts.scoring import RETRYABLE
from reward_service.isolate import Failed
from reward_service.judging import endpoint as module
from reward_service.judging.endpoint import Endpoint, chat_url
from reward_service.judging.scale import Reading, scale_of
from tests.unit.test_reward_http_client import Answer, Scripted

TOKEN = "sk-a-secret-that-nobody-sees-0123456789"
QUESTION = "How good is this? A warm film"


@pytest.fixture
def server() -> Iterator[Scripted]:
    started = Scripted()
    yield started
    started.stop()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.01)


def completion(choice: dict[str, Any], usage: Any = None) -> Any:
    usage = {"prompt_tokens": 10, "completion_tokens": 1} if usage is None else usage
    return lambda body: (200, {}, {"choices": [choice], "usage": usage})


def likely(*tokens: tuple[str, float]) -> Any:
    """The first token's probabilities."""
    top = [{"token": token, "logprob": math.log(p)} for token, p in tokens]
    return completion({"message": {"content": tokens[0][0]}, "logprobs": {"content": [{"top_logprobs": top}]}})


def said(text: Any) -> Any:
    return completion({"message": {"role": "assistant", "content": text}})


def failing(status: int, **headers: str) -> Any:
    """With a body that quotes what it was sent, as servers do."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}

    def answer(body: dict[str, Any]) -> Answer:
        return status, names, {"error": {"message": f"Incorrect API key {TOKEN} for {QUESTION}"}}

    return answer


def judge_at(server: Scripted, **values: Any) -> JudgeConfig:
    return JudgeConfig(**{"address": server.url, "model_name": "m", "rubric": "{{ completion }}", **values})


def asked(
    judge: JudgeConfig, *questions: str, deadline_s: float = 20.0
) -> tuple[list[Reading | Failed], dict[str, int]]:
    async def go() -> tuple[list[Reading | Failed], dict[str, int]]:
        endpoint = Endpoint(judge, scale_of(judge))
        found = await endpoint.read(list(questions or [QUESTION]), time.monotonic() + deadline_s)
        await endpoint.close()
        return found, dict(endpoint.counts)

    return asyncio.run(go())


def test_the_expected_value_of_the_answers_and_what_is_beside_them(server: Scripted) -> None:
    server.script = [
        likely(("4", 0.5), (" 5", 0.125), ("5", 0.125), ("2", 0.05), ("Well", 0.1), (" ", 0.05), ("10", 0.05))
    ]
    (found,), counts = asked(judge_at(server))
    assert isinstance(found, Reading)
    assert found.value == pytest.approx((4 * 0.5 + 5 * 0.25 + 2 * 0.05) / 0.8)  # 4.1875
    assert found.off_scale == pytest.approx(0.2)
    assert counts == {"requests": 1, "prompt_tokens": 10, "completion_tokens": 1}
    body = server.bodies[0]
    assert body["messages"] == [{"role": "user", "content": QUESTION}]
    assert (body["model"], body["logprobs"], body["top_logprobs"], body["max_tokens"]) == ("m", True, 20, 1)
    assert (body["temperature"], body["top_p"]) == (1, 1)


def test_a_longer_answer_is_known_by_its_first_token(server: Scripted) -> None:
    server.script = [likely(("Go", 0.6), (" Bad", 0.2), ("Good!", 0.1), ("good", 0.1))]
    (found,), _ = asked(judge_at(server, scale=["Good", "Bad"], values=[1.0, 0.0]))
    assert found == Reading(pytest.approx(0.75), pytest.approx(0.2))


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_get_through_is_tried_again(server: Scripted, status: int) -> None:
    server.script = [failing(status), None, failing(status), likely(("3", 1.0))]  # None: the connection ends
    (found,), counts = asked(judge_at(server))
    assert found == Reading(3.0, 0.0)
    assert (counts["requests"], counts["retries"], counts["failed_requests"]) == (4, 3, 3)


def test_a_pause_that_the_server_asks_for_is_made_or_is_too_long(server: Scripted) -> None:
    server.script = [failing(429, Retry_After="1"), likely(("3", 1.0))]
    start = time.monotonic()
    (found,), _ = asked(judge_at(server))
    assert found == Reading(3.0, 0.0)
    assert 1.0 <= time.monotonic() - start < 15.0
    server.script = [failing(429, Retry_After="60")]
    start = time.monotonic()
    (late,), _ = asked(judge_at(server))
    assert str(late) == "overloaded: HTTP 429 of the judge's server"
    assert time.monotonic() - start < 15.0  # it waits for nothing that comes too late


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (failing(429, Retry_After="60"), "overloaded: HTTP 429 of the judge's server"),
        (failing(500, Retry_After="60"), "unavailable: HTTP 500 of the judge's server"),
        (failing(400), "unreadable: the judge's server answers with HTTP 400"),
        (failing(401), "unavailable: the judge's server answers with HTTP 401"),
        (failing(307, Location="http://127.0.0.1:9/steal"), "unavailable: the judge's server answers with HTTP 307"),
        (lambda body: (200, {}, b"<html>"), "unreadable: the judge's server answers with something else"),
        (lambda body: (200, {}, b"[" * 100_000), "unreadable: the judge's server answers with something else"),
        (lambda body: (200, {}, {"choices": []}), "unreadable: the judge's server answers with something else"),
        (lambda body: (200, {}, [1]), "unreadable: the judge's server answers with something else"),
        (lambda body: (200, {}, b" " * (8 * 2**20 + 1)), "unreadable: the judge's server answers with more than"),
        (said("4"), "unreadable: the judge's server gives no log-probabilities"),
        (completion({"logprobs": None}), "unreadable: the judge's server gives no log-probabilities"),
        (completion({"logprobs": {"content": []}}), "unreadable: the judge's server gives no log-probabilities"),
        (completion({"logprobs": {"content": [{"top_logprobs": [{"token": "4", "logprob": "high"}]}]}}),
         "unreadable: the judge's server gives no log-probabilities"),
        (completion({"logprobs": {"content": [{"top_logprobs": [{"token": "4", "logprob": math.nan}]}]}}),
         "unreadable: the judge's log-probabilities are none"),
        (completion({"logprobs": {"content": [{"top_logprobs": [{"token": "4", "logprob": 0.7}]}]}}),
         "unreadable: the judge's log-probabilities are none"),
        (likely(("4", 0.8), ("5", 0.8)), "unreadable: the judge's log-probabilities are none"),
        (likely(("Well", 0.6), ("4", 0.4)), "unreadable: the judge puts 0.4 on its scale, below judge.min_on_scale=0.5"),
        (likely(("Well", 1.0)), "unreadable: the judge puts 0 on its scale"),
    ],
)  # fmt: skip
def test_no_value_is_invented_and_no_error_says_what_the_server_said(
    server: Scripted, script: Any, error: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    server.script = [script]
    (found,), _ = asked(judge_at(server, token_file=str(tmp_path / "token")))
    assert isinstance(found, Failed)
    assert str(found).startswith(error)
    assert (str(found).partition(":")[0] in RETRYABLE) == error.startswith(("overloaded", "unavailable"))
    assert server.tokens[0] == f"Bearer {TOKEN}"
    assert TOKEN not in str(found) + caplog.text
    assert QUESTION not in str(found) + caplog.text


def test_a_request_and_an_item_have_their_times(server: Scripted) -> None:
    def slow(body: dict[str, Any]) -> Answer:
        time.sleep(2.0)
        return likely(("1", 1.0))(body)

    server.script = [slow, likely(("2", 1.0))]
    (found,), counts = asked(judge_at(server, timeout_s=1.0))
    assert found == Reading(2.0, 0.0)  # of the second request
    assert counts["retries"] >= 1
    server.bodies.clear()
    server.script = [slow]
    start = time.monotonic()
    (late,), _ = asked(judge_at(server), deadline_s=0.3)
    assert str(late).startswith("timeout: ")
    assert time.monotonic() - start < 2.0
    server.script = [None]  # the connection ends, whenever it is tried
    (lost,), counts = asked(judge_at(server), deadline_s=2.0)
    assert str(lost).startswith(("unavailable: ServerDisconnectedError of the judge's server", "timeout: "))
    assert counts["failed_requests"] > 1


def test_at_most_so_many_requests_are_under_way(server: Scripted) -> None:
    under_way, most = [0], [0]

    def counted(body: dict[str, Any]) -> Answer:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        time.sleep(0.05)
        under_way[0] -= 1
        return likely((body["messages"][0]["content"], 1.0))(body)

    server.script = [counted]
    found, _ = asked(judge_at(server, concurrency=3), *"123451234")
    assert found == [Reading(float(question), 0.0) for question in "123451234"]  # in order, whoever came first
    assert 1 < most[0] <= 3


@pytest.mark.parametrize(
    ("constrain", "text", "value"),
    [
        ("json_schema", '{"answer": "4"}', 4.0),
        ("json_schema", ' {"answer":"2"}\n', 2.0),
        ("json_schema", "4", None),
        ("json_schema", '{"answer": 4}', None),
        ("json_schema", '{"answer": "7"}', None),
        ("json_schema", '{"score": "4"}', None),
        ("json_schema", '{"answer": "4"', None),
        ("choice", "4", 4.0),
        ("choice", "4/5", None),
        ("none", " 5\n", 5.0),
        ("none", "5.", None),
        ("none", "I would say 5", None),
        ("none", "4 or 5", None),
        ("none", "", None),
        ("none", None, None),
    ],
)
def test_a_written_answer_is_one_of_the_scale_or_none(
    server: Scripted, constrain: str, text: Any, value: float | None
) -> None:
    server.script = [said(text)]
    (found,), _ = asked(judge_at(server, read="text", constrain=constrain))
    if value is None:
        assert isinstance(found, Failed)
        assert str(found).startswith("unreadable: ")
    else:
        assert found == Reading(value)
    body = server.bodies[0]
    assert body["temperature"] == 0
    if constrain == "json_schema":
        schema = body["response_format"]["json_schema"]["schema"]
        assert schema["properties"]["answer"]["enum"] == ["1", "2", "3", "4", "5"]
    assert body.get("structured_outputs") == ({"choice": ["1", "2", "3", "4", "5"]} if constrain == "choice" else None)


def test_it_reasons_first_and_is_asked_again(server: Scripted) -> None:
    server.script = [said("It is warm."), likely(("4", 1.0))]
    (found,), counts = asked(judge_at(server, max_tokens=50))
    assert found == Reading(4.0, 0.0)
    assert counts["requests"] == 2
    first, second = server.bodies
    assert (first["max_tokens"], first["temperature"], "logprobs" in first) == (50, 0, False)
    assert second["messages"] == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "It is warm."},
        {"role": "user", "content": "Answer with one of these and nothing else: 1, 2, 3, 4, 5"},
    ]
    server.bodies.clear()
    server.script = [said(None)]
    (silent,), _ = asked(judge_at(server, max_tokens=50))
    assert str(silent) == "unreadable: the judge's answer has no text"


@pytest.mark.parametrize("usage", [None, [], {}, {"prompt_tokens": -5}, {"prompt_tokens": "many"}])
def test_tokens_that_are_not_told_are_not_counted(server: Scripted, usage: Any) -> None:
    choice = likely(("4", 1.0))({})[2]["choices"][0]
    server.script = [lambda body: (200, {}, {"choices": [choice], "usage": usage})]
    (found,), counts = asked(judge_at(server))
    assert found == Reading(4.0, 0.0)
    assert counts == {"requests": 1}


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("http://h:8000", "http://h:8000/v1/chat/completions"),
        ("http://h:8000/", "http://h:8000/v1/chat/completions"),
        ("https://h/v1/", "https://h/v1/chat/completions"),
        ("https://h/v1beta/openai", "https://h/v1beta/openai/chat/completions"),
    ],
)
def test_where_requests_go(address: str, url: str) -> None:
    assert chat_url(address) == url


@pytest.mark.parametrize(
    ("script", "values", "error"),
    [
        (failing(401), {}, r"token_file: address=.* does not accept its token \(HTTP 401\)"),
        (failing(404), {}, r"address=.*: HTTP 404 at .*/v1/chat/completions for model_name=m"),
        (failing(400), {}, r"refuses what read=probabilities asks for \(HTTP 400\); write read=text"),
        (failing(422), {"read": "text"}, r"refuses what read=text asks for \(HTTP 422\); write another constrain"),
        (failing(503, Retry_After="60"), {}, r"address=.*: no answer \(HTTP 503 of the judge's server\)"),
        (
            said("4"),
            {},
            "read=probabilities: the judge's server gives no log-probabilities at address=.*; write read=text",
        ),
        (lambda body: (200, {}, b"<html>"), {}, "write the base URL of an OpenAI-compatible server"),
    ],
)
def test_what_is_at_the_address_is_known_at_the_start(
    server: Scripted, script: Any, values: dict[str, Any], error: str
) -> None:
    server.script = [script]
    judge = judge_at(server, **values)
    with pytest.raises(ValueError, match=error) as raised:
        asyncio.run(Endpoint(judge, scale_of(judge)).probe(20.0))
    assert TOKEN not in str(raised.value)


def test_a_server_that_can_be_asked_passes_whatever_it_thinks_of_the_question(server: Scripted) -> None:
    for script, values in ((likely(("Well", 1.0)), {}), (said("no"), {"read": "text"}), (likely(("1", 1.0)), {})):
        server.script = [script]
        judge = judge_at(server, **values)
        asyncio.run(Endpoint(judge, scale_of(judge)).probe(20.0))


def test_nobody_at_the_address(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    judge = JudgeConfig(address=address, model_name="m")
    with pytest.raises(ValueError, match=f"address={address}: no answer .*; write where the judge listens"):
        asyncio.run(Endpoint(judge, scale_of(judge)).probe(1.0))
    for content in ("", "one two"):
        (tmp_path / "token").write_text(content)
        with pytest.raises(ValueError, match="tokens, one is wanted"):
            Endpoint(JudgeConfig(address=address, token_file=str(tmp_path / "token")), scale_of(judge))


def test_bodies_are_json_whatever_a_completion_holds(server: Scripted) -> None:
    server.script = [likely(("1", 1.0))]
    question = 'half a pair \ud83d, quotes ", and {{ braces }}'
    (found,), _ = asked(judge_at(server), question)
    assert found == Reading(1.0, 0.0)
    assert json.dumps(server.bodies[0]["messages"][0]["content"]) == json.dumps(question)
