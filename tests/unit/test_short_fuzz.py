"""The OpenAPI description, and the service under requests of all kinds; `make test-fuzz` sends many more of them."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import httpx
import jsonschema
import pytest
from starlette.routing import Route

from common.processes.network_interface import free_port
from contracts.config import HttpConfig
from reward_service.http import HttpService
from reward_service.openapi import OPERATIONS, description
from tests.conftest import ROOT
from tests.schema_fuzz import by_schema
from tests.service_fuzz import Attack, scorers

REQUESTS, CASES = 400, 15


def test_every_route_is_described() -> None:
    service = HttpService(None, None, HttpConfig(), None)  # type: ignore[arg-type]
    routes = [route for route in service.application(()).routes if isinstance(route, Route)]
    assert {(route.path, method.lower()) for route in routes for method in route.methods or () if method != "HEAD"} == {
        (operation.path, operation.method) for operation in OPERATIONS
    }


def test_the_description_holds_together() -> None:
    whole = description()
    for operation in OPERATIONS:
        described = whole["paths"][operation.path][operation.method]
        schemas = [content["schema"] for r in described["responses"].values() for content in r["content"].values()]
        for schema in schemas:
            validator = jsonschema.Draft202012Validator(schema | {"components": whole["components"]})
            list(validator.iter_errors({}))  # raises where a reference leads nowhere


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "tests.service_alone", str(port), scorers(tmp_path_factory.mktemp("rules"))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "serving\n"
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()
    process.stdout.close()


def test_no_request_is_answered_wrongly(url: str) -> None:
    attack = Attack(url, {}, seed=1, description=httpx.get(f"{url}/openapi.json").json())
    asyncio.run(attack.run(REQUESTS))
    assert attack.failures == []
    assert attack.statuses.total() >= REQUESTS
    assert attack.right > REQUESTS / 2


def test_requests_by_the_description_are_answered_as_described(url: str) -> None:
    assert by_schema(url, {}, CASES, seed=1) >= CASES * len(OPERATIONS) / 2
