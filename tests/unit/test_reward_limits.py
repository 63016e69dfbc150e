"""What slow, greedy and leaving clients take from others: connections, bodies, reading, places."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from contracts.config import HttpConfig, ScorerConfig
from contracts.records import Score, ScoringItem
from reward_service import access
from reward_service import http as service_http
from reward_service.access import token_of
from reward_service.connections import ConnectionLimits
from reward_service.encoding_pool import EncodingPool, Late
from reward_service.front import Front, FrontLimits
from reward_service.http import HttpServer, HttpService
from reward_service.replica_dispatcher import ReplicaDispatcher
from reward_service.scorer_kind import ScorerSpec
from reward_service.service_metrics import Metrics

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


class Lengths:
    """Stands for the tokenizer: an item's tokens are its characters. `step_s` is how long it takes for one."""

    hash = "h"

    def __init__(self, step_s: float = 0.0):
        self.step_s, self.read = step_s, 0

    def text(self, text: str, label: str | None = None) -> ScoringItem:
        self.read += 1
        time.sleep(self.step_s)
        return ScoringItem(tuple(range(1, len(text) % 50 + 2)), 0, label)


def scored(items: list[ScoringItem]) -> list[Score]:
    return [Score(float(len(item.token_ids)), raw=float(len(item.token_ids))) for item in items]


class Service:
    """Two scorers behind the HTTP side; `slow` answers when it is `released`."""

    def __init__(self, encoder: Any = None, limits: FrontLimits | None = None, **http: Any):
        self.calls: list[tuple[str, list[ScoringItem]]] = []
        self.ended: list[str] = []
        scorers = {
            name: ScorerSpec(name, ScorerConfig(kind="function"), f"{name}-1", name, calls=2, call_items=4)
            for name in ("quick", "slow")
        }
        self.front = Front(scorers, limits or FrontLimits(100, 0, 30.0, 50), self._call, Metrics())
        self.http = HttpConfig(port=1, **http)
        self.service = HttpService(self.front, encoder or Lengths(), self.http, self._ready)

    async def _call(self, application: str, items: list[ScoringItem], deadline_s: float) -> list[Score]:
        self.calls.append((application, items))
        if application == "slow":
            await asyncio.sleep(deadline_s)
        return scored(items)

    async def _ready(self) -> list[str]:
        return []

    def count(self, sample: str) -> float:
        lines = self.front.metrics.text().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(sample))

    @asynccontextmanager
    async def client(self, address: str = "1.1.1.1", **options: Any) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.service.application(()), client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://service", **options) as client:
            yield client

    @asynccontextmanager
    async def listening(self, **limits: Any) -> AsyncIterator[int]:
        """On a real socket; gives the port."""
        server = HttpServer(self.service.application(()), self.http, self.ended.append, ConnectionLimits(**limits))
        server._http.port = 0
        await server.start()
        try:
            yield server._server.servers[0].sockets[0].getsockname()[1]
        finally:
            await server.stop()


def texts(count: int, model: str, size: int = 3, **more: Any) -> dict[str, Any]:
    return {"model": model, "items": [{"text": f"{n:0{size}}"} for n in range(count)], **more}


async def until(holds: Callable[[], bool], timeout_s: float = 5.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


# ---- connections


async def talk(port: int, *pieces: bytes, pause_s: float = 0.0) -> bytes:
    """What comes back until the connection ends, or nothing more comes for half a second."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    said = b""
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)
        while part := await asyncio.wait_for(reader.read(1 << 16), 0.5):
            said += part
    except (ConnectionError, TimeoutError):
        pass
    finally:
        writer.close()
    return said


POST = b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [b"GET /healthz HTTP/1.1\r\nX-Long: ", b"a" * 600, b"a" * 600],  # a line that does not end
        [b"GET /healthz HTTP/1.1\r\n", b"X-Many: aaaaaaaaaaaaaaaa\r\n" * 20, b"X-Many: aaaaaaaaaaaaaaaa\r\n" * 20],
        [b"GET /healthz HTTP/1.1\r\n" + b"X-Many: aaaaaaaaaaaaaaaa\r\n" * 80 + b"\r\n"],  # at one go
        [b"GET /" + b"a" * 2000],
        [b"\r\n" * 1000],
        [POST, b"0\r\n", b"X-Trailer: aaaaaaaaaaaaaaaa\r\n" * 80],
    ],
)
def test_a_head_has_a_limit_in_bytes(pieces: list[bytes]) -> None:
    async def go() -> None:
        service = Service()
        async with service.listening(head_bytes=1000) as port:
            said = await talk(port, *pieces, pause_s=0.02)
            head, _, body = said.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 431 "), said
            assert json.loads(body)["error"]["code"] == "too_large"
            assert service.ended == ["head_bytes"]
            assert (await talk(port, HEALTH)).startswith(b"HTTP/1.1 200 OK")

    asyncio.run(go())


def test_a_long_body_in_many_chunks_is_no_long_head() -> None:
    async def go() -> None:
        async with Service().listening(head_bytes=1000) as port:
            body = json.dumps(texts(40, "quick")).encode()
            chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in (body[i : i + 3] for i in range(0, len(body), 3))]
            said = await talk(port, POST, b"".join(chunks), b"0\r\n\r\n")
            assert said.startswith(b"HTTP/1.1 200 OK"), said

    asyncio.run(go())


def test_what_is_not_http_is_told_so_in_the_one_form() -> None:
    async def go() -> None:
        async with Service().listening() as port:
            said = await talk(port, b"\x16\x03\x01 no HTTP\r\n\r\n")
            assert said.startswith(b"HTTP/1.1 400 ")
            assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "bad_request"

    asyncio.run(go())


def test_a_head_has_a_limit_in_time() -> None:
    """Not that of its last byte: one that drips would never end."""

    async def go() -> None:
        service = Service()
        async with service.listening(head_s=0.2) as port:
            start = time.monotonic()
            await asyncio.gather(talk(port), talk(port, *[b"G", b"E", b"T", b" ", b"/"] * 2, pause_s=0.1))
            assert time.monotonic() - start < 1.5
            assert service.ended == ["head_time"] * 2
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(3):  # each request has a time of its own
                writer.write(HEALTH)
                assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200 OK")
                await asyncio.sleep(0.15)
            writer.close()

    asyncio.run(go())


def test_idle_connections_shut_nobody_out() -> None:
    """Those without a request make room; the one with a request under way is left alone."""

    async def go() -> None:
        service = Service()
        async with service.listening(connections=8) as port:
            body = json.dumps(texts(1, "slow", deadline_ms=900)).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await until(lambda: bool(service.calls))
            idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(30)]
            assert (await talk(port, HEALTH)).startswith(b"HTTP/1.1 200 OK")
            assert service.ended == ["connections"] * 24  # 8 stay: that at work, six idle ones, and the newest
            assert (await reader.readuntil(b"}]}")).startswith(b"HTTP/1.1 200 OK")
            for _, other in [*idle, (reader, writer)]:
                other.close()

    asyncio.run(go())


def test_an_answer_that_is_not_taken_ends_its_connection() -> None:
    async def go() -> None:
        service = Service(max_body_mib=32)
        async with service.listening(send_s=0.2) as port:
            body = json.dumps({"model": "quick", "items": [{"id": "x" * 2**24, "text": "a"}]}).encode()
            _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.write(b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await until(lambda: service.ended == ["send_time"])
            await until(lambda: service.service.bodies.pending == 0)
            writer.close()

    asyncio.run(go())


def test_health_is_told_when_all_requests_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_http, "REQUESTS", 2)

    async def go() -> list[httpx.Response]:
        service = Service()
        async with service.client() as client:
            waiting = [
                asyncio.create_task(client.post("/v1/rewards", json=texts(1, "slow", deadline_ms=300))) for _ in "ab"
            ]
            await until(lambda: bool(service.calls))
            answers = [await client.post("/v1/rewards", json=texts(1, "quick")), await client.get("/healthz")]
            return [
                *answers,
                *[await task for task in waiting],
                await client.post("/v1/rewards", json=texts(1, "quick")),
            ]

    turned_away, health, *others = asyncio.run(go())
    assert (turned_away.status_code, turned_away.json()["error"]["code"]) == (503, "overloaded")
    assert health.status_code == 200
    assert [answer.status_code for answer in others] == [200] * 3


@pytest.mark.parametrize(
    "authorization", ["Basic é", "Basic %%%", "Basic 4pyT", "Basic", "Bearer é", "Bearer \x00", "x" * 999]
)
def test_no_form_of_a_token_is_more_than_wrong(authorization: str) -> None:
    assert token_of(authorization, ("0" * 64,)) is None


# ---- bodies


async def body_of(pieces: list[bytes], pause_s: float = 60.0) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
    await asyncio.sleep(pause_s)


def test_bodies_that_are_announced_and_do_not_come_take_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "STALL_S", 0.3)

    async def go() -> None:
        service = Service(max_body_mib=1, max_pending_mib=2)
        announced = {"Content-Length": str(2**20)}
        async with service.client() as client:
            start = time.monotonic()
            none = [
                asyncio.create_task(client.post("/v1/rewards", content=body_of([b" "]), headers=announced))
                for _ in range(20)
            ]
            await until(lambda: service.service.bodies.pending == 20)
            assert (await client.post("/v1/rewards", json=texts(1, "quick"))).status_code == 200
            answers = [await task for task in none]
            assert {answer.status_code for answer in answers} == {408}
            assert time.monotonic() - start < 3
            assert service.service.bodies.pending == 0

    asyncio.run(go())


def test_the_bodies_of_one_client_take_half_of_the_room() -> None:
    async def go() -> None:
        service = Service(max_body_mib=1, max_pending_mib=2)
        with service.service.bodies.room("@1.1.1.1") as take:
            take(2**20)
            async with service.client() as client, service.client("2.2.2.2") as another:
                refused = await client.post("/v1/rewards", json=texts(1, "quick"))
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
                assert (await another.post("/v1/rewards", json=texts(1, "quick"))).status_code == 200
        assert service.service.bodies.pending == 0

    asyncio.run(go())


# ---- reading what was sent


def test_reading_is_within_the_deadline_and_ends_with_it() -> None:
    async def go() -> None:
        encoder = Lengths(step_s=0.05)
        service = Service(encoder)
        async with service.client() as client:
            start = time.monotonic()
            answer = await client.post("/v1/rewards", json=texts(200, "quick", size=30, deadline_ms=150))
            assert time.monotonic() - start < 1
            assert answer.status_code == 200
            codes = {(item["code"], item["retryable"]) for item in answer.json()["items"]}
            assert codes == {("timeout", True)}
            assert len(answer.json()["items"]) == 200
        await asyncio.sleep(0.2)
        assert encoder.read < 10
        assert service.calls == []

    asyncio.run(go())


def test_reading_of_one_client_keeps_no_other_waiting() -> None:
    """Whatever it sends at once has one thread."""

    async def go() -> None:
        encoder = Lengths(step_s=0.02)
        service = Service(encoder)
        async with service.client() as client, service.client("2.2.2.2") as another:
            many = [
                asyncio.create_task(client.post("/v1/rewards", json=texts(100, "quick", size=60))) for _ in range(6)
            ]
            await until(lambda: encoder.read > 0)
            start = time.monotonic()
            assert (await client.post("/v1/rewards", json=texts(1, "quick"))).status_code == 200  # a short one
            long = await another.post("/v1/rewards", json=texts(10, "quick", size=600))
            assert long.status_code == 200
            assert time.monotonic() - start < 1.5
            for task in many:
                task.cancel()
        await until(lambda: service.service.bodies.pending == 0)

    asyncio.run(go())


def test_a_thread_that_does_not_end_keeps_its_clients_place_alone() -> None:
    async def go() -> None:
        pool, release = EncodingPool(threads=2, of_one_client=1), threading.Event()
        try:
            for _ in range(3):
                with pytest.raises(Late):
                    await pool.run("greedy", time.monotonic() + 0.05, lambda check: release.wait(5))
            assert await pool.run("another", time.monotonic() + 5, lambda check: "read") == "read"
        finally:
            release.set()
        assert await pool.run("greedy", time.monotonic() + 5, lambda check: "read") == "read"

    asyncio.run(go())


# ---- places


async def leave(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    with pytest.raises(httpx.TimeoutException):
        await client.post("/v1/rewards", json=body, timeout=0.2)


def test_a_client_that_leaves_frees_its_places_and_the_replica() -> None:
    async def go() -> None:
        service, ended = Service(), asyncio.Event()

        async def endless(application: str, items: list[ScoringItem], deadline_s: float) -> list[Score]:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                ended.set()
                raise
            return scored(items)

        service._call = endless  # type: ignore[method-assign]
        service.front._dispatchers["slow"]._call = endless
        async with service.listening() as port:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                await leave(client, texts(50, "slow"))
                await until(lambda: service.front.queued == 0)
                await asyncio.wait_for(ended.wait(), 1)
            await until(lambda: service.count('tandem_reward_requests_total{route="/v1/rewards",status="499"}') == 1)
        assert service.front._dispatchers["slow"]._waiting == {}
        assert service.service.bodies.pending == 0

    asyncio.run(go())


def test_one_scorers_queue_and_one_clients_are_no_others() -> None:
    async def go() -> None:
        service = Service()
        async with service.client() as client, service.client("2.2.2.2") as another, service.client("3.3.3.3") as third:
            waiting = [
                asyncio.create_task(one.post("/v1/rewards", json=texts(50, "slow", deadline_ms=700)))
                for one in (client, another)
            ]
            await until(lambda: service.front.queued == 100)
            full = await third.post("/v1/rewards", json=texts(1, "slow"))
            assert full.json()["error"]["message"] == "overloaded: 100 items are waiting"
            assert (await client.post("/v1/rewards", json=texts(50, "quick"))).status_code == 200
            own = await service.front.score(service.front.find("slow"), [ScoringItem((1,))] * 100, 0.05)
            assert {score.code for score in own} == {"timeout"}  # the loop's were let in
            await waiting[0]
            await waiting[1]
        assert service.front.queued == 0

    asyncio.run(go())


def test_one_client_does_not_fill_a_scorers_queue() -> None:
    async def go() -> None:
        service = Service()
        async with service.client() as client, service.client("2.2.2.2") as another:
            first = asyncio.create_task(client.post("/v1/rewards", json=texts(40, "slow", deadline_ms=500)))
            await until(lambda: service.front.queued == 40)
            second = await client.post("/v1/rewards", json=texts(11, "slow"))
            assert second.json()["error"]["message"] == "overloaded: 40 items of yours are waiting"
            allowed = asyncio.create_task(another.post("/v1/rewards", json=texts(50, "slow", deadline_ms=100)))
            await until(lambda: service.front.queued == 90)
            await first
            await allowed

    asyncio.run(go())


# ---- whose turn it is


class Calls:
    """Replicas that answer when told to; the first token of an item says whose it is."""

    def __init__(self) -> None:
        self.sent: list[list[int]] = []
        self.gate = asyncio.Semaphore(0)

    async def __call__(self, application: str, items: list[ScoringItem], deadline_s: float) -> list[Score]:
        self.sent.append([item.token_ids[0] for item in items])
        await self.gate.acquire()
        return scored(items)


def ask(dispatcher: ReplicaDispatcher, client: str | None, mark: int, count: int) -> list[Awaitable[Score]]:
    expires = time.monotonic() + 30
    return [asyncio.ensure_future(dispatcher.score(ScoringItem((mark, n)), expires, client)) for n in range(count)]


def test_the_loop_and_http_take_turns_and_http_clients_share_a_call() -> None:
    async def go() -> None:
        calls = Calls()
        dispatcher = ReplicaDispatcher(calls, "a", 1, 4)
        waiting = ask(dispatcher, "greedy", 1, 40)
        await until(lambda: len(calls.sent) == 1)
        waiting += [*ask(dispatcher, "modest", 2, 3), *ask(dispatcher, None, 0, 8)]
        await asyncio.sleep(0)
        for _ in range(20):
            calls.gate.release()
        await asyncio.gather(*waiting)
        assert calls.sent[:5] == [[1, 1, 1, 1], [0, 0, 0, 0], [1, 2, 1, 2], [0, 0, 0, 0], [1, 2, 1, 1]]

    asyncio.run(go())


def test_http_leaves_calls_to_a_loop_that_asks() -> None:
    async def go() -> None:
        calls = Calls()
        dispatcher = ReplicaDispatcher(calls, "a", 4, 2)
        waiting = ask(dispatcher, "greedy", 1, 20)
        await until(lambda: len(calls.sent) == 4)  # all of them, as long as no loop has asked
        calls.gate.release()
        calls.gate.release()
        waiting += ask(dispatcher, None, 0, 4)
        await until(lambda: len(calls.sent) >= 6)
        await asyncio.sleep(0.01)
        assert calls.sent[4:].count([0, 0]) == 2
        for _ in range(20):
            calls.gate.release()
        await asyncio.gather(*waiting)

    asyncio.run(go())
