"""Data sets to tokenised examples: read rows, check each one, encode it, and account for every row that is left out.

    load_rows -> detect_format -> parts -> encode -> Prompt | Example | RatedText | PreferencePair
                                                     RatedExample | ExamplePair

What a row says is `controller.data.row_formats`, how it becomes tokens `common.text.encoding`. What was left out: no
packing, no truncation; a row that is too long is left out and counted.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from common.text.encoding import (
    DataError,
    LeftOut,
    Notes,
    as_turns,
    encode_example,
    encode_prompt,
    readable,
    scored_ids,
)
from contracts.config import DataConfig, SourceConfig
from contracts.records import Example, ExamplePair, PreferencePair, Prompt, RatedExample, RatedText
from controller.data.kept_columns import kept_columns, require_values
from controller.data.row_files import detect_format, load_rows
from controller.data.row_formats import (
    EQUAL,
    LABELS,
    Parts,
    Shape,
    Traits,
    columns_read,
    is_refused_answer,
    pair_parts,
    parts,
    preference,
    prompt_columns,
    ratings,
    refuses_answers,
    shape_of,
    traits_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

T = TypeVar("T")
E = TypeVar("E")
TOO_LONG = "over max_tokens"
UNSHOWN = "no answer that may train is shown as it was given"
LABELLED = ("prompt_completion", "messages")  # formats whose rows may have KTO's label


@dataclass
class LoadReport:
    """What became of the rows of one source."""

    rows: int = 0
    used: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> rows
    kept: list[str] = field(default_factory=list)  # columns that travel with the prompts
    dropped: dict[str, str] = field(default_factory=dict)  # columns that could not, with the reason
    unread: list[str] = field(default_factory=list)  # columns that nobody reads
    notes: Notes = field(default_factory=Notes)  # of the chat template


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


@dataclass
class _Source:
    """An opened source: its rows, and how they are read and encoded."""

    source: SourceConfig
    data: DataConfig
    tokenizer: "Tokenizer"
    rows: list[dict]
    form: str
    shape: Shape | None
    base: str
    report: LoadReport
    in_messages: set[bool] = field(default_factory=set)  # whether rows are messages: of all that were read

    def keep(self, build: Callable[[int, dict], T]) -> list[T]:
        """`build` of every usable row, in our columns.

        Raises:
            DataError: also where the chat template would write the rows with a history, and no others.
        """
        kept = _keep(self.rows, lambda n, row: build(n, self.converted(row)), self.data, self.base, self.report)
        if self.shape and "history" in self.shape.also and len(self.in_messages) > 1 and not self.data.chat:
            raise DataError(
                f"{self.base}: the chat template writes rows with a history, and without data.chat not the others. Write "
                "data.chat: true, or give the column history another name"
            )
        columns = dict.fromkeys(column for row in self.rows for column in row)
        in_chat = self.report.notes.template != ""
        read = columns_read(self.form, self.source, self.shape, in_chat, self.is_labelled)
        known = {*read, *self.report.kept, *self.report.dropped}
        self.report.unread = [column for column in columns if column not in known]
        return kept

    def converted(self, row: dict) -> dict:
        return self.shape.convert(row, self.source) if self.shape else row

    @cached_property
    def is_labelled(self) -> bool:
        """Whether rows say of their completion whether it is a good one."""
        return self.form in LABELLED and refuses_answers(self.rows)

    @cached_property
    def traits(self) -> Traits:
        found = []
        for row in self.rows if self.form in ("pair", "rated") else ():
            with suppress(LeftOut):  # told where the row is read
                found.append(self.converted(row))
        return traits_of(found, self.source)

    def parts(self, row: dict, words: int | None) -> Parts:
        return self._noted(parts(row, self.form, self.source, self.data, words, self.traits))

    def _noted(self, found: Parts) -> Parts:
        self.in_messages.add(isinstance(found.prompt, list) or isinstance(found.completion, list))
        return found

    def pair(self, row: dict, words: int | None, encode: Callable[[Parts], E]) -> tuple[E, E]:
        """Chosen and rejected. Raises LeftOut also where they come to the same tokens."""
        sides = pair_parts(row, self.source, self.data, words, self.traits)
        chosen, rejected = (encode(self._noted(side)) for side in sides)
        if chosen == rejected:
            raise LeftOut(EQUAL, "as they are encoded", bad=False)
        return chosen, rejected

    def example(self, found: Parts, max_tokens: int) -> Example:
        example = encode_example(
            self.tokenizer, found.prompt, found.completion, self.data.chat, found.tools, self.report.notes
        )
        if len(example.token_ids) > max_tokens:
            raise LeftOut(TOO_LONG, f"{len(example.token_ids)} > {max_tokens}", bad=False)
        if not any(example.loss_mask):
            answers = [turn for turn in as_turns(found.completion, "assistant") if turn["role"] == "assistant"]
            unshown = any(turn.get("weight") != 0 for turn in answers)
            raise LeftOut(UNSHOWN if unshown else "every answer has weight 0", bad=False)
        return example

    def scored(self, found: Parts, max_tokens: int) -> list[int]:
        """The scoring input: as a policy's completion of the same prompt."""
        ids = scored_ids(self.tokenizer, found.prompt, found.completion, self.data.chat, found.tools, self.report.notes)
        if len(ids) > max_tokens:
            raise LeftOut(TOO_LONG, f"{len(ids)} > {max_tokens}", bad=False)
        return ids


def _open(
    source: SourceConfig,
    data: DataConfig,
    tokenizer: "Tokenizer",
    report: LoadReport | None,
    base: str,
    allowed: tuple[str, ...],
) -> _Source:
    rows = load_rows(source, base)
    columns = dict.fromkeys(column for row in rows for column in row)
    shape = shape_of(columns, source)
    form = detect_format(source, [*columns, *(shape.ours(source) if shape else ())], base)
    if source.format == "auto" and form == "text" and "prompt" in allowed and source.prompt_column in columns:
        form = "prompt"  # which is asked for; the text is another column
    if form not in allowed:
        unpaired = form in LABELLED and any(name in columns for name in LABELS)
        hint = (
            "; rows with a label say of one completion alone whether it is good, no method here learns from both"
            * unpaired
        )
        raise DataError(
            f"{base}.format: one of {', '.join(allowed)} is needed here; found {form} (columns {', '.join(columns)}){hint}"
        )
    return _Source(source, data, tokenizer, rows, form, shape, base, report or LoadReport())


def load_prompts(
    source: SourceConfig,
    data: DataConfig,
    tokenizer: "Tokenizer",
    max_completion_tokens: int,
    max_model_len: int,
    report: LoadReport | None = None,
    base: str = "data.prompts",
) -> list[Prompt]:
    """Prompts with distinct tokens; `prompt_id` is the row number. A conversation's last answer is not part of it.

    Raises:
        DataError: also where `source.keep` names what cannot be kept of every prompt's row.
    """
    opened = _open(
        source, data, tokenizer, report, base, ("prompt", "text", "rated", "prompt_completion", "messages", "pair")
    )
    form, rows = opened.form, opened.rows
    unprompted = form == "text" or (form == "rated" and not any(source.prompt_column in row for row in rows))
    if unprompted and data.prompt_words is None and not data.chat:
        raise DataError(
            f"{base}: a prompt is a column {source.prompt_column!r} or the first words of a text; found a text and "
            f"data.prompt_words: null. Write data.prompt_words: 4, or name {base}.prompt_column"
        )
    kept = kept_columns(rows, source, prompt_columns(form, source, opened.shape), base)
    opened.report.kept, opened.report.dropped = kept.columns, kept.dropped
    seen: dict[tuple[int, ...], str | None] = {}
    numbers: dict[int, dict] = {}

    def build(number: int, row: dict) -> Prompt:
        prompt, completion, tools = opened.parts(row, data.prompt_words)
        if prompt and isinstance(prompt, str) and isinstance(completion, list):
            prompt = as_turns(prompt, "user")  # as what is trained on them shows both
        if not prompt and isinstance(completion, list):
            prompt = completion[:-1] if completion[-1]["role"] == "assistant" else completion
        if not prompt:
            raise LeftOut("no prompt")
        ids = tuple(encode_prompt(tokenizer, prompt, data.chat, tools, opened.report.notes))
        if len(ids) > data.max_prompt_tokens:
            raise LeftOut("prompt over data.max_prompt_tokens", f"{len(ids)} > {data.max_prompt_tokens}")
        if len(ids) + max_completion_tokens > max_model_len:
            detail = f"{len(ids)} + {max_completion_tokens} > {max_model_len}"
            raise LeftOut("prompt and max_completion_tokens over engine.max_model_len", detail)
        columns = kept.row(rows[number])
        if ids in seen:
            raise LeftOut("duplicate prompt" + " with other columns" * (columns != seen[ids]), bad=False)
        seen[ids], numbers[number] = columns, rows[number]
        turns = json.dumps(prompt, ensure_ascii=False, default=str) if isinstance(prompt, list) else None
        return Prompt(number, readable(prompt), ids, columns, turns)

    prompts = opened.keep(build)
    require_values(numbers, source, base)
    return prompts


def load_some_prompts(
    source: SourceConfig,
    data: DataConfig,
    tokenizer: "Tokenizer",
    max_completion_tokens: int,
    max_model_len: int,
    count: int,
    seed: int,
    report: LoadReport | None = None,
    base: str = "data.eval_prompts",
) -> list[Prompt]:
    """As `load_prompts`; `count` of them, drawn with `seed`, in their order."""
    every = load_prompts(source, data, tokenizer, max_completion_tokens, max_model_len, report, base)
    return [every[i] for i in sorted(np.random.default_rng(seed).permutation(len(every))[:count])]


def load_sft(
    source: SourceConfig,
    data: DataConfig,
    tokenizer: "Tokenizer",
    max_tokens: int,
    report: LoadReport | None = None,
    base: str = "data.sft",
) -> list[Example]:
    """Supervised examples of at most `max_tokens`; a pair gives its chosen side, a rated text the text."""
    opened = _open(source, data, tokenizer, report, base, ("text", "rated", "prompt_completion", "messages", "pair"))

    def build(_: int, row: dict) -> Example:
        if opened.is_labelled and is_refused_answer(row):
            raise LeftOut("label is false: not to be imitated", bad=False)
        return opened.example(opened.parts(row, data.prompt_words), max_tokens)

    return opened.keep(build)


def load_preferences(
    source: SourceConfig,
    data: DataConfig,
    tokenizer: "Tokenizer",
    max_tokens: int,
    report: LoadReport | None = None,
    base: str = "data.preferences",
) -> list[RatedText] | list[PreferencePair]:
    """Scoring inputs of at most `max_tokens`, encoded as a prompt and its completion are at rollout time."""
    opened = _open(source, data, tokenizer, report, base, ("rated", "pair"))
    # A text without a chat template reads the same in one piece, and short ones need not be cut to be rated.
    words = data.prompt_words if data.chat else None

    def rated(_: int, row: dict) -> RatedText:
        prompt, completion, _tools = found = opened.parts(row, words)
        if isinstance(prompt, str) and isinstance(completion, str):
            text = prompt + completion
        else:
            text = readable([*(as_turns(prompt, "user") if prompt else []), *as_turns(completion, "assistant")])
        return RatedText(text, opened.scored(found, max_tokens), ratings(row, source))

    def pair(_: int, row: dict) -> PreferencePair:
        return PreferencePair(
            *opened.pair(row, words, lambda side: opened.scored(side, max_tokens)), preference(row, source)
        )

    return opened.keep(rated) if opened.form == "rated" else opened.keep(pair)


def load_rated_examples(
    source: SourceConfig,
    data: DataConfig,
    tokenizer: "Tokenizer",
    max_tokens: int,
    report: LoadReport | None = None,
    base: str = "data.preferences",
) -> list[RatedExample] | list[ExamplePair]:
    """Rated texts, or pairs, as a policy is trained on them: what it would not write itself is masked, as in `load_sft`."""
    opened = _open(source, data, tokenizer, report, base, ("rated", "pair"))

    def rated(_: int, row: dict) -> RatedExample:
        return RatedExample(opened.example(opened.parts(row, data.prompt_words), max_tokens), ratings(row, source))

    def pair(_: int, row: dict) -> ExamplePair:
        sides = opened.pair(row, data.prompt_words, lambda side: opened.example(side, max_tokens))
        return ExamplePair(*sides, preference(row, source))

    return opened.keep(rated) if opened.form == "rated" else opened.keep(pair)


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
        if isinstance(item, Prompt):  # what it does not have does not tell it from one of before
            content = {name: value for name, value in content.items() if value is not None}
        digest.update(json.dumps(content, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
