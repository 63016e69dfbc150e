"""A judge of others: any server with OpenAI's chat completions. No text that it sends back reaches an error or a log: it may
quote an item, or the token."""

import asyncio
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from contracts.checks.scorer_checks import read_tokens
from contracts.config import JudgeConfig
from reward_service.client import FIRST_PAUSE_S, LONGEST_PAUSE_S, wished_pause_s
from reward_service.isolate import Failed
from reward_service.judging.scale import Reading, Scale, expected, of_tokens, written

PROBE_S = 30.0
MAX_ANSWER_BYTES = 8 * 2**20
TOP = 20  # likeliest tokens: as many as OpenAI gives, and vLLM by default
ROOM = 32  # tokens for what a server writes around a constrained answer
RETRIED = {408: "unavailable", 429: "overloaded"}  # and every 5xx
REFUSED = (400, 413, 422)  # what is known against the one request
NO_COMPLETION = "the judge's server answers with something else than a completion"
NO_LOGPROBS = "the judge's server gives no log-probabilities"
Json = dict[str, Any]


class _TryAgain(Exception):
    """With the error that the item has where time is over."""

    def __init__(self, error: str, pause_s: float = 0.0):
        super().__init__(error)
        self.error = error
        self.pause_s = pause_s


class RequestRefused(Failed):
    """HTTP `status`, which another try would not change."""

    def __init__(self, status: int):
        code = "unreadable" if status in REFUSED else "unavailable"
        super().__init__(f"{code}: the judge's server answers with HTTP {status}")
        self.status = status


def chat_url(address: str) -> str:
    """Of the requests: an address without a path is that of a server, whose routes begin with /v1."""
    base = address.rstrip("/")
    return f"{base}/chat/completions" if urlsplit(base).path else f"{base}/v1/chat/completions"


def read_token(token_file: str | None) -> str | None:
    """Raises OSError or ValueError where there is no token in the file."""
    if token_file is None:
        return None
    tokens = read_tokens(token_file)
    if len(tokens) != 1:
        raise ValueError(f"{Path(token_file).name} has {len(tokens)} tokens, one is wanted")
    return tokens[0]


class Endpoint:
    """Requests to one address, of one event loop. Raises OSError or ValueError where the token cannot be read."""

    def __init__(self, judge: JudgeConfig, scale: Scale):
        assert judge.address is not None
        self._judge, self._scale = judge, scale
        self._url = chat_url(judge.address)
        token = read_token(judge.token_file)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._places: asyncio.Semaphore | None = None
        self._session: Any = None
        self.counts: Counter[str] = Counter()

    async def read(self, questions: list[str], expires: float) -> list[Reading | Failed]:
        """A reading of each question, or why there is none. What has none at `expires` (monotonic clock) is a time-out."""
        return list(await asyncio.gather(*(self._read(question, expires) for question in questions)))

    async def _read(self, question: str, expires: float) -> Reading | Failed:
        try:
            async with asyncio.timeout(max(0.0, expires - time.monotonic())):
                return await self._ask(question, expires)
        except TimeoutError:
            return Failed("timeout: no answer of the judge before the deadline")
        except Failed as fault:
            return fault

    async def _ask(self, question: str, expires: float) -> Reading:
        turns = [{"role": "user", "content": question}]
        if self._judge.max_tokens:
            said = _text(await self._post(turns, expires, temperature=0, max_tokens=self._judge.max_tokens))
            turns += [{"role": "assistant", "content": said}, {"role": "user", "content": self._scale.cue}]
        if self._judge.read == "probabilities":
            # Temperature 1: some servers give the log-probabilities of what they sample from. What they sample counts not.
            wanted: Json = {"temperature": 1, "max_tokens": 1, "logprobs": True, "top_logprobs": TOP}
            top = _top(await self._post(turns, expires, **wanted))
            return expected(self._scale, of_tokens(self._scale, top), self._judge.min_on_scale)
        wanted = {"temperature": 0, "max_tokens": self._scale.longest + ROOM, **self._constraint()}
        return self._written(_text(await self._post(turns, expires, **wanted)))

    def _constraint(self) -> Json:
        answers = [answer.strip() for answer in self._scale.answers]
        if self._judge.constrain == "choice":
            return {"structured_outputs": {"choice": answers}}
        if self._judge.constrain == "none":
            return {}
        schema = {
            "type": "object",
            "properties": {"answer": {"type": "string", "enum": answers}},
            "required": ["answer"],
            "additionalProperties": False,
        }
        return {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": schema, "strict": True},
            }
        }

    def _written(self, text: str) -> Reading:
        if self._judge.constrain != "json_schema":
            return written(self._scale, text)
        try:
            answer = json.loads(text)["answer"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise Failed("unreadable: the judge's text is not the object that was asked for") from None
        return written(self._scale, answer if isinstance(answer, str) else "")

    async def _post(self, turns: list[dict[str, str]], expires: float, **more: Any) -> Json:
        """The first choice of an answer. What may get through another time is tried again, with growing pauses."""
        body = {"model": self._judge.model_name, "messages": turns, "top_p": 1, **more}
        pause = FIRST_PAUSE_S
        while True:
            try:
                return await self._once(body, expires)
            except RequestRefused:
                self.counts["failed_requests"] += 1
                raise
            except _TryAgain as fault:
                self.counts["failed_requests"] += 1
                wait = max(fault.pause_s, pause * random.uniform(0.5, 1.0))
                if time.monotonic() + wait >= expires:
                    raise Failed(fault.error) from None
            self.counts["retries"] += 1
            await asyncio.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _once(self, body: Json, expires: float) -> Json:
        import aiohttp

        if self._session is None:  # within the loop that it belongs to
            self._places = asyncio.Semaphore(self._judge.concurrency)
            # No cookies, proxies or redirects: the token goes to the address and nowhere else.
            self._session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        assert self._places is not None
        async with self._places:
            self.counts["requests"] += 1
            left_s = max(0.05, min(self._judge.timeout_s, expires - time.monotonic()))
            try:
                async with self._session.post(
                    self._url,
                    json=body,
                    headers=self._headers,
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(total=left_s),
                ) as answer:
                    if answer.status != 200:
                        raise _fault(answer.status, answer.headers.get("Retry-After", ""))
                    content = await _content(answer.content)
            except TimeoutError:
                raise _TryAgain(f"timeout: the judge's server took longer than {left_s:.3g} s") from None
            except aiohttp.ClientError as fault:  # refused, reset, or cut off
                raise _TryAgain(f"unavailable: {type(fault).__name__} of the judge's server") from None
        return self._choice(content)

    def _choice(self, content: bytes) -> Json:
        """Of an answer's body, whose tokens are counted."""
        try:
            body = json.loads(content)
            choice = body["choices"][0]
            usage = body.get("usage") or {}
            tokens = {name: usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens")}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise Failed(f"unreadable: {NO_COMPLETION}") from None
        self.counts.update({name: number for name, number in tokens.items() if isinstance(number, int) and number > 0})
        return choice

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def probe(self, budget_s: float = PROBE_S) -> None:
        """One question, so that what the server is and can is known before anything is scored.

        Raises:
            ValueError: naming the key, what was found and what to write instead.
        """
        address = f"address={self._judge.address}"
        try:
            found = await self._read(self._scale.cue, time.monotonic() + budget_s)
        finally:
            await self.close()
            self._session = None
        if isinstance(found, RequestRefused):
            raise ValueError(self._refusal(found.status))
        if not isinstance(found, Failed):
            return
        code, _, detail = str(found).partition(": ")
        if code != "unreadable":
            raise ValueError(f"{address}: no answer ({detail or code}); write where the judge listens")
        if detail == NO_COMPLETION:
            raise ValueError(f"{address}: {detail}; write the base URL of an OpenAI-compatible server")
        if detail == NO_LOGPROBS:
            raise ValueError(f"read=probabilities: {detail} at {address}; write read=text")

    def _refusal(self, status: int) -> str:
        address, read = f"address={self._judge.address}", self._judge.read
        if status in (401, 403):
            return (
                f"token_file: {address} does not accept its token (HTTP {status}); write the file of one that it does"
            )
        if status not in REFUSED:
            return (
                f"{address}: HTTP {status} at {self._url} for model_name={self._judge.model_name}; write what is there"
            )
        other = "read=text" if read == "probabilities" else "another constrain, such as none"
        return f"{address} refuses what read={read} asks for (HTTP {status}); write {other}"


def _fault(status: int, retry_after: str) -> Exception:
    code = RETRIED.get(status) or ("unavailable" if status >= 500 else None)
    if code is None:
        return RequestRefused(status)
    return _TryAgain(f"{code}: HTTP {status} of the judge's server", wished_pause_s(retry_after))


async def _content(stream: Any) -> bytes:
    content = b""
    async for piece in stream.iter_chunked(2**16):
        content += piece
        if len(content) > MAX_ANSWER_BYTES:
            raise Failed(f"unreadable: the judge's server answers with more than {MAX_ANSWER_BYTES} bytes")
    return content


def _text(choice: Json) -> str:
    try:
        text = choice["message"]["content"]
    except (LookupError, TypeError):
        text = None
    if not isinstance(text, str):
        raise Failed("unreadable: the judge's answer has no text")
    return text


def _top(choice: Json) -> list[tuple[str, float]]:
    """The likeliest first tokens with their log-probabilities."""
    try:
        top = [(str(t["token"]), float(t["logprob"])) for t in choice["logprobs"]["content"][0]["top_logprobs"]]
    except (LookupError, TypeError, ValueError, OverflowError):
        top = []
    if not top:
        raise Failed(f"unreadable: {NO_LOGPROBS}")
    return top
