"""Requests for the reward service that are right, wrong and broken, by a seed, and what must be true of every answer.

right: every score is known          ─┐
one bad item among right ones         ├─> status, form (the OpenAPI description), scores
mutated: values, keys, bytes         ─┘
"""

import asyncio
import base64
import json
import math
import random
import struct
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jsonschema

RULES = """
import math
ODD = {"raise": lambda: 1 / 0, "nan": lambda: math.nan, "big": lambda: 1e300, "none": lambda: None}
def length(completions): return [float(len(c)) for c in completions]
def odd(completions): return [ODD[c]() if c in ODD else float(len(c)) for c in completions]
"""
POSTED = ("/v1/rewards", "/get_reward", "/classify", "/pooling")
SCORERS = ("length", "odd", "sum", "spread")
UNDER_WAY = 16
ALPHABET = "abc XYZ 0123 \n\t.,;:!?<|>\\\"'{}[]äßçñ日本語 \u2028\u0000\u200d😀👩‍🚀\U0010ffff"
# JSON as text, so that also what no Python value can be is sent.
ODD_JSON = (
    "null", "true", "-1", "0", "1e308", "1e999", "NaN", "-Infinity", "4294967296", "18446744073709551616", "1" * 4000,
    "9" * 5000, '""', '" "', '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"a"', "[]", "{}", "[[]]", "[null]", "[-1]",
    "[4294967296]", "[49152]", '["\\ud800"]', '{"role": "user"}', '[{"role": "assistant", "content": "a"}]',
    "[" * 500 + "]" * 500,
    '[{"role": "user", "content": null, "tool_calls": 5}]', '{"\\ud800": 1}', '{"a": {"a": {"a": NaN}}}', '"<|im_end|>"',
)  # fmt: skip
HOLE = "\ue123hole\ue123"  # where a piece of such JSON goes
OVERRIDES = (
    "length: {kind: function, function: '%(rules)s:length'}",
    "odd: {kind: function, function: '%(rules)s:odd'}",
    "sum: {kind: weighted_sum, parts: [length, odd], weights: [1.0, 10000000000.0]}",
    "spread: {kind: ensemble, parts: [length, odd]}",
)


def scorers(folder: Path) -> str:
    """The scorers that these requests ask, for a command line."""
    (folder / "rules.py").write_text(RULES)
    return "{" + ", ".join(OVERRIDES) % {"rules": folder / "rules.py"} + "}"


def expected(scorer: str, text: str) -> float | str:
    """The score of a text, or the code of its error."""
    if not text.strip():
        return "empty"
    length = float(len(text))
    odd = {"raise": "poison", "nan": "non_finite", "none": "not_applicable", "big": 1e300}.get(text, length)
    if scorer == "length":
        return length
    if scorer == "odd" or isinstance(odd, str):
        return odd
    if odd == 1e300:
        return "non_finite"
    return length + 1e10 * odd if scorer == "sum" else length


@dataclass
class Attack:
    """Asks a service. `failures` says what was wrong with an answer, with the request."""

    url: str
    headers: dict[str, str]
    seed: int
    description: dict[str, Any]
    statuses: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    right: int = 0  # scores that were compared

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._validators: dict[tuple[str, str], Any] = {}

    async def run(self, count: int) -> None:
        async with httpx.AsyncClient(base_url=self.url, headers=self.headers, timeout=60) as client:

            async def worker(requests: int) -> None:
                for _ in range(requests):
                    await self._one(client)

            await asyncio.gather(*(worker(len(range(i, count, UNDER_WAY))) for i in range(UNDER_WAY)))

    async def _one(self, client: httpx.AsyncClient) -> None:
        draw, path = self._random.random(), self._random.choice(POSTED)
        texts = [self._text() for _ in range(self._random.choice((1, 1, 2, 5)))]
        scorer = self._random.choice(SCORERS)
        body = self._body(path, scorer, texts)
        if draw < 0.4:
            answer = await client.post(path, json=body)
            self._check(path, answer, str(body))
            self._compare(path, scorer, texts, answer, body)
        elif draw < 0.6:
            await self._with_a_bad_item(client, scorer, texts)
        elif draw < 0.97:
            raw = self._mutated(body)
            self._check(path, await client.post(path, content=raw), repr(raw[:300]))
        else:
            path = self._random.choice(("/v1/models", "/healthz", "/readyz", "/metrics", "/openapi.json", "/nothing"))
            self._check(path, await client.get(path), "")

    async def _with_a_bad_item(self, client: httpx.AsyncClient, scorer: str, texts: list[str]) -> None:
        """What no item can be, in any place: the others have their scores."""
        (known,) = {model["tokenizer_hash"] for model in (await client.get("/v1/models")).json()["data"]}
        ids = self._random.choice(([-1], [2**32], [49152], [1, 2**40, 2], [-(2**70)], [10**300]))
        place = self._random.randrange(len(texts) + 1)
        items: list[dict[str, Any]] = [{"id": i, "text": text} for i, text in enumerate(texts)]
        items.insert(place, {"id": "bad", "token_ids": ids, "tokenizer_hash": known})
        body = {"model": scorer, "items": items}
        answer = await client.post("/v1/rewards", json=body)
        self._check("/v1/rewards", answer, str(body))
        if answer.status_code != 200:
            self._wrong(f"{answer.status_code} for a bad item among good ones", body)
            return
        found = answer.json()["items"]
        bad = found.pop(place)
        if (bad.get("code"), bad.get("retryable")) != ("out_of_vocabulary", False):
            self._wrong(f"the bad item got {bad}", body)
        self._compare_items(scorer, texts, found, body)

    # ---- requests

    def _text(self) -> str:
        kind = self._random.random()
        if kind < 0.1:
            return self._random.choice(("raise", "nan", "none", "big", "", "  "))
        size = self._random.choice((1, 5, 20, 60))
        return "".join(self._random.choice(ALPHABET) for _ in range(size))

    def _body(self, path: str, scorer: str, texts: list[str]) -> dict[str, Any]:
        if path == "/v1/rewards":
            return {"model": scorer, "items": [{"id": i, "text": text} for i, text in enumerate(texts)]}
        if path == "/get_reward":
            return {"model": scorer, "query": texts, "labels": [None] * len(texts)}
        packed = {"encoding_format": self._random.choice(("float", "base64"))} if path == "/pooling" else {}
        return {"model": scorer, "input": texts, "use_activation": False, **packed}

    def _mutated(self, body: dict[str, Any]) -> bytes:
        kind = self._random.random()
        if kind < 0.7:
            body = json.loads(json.dumps(body))
            extra = ("token_ids", "messages", "tools", "tokenizer_hash", "deadline_ms", "version", "prompts", "labels",
                     "truncate_prompt_tokens", "normalize", "request_id", "input", "items", "label")  # fmt: skip
            target: Any = body
            if self._random.random() < 0.5 and isinstance(body.get("items"), list):
                target = self._random.choice(body["items"])
            target[self._random.choice((*target, *extra))] = HOLE
            if self._random.random() < 0.3 and target is not body:
                target.pop("text", None)
            return json.dumps(body).replace(json.dumps(HOLE), self._random.choice(ODD_JSON)).encode()
        raw = bytearray(json.dumps(body, ensure_ascii=self._random.random() < 0.5).encode())
        if kind < 0.8:
            return bytes(raw[: self._random.randrange(len(raw))])
        for _ in range(self._random.choice((1, 1, 3, 10))):
            place = self._random.randrange(len(raw))
            if self._random.random() < 0.5:
                raw[place] = self._random.randrange(256)
            else:
                raw[place:place] = self._random.choice(
                    (b"\x00", b"\xff", b"\xed\xa0\x80", b"{", b'"', b"[", b"\\u", b"9")
                )
        return bytes(raw)

    # ---- answers

    def _wrong(self, what: str, request: Any) -> None:
        self.failures.append(f"{what}: {str(request)[:300]}")

    def _check(self, path: str, answer: httpx.Response, request: str) -> None:
        self.statuses[f"{path} {answer.status_code}"] += 1
        described = self.description["paths"].get(path)
        if described is None:
            if answer.status_code != 404:
                self._wrong(f"{answer.status_code} of {path}", request)
            return
        (operation,) = described.values()
        status = str(answer.status_code)
        if answer.status_code == 500 or status not in operation["responses"]:
            self._wrong(f"{status} of {path}", request)
        elif "application/json" in (content := operation["responses"][status]["content"]):
            validator = self._validators.get((path, status))
            if validator is None:
                schema = content["application/json"]["schema"] | {"components": self.description["components"]}
                validator = self._validators[path, status] = jsonschema.Draft202012Validator(schema)
            error = jsonschema.exceptions.best_match(validator.iter_errors(answer.json()))
            if error is not None:
                self._wrong(f"{status} of {path} is not as described, {error.message[:200]}", request)

    def _compare(self, path: str, scorer: str, texts: list[str], answer: httpx.Response, body: Any) -> None:
        wanted = [expected(scorer, text) for text in texts]
        if body.get("encoding_format") == "base64":  # which carries float32
            wanted = ["non_finite" if value == 1e300 else value for value in wanted]
        errors = [value for value in wanted if isinstance(value, str)]
        content = answer.json()
        if path == "/v1/rewards":
            if answer.status_code == 200:
                self._compare_items(scorer, texts, content["items"], body)
            else:
                self._wrong(f"{answer.status_code} for a right request", body)
        elif errors:
            if answer.status_code != 422 or content["error"]["code"] not in errors:
                self._wrong(f"{answer.status_code} {content} instead of 422 with one of {errors}", body)
            self.right += 1
        elif answer.status_code != 200:
            self._wrong(f"{answer.status_code} for a right request", body)
        else:
            found = _values(path, content)
            exact = [struct.unpack("=f", struct.pack("=f", v))[0] for v in wanted] if "base64" in str(body) else wanted  # type: ignore[arg-type]
            if not all(math.isclose(a, b, rel_tol=1e-12) for a, b in zip(found, exact, strict=True)):  # type: ignore[arg-type]
                self._wrong(f"{found} instead of {wanted}", body)
            self.right += len(found)

    def _compare_items(self, scorer: str, texts: list[str], items: list[dict[str, Any]], body: Any) -> None:
        for index, (text, item) in enumerate(zip(texts, items, strict=True)):
            wanted, found = expected(scorer, text), item.get("reward", item.get("code"))
            same = found == wanted if isinstance(wanted, str) else math.isclose(found, wanted, rel_tol=1e-12)
            if not same or item["id"] != index or item.get("retryable"):
                self._wrong(f"{item} instead of {wanted} for item {index}", body)
            self.right += 1


def _values(path: str, content: dict[str, Any]) -> list[float]:
    if path == "/get_reward":
        return content["rewards"]
    if path == "/classify":
        return [row["probs"][0] for row in content["data"]]
    data = [row["data"] for row in content["data"]]
    return [struct.unpack("=f", base64.b64decode(one))[0] if isinstance(one, str) else one[0] for one in data]
