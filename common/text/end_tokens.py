"""Which tokens end a completion: what stops the engine, is banned before `min_completion_tokens`, and is no text.

A model names several: its tokenizer's EOS, what its chat template ends an answer with, and the `eos_token_id` of
generation_config.json. vLLM stops at all of them and bans all of them; whoever knows of one alone computes other
log-probabilities, and scores a text that ends twice.
"""

from typing import TYPE_CHECKING

from common.text.encoding import DataError, answer_end_ids
from common.text.tokenizers import load_config
from contracts.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def end_ids(tokenizer: "Tokenizer", model: ModelConfig, chat: bool) -> tuple[int, ...]:
    """The tokens that end a completion, each once. The first ends texts in training and scoring inputs.

    Args:
        chat: completions are answers in the form of the chat template, which has written the prompts.
        model: whose generation_config.json names the others; without that file config.json does.

    Raises:
        DataError: where one of them is no token of the model.
    """
    from transformers import GenerationConfig

    from common.models.adapters import holder

    config = load_config(model.path, model)
    try:
        path = holder(model.path, "generation_config.json")
        generation = GenerationConfig.from_pretrained(path, revision=model.revision_of(path) or "main")
    except OSError:  # no such file; vLLM goes on in the same way
        generation = GenerationConfig.from_model_config(config)
    named = generation.eos_token_id
    others = named if isinstance(named, list) else [named] if named is not None else []
    of_template = answer_end_ids(tokenizer) if chat else ()
    ids = tuple(dict.fromkeys([int(tokenizer.eos_token_id), *of_template, *map(int, others)]))
    beyond = [i for i in ids if not 0 <= i < config.get_text_config().vocab_size]
    if beyond:
        raise DataError(
            f"model.path={model.path}: the tokens that end a completion must be below its vocab_size "
            f"({config.get_text_config().vocab_size}); found {beyond}; write another eos_token_id in generation_config.json"
        )
    return ids
