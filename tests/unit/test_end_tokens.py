"""Which tokens end a completion, read off a checkpoint."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common.text.encoding import DataError
from common.text.end_tokens import end_ids
from contracts.checks.validation import ConfigError
from contracts.config import DataConfig, ModelConfig, SourceConfig, TandemConfig
from controller.data.inputs import load_inputs
from controller.pipeline.context import StageContext
from controller.pipeline.pipeline import rehearse_environment


@pytest.fixture
def named(small_vocab: Path, tmp_path: Path) -> Any:
    """End tokens of the tiny model (tokenizer: 2), with other files: a value for `eos_token_id`, "none" for no such file."""

    def ends(generation: Any, config: Any = 2) -> tuple[int, ...]:
        path = tmp_path / "model"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(small_vocab, path)
        if generation == "none":
            (path / "generation_config.json").unlink()
        else:
            (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
        text = json.loads((path / "config.json").read_text()) | {"eos_token_id": config}
        (path / "config.json").write_text(json.dumps(text))
        return end_ids(AutoTokenizer.from_pretrained(path), ModelConfig(path=str(path)), chat=False)

    return ends


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (2, 2, (2,)),
        ([2, 0], 2, (2, 0)),
        ([0, 7, 2, 0], 2, (2, 0, 7)),  # the tokenizer's comes first: texts end with it
        (0, 2, (2, 0)),
        (None, 7, (2,)),  # a file that names none; transformers and vLLM then read no other
        ("none", [7, 0], (2, 7, 0)),  # no file: config.json
        ("none", None, (2,)),
    ],
)
def test_all_that_a_checkpoint_names(named: Any, generation: Any, config: Any, expected: tuple[int, ...]) -> None:
    assert named(generation, config) == expected


def test_a_token_beyond_the_embeddings_is_refused(named: Any) -> None:
    with pytest.raises(DataError, match=r"below its vocab_size \(512\); found \[600\]; write another eos_token_id"):
        named([2, 600])


def test_a_stage_keeps_them(small_vocab: Path, tmp_path: Path) -> None:
    """What is saved of a model that trained names the same tokens as the model it began with."""
    model = AutoModelForCausalLM.from_pretrained(small_vocab)
    model.generation_config = GenerationConfig(eos_token_id=[2, 0])
    model.save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    tokenizer = AutoTokenizer.from_pretrained(small_vocab)
    assert end_ids(tokenizer, ModelConfig(path=str(tmp_path / "second")), chat=False) == (2, 0)


def test_what_the_template_ends_an_answer_with_ends_a_completion(small_vocab: Path, tmp_path: Path) -> None:
    """As of base Qwen: texts end with <|endoftext|>, turns with <|im_end|>, and no file says so."""
    shutil.copytree(small_vocab, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.eos_token = "<|endoftext|>"
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]) == [0, 2]
    model = ModelConfig(path=str(tmp_path / "model"))
    assert end_ids(tokenizer, model, chat=True) == (0, 2)
    assert end_ids(tokenizer, model, chat=False) == (0,)


@pytest.mark.parametrize(
    ("row", "chat", "expected"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}]}, False, (0, 2)),  # rendered by the template all the same
        ({"prompt": "Hi"}, True, (0, 2)),
        ({"prompt": "Hi"}, False, (0,)),
    ],
)
def test_completions_of_messages_end_as_turns_do_without_data_chat_too(
    row: dict[str, Any], chat: bool, expected: tuple[int, ...], tiny_float32: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_float32, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.eos_token = "<|endoftext|>"
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    config = TandemConfig(
        stage="ppo",
        proxy_model="given",
        sft_model="given",
        model=ModelConfig(path=str(tmp_path / "model")),
        data=DataConfig(prompts=SourceConfig(path=str(tmp_path / "prompts.jsonl")), chat=chat),
    )
    context: Any = object.__new__(StageContext)  # without what end tokens do not need
    context.config, context.tokenizer = config, tokenizer
    context.data = load_inputs(config, tokenizer, print)
    assert context.end_ids([config.model.path], "prompts") == expected
    assert context.end_ids([config.model.path], "eval_prompts") == (0,)  # nothing has been read of them
    config.environment.name = "two_turn"  # tells by the template with data.chat alone
    if expected == (0, 2) and not chat:
        with pytest.raises(ConfigError, match=r"messages in data\.prompts, .* write data\.chat=true"):
            rehearse_environment(config, tokenizer, context.data, SimpleNamespace())  # type: ignore[arg-type]
    shutil.copytree(tmp_path / "model", tmp_path / "given")
    (tmp_path / "given/generation_config.json").write_text(json.dumps({"eos_token_id": [7, 0]}))
    both = [config.model.path, str(tmp_path / "given")]
    assert context.end_ids(both, "prompts") == (*expected, 7)  # one engine serves both in the evaluation
