"""The service over HTTP: routes, statuses and limits. An ASGI application over a `Front`; nothing here knows Ray.

    token? ─> body within limits? ─> protocol (protocols.py) ─> Front.score ─> answer

`/v1/rewards` answers item by item. The protocols of others have no place for an item's error, so there one item without a
score is a status: 422 where a retry cannot help, 503 or 504 where it can. A reward is never made up to fill the gap.
"""

import asyncio
import logging
import socket
import time
import traceback
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from contracts.config import HttpConfig
from contracts.records import Score, ScoringItem
from contracts.scoring import RETRYABLE
from reward_service import openapi, protocols
from reward_service.access import Bodies, Refused, RequireToken
from reward_service.encoder import Encoder
from reward_service.front import Front, UnknownScorer, last_tokens
from reward_service.protocols import BadRequest, Entry
from reward_service.scorer_kind import ScorerSpec

Handler = Callable[[Any], Awaitable[protocols.Answer]]
logger = logging.getLogger("ray.serve")
CONNECTIONS = 1024  # above which uvicorn itself answers 503
IDLE_S = 30
STOP_S = 15  # for answers that have begun
INLINE_BYTES = 16_384  # a longer body is tokenised in a thread, so that other requests are answered meanwhile


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
        self.front, self.encoder, self.config, self._ready = front, encoder, config, ready
        self.bodies = Bodies(int(config.max_body_mib * 2**20), int(config.max_pending_mib * 2**20))

    def application(self, digests: tuple[str, ...]) -> Starlette:
        """Args: digests of the tokens that are accepted; none: open."""
        routes = [
            Route("/v1/rewards", self._posted(self._native), methods=["POST"]),
            Route("/get_reward", self._posted(self._openrlhf), methods=["POST"]),
            Route("/classify", self._posted(partial(self._pooled, "classify")), methods=["POST"]),
            Route("/pooling", self._posted(partial(self._pooled, "pooling")), methods=["POST"]),
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

    def _posted(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            with self.bodies.reserved(request.headers.get("content-length")):
                body = await self.bodies.read(request)
                try:
                    parsed = protocols.parse(body)
                    if "model" in request.query_params:  # for clients whose bodies cannot name a scorer
                        parsed.setdefault("model", request.query_params["model"])
                    return JSONResponse(await handler(_Body(parsed, len(body))))
                except RecursionError:
                    raise Refused(400, "bad_request", "the body is nested too deeply") from None
                except BadRequest as fault:
                    raise Refused(400, "bad_request", str(fault)) from None
                except (Refused, asyncio.CancelledError):
                    raise
                except Exception as fault:  # ours; logged without its text, which may quote the request
                    where = traceback.extract_tb(fault.__traceback__)[-1]
                    logger.error("%s at %s:%d", type(fault).__name__, where.filename, where.lineno or 0)
                    raise Refused(500, "internal", "the service failed on this request") from None

        return answer

    async def _native(self, body: "_Body") -> protocols.Answer:
        request = protocols.read(protocols.NativeRequest, body.content)
        scorer = self._scorer(request.model, request.version)
        entries = await self._entries(protocols.native_entries, request, body.size, len(request.items))
        deadline_s = request.deadline_ms / 1000 if request.deadline_ms else None
        truncate = request.on_overflow == "truncate_left_keep_eos"
        scores = await self._scores(scorer, entries, deadline_s, truncate)
        if all(score.code == "overloaded" for score in scores):
            raise self._overloaded(scores[0])
        return protocols.native_answer(request, scorer.name, scorer.version, entries, scores)

    async def _openrlhf(self, body: "_Body") -> protocols.Answer:
        request = protocols.read(protocols.OpenRLHFRequest, body.content)
        scorer = self._scorer(request.model)
        entries = await self._entries(protocols.openrlhf_entries, request, body.size, len(request.query))
        return protocols.openrlhf_answer(self._complete(await self._scores(scorer, entries)))

    async def _pooled(self, path: Literal["classify", "pooling"], body: "_Body") -> protocols.Answer:
        request = protocols.read(protocols.PoolingRequest, body.content)
        scorer = self._scorer(request.model)
        several = isinstance(request.input, list) and not isinstance(request.input[0], int)
        entries = await self._entries(
            protocols.pooling_entries, request, body.size, len(request.input) if several else 1
        )
        keep = request.truncate_prompt_tokens
        entries = [_kept(entry, keep) for entry in entries]
        scores = await self._scores(scorer, entries, truncate=keep is not None)
        scores = self._complete([protocols.packable(request, score) for score in scores])
        return protocols.pooling_answer(path, request, scorer.name, entries, scores)

    def _scorer(self, name: str | None, version: str | None = None) -> ScorerSpec:
        try:
            return self.front.find(name, version)
        except UnknownScorer as fault:
            status, code = (410, "version_gone") if fault.is_gone else (404, "unknown_model")
            raise Refused(status, code, str(fault)) from None

    async def _entries(self, read: Callable[..., list[Entry]], request: Any, size: int, count: int) -> list[Entry]:
        if count > self.config.max_items:
            raise Refused(413, "too_many_items", f"a request has at most {self.config.max_items} items")
        if size < INLINE_BYTES:
            return read(request, self.encoder)
        return await asyncio.to_thread(read, request, self.encoder)

    async def _scores(
        self, scorer: ScorerSpec, entries: list[Entry], deadline_s: float | None = None, truncate: bool = False
    ) -> list[Score]:
        items = [entry for entry in entries if isinstance(entry, ScoringItem)]
        found = iter(await self.front.score(scorer, items, deadline_s, truncate))
        return [next(found) if isinstance(entry, ScoringItem) else entry for entry in entries]

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


class _Body(NamedTuple):
    content: dict[str, Any]
    size: int


class _Counted:
    """ASGI middleware: counts requests by route and status, and answers what nobody foresaw with a bare 500."""

    def __init__(self, app: Any, service: HttpService):
        self.app, self.service = app, service

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

        route = self.service.route_of(scope["path"])
        try:
            await self.app(scope, receive, noted)
        finally:
            metrics.requests.labels(route, status).inc()
            metrics.seconds.labels(route).observe(time.perf_counter() - start)


def _kept(entry: Entry, tokens: int | None) -> Entry:
    """vLLM's `truncate_prompt_tokens`: the last so many (-1: as many as the model takes). The first go, never the EOS."""
    if not isinstance(entry, ScoringItem) or tokens is None or not 0 < tokens < len(entry.token_ids):
        return entry
    return last_tokens(entry, tokens)


class HttpServer:
    """The socket of the HTTP side: uvicorn within the front's process and event loop."""

    def __init__(self, application: Starlette, http: HttpConfig):
        self._http = http
        config = uvicorn.Config(
            application,
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=STOP_S,
        )
        self._server = uvicorn.Server(config)
        self._task: asyncio.Task | None = None

    async def start(self) -> None:
        """Returns once connections are accepted. Raises OSError where the address cannot be had."""
        family = socket.AF_INET6 if ":" in self._http.host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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
