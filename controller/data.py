"""Data sets to tokenised examples: read rows, check each one, encode it, and account for every row that is left out.

    load_rows -> detect_format -> _split (prompt, completion) -> encode -> Prompt | Example | RatedText | PreferencePair
                                                                           RatedExample | ExamplePair

Prompt and completion are encoded separately (`contracts.encoding`). What was left out: no packing, no truncation; a row
that is too long is left out and counted.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from contracts.config import DataConfig, SourceConfig
from contracts.encoding import DataError, LeftOut, Turns, as_turns, encode_example, encode_prompt, readable
from contracts.records import Example, ExamplePair, PreferencePair, Prompt, RatedExample, RatedText
from controller.prompts import first_words
from controller.rows import detect_format, load_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

T = TypeVar("T")
Side = TypeVar("Side")  # of a pair, encoded

ROLES = ("system", "user", "assistant", "tool")


@dataclass
class LoadReport:
    """What became of the rows of one source."""

    rows: int = 0
    used: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> rows


def _text(value: Any, what: str) -> str:
    if value is None:
        raise LeftOut(f"no {what}")
    if not isinstance(value, str):
        raise LeftOut(f"{what} is not a text", f"found {type(value).__name__}")
    if not value.strip():
        raise LeftOut(f"empty {what}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise LeftOut(f"{what} is not valid Unicode", "a lone surrogate")
    return value


def _content(row: dict, column: str) -> str | Turns:
    """A text, or checked messages."""
    value = row.get(column)
    if not isinstance(value, list):
        return _text(value, column)
    if not value:
        raise LeftOut(f"empty {column}")
    for turn in value:
        role = turn.get("role") if isinstance(turn, dict) else None
        if role not in ROLES:
            raise LeftOut(f"{column}: a message needs a role of {', '.join(ROLES)}", f"found {role!r}")
        _text(turn.get("content"), f"content in {column}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _split(row: dict, form: str, source: SourceConfig, words: int | None, side: str = "") -> tuple[Any, Any]:
    """(prompt, completion) of one row, each a text or messages; "" where there is none. `side`: column of a pair."""
    if form == "text":
        return first_words(_text(row.get(source.text_column), source.text_column), words)
    if form == "prompt":
        return _content(row, source.prompt_column), ""
    if form == "prompt_completion":
        return _content(row, source.prompt_column), _content(row, source.completion_column)
    if form == "messages":
        return "", _content(row, source.messages_column)
    column = side or (source.text_column if form == "rated" else source.chosen_column)
    completion = _content(row, column)
    # UltraFeedback's form: chosen and rejected are whole conversations next to a prompt column that repeats the start.
    if isinstance(completion, list) and completion[0]["role"] != "assistant":
        return "", completion
    if row.get(source.prompt_column) is not None:
        return _content(row, source.prompt_column), completion
    return first_words(completion, words) if isinstance(completion, str) else ("", completion)


def _ratings(row: dict, source: SourceConfig) -> list[float]:
    several = row.get(source.ratings_column) is not None
    column = source.ratings_column if several else source.rating_column
    values = row.get(column)
    if isinstance(values, str):  # a CSV cell holds a list as JSON
        with suppress(json.JSONDecodeError):  # then the check below names the text
            values = json.loads(values)
    values = values if several and isinstance(values, list) else [values]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise LeftOut(f"{column} is not a number", f"found {value!r}")
        if not math.isfinite(value):
            raise LeftOut(f"{column} is not finite", f"found {value}")
    if not values:
        raise LeftOut(f"empty {column}")
    return [float(value) for value in values]


def _keep(
    rows: list[dict], build: Callable[[int, dict], T], data: DataConfig, base: str, report: LoadReport | None
) -> list[T]:
    """`build` of every usable row. Raises DataError past `data.max_bad_rows`, or where nothing is left."""
    report = LoadReport() if report is None else report
    made: list[T] = []
    bad: list[str] = []
    for number, row in enumerate(rows):
        try:
            made.append(build(number, row))
        except LeftOut as out:
            report.left_out[out.reason] += 1
            if out.bad:
                bad.append(f"  row {number}: {out}")
    report.rows, report.used = len(rows), len(made)
    counts = ", ".join(f"{count} x {reason}" for reason, count in report.left_out.most_common())
    if len(bad) > data.max_bad_rows * len(rows):
        first = "\n".join(bad[:5])
        raise DataError(
            f"{base}: {len(bad)} of {len(rows)} rows are unusable ({len(bad) / len(rows):.2%}); data.max_bad_rows allows "
            f"{data.max_bad_rows:.2%}. Left out: {counts}. The first ones, counted from 0:\n{first}\n"
            "Repair or remove them, or raise data.max_bad_rows"
        )
    if not made:
        raise DataError(f"{base}: no row of {len(rows)} is left to use. Left out: {counts}")
    return made


def _open(source: SourceConfig, base: str, allowed: tuple[str, ...]) -> tuple[list[dict], str]:
    rows = load_rows(source, base)
    columns = dict.fromkeys(column for row in rows for column in row)
    form = detect_format(source, columns, base)
    if form not in allowed:
        raise DataError(
            f"{base}.format: one of {', '.join(allowed)} is needed here; found {form} (columns {', '.join(columns)})"
        )
    return rows, form


def _example(tokenizer: "Tokenizer", parts: tuple[Any, Any], chat: bool, max_tokens: int) -> Example:
    example = encode_example(tokenizer, *parts, chat)
    if len(example.token_ids) > max_tokens:
        raise LeftOut("over max_tokens", f"{len(example.token_ids)} > {max_tokens}", bad=False)
    return example


def load_prompts(
    source: SourceConfig,
    data: DataConfig,
    tokenizer: "Tokenizer",
    max_completion_tokens: int,
    max_model_len: int,
    report: LoadReport | None = None,
    base: str = "data.prompts",
) -> list[Prompt]:
    """Prompts with distinct tokens; `prompt_id` is the row number. A conversation's last answer is not part of it."""
    rows, form = _open(source, base, ("prompt", "text", "rated", "prompt_completion", "messages", "pair"))
    unprompted = form == "text" or (form == "rated" and not any(source.prompt_column in row for row in rows))
    if unprompted and data.prompt_words is None:
        raise DataError(
            f"{base}: a prompt is a column {source.prompt_column!r} or the first words of a text; found a text and "
            f"data.prompt_words: null. Write data.prompt_words: 4, or name {base}.prompt_column"
        )
    seen: set[tuple[int, ...]] = set()

    def build(number: int, row: dict) -> Prompt:
        prompt, completion = _split(row, form, source, data.prompt_words)
        if not prompt and isinstance(completion, list):
            prompt = completion[:-1] if completion[-1]["role"] == "assistant" else completion
        if not prompt:
            raise LeftOut("no prompt")
        ids = tuple(encode_prompt(tokenizer, prompt, data.chat))
        if len(ids) > data.max_prompt_tokens:
            raise LeftOut("prompt over data.max_prompt_tokens", f"{len(ids)} > {data.max_prompt_tokens}")
        if len(ids) + max_completion_tokens > max_model_len:
            detail = f"{len(ids)} + {max_completion_tokens} > {max_model_len}"
            raise LeftOut("prompt and max_completion_tokens over engine.max_model_len", detail)
        if ids in seen:
            raise LeftOut("duplicate prompt", bad=False)
        seen.add(ids)
        return Prompt(number, readable(prompt), ids)

    return _keep(rows, build, data, base, report)


def load_sft(
    source: SourceConfig,
    data: DataConfig,
    tokenizer: "Tokenizer",
    max_tokens: int,
    report: LoadReport | None = None,
    base: str = "data.sft",
) -> list[Example]:
    """Supervised examples of at most `max_tokens`; a pair gives its chosen side, a rated text the text."""
    rows, form = _open(source, base, ("text", "rated", "prompt_completion", "messages", "pair"))

    def build(_: int, row: dict) -> Example:
        return _example(tokenizer, _split(row, form, source, data.prompt_words), data.chat, max_tokens)

    return _keep(rows, build, data, base, report)


def load_preferences(
    source: SourceConfig,
    data: DataConfig,
    tokenizer: "Tokenizer",
    max_tokens: int,
    report: LoadReport | None = None,
    base: str = "data.preferences",
) -> list[RatedText] | list[PreferencePair]:
    """Scoring inputs of at most `max_tokens`, encoded as a prompt and its completion are at rollout time."""
    rows, form = _open(source, base, ("rated", "pair"))
    # A text without a chat template reads the same in one piece, and short ones need not be cut to be rated.
    words = data.prompt_words if data.chat else None

    def rated(_: int, row: dict) -> RatedText:
        prompt, completion = parts = _split(row, form, source, words)
        both = isinstance(prompt, str) and isinstance(completion, str)
        text = prompt + completion if both else readable(as_turns(prompt, "user") + as_turns(completion, "assistant"))
        return RatedText(text, _example(tokenizer, parts, data.chat, max_tokens).token_ids, _ratings(row, source))

    def pair(_: int, row: dict) -> PreferencePair:
        def encoded(side: str) -> list[int]:
            return _example(tokenizer, _split(row, form, source, words, side), data.chat, max_tokens).token_ids

        return PreferencePair(*_sides(encoded, source))

    if form == "rated":
        return _keep(rows, rated, data, base, report)
    return _keep(rows, pair, data, base, report)


def _sides(encoded: Callable[[str], Side], source: SourceConfig) -> tuple[Side, Side]:
    """Chosen and rejected of a pair. Raises LeftOut where they are the same."""
    chosen, rejected = encoded(source.chosen_column), encoded(source.rejected_column)
    if chosen == rejected:
        raise LeftOut("chosen equals rejected", bad=False)
    return chosen, rejected


def load_rated_examples(
    source: SourceConfig,
    data: DataConfig,
    tokenizer: "Tokenizer",
    max_tokens: int,
    report: LoadReport | None = None,
    base: str = "data.preferences",
) -> list[RatedExample] | list[ExamplePair]:
    """Rated texts, or pairs, as a policy is trained on them: what it would not write itself is masked, as in `load_sft`."""
    rows, form = _open(source, base, ("rated", "pair"))

    def encoded(row: dict, side: str = "") -> Example:
        return _example(tokenizer, _split(row, form, source, data.prompt_words, side), data.chat, max_tokens)

    def rated(_: int, row: dict) -> RatedExample:
        return RatedExample(encoded(row), _ratings(row, source))

    def pair(_: int, row: dict) -> ExamplePair:
        return ExamplePair(*_sides(partial(encoded, row), source))

    if form == "rated":
        return _keep(rows, rated, data, base, report)
    return _keep(rows, pair, data, base, report)


def load_best_rated(
    source: SourceConfig,
    data: DataConfig,
    tokenizer: "Tokenizer",
    max_tokens: int,
    fraction: float,
    report: LoadReport | None = None,
    base: str = "data.preferences",
) -> list[Example]:
    """The `fraction` of the usable texts with the highest mean rating, at least one, in their order in the source; of equal
    ones the earlier.

    Raises:
        DataError: where the rows have no ratings.
    """
    columns = {column for row in load_rows(source, base) for column in row}
    needed = [source.text_column, source.ratings_column, source.rating_column]
    if needed[0] not in columns or not columns.intersection(needed[1:]):
        raise DataError(
            f"{base}: stage filtered_sft keeps the texts that people rated highest, so it needs the column {needed[0]!r} "
            f"and {needed[1]!r} (a list) or {needed[2]!r} (a number); {source.path} has {', '.join(sorted(columns))}. Add "
            f"them, or name them with {base}.ratings_column"
        )
    rated = load_rated_examples(replace(source, format="rated"), data, tokenizer, max_tokens, report, base)
    found = [item for item in rated if isinstance(item, RatedExample)]
    order = sorted(range(len(found)), key=lambda i: (-float(np.mean(found[i].ratings)), i))
    return [found[i].example for i in sorted(order[: max(1, round(fraction * len(found)))])]


def fingerprint(rows_or_examples: Iterable[Any]) -> str:
    """SHA-256 (hex) of the content, in order: the same for the same rows in any process, on any day."""
    digest = hashlib.sha256()
    for item in rows_or_examples:
        content = asdict(item) if is_dataclass(item) and not isinstance(item, type) else item
        digest.update(json.dumps(content, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
