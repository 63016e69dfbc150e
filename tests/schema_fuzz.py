"""Requests that schemathesis makes of the service's own OpenAPI description, right ones and wrong ones."""

import hypothesis
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def by_schema(url: str, headers: dict[str, str], cases: int, seed: int) -> int:
    """Send up to `cases` requests to each operation, in each mode; how many were sent.

    Raises:
        AssertionError: or one of schemathesis', for an answer that is not as described.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
    sent = 0
    for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
        for found in schema.get_all_operations():
            operation = found.ok()
            if mode == GenerationMode.NEGATIVE and operation.method == "get":
                continue  # they read nothing of a request

            @hypothesis.seed(seed)
            @hypothesis.settings(
                max_examples=cases, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                nonlocal sent
                sent += 1
                case.call_and_validate(headers=headers, checks=CHECKS)

            ask()
    return sent
