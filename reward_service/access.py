"""Who may ask, and how much: bearer tokens and body limits, before anything of a body is read."""

import asyncio
import base64
import binascii
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OPEN_ROUTES = ("/healthz",)
BODY_S = 30.0  # for a body to arrive
ASGI = Callable[[dict[str, Any], Callable, Callable], Awaitable[None]]


class Refused(Exception):
    """An answer other than 200, with an HTTP status and a code for programs."""

    def __init__(self, status: int, code: str, message: str, retry_after_s: float | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after_s = status, code, message, retry_after_s


def token_digests(token_file: str | None) -> tuple[str, ...]:
    """SHA-256 of each token of the file: what travels to replicas and is kept there. Empty: nobody needs a token."""
    if token_file is None:
        return ()
    return tuple(hashlib.sha256(token.encode()).hexdigest() for token in Path(token_file).read_text().split())


def is_allowed(authorization: str, digests: tuple[str, ...]) -> bool:
    """`Bearer TOKEN`, or `Basic` with the token as the password: clients that cannot set a header can write it into the
    URL, as `http://any:TOKEN@host:8000/get_reward`. Every digest is compared, each in constant time."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            value = ""
    elif scheme.lower() != "bearer":
        value = ""
    given = hashlib.sha256(value.strip().encode()).hexdigest()
    return sum(hmac.compare_digest(given, digest) for digest in digests) > 0


class RequireToken:
    """ASGI middleware: 401 on every route but `OPEN_ROUTES`, whether the route exists or not."""

    def __init__(self, app: ASGI, digests: tuple[str, ...], refuse: Callable[[Refused], ASGI]):
        self.app, self.digests, self.refuse = app, digests, refuse

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "lifespan" and self.digests and scope.get("path") not in OPEN_ROUTES:
            headers = dict(scope.get("headers", []))
            if not is_allowed(headers.get(b"authorization", b"").decode("latin-1"), self.digests):
                fault = Refused(401, "unauthorized", "a bearer token is required")
                await self.refuse(fault)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Bodies:
    """Reads bodies within a limit for each and one for all that are being answered."""

    def __init__(self, max_bytes: int, max_pending_bytes: int):
        self.max_bytes, self.max_pending_bytes, self.pending = max_bytes, max_pending_bytes, 0

    @contextmanager
    def reserved(self, content_length: str | None) -> Iterator[None]:
        """Room for a body of the announced length, or of the longest allowed. Raises Refused (413, 503)."""
        size = int(content_length) if content_length and content_length.isdigit() else self.max_bytes
        if size > self.max_bytes:
            raise self.too_large()
        if self.pending + size > self.max_pending_bytes:
            raise Refused(503, "overloaded", "the bodies of other requests fill the memory for them", retry_after_s=1)
        self.pending += size
        try:
            yield
        finally:
            self.pending -= size

    async def read(self, request: Any) -> bytes:
        """The body of a Starlette request. Raises Refused (408, 413)."""
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                async for piece in request.stream():
                    body += piece
                    if len(body) > self.max_bytes:
                        raise self.too_large()
        except TimeoutError:
            raise Refused(408, "timeout", f"the body did not arrive within {BODY_S:.0f} s") from None
        return bytes(body)

    def too_large(self) -> Refused:
        return Refused(413, "too_large", f"a body has at most {self.max_bytes} bytes")
