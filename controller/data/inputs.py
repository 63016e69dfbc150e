"""All data of a run, loaded and checked before anything starts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from common.text.encoding import DataError
from common.text.tokenizers import load_config
from contracts.config import TandemConfig
from contracts.methods import readings
from contracts.records import ExamplePair, PreferencePair, Prompt, RatedExample
from controller.data import datasets
from controller.data.datasets import TOO_LONG, LoadReport
from controller.data.mixture import of_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass
class Inputs:
    """What a run has read, by item (`contracts.stages.Reading`); what it does not need is empty."""

    items: dict[str, list[Any]] = field(default_factory=dict)
    in_chat: set[str] = field(default_factory=set)  # sources with rows that the chat template writes

    def __getitem__(self, item: str) -> list[Any]:
        return self.items.get(item, [])


def check_vocabulary(items: Sequence[Any], tokenizer: "Tokenizer", vocab_size: int, base: str, model: str) -> None:
    """Refuse tokens that the model has no embedding for, as those that were added to a tokenizer without resizing its model.

    Raises:
        DataError: naming the first such token.
    """
    for number, item in enumerate(items):
        for ids in _ids_of(item):
            if (largest := max(ids, default=0)) >= vocab_size:
                raise DataError(
                    f"{base}: item {number}, {tokenizer.decode(list(ids[:12]))!r}..., has the token {largest} "
                    f"({tokenizer.convert_ids_to_tokens(largest)!r}), but model.path={model} has embeddings for the tokens "
                    f"below {vocab_size} alone: resize them to its tokenizer and save it, or give the checkpoint the "
                    "tokenizer that it was trained with"
                )


def _ids_of(item: Any) -> list[Sequence[int]]:
    if isinstance(item, PreferencePair):
        return [item.chosen_ids, item.rejected_ids]
    if isinstance(item, ExamplePair | RatedExample):
        return [text.token_ids for text in item.texts]
    return [item.token_ids]


# Sources of which the first is to say how good something is that the second has made.
HELD_OUT = (("eval_prompts", "prompts"), ("test", "preferences"), ("test", "gold"), ("preferences", "gold"))


def _check_held_out(read: dict[tuple[str, str], list[Any]], config: TandemConfig, say: Callable[[str], None]) -> None:
    """Say how many held-out items stand in what they are held out from, and refuse more than `data.max_seen_rows`.

    Args:
        read: items by source and loader.

    Raises:
        DataError: naming both sources.
    """
    for held, other in HELD_OUT:
        others = {_compared(item) for (source, _), items in read.items() if source == other for item in items}
        mine = [{_compared(item) for item in items} for (source, _), items in read.items() if source == held]
        # Of one source in two readings that with more of them: they leave out other rows as too long.
        worst = max(mine, key=lambda found: len(found & others) / max(1, len(found)), default=set())
        seen, count = len(worst & others), len(worst)
        if not seen:
            continue
        said = f"data.{held}: {seen} of {count} items are in data.{other} too"
        if seen > max(1, config.data.max_seen_rows * count):  # one may be chance, as of prompts of a few words
            raise DataError(
                f"{said} ({seen / count:.0%}), so what is measured on them would not be held out; "
                f"data.max_seen_rows allows {config.data.max_seen_rows:.0%}. Remove them from one "
                "of both, or raise data.max_seen_rows"
            )
        say(f"  {said}")


def _compared(item: Any) -> int:
    """A hash of the tokens of its texts, in one form for training and scoring: without what ends them, which is the EOS of
    a scoring input and the template's own end of an example."""
    end = None if isinstance(item, Prompt) else -1
    return hash(tuple(tuple(ids[:end]) for ids in _ids_of(item)))


def _check_forms(in_chat: set[str], sources: set[str], say: Callable[[str], None]) -> None:
    """What is learned from must have the form of what is sampled and scored.

    Raises:
        DataError: where the chat template writes prompts or what a reward model learns from, but not both.
    """
    for prompts in ("prompts", "eval_prompts"):
        for source in ("preferences", "gold", "test", "sft"):
            if not {prompts, source} <= sources or (source in in_chat) == (prompts in in_chat):
                continue
            written, plain = (prompts, source) if prompts in in_chat else (source, prompts)
            said = (
                f"data.{source}: the chat template writes data.{written}, while data.{plain} has plain texts alone, without "
                "a prompt or messages"
            )
            if source == "sft":
                say(f"  WARNING: {said}")
                continue
            raise DataError(
                f"{said}, so that what is learned from would be of another form than what is sampled and scored. Name the "
                f"column of its prompts with data.{plain}.prompt_column, give messages in both, or write data.chat: false"
            )


def load_inputs(config: TandemConfig, tokenizer: "Tokenizer", say: Callable[[str], None]) -> Inputs:
    """Read every source that the run needs, and say what was left out of it, what nobody reads and what the chat template
    does not show.

    Raises:
        DataError: a source cannot be read, has too many unusable or too long rows, tokens without embeddings, rows of
            another form than the prompts, or held-out rows that training sees.
    """
    inputs, read = Inputs(), dict[tuple[str, str], list[Any]]()
    vocab_size = load_config(config.model.path, config.model).get_text_config().vocab_size
    for item, (_, source, loader, limits) in readings(config).items():
        values = [attrgetter(key)(config) for key in limits]
        mixed = config.data.prompt_sources if source == "prompts" else {}
        found: list[Any] = []
        for name, rows in sorted(mixed.items()) or [("", getattr(config.data, source))]:
            report, base = LoadReport(), f"data.prompt_sources.{name}" if name else f"data.{source}"
            items = getattr(datasets, loader)(rows, config.data, tokenizer, *values, report, base)
            _say(report, base, say)
            _check_lengths(report, base, config, limits)
            inputs.in_chat |= {source} if report.notes.template else set()
            check_vocabulary(items, tokenizer, vocab_size, base, config.model.path)
            found += of_source(items, name, sorted(mixed).index(name) + 1) if name else items
        inputs.items[item] = read[source, loader] = found
    _check_forms(inputs.in_chat, {source for source, _ in read}, say)
    _check_held_out(read, config, say)
    return inputs


def _check_lengths(report: LoadReport, base: str, config: TandemConfig, limits: Sequence[str]) -> None:
    """Refuse a limit of tokens that is meant for other rows than these. Raises DataError."""
    long, most = report.left_out[TOO_LONG], config.data.max_long_rows
    if long > most * report.rows:
        key = next(key for key in limits if key.endswith("max_tokens"))
        raise DataError(
            f"{base}: {long} of {report.rows} rows ({long / report.rows:.0%}) are longer than {key}="
            f"{attrgetter(key)(config)} tokens and would be left out; data.max_long_rows allows {most:.0%}. Write a larger "
            f"{key}, or raise data.max_long_rows"
        )


def _say(report: LoadReport, base: str, say: Callable[[str], None]) -> None:
    if report.left_out:
        left = ", ".join(f"{count} {reason}" for reason, count in report.left_out.most_common())
        say(f"  {base}: {report.used} of {report.rows} rows used; left out: {left}")
    if report.kept:
        say(f"  {base}: columns that travel with a prompt: {', '.join(report.kept)}")
    for column, why in report.dropped.items():
        say(f"  {base}: WARNING: column {column} does not travel with a prompt: {why}")
    if report.unread:
        say(f"  {base}: columns that nobody reads: {', '.join(report.unread)}")
    for line in report.notes.lines():
        say(f"  {base}: {line}")
