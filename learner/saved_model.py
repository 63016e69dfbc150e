"""Writing a model as a normal Hugging Face checkpoint that transformers, vLLM and the next stage load; with LoRA a directory
of PEFT."""

import copy
from collections.abc import Callable, Set
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from common.models import adapters
from common.models.lora import saved_name
from common.text.encoding import answer_end_ids
from common.text.tokenizers import load_tokenizer
from contracts.config import ModelConfig
from learner.engine import TrainEngine
from learner.models import PolicyModel, ScalarModel
from learner.ranks import Ranks


def save_checkpoint(
    engine: TrainEngine,
    path: str,
    tokenizer_from: str,
    model: ModelConfig,
    ranks: Ranks,
    config_fields: dict[str, Any] | None = None,
    taught: Set[int] = frozenset(),
) -> None:
    """Gather the weights on all ranks and let rank 0 write them to `path` with configuration and tokenizer.

    Args:
        config_fields: are added to the checkpoint's config.json.
        taught: tokens that the model has learnt to write. Those among them that end texts or answers are named in
            generation_config.json, where engines look for them.
    """
    write = gather_checkpoint(engine, tokenizer_from, model, ranks, config_fields, taught)
    if write:
        write(path)
    if ranks.world_size > 1:
        torch.distributed.barrier()


def gather_checkpoint(
    engine: TrainEngine,
    tokenizer_from: str,
    model: ModelConfig,
    ranks: Ranks,
    config_fields: dict[str, Any] | None = None,
    taught: Set[int] = frozenset(),
) -> Callable[[str], None] | None:
    """Gather the weights on all ranks together; returns, on rank 0, what writes them to a path. Arguments as of
    `save_checkpoint`.

    Weights that lie whole on the CPU are written from where they are: the next optimizer step has to wait for that.
    """
    weights = {}
    for name, tensor in engine.named_weights():  # a collective under ZeRO-3
        if ranks.rank == 0:
            weights[name] = tensor.detach().to("cpu", copy=engine.is_sharded)
    if ranks.rank != 0:
        return None

    def write(path: str) -> None:
        lm = engine.model.lm
        tokenizer = _tokenizer(
            tokenizer_from, model.revision_of(tokenizer_from), model.trust_remote_code, model.template_date
        )
        for key, value in (config_fields or {}).items():
            setattr(lm.config, key, value)
        if engine.model.adapter:
            _write_adapter(path, engine.model, weights, config_fields or {})
            if lm.can_generate():
                _write_generation(path, lm.generation_config, tokenizer, taught)
            tokenizer.save_pretrained(path)
            return
        # Tied weights appear once in `weights`, as they do on disk.
        generation = lm.generation_config if lm.can_generate() else None
        try:
            # Many published ones are not what transformers saves, as a temperature without do_sample.
            lm.generation_config = GenerationConfig()
            lm.save_pretrained(path, state_dict=weights, safe_serialization=True)
        finally:
            lm.generation_config = generation
        if generation is not None:
            _write_generation(path, generation, tokenizer, taught)
        tokenizer.save_pretrained(path)

    return write


def _write_adapter(
    path: str, model: PolicyModel | ScalarModel, weights: dict[str, torch.Tensor], fields: dict[str, Any]
) -> None:
    lm, of, is_reward_model = model.lm, model.adapter, isinstance(model, ScalarModel)
    assert of is not None
    tensors = {saved_name(name): tensor for name, tensor in weights.items()}
    if is_reward_model:
        text = lm.config.get_text_config()
        fields = fields | {"num_labels": 1, "architectures": [type(lm).__name__], "pad_token_id": text.pad_token_id}
    adapters.write(path, of.lora, tensors, of.base, of.fingerprint, fields, is_reward_model)


def _write_generation(path: str, published: GenerationConfig, tokenizer: Any, taught: Set[int]) -> None:
    """As it was published, with the ends that are `taught`: base Qwen's names its EOS alone, while its template ends an
    answer with another token."""
    generation, named = copy.deepcopy(published), published.eos_token_id
    own = named if isinstance(named, list) else [named] if named is not None else []
    ends = dict.fromkeys([int(tokenizer.eos_token_id), *answer_end_ids(tokenizer)])
    if added := [end for end in ends if end in taught and end not in own]:
        generation.eos_token_id = [*own, *added]
    generation.to_json_file(Path(path, "generation_config.json"), keys_to_pop=["compile_config"])


@cache
def _tokenizer(source: str, revision: str | None, trust_remote_code: bool, template_date: str) -> Any:
    """Once a process: it takes a third of a second, in which nothing else of the process runs."""
    model = ModelConfig(
        path=source, revision=revision, trust_remote_code=trust_remote_code, template_date=template_date
    )
    return load_tokenizer(source, model)
