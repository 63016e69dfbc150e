"""The completion, or its last fenced block, is JSON that satisfies the schema of the row or of the configuration."""

import json
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from reward_service.verifier import BadRow, Option, Options, Row, Verified, Verifier, column
from reward_service.verifiers._answers import answered, fenced, verdict


def problem_of(schema: Any) -> str | None:
    """Why this is no schema that completions can be compared with."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    if not isinstance(schema, dict):
        return "an object"
    try:
        validator_for(schema).check_schema(schema)
    except SchemaError as error:
        return f"a JSON schema (at {'/'.join(map(str, error.absolute_path)) or 'its root'}: see {error.validator})"
    if any(not reference.startswith("#") for reference in _references(schema)):
        return "a schema whose every $ref begins with # (nothing is fetched)"
    return None


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        for name, value in schema.items():
            if name in ("$ref", "$dynamicRef") and isinstance(value, str):
                yield value
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _multiple_of(validator: Any, of: int | float, value: Any, schema: Any) -> Iterator[Exception]:
    """As JSON writes the numbers: of floats, 0.07 / 0.01 is no whole number."""
    from jsonschema.exceptions import ValidationError

    if validator.is_type(value, "number"):
        is_finite = math.isfinite(value) and math.isfinite(of)
        if not is_finite or Fraction(repr(value)) % Fraction(repr(of)):
            yield ValidationError(f"{value!r} is not a multiple of {of!r}")


def read(row: Row, options: Options) -> Any:
    """A validator."""
    from jsonschema.validators import extend, validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    name, schema = options["answer"], options["schema"]
    if schema is None:
        schema = column(row, name)
        if schema is None:
            raise BadRow(f"{name} must be there and not null; write a JSON schema, or options.schema for all rows")
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError):
                raise BadRow(f"{name} must be a JSON schema; found a text that is no JSON; write an object") from None
    problem = problem_of(schema)
    if problem:
        raise BadRow(f"{name} must be {problem}; write another schema")
    draft = validator_for(schema)
    exact = extend(draft, {name: _multiple_of for name in ("multipleOf", "divisibleBy") if name in draft.VALIDATORS})
    # With $schema, what refers to the root would be compared by the draft's own validator; without a registry, references
    # are fetched.
    root = {key: value for key, value in schema.items() if key != "$schema"}
    validator = exact(root, registry=Registry())
    try:
        validator.is_valid({})
        for reference in _references(schema):
            validator._resolver.lookup(reference)
    except Unresolvable:
        raise BadRow(
            f"{name} must be a schema whose every $ref leads somewhere; write the part that is missing"
        ) from None
    return validator


def verify(completion: str, right: Any, options: Options) -> Verified:
    answer = answered(completion)
    text = fenced(answer, "json")
    try:
        value = json.loads(answer if text is None else text, parse_constant=_refuse, object_pairs_hook=_object)
        return verdict(right.is_valid(value))
    except (ValueError, RecursionError):  # no JSON, or deeper than Python goes
        return verdict(False, False)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values for one key nobody knows which is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


SCHEMA = Option(None, "null or a JSON schema", lambda value: value is None or problem_of(value) is None, "an object")
VERIFIER = Verifier(
    read=read,
    verify=verify,
    options={"schema": SCHEMA},
    answer="schema",
    needs_answer=False,
    requires={"jsonschema": "jsonschema"},
)
