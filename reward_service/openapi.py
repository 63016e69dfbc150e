"""The OpenAPI description of every route, from the types that read requests and make answers (`protocols.py`).

`/openapi.json` serves it. What it cannot say, such as that an item has one of messages, text and token_ids, a 400 does.
"""

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from reward_service import protocols

REF = "#/components/schemas/{model}"
REFUSED = {
    400: "the body is not what the protocol asks for",
    401: "no token, or one that is not accepted",
    404: "no such scorer",
    405: "another method",
    408: "the body did not arrive in time",
    410: "the scorer is not served in the pinned version",
    413: "too many items, or bytes",
    422: "an item has no score, and no retry will help",
    500: "the service failed",
    503: "overloaded or unavailable; Retry-After says when to try again",
    504: "an item timed out",
}
ITEM_BY_ITEM = (400, 401, 404, 408, 410, 413, 500, 503)
ALL_OR_NONE = (*ITEM_BY_ITEM, 422, 504)


@dataclass(frozen=True)
class Operation:
    path: str
    summary: str
    answer: Any  # a type; None: a text
    request: type[BaseModel] | None = None
    refused: tuple[int, ...] = (401,)
    is_open: bool = False  # without a token
    other: int | None = None  # another status with the same answer

    @property
    def method(self) -> str:
        return "get" if self.request is None else "post"


OPERATIONS = (
    Operation("/v1/rewards", "scores, item by item", protocols.NativeAnswer, protocols.NativeRequest, ITEM_BY_ITEM),
    Operation(
        "/get_reward", "OpenRLHF's remote reward", protocols.OpenRLHFAnswer, protocols.OpenRLHFRequest, ALL_OR_NONE
    ),
    Operation("/classify", "vLLM's /classify", protocols.ClassifyAnswer, protocols.PoolingRequest, ALL_OR_NONE),
    Operation("/pooling", "vLLM's /pooling", protocols.PoolingAnswer, protocols.PoolingRequest, ALL_OR_NONE),
    Operation("/v1/models", "the scorers with their versions", protocols.ModelsAnswer),
    Operation("/healthz", "whether the service answers", protocols.StatusAnswer, refused=(), is_open=True),
    Operation("/readyz", "whether every scorer answers", protocols.StatusAnswer, other=503),
    Operation("/metrics", "metrics for Prometheus", None),
    Operation("/openapi.json", "this description", dict[str, Any]),
)


def description() -> dict[str, Any]:
    """An OpenAPI 3.1 document."""
    adapters = [(op.path, "serialization", TypeAdapter(op.answer)) for op in OPERATIONS if op.answer is not None]
    adapters.append(("refused", "serialization", TypeAdapter(protocols.RefusedAnswer)))
    requests = {op.request for op in OPERATIONS if op.request is not None}
    requests_of, schemas = models_json_schema(
        [(one, "validation") for one in sorted(requests, key=str)], ref_template=REF
    )
    answers_of, more = TypeAdapter.json_schemas(adapters, ref_template=REF)  # type: ignore[arg-type]
    answers = {path: schema for (path, _), schema in answers_of.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tandem's reward service", "version": version("tandem-rlhf")},
        "components": {
            "schemas": schemas.get("$defs", {}) | more.get("$defs", {}),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "paths": {op.path: {op.method: _operation(op, requests_of, answers)} for op in OPERATIONS},
    }


def _operation(op: Operation, requests: dict, answers: dict[str, Any]) -> dict[str, Any]:
    found = {"text/plain": {"schema": {"type": "string"}}} if op.answer is None else _json(answers[op.path])
    responses = {"200": {"description": "the answer", "content": found}}
    if op.other is not None:
        responses[str(op.other)] = {"description": "not yet", "content": found}
    for status in op.refused:
        responses[str(status)] = {"description": REFUSED[status], "content": _json(answers["refused"])}
    described = {"summary": op.summary, "responses": responses, "security": [] if op.is_open else [{"token": []}]}
    if op.request is None:
        return described
    model = {"name": "model", "in": "query", "schema": {"type": "string"}, "description": "where the body names none"}
    body = {"required": True, "content": _json(requests[op.request, "validation"])}
    return described | {"parameters": [model], "requestBody": body}


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
