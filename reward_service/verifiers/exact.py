"""The completion, or a part of it, is the answer itself, in the forms that count as the same."""

from typing import Any

from reward_service.verifier import BadRow, Options, Row, Verified, Verifier, answer_text, column
from reward_service.verifiers._answers import NORMALISE, normalised, take, taken, verdict


def read(row: Row, options: Options) -> set[str]:
    """Every right answer: a column may have a list of them."""
    name = options["answer"]
    value: Any = column(row, name)
    if value == []:
        raise BadRow(f"{name} must be an answer or a list of them; write one or more")
    each = (
        [answer_text({name: one}, options) for one in value] if isinstance(value, list) else [answer_text(row, options)]
    )
    right = {normalised(text, options) for text in each}
    if "" in right:
        raise BadRow(f"{name} must have something left when it is normalised; write another answer")
    return right


def verify(completion: str, right: set[str], options: Options) -> Verified:
    found = taken(completion, options)
    return verdict(found is not None and normalised(found, options) in right, bool(found and found.strip()))


VERIFIER = Verifier(read=read, verify=verify, options={"normalise": NORMALISE, "take": take("text")})
