"""Who may ask, and how much: bearer tokens and body limits, before anything of a body is read."""

import asyncio
import base64
import hashlib
import hmac
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from contracts.checks.scorer_checks import read_tokens

OPEN_ROUTES = ("/healthz",)
BODY_S = 30.0  # for a body to arrive
STALL_S = 5.0  # for the next piece of it
TOKEN = "tandem.token"  # in the scope of a request: which token it has
ASGI = Callable[[dict[str, Any], Callable, Callable], Awaitable[None]]


class Refused(Exception):
    """An answer other than 200, with an HTTP status and a code for programs."""

    def __init__(self, status: int, code: str, message: str, retry_after_s: float | None = None):
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


def token_digests(token_file: str | None) -> tuple[str, ...]:
    """SHA-256 of each token of the file: what travels to replicas and is kept there. Empty: nobody needs a token.

    Raises:
        OSError, ValueError: the file cannot be read, or has no token, which must not open the service to everyone.
    """
    if token_file is None:
        return ()
    tokens = read_tokens(token_file)
    if not tokens:
        raise ValueError(f"{token_file} has no token")
    return tuple(hashlib.sha256(token.encode()).hexdigest() for token in tokens)


def token_of(authorization: str, digests: tuple[str, ...]) -> str | None:
    """The digest of the token in `Bearer TOKEN`, or in `Basic` with the token as the password: clients that cannot set a
    header can write it into the URL, as `http://any:TOKEN@host:8000/get_reward`. None: it has none of these.

    Every digest is compared, each in constant time."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:  # no base64, no ASCII before it, or no UTF-8 in it
            value = ""
    elif scheme.lower() != "bearer":
        value = ""
    given = hashlib.sha256(value.strip().encode()).hexdigest()
    found = [digest for digest in digests if hmac.compare_digest(given, digest)]
    return found[0] if found else None


class RequireToken:
    """ASGI middleware: 401 on every route but `OPEN_ROUTES`, whether the route exists or not."""

    def __init__(self, app: ASGI, digests: tuple[str, ...], refuse: Callable[[Refused], ASGI]):
        self.app = app
        self.digests = digests
        self.refuse = refuse

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "lifespan" and self.digests and scope.get("path") not in OPEN_ROUTES:
            headers = dict(scope.get("headers", []))
            token = token_of(headers.get(b"authorization", b"").decode("latin-1"), self.digests)
            if token is None:
                fault = Refused(401, "unauthorized", "a bearer token is required")
                await self.refuse(fault)(scope, receive, send)
                return
            scope[TOKEN] = token
        await self.app(scope, receive, send)


def client_of(request: Any) -> str:
    """Whose Starlette request it is, for what everyone has a share of: a token used from one address."""
    return f"{request.scope.get(TOKEN, '')}@{request.client.host if request.client else ''}"


class Bodies:
    """Reads bodies within a limit for each, one for all that are being answered, and one for those of one client, half as
    large. What is announced takes no room before it is there."""

    def __init__(self, max_bytes: int, max_pending_bytes: int):
        self.max_bytes = max_bytes
        self.max_pending_bytes = max_pending_bytes
        self.pending = 0
        self.max_client_bytes = max(max_bytes, max_pending_bytes // 2)
        self._of_client: Counter[str] = Counter()

    @contextmanager
    def room(self, client: str) -> Iterator[Callable[[int], None]]:
        """A function that takes room for more bytes, all of which is given back in the end. It raises Refused (503)."""
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            if self.pending + count > self.max_pending_bytes:
                raise Refused(
                    503, "overloaded", "the bodies of other requests fill the memory for them", retry_after_s=1
                )
            if self._of_client[client] + count > self.max_client_bytes:
                raise Refused(503, "overloaded", "the bodies of your other requests fill your half", retry_after_s=1)
            taken += count
            self.pending += count
            self._of_client[client] += count

        try:
            yield take
        finally:
            self.pending -= taken
            self._of_client[client] -= taken
            if not self._of_client[client]:
                del self._of_client[client]

    async def read(self, request: Any, take: Callable[[int], None]) -> bytes:
        """The body of a Starlette request. Raises Refused (408, 413, and what `take` raises)."""
        announced = request.headers.get("content-length", "0")
        if len(announced) > 18 or (announced.isdecimal() and int(announced) > self.max_bytes):
            raise self.too_large()
        body, clock = bytearray(), asyncio.get_running_loop().time
        end = clock() + BODY_S
        try:
            async with asyncio.timeout(STALL_S) as next_piece:
                async for piece in request.stream():
                    if len(body) + len(piece) > self.max_bytes:
                        raise self.too_large()
                    take(len(piece))
                    body += piece
                    next_piece.reschedule(min(end, clock() + STALL_S))
        except TimeoutError:
            message = f"a body arrives within {BODY_S:.0f} s, and no pause in it is longer than {STALL_S:.0f} s"
            raise Refused(408, "timeout", message) from None
        return bytes(body)

    def too_large(self) -> Refused:
        return Refused(413, "too_large", f"a body has at most {self.max_bytes} bytes")
