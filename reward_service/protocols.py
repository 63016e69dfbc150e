"""The bodies of requests and answers: ours, OpenRLHF's remote reward and vLLM's `/classify` and `/pooling` (verl's client).

Pure translation: JSON in, items out; scores in, JSON out. docs/reward_service.md has an example of each.
"""

import base64
import json
import math
import re
import struct
import time
import uuid
from dataclasses import replace
from typing import Any, Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import TypedDict  # pydantic reads the one of typing from Python 3.12 on

from common.text.encoding import Turns
from contracts.records import Score, ScoringItem, row_text
from contracts.scoring import RETRYABLE
from reward_service.encoder import Encoder

FLOAT32_MAX = 3.4028234663852886e38
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON escapes one
Entry = ScoringItem | Score  # an item, or why it cannot be one


class BadRequest(ValueError):
    """The body is not what the protocol asks for. The message names fields, never their content."""


class Message(BaseModel):
    """With every key that a chat template may show: tool_calls, reasoning_content, ..."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | None = None

    @model_validator(mode="after")
    def says_something(self) -> "Message":
        if self.content is None and not (self.model_extra or {}).get("tool_calls"):
            raise ValueError("a message has content or tool_calls")
        return self


def _row_text(columns: dict[str, Any] | None) -> str | None:
    """Raises ValueError: json.loads takes NaN, which is no JSON."""
    return None if columns is None else row_text(columns)


class NativeItem(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: str | int | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    tools: list[dict[str, Any]] | None = None  # beside messages: what the chat template shows of them
    text: str | None = None
    token_ids: list[int] | None = None
    tokenizer_hash: str | None = None
    finish_reason: str | None = None  # told by many callers, needed for nothing: every item is scored with its EOS
    label: str | None = None
    row: dict[str, Any] | None = None  # what rule functions see beside the texts, as columns of a data set

    @model_validator(mode="after")
    def has_a_row_of_json(self) -> "NativeItem":
        _row_text(self.row)
        return self

    @model_validator(mode="after")
    def has_one_content(self) -> "NativeItem":
        if sum(value is not None for value in (self.messages, self.text, self.token_ids)) != 1:
            raise ValueError("an item has one of messages, text and token_ids")
        if self.tools and self.messages is None:
            raise ValueError("tools stand beside messages")
        return self


class NativeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    items: list[NativeItem] = Field(min_length=1)
    request_id: str | None = None
    model: str | None = None
    version: str | None = None
    normalize: bool = True
    on_overflow: Literal["error", "truncate_left_keep_eos"] = "error"
    deadline_ms: float | None = Field(default=None, gt=0)


class OpenRLHFRequest(BaseModel):
    model: str | None = None  # ours: its client can only write it into the URL
    query: list[str] | str
    prompts: list[Any] | None = None
    labels: list[Any] | None = None

    @model_validator(mode="after")
    def has_equal_lengths(self) -> "OpenRLHFRequest":
        self.query = [self.query] if isinstance(self.query, str) else self.query
        if not self.query or any(column and len(column) != len(self.query) for column in (self.prompts, self.labels)):
            raise ValueError("query, prompts and labels have one entry an item, and at least one")
        _row_text({"label": self.labels})
        return self


class PoolingRequest(BaseModel):
    """`/classify` and `/pooling` of vLLM, whose other fields (user, priority, ...) decide no score."""

    model: str | None = None
    input: list[int] | list[list[int]] | str | list[str] | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    use_activation: bool | None = None
    activation: bool | None = None  # the name before vLLM 0.12
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    truncation_side: Literal["left", "right"] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    task: Literal["classify"] | None = None
    request_id: str | None = None

    @model_validator(mode="after")
    def can_be_scored(self) -> "PoolingRequest":
        if (self.input is None) == (self.messages is None) or self.input in ("", []):
            raise ValueError("a request has one of input and messages, and it is not empty")
        if self.truncate_prompt_tokens is not None and self.truncation_side == "right":
            raise ValueError("truncation_side=right would take the EOS, which is what is scored")
        return self

    @property
    def has_activation(self) -> bool:
        """Raw logits unless a sigmoid is asked for."""
        return bool(self.use_activation if self.use_activation is not None else self.activation)


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        BadRequest: it is none, has an integer of more digits than Python reads, or half a character (a lone surrogate,
            which no tokenizer and no answer can carry).
        RecursionError: it is nested too deeply.
    """
    try:
        text = body.decode(json.detect_encoding(body))  # strictly, unlike json.loads of bytes
        parsed = json.loads(text)
        if SURROGATE.search(text):  # of two in a row most make a character
            json.dumps(parsed, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise BadRequest("the body is not JSON") from None
    except UnicodeError:
        raise BadRequest("the body is not UTF-8, or has half of a surrogate pair") from None
    except ValueError:
        raise BadRequest("the body has an integer of too many digits") from None
    if not isinstance(parsed, dict):
        raise BadRequest("the body must be a JSON object")
    return parsed


def read(kind: type[BaseModel], body: Any) -> Any:
    """The request in a parsed body.

    Raises:
        BadRequest: naming every field that is wrong.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        where = [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
        raise BadRequest("; ".join(f"{loc}: {message}" if loc else message for loc, message in where[:8])) from None


# ---- items


def _turns(messages: list[Message]) -> Turns:
    return [message.model_dump(exclude_none=True) for message in messages]


def native_entries(request: NativeRequest, encoder: Encoder) -> list[Entry]:
    entries: list[Entry] = []
    for item in request.items:
        if item.messages is not None:
            entry = encoder.messages(_turns(item.messages), item.label, item.tools)
        elif item.text is not None:
            entry = encoder.text(item.text, item.label)
        else:
            entry = encoder.token_ids(item.token_ids or [], item.tokenizer_hash, item.label)
        entries.append(_with_row(entry, item.row))
    return entries


def _with_row(entry: Entry, columns: dict[str, Any] | None) -> Entry:
    return replace(entry, row=_row_text(columns)) if isinstance(entry, ScoringItem) and columns is not None else entry


def openrlhf_entries(request: OpenRLHFRequest, encoder: Encoder, is_apart: bool = True) -> list[Entry]:
    """
    Args:
        is_apart: prompt and completion are scored as two: a query that does not begin with its prompt says of neither.
    """
    prompts = request.prompts or [None] * len(request.query)
    labels = request.labels or [None] * len(request.query)

    def entry(query: str, prompt: Any, label: Any) -> Entry:
        prompt, label = (value if isinstance(value, str) else None for value in (prompt, label))
        if is_apart and prompt and not query.startswith(prompt):
            return Score(None, "unreadable: the query does not begin with its prompt")
        return encoder.rendered(query, prompt, label)

    entries = list(map(entry, request.query, prompts, labels))
    # A label that is no text is a column of its item's row.
    rows = [None if label is None or isinstance(label, str) else {"label": label} for label in labels]
    return [_with_row(entry, row) for entry, row in zip(entries, rows, strict=True)]


def pooling_entries(request: PoolingRequest, encoder: Encoder) -> list[Entry]:
    if request.messages is not None:
        return [encoder.messages(_turns(request.messages))]
    given: Any = request.input
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    return [
        encoder.rendered(one, with_bos=request.add_special_tokens)
        if isinstance(one, str)
        else encoder.token_ids(one, encoder.hash)  # the protocol has no field that says whose ids they are
        for one in given
    ]


# ---- answers


class ScoredItem(TypedDict):
    id: str | int
    status: Literal["ok"]
    reward: float | None
    raw: float | None
    tokens: int
    truncated: bool
    cached: bool
    spread: NotRequired[float]
    parts: NotRequired[dict[str, float]]


class FailedItem(TypedDict):
    id: str | int
    status: Literal["error"]
    code: str
    retryable: bool
    detail: NotRequired[str]


class NativeAnswer(TypedDict):
    request_id: str
    model: str
    version: str
    items: list[ScoredItem | FailedItem]


class OpenRLHFAnswer(TypedDict):
    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float | None]]


class Usage(TypedDict):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: None


class Class(TypedDict):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class Pooled(TypedDict):
    index: int
    object: Literal["pooling"]
    data: list[float] | str


class _Listed(TypedDict):
    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: Usage


class ClassifyAnswer(_Listed):
    data: list[Class]


class PoolingAnswer(_Listed):
    data: list[Pooled]


Answer = NativeAnswer | OpenRLHFAnswer | ClassifyAnswer | PoolingAnswer


class ServedModel(TypedDict):
    id: str
    object: Literal["model"]
    kind: str
    version: str
    tokenizer_hash: str
    max_tokens: int | None
    read_at: str | None
    parts: list[str]


class ModelsAnswer(TypedDict):
    object: Literal["list"]
    data: list[ServedModel]


class StatusAnswer(TypedDict):
    status: str


class Refusal(TypedDict):
    code: str
    message: str


class RefusedAnswer(TypedDict):
    """Every answer that is not 200."""

    error: Refusal


def native_answer(
    request: NativeRequest, name: str, version: str, entries: list[Entry], scores: list[Score]
) -> NativeAnswer:
    return {
        "request_id": request.request_id or uuid.uuid4().hex,
        "model": name,
        "version": version,
        "items": [
            _native_item(item.id if item.id is not None else index, entry, score, request.normalize)
            for index, (item, entry, score) in enumerate(zip(request.items, entries, scores, strict=True))
        ],
    }


def _native_item(item_id: str | int, entry: Entry, score: Score, normalize: bool) -> ScoredItem | FailedItem:
    if score.value is None:
        code, _, detail = (score.error or "unavailable").partition(": ")
        failed: FailedItem = {"id": item_id, "status": "error", "code": code, "retryable": code in RETRYABLE}
        return {**failed, "detail": detail} if detail else failed
    answer: ScoredItem = {
        "id": item_id,
        "status": "ok",
        "reward": score.value if normalize else score.raw,
        "raw": score.raw,
        "tokens": len(entry.token_ids) if isinstance(entry, ScoringItem) else 0,
        "truncated": score.is_truncated,
        "cached": score.is_cached,
    }
    if score.spread is not None:
        answer["spread"] = score.spread
    if score.parts is not None:
        answer["parts"] = score.parts
    return answer


def openrlhf_answer(scores: list[Score]) -> OpenRLHFAnswer:
    """Every one of the scores has a value."""
    rewards = [score.value for score in scores if score.value is not None]
    logs = {"raw": [score.raw for score in scores]}
    if all(score.spread is not None for score in scores):
        logs["spread"] = [score.spread for score in scores]
    for name in {name: None for score in scores for name in score.parts or {}}:
        logs.setdefault(name, [(score.parts or {}).get(name) for score in scores])
    return {"rewards": rewards, "scores": rewards, "extra_logs": logs}


def packable(request: PoolingRequest, score: Score) -> Score:
    """The score, or `non_finite` where the float32 that base64 carries cannot hold it."""
    if request.encoding_format == "float" or score.raw is None or abs(score.raw) <= FLOAT32_MAX:
        return score
    return Score(None, "non_finite: beyond the range of float32, which base64 carries; ask for encoding_format=float")


def pooling_answer(
    path: Literal["classify", "pooling"], request: PoolingRequest, name: str, entries: list[Entry], scores: list[Score]
) -> ClassifyAnswer | PoolingAnswer:
    """Every one of the scores has a value."""
    raw = [score.value if score.raw is None else score.raw for score in scores]
    values = [_activated(number, request.has_activation) for number in raw if number is not None]
    tokens = sum(len(entry.token_ids) for entry in entries if isinstance(entry, ScoringItem))
    prefix = "classify" if path == "classify" else "pool"
    common: _Listed = {
        "id": f"{prefix}-{request.request_id or uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": request.model or name,
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        },
    }
    if path == "classify":
        classes: list[Class] = [
            {"index": i, "label": "LABEL_0", "probs": [v], "num_classes": 1} for i, v in enumerate(values)
        ]
        return {**common, "data": classes}
    is_text = request.encoding_format == "base64"
    pooled: list[Pooled] = [
        {"index": i, "object": "pooling", "data": base64.b64encode(struct.pack("=f", v)).decode() if is_text else [v]}
        for i, v in enumerate(values)
    ]
    return {**common, "data": pooled}


def _activated(raw: float, has_activation: bool) -> float:
    return 0.5 * (1 + math.tanh(raw / 2)) if has_activation else raw  # the sigmoid, without overflow
