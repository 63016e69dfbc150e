"""The service over HTTP: routes, statuses and limits. An ASGI application over a `Front`; nothing here knows Ray.

    connection (connections.py) ─> token? ─> body within limits? ─> protocol (protocols.py) ─> Front.score ─> answer

`/v1/rewards` answers item by item. The protocols of others have no place for an item's error, so there one item without a
score is a status: 422 where a retry cannot help, 503 or 504 where it can. A reward is never made up to fill the gap.

A request's deadline begins when its body is there, and holds for reading it too. A client that leaves ends its request.
"""

import asyncio
import logging
import math
import socket
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Literal, NamedTuple

import uvicorn
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from contracts.checks.check import Check
from contracts.config import HttpConfig
from contracts.records import Score, ScoringItem
from contracts.scoring import RETRYABLE
from reward_service import openapi, protocols
from reward_service.access import OPEN_ROUTES, Bodies, Refused, RequireToken, client_of
from reward_service.connections import LIMITS, BoundedProtocol, ConnectionLimits
from reward_service.encoder import Encoder
from reward_service.encoding_pool import EncodingPool, Late, StoppableEncoder
from reward_service.front import Front, UnknownScorer, last_tokens
from reward_service.protocols import BadRequest, Entry
from reward_service.scorer_kind import ScorerSpec

logger = logging.getLogger("ray.serve")
REQUESTS = (
    960  # under way, above which others get 503; the connections that are left can be ended, /healthz has one of them
)
STOP_S = 15  # for answers that have begun
INLINE_BYTES = 4096  # a longer body is read in a thread, so that other requests are answered meanwhile
GONE = 499  # of a client that has left: nobody sees it but /metrics


def refusal(fault: Refused) -> JSONResponse:
    """The one form of every answer that is not 200."""
    headers = {}
    if fault.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(fault.retry_after_s)))
    if fault.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": {"code": fault.code, "message": fault.message}}, fault.status, headers)


class HttpService:
    """The routes' handlers."""

    def __init__(self, front: Front, encoder: Encoder, config: HttpConfig, ready: Callable[[], Awaitable[list[str]]]):
        self.front = front
        self.encoder = encoder
        self.config = config
        self._ready = ready
        self.pool = EncodingPool()
        self.bodies = Bodies(int(config.max_body_mib * 2**20), int(config.max_pending_mib * 2**20))

    def application(self, digests: tuple[str, ...]) -> Starlette:
        """Args: digests of the tokens that are accepted; none: open."""
        routes = [
            Route("/v1/rewards", self._posted(protocols.NativeRequest, self._native), methods=["POST"]),
            Route("/get_reward", self._posted(protocols.OpenRLHFRequest, self._openrlhf), methods=["POST"]),
            Route(
                "/classify", self._posted(protocols.PoolingRequest, partial(self._pooled, "classify")), methods=["POST"]
            ),
            Route(
                "/pooling", self._posted(protocols.PoolingRequest, partial(self._pooled, "pooling")), methods=["POST"]
            ),
            Route("/v1/models", self._models),
            Route("/healthz", self._healthz),
            Route("/readyz", self._readyz),
            Route("/metrics", self._metrics),
            Route("/openapi.json", self._openapi),
        ]
        self._paths = {route.path for route in routes}
        handlers = {
            Refused: lambda request, fault: refusal(fault),
            HTTPException: lambda request, fault: refusal(Refused(fault.status_code, "no_route", fault.detail)),
        }
        token = Middleware(RequireToken, digests=digests, refuse=refusal)
        return Starlette(
            routes=routes, middleware=[Middleware(_Counted, service=self), token], exception_handlers=handlers
        )

    def route_of(self, path: str) -> str:
        """For metrics, whose labels must not grow with what strangers ask for."""
        return path if path in self._paths else "other"

    # ---- scoring

    def _posted(self, kind: type[BaseModel], handler: "Handler") -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            client = client_of(request)
            try:
                with self.bodies.room(client) as take:
                    body = await self.bodies.read(request, take)
                    return await _unless_gone(request.receive, self._answer(kind, handler, request, body, client))
            except ClientDisconnect:
                return Response(status_code=GONE)

        return answer

    async def _answer(
        self, kind: type[BaseModel], handler: "Handler", request: Request, body: bytes, client: str
    ) -> Response:
        ask = _Ask(client, len(body), time.monotonic(), request.query_params.get("model"))
        try:
            expires = ask.arrived + self.front.limits.deadline_s
            content = await self._read(ask, expires, lambda check: protocols.read(kind, _parsed(body, ask.model)))
            return JSONResponse(await handler(content, ask))
        except RecursionError:
            raise Refused(400, "bad_request", "the body is nested too deeply") from None
        except BadRequest as fault:
            raise Refused(400, "bad_request", str(fault)) from None
        except Late:
            raise Refused(504, "timeout", "the body was not read before the deadline", retry_after_s=1) from None
        except (Refused, asyncio.CancelledError):
            raise
        except Exception as fault:  # ours; logged without its text, which may quote the request
            where = traceback.extract_tb(fault.__traceback__)[-1]
            logger.error("%s at %s:%d", type(fault).__name__, where.filename, where.lineno or 0)
            raise Refused(500, "internal", "the service failed on this request") from None

    async def _read(self, ask: "_Ask", expires: float, work: Callable[[Callable[[], None]], Any]) -> Any:
        """What `work` reads of a body, a long one in the pool. Raises Late."""
        if ask.size < INLINE_BYTES:
            return work(lambda: None)
        return await self.pool.run(ask.client, expires, work)

    async def _native(self, request: protocols.NativeRequest, ask: "_Ask") -> protocols.Answer:
        scorer = self._scorer(request.model, request.version)
        if request.deadline_ms:
            ask = ask._replace(deadline_s=request.deadline_ms / 1000)
        entries = await self._entries(protocols.native_entries, request, ask, len(request.items))
        truncate = request.on_overflow == "truncate_left_keep_eos"
        scores = await self._scores(scorer, entries, ask, truncate)
        if all(score.code == "overloaded" for score in scores):
            raise self._overloaded(scores[0])
        return protocols.native_answer(request, scorer.name, scorer.version, entries, scores)

    async def _openrlhf(self, request: protocols.OpenRLHFRequest, ask: "_Ask") -> protocols.Answer:
        scorer = self._scorer(request.model)
        read = partial(protocols.openrlhf_entries, is_apart=self.front.needs_seam(scorer))
        entries = await self._entries(read, request, ask, len(request.query))
        return protocols.openrlhf_answer(self._complete(await self._scores(scorer, entries, ask)))

    async def _pooled(
        self, path: Literal["classify", "pooling"], request: protocols.PoolingRequest, ask: "_Ask"
    ) -> protocols.Answer:
        scorer = self._scorer(request.model)
        several = isinstance(request.input, list) and not isinstance(request.input[0], int)
        count = len(request.input) if several and request.input else 1
        entries = await self._entries(protocols.pooling_entries, request, ask, count)
        keep = request.truncate_prompt_tokens
        entries = [_kept(entry, keep) for entry in entries]
        scores = await self._scores(scorer, entries, ask, truncate=keep is not None)
        scores = self._complete([protocols.packable(request, score) for score in scores])
        return protocols.pooling_answer(path, request, scorer.name, entries, scores)

    def _scorer(self, name: str | None, version: str | None = None) -> ScorerSpec:
        try:
            return self.front.find(name, version)
        except UnknownScorer as fault:
            status, code = (410, "version_gone") if fault.is_gone else (404, "unknown_model")
            raise Refused(status, code, str(fault)) from None

    async def _entries(self, read: Callable[..., list[Entry]], request: Any, ask: "_Ask", count: int) -> list[Entry]:
        if count > self.config.max_items:
            raise Refused(413, "too_many_items", f"a request has at most {self.config.max_items} items")
        try:
            return await self._read(
                ask, self._expires(ask), lambda check: read(request, StoppableEncoder(self.encoder, check))
            )
        except Late:
            return [Score(None, "timeout: not read before the deadline")] * count

    async def _scores(
        self, scorer: ScorerSpec, entries: list[Entry], ask: "_Ask", truncate: bool = False
    ) -> list[Score]:
        items = [entry for entry in entries if isinstance(entry, ScoringItem)]
        left_s = self._expires(ask) - time.monotonic()
        found = iter(await self.front.score(scorer, items, left_s, truncate, client=ask.client))
        return [next(found) if isinstance(entry, ScoringItem) else entry for entry in entries]

    def _expires(self, ask: "_Ask") -> float:
        longest = self.front.limits.deadline_s
        return ask.arrived + (longest if ask.deadline_s is None else min(ask.deadline_s, longest))

    def _complete(self, scores: list[Score]) -> list[Score]:
        """For protocols that know no error of an item. Raises Refused unless every item has a score."""
        failed = [(i, score) for i, score in enumerate(scores) if score.value is None]
        if not failed:
            return scores
        if all(score.code == "overloaded" for _, score in failed):
            raise self._overloaded(failed[0][1])
        index, first = min(failed, key=lambda entry: entry[1].code in RETRYABLE)
        message = f"{len(failed)} of {len(scores)} items have no score; item {index}: {first.error}"
        if first.code not in RETRYABLE:
            raise Refused(422, str(first.code), message)
        raise Refused(504 if first.code == "timeout" else 503, str(first.code), message, retry_after_s=1)

    def _overloaded(self, score: Score) -> Refused:
        return Refused(503, "overloaded", str(score.error), self.front.backlog_s())

    # ---- everything else

    async def _models(self, request: Request) -> Response:
        data = [
            {
                "id": spec.name,
                "object": "model",
                "kind": spec.entry.kind,
                "version": spec.version,
                "tokenizer_hash": self.encoder.hash,
                "max_tokens": spec.max_tokens,
                "read_at": spec.read_at,
                "parts": list(spec.parts),
            }
            for spec in self.front.scorers.values()
        ]
        return JSONResponse({"object": "list", "data": data})

    async def _healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _readyz(self, request: Request) -> Response:
        missing = await self._ready()
        status = "waiting for " + ", ".join(missing) if missing else "ok"
        return JSONResponse({"status": status}, 503 if missing else 200)

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(openapi.description())

    async def _metrics(self, request: Request) -> Response:
        return Response(self.front.metrics.text(), media_type="text/plain; version=0.0.4")


class _Ask(NamedTuple):
    """What is known of a request beside its content."""

    client: str
    size: int  # bytes of the body
    arrived: float  # on the monotonic clock
    model: str | None  # of the URL, for clients whose bodies cannot name a scorer
    deadline_s: float | None = None


Handler = Callable[[Any, _Ask], Awaitable[protocols.Answer]]


def _parsed(body: bytes, model: str | None) -> dict[str, Any]:
    """Raises BadRequest."""
    parsed = protocols.parse(body)
    if model is not None:
        parsed.setdefault("model", model)
    return parsed


async def _unless_gone(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, Response]) -> Response:
    """What `work` returns. Where the client leaves before, it is cancelled, and ClientDisconnect is raised."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    answer, left = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait((answer, left), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        left.cancel()


class _Counted:
    """ASGI middleware: counts requests by route and status, turns away those above `REQUESTS`, and answers what nobody
    foresaw with a bare 500."""

    def __init__(self, app: Any, service: HttpService):
        self.app = app
        self.service = service
        self.under_way = 0

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        metrics, start, status = self.service.front.metrics, time.perf_counter(), "500"

        async def noted(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        route, app = self.service.route_of(scope["path"]), self.app
        if self.under_way >= REQUESTS and scope["path"] not in OPEN_ROUTES:
            app = refusal(Refused(503, "overloaded", f"{REQUESTS} requests are under way", retry_after_s=1))
            metrics.rejected.labels("requests").inc()
        self.under_way += 1
        try:
            await app(scope, receive, noted)
        finally:
            self.under_way -= 1
            metrics.requests.labels(route, status).inc()
            metrics.seconds.labels(route).observe(time.perf_counter() - start)


def _kept(entry: Entry, tokens: int | None) -> Entry:
    """vLLM's `truncate_prompt_tokens`: the last so many (-1: as many as the model takes). The first go, never the EOS."""
    if not isinstance(entry, ScoringItem) or tokens is None or not 0 < tokens < len(entry.token_ids):
        return entry
    return last_tokens(entry, tokens)


def port_problems(http: HttpConfig) -> list[str]:
    """Why the first front of a service could not listen, or should not: beside another service of this user it could, by
    SO_REUSEPORT, and each would get some of the other's requests. So this tries without; not for a front's successor."""
    try:
        with _unbound(http.host) as probe:
            probe.bind((http.host, http.port))
    except OSError as error:
        rule = f"a port that can be had at reward_service.http.host ({http.host})"
        found, instead = f"{http.port} ({error.strerror})", "another port, or end what listens there"
        return [Check(False, "reward_service.http.port", rule, found, instead).message]
    return []


def _unbound(host: str) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    # Connections that have ended keep their port for a minute.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return made


class HttpServer:
    """The socket of the HTTP side: uvicorn within the front's process and event loop."""

    def __init__(
        self,
        application: Starlette,
        http: HttpConfig,
        ended: Callable[[str], None],
        limits: ConnectionLimits = LIMITS,
    ):
        """
        Args:
            ended: is told why a connection was ended before a request on it was answered.
        """
        self._http = http
        config = uvicorn.Config(
            application,
            http=partial(BoundedProtocol, limits=limits, ended=ended),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_keep_alive=math.ceil(limits.idle_s),
            timeout_graceful_shutdown=STOP_S,
        )
        self._server = uvicorn.Server(config)
        self._task: asyncio.Task | None = None

    async def start(self) -> None:
        """Returns once connections are accepted. Raises OSError where the address cannot be had."""
        listening = _unbound(self._http.host)
        # The successor of a front listens before it goes.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind((self._http.host, self._http.port))
        self._task = asyncio.create_task(self._server.serve(sockets=[listening]))
        while not self._server.started:
            if self._task.done():
                self._task.result()
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Accept no more, and return when what has begun is answered."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task
