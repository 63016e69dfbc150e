"""Connections, before and between requests: what a stranger without a token may take. The protocol is uvicorn's, with limits
that it has options for in its slower one alone (h11 takes twice the CPU), or in none:

    bytes of a head           head_bytes, of trailers too; then 431
    time for a head           head_s from its first byte, or from the connection's
    time between requests     idle_s
    connections               a new one takes the place of the one that has been without a request for longest
    time to take an answer    send_s, once the buffers for it are full
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol


@dataclass(frozen=True)
class ConnectionLimits:
    head_bytes: int = 16_384
    head_s: float = 10.0
    idle_s: float = 30.0
    connections: int = 1024
    send_s: float = 30.0


LIMITS = ConnectionLimits()


class BoundedProtocol(HttpToolsProtocol):
    """One connection.

    Args:
        ended: is told why a connection was ended: head_bytes, head_time, send_time or connections.
    """

    def __init__(self, *args: Any, limits: ConnectionLimits, ended: Callable[[str], None], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._limits, self._ended = limits, ended
        self._head_bytes = 0  # of this request, as far as its lines are complete
        self._line_bytes = 0  # received since the parser last had something to tell
        self._idle_since = 0.0
        self._head_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Without a request that is being answered."""
        return self.cycle is None or self.cycle.response_complete

    # ---- connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head(self._limits.head_s)
        if len(self.connections) > self._limits.connections:
            idle = [other for other in self.connections if isinstance(other, BoundedProtocol) and other.is_idle]
            min(idle, key=lambda other: other._idle_since)._end("connections")  # itself, if all others are at work

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._send_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def _end(self, reason: str) -> None:
        """At once: closing would first wait until all that was written is taken."""
        self._ended(reason)
        self.connections.discard(self)
        self.transport.abort()

    # ---- time

    def _wait_for_head(self, seconds: float) -> None:
        self._head_is_there()
        self._idle_since = self.loop.time()
        self._head_timer = self.loop.call_later(seconds, self._end, "head_time")

    def _head_is_there(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Where no other request has been sent behind it. uvicorn closes after idle_s, unless the answer is not taken.
        if self.is_idle:
            self._wait_for_head(self._limits.idle_s + self._limits.head_s)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timer = self.loop.call_later(self._limits.send_s, self._end, "send_time")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()

    # ---- bytes

    def data_received(self, data: bytes) -> None:
        self._line_bytes += len(data)
        super().data_received(data)  # what is complete, or of a body, resets the count
        if self._line_bytes > self._limits.head_bytes and not self.transport.is_closing():
            self._refuse_head()

    def on_message_begin(self) -> None:
        if self.is_idle:
            self._wait_for_head(self._limits.head_s)
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + len(": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_is_there()
        self._line_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._line_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._line_bytes = 0
        super().on_message_complete()

    def _count(self, size: int) -> None:
        self._line_bytes = 0
        self._head_bytes += size
        if self._head_bytes > self._limits.head_bytes:
            raise ValueError("the head is too long")  # ends the parser, which asks for the answer below

    def send_400_response(self, msg: str) -> None:
        if self._head_bytes > self._limits.head_bytes:
            self._refuse_head()
        else:
            self._answer(400, "bad_request", "the request is not HTTP")

    def _refuse_head(self) -> None:
        self._ended("head_bytes")
        self._answer(431, "too_large", f"line and headers have at most {self._limits.head_bytes} bytes")

    def _answer(self, status: int, code: str, message: str) -> None:
        """In the form of every answer that is not 200, and the end of the connection."""
        body = json.dumps({"error": {"code": code, "message": message}}).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
