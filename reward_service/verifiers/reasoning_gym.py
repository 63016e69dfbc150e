"""What reasoning-gym's own scorer says of an answer to one of its tasks; a row is an entry of one of its data sets."""

import json
import math
from contextlib import suppress
from typing import Any, NamedTuple

from reward_service.verifier import BadRow, Options, Row, Verified, Verifier, column, flag, text_or_null
from reward_service.verifiers._answers import take, taken

NONSENSE = "neither here nor there"
# Their scorers, of reasoning-gym 0.1.25, call eval() or sympy's parse_expr() on the answer: it is code, and runs here.
RUN_ANSWERS = frozenset(
    {"binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication", "puzzle24",
     "simple_integration", "spiral_matrix", "string_insertion"}
)  # fmt: skip


class Entry(NamedTuple):
    dataset: str
    entry: dict[str, Any]
    is_strict: bool  # its scorer takes nonsense for right: only the answer itself counts


def read(row: Row, options: Options) -> Entry:
    from reasoning_gym.factory import DATASETS

    metadata = column(row, "metadata")
    if isinstance(metadata, str):
        with suppress(ValueError):
            metadata = json.loads(metadata)
    if not isinstance(metadata, dict):
        raise BadRow("metadata must be an object, or JSON of one; write the metadata of reasoning_gym's entry")
    name = options["dataset"] or metadata.get("source_dataset")
    if not isinstance(name, str) or name not in DATASETS or name == "composite":
        raise BadRow(
            "metadata.source_dataset must be the name of a data set of reasoning_gym; write it, or options.dataset"
        )
    if name in RUN_ANSWERS and not options["runs_answers"]:
        raise BadRow(
            f"metadata.source_dataset must be none whose scorer runs answers as code, as that of {name} does; write "
            "options.runs_answers=true to allow it, or use verifier: code"
        )
    answer = column(row, options["answer"])
    if answer is not None and not isinstance(answer, str):
        raise BadRow(f"{options['answer']} must be null or a text; write the answer of reasoning_gym's entry")
    entry = {**row, "answer": answer, "metadata": metadata}
    if answer is None:  # some data sets have none: any answer that solves the task is right
        return Entry(name, entry, False)
    # What JSON makes lists of were tuples, and some scorers compare with tuples: the form in which it is right is the form.
    for form in (entry, {**entry, "metadata": _tuples(metadata)}):
        if _scored(name, answer, form) >= 1:
            return Entry(name, form, _scored(name, NONSENSE, form) >= 1)
    raise BadRow(f"{options['answer']} must be right by the scorer of {name}; write the entry as reasoning_gym made it")


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return {name: _tuples(item) for name, item in value.items()} if isinstance(value, dict) else value


def _scored(dataset: str, answer: str, entry: dict[str, Any]) -> float:
    from reasoning_gym.factory import get_score_answer_fn

    try:
        score = float(get_score_answer_fn(dataset)(answer, entry))
    except MemoryError:  # nothing was shown against the answer
        raise
    except Exception:  # some raise where they cannot read an answer, which is then wrong
        return 0.0
    return score if math.isfinite(score) else 0.0


def verify(completion: str, right: Entry, options: Options) -> Verified:
    answer = taken(completion, options)
    if not answer:
        return {"score": 0.0, "extracted": 0.0}
    if right.is_strict and answer.casefold() != right.entry["answer"].strip().casefold():
        return {"score": 0.0, "extracted": 1.0}
    return {"score": _scored(right.dataset, answer, right.entry), "extracted": 1.0}


VERIFIER = Verifier(
    read=read,
    verify=verify,
    options={
        "dataset": text_or_null("the name of a data set of reasoning_gym"),
        "take": take("tag"),
        "runs_answers": flag(False),
    },
    needs_answer=False,
    requires={"reasoning_gym": "reasoning-gym"},
)
