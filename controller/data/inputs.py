"""All data of a run, loaded and checked before anything starts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from common.text.encoding import DataError
from common.text.tokenizers import load_config
from contracts.config import SourceConfig, TandemConfig
from contracts.methods import results_needed, runs
from contracts.records import Example, ExamplePair, PreferencePair, Prompt, RatedExample, RatedText
from controller.data.datasets import (
    LoadReport,
    load_best_rated,
    load_preferences,
    load_prompts,
    load_rated_examples,
    load_sft,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass
class Inputs:
    """What a run does not need is empty."""

    sft: list[Example] = field(default_factory=list)
    best_sft: list[Example] = field(default_factory=list)  # of stage filtered_sft
    prompts: list[Prompt] = field(default_factory=list)
    preferences: dict[str, Sequence[RatedText | PreferencePair]] = field(default_factory=dict)  # by reward model
    test: Sequence[RatedText | PreferencePair] = ()
    completions: Sequence[RatedExample | ExamplePair] = ()  # of stage preference: data.preferences
    test_completions: Sequence[RatedExample | ExamplePair] = ()
    eval_prompts: list[Prompt] = field(default_factory=list)
    in_chat: set[str] = field(default_factory=set)  # sources with rows that the chat template writes


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


def load_inputs(config: TandemConfig, tokenizer: "Tokenizer", say: Callable[[str], None]) -> Inputs:
    """Read every source that the run needs, and say what was left out of it, what nobody reads and what the chat template
    does not show.

    Raises:
        DataError: a source cannot be read, has too many unusable rows or tokens without embeddings.
    """
    data, needed, inputs = config.data, results_needed(config), Inputs()
    vocab_size = load_config(config.model.path, config.model).get_text_config().vocab_size

    def load(work: Callable[..., Any], name: str, source: SourceConfig, *arguments: Any) -> Any:
        report = LoadReport()
        items = work(source, data, tokenizer, *arguments, report, f"data.{name}")
        if report.left_out:
            left = ", ".join(f"{count} {reason}" for reason, count in report.left_out.most_common())
            say(f"  data.{name}: {report.used} of {report.rows} rows used; left out: {left}")
        if report.unread:
            say(f"  data.{name}: columns that nobody reads: {', '.join(report.unread)}")
        for line in report.notes.lines():
            say(f"  data.{name}: {line}")
        inputs.in_chat |= {name} if report.notes.template else set()
        check_vocabulary(items, tokenizer, vocab_size, f"data.{name}", config.model.path)
        return items

    if "sft" in needed or ("ppo" in needed and config.ppo.ptx_coef > 0):
        inputs.sft = load(load_sft, "sft", data.sft, config.sft.max_tokens)
    if "filtered_sft" in needed:
        limits = (config.sft.max_tokens, config.sft.top_fraction)
        inputs.best_sft = load(load_best_rated, "preferences", data.preferences, *limits)
    limit = config.reward_model.max_tokens
    for name, key in (("proxy", "preferences"), ("gold", "gold")):
        if f"reward_model/{name}" in needed:
            inputs.preferences[name] = load(load_preferences, key, getattr(data, key), limit)
    if inputs.preferences:
        inputs.test = load(load_preferences, "test", data.test, limit)
    if "preference" in needed:
        limit = config.preference.max_tokens
        inputs.completions = load(load_rated_examples, "preferences", data.preferences, limit)
        inputs.test_completions = load(load_rated_examples, "test", data.test, limit)
    longest = config.engine.max_model_len
    if "ppo" in needed:
        tokens = config.ppo.sampling.max_completion_tokens
        inputs.prompts = load(load_prompts, "prompts", data.prompts, tokens, longest)
    if runs(config, "evaluate"):
        tokens = config.evaluate.sampling.max_completion_tokens
        every = load(load_prompts, "eval_prompts", data.eval_prompts, tokens, longest)
        order = np.random.default_rng(config.evaluate.seed).permutation(len(every))[: config.evaluate.prompts]
        inputs.eval_prompts = [every[i] for i in sorted(order)]
    return inputs
