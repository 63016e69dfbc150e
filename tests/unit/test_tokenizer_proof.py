"""A tokenizer that transformers reads otherwise than its file has it is refused; what is read as it is passes."""

import importlib.resources
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from common.text.tokenizer_proof import OtherTokens, check_tokens
from contracts.checks.validation import ConfigError
from contracts.config import ModelConfig, TandemConfig
from controller.start_checks.model_checks import checked_tokenizer
from reward_service.kinds import judge
from tests.conftest import SMOLLM

BACKEND = {"tokenizer_class": "TokenizersBackend"}


def check(folder: Path) -> None:
    check_tokens(str(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=False))


def say(folder: Path, **options: Any) -> None:
    """Change tokenizer_config.json."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | options))


@pytest.fixture
def smollm(tmp_path: Path) -> Callable[[str], Path]:
    """SmolLM2's tokenizer in a directory of another type."""

    def made(kind: str) -> Path:
        folder = tmp_path / kind
        AutoTokenizer.from_pretrained(SMOLLM).save_pretrained(folder)
        AutoConfig.for_model(kind).save_pretrained(folder)
        return folder

    return made


@pytest.fixture
def llama2(tmp_path: Path) -> Path:
    """A tokenizer of Llama 2's kind: SentencePiece's joins, a space before every text, and pieces of several spaces."""
    rust = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    corpus = ["  the fox had two dogs", "   deep", " x"]
    rust.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    folder = tmp_path / "llama2"
    PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    AutoConfig.for_model("llama").save_pretrained(folder)
    say(folder, tokenizer_class="LlamaTokenizer", legacy=True)
    return folder


@pytest.fixture
def sentencepiece(tmp_path: Path) -> Path:
    """Mistral 7B's, from the wheel of mistral-common."""
    source = importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    shutil.copy(str(source), tmp_path / "tokenizer.model")
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    say(tmp_path, tokenizer_class="LlamaTokenizer")
    return tmp_path


def test_the_demos_is_read_as_it_is() -> None:
    check(SMOLLM)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "mistral", "gpt2", "olmo2"])
def test_another_type_says_nothing_of_the_tokenizer(kind: str, smollm: Callable[[str], Path]) -> None:
    check(smollm(kind))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_5"])
def test_a_type_that_puts_its_own_rules_over_the_file(kind: str, smollm: Callable[[str], Path]) -> None:
    folder = smollm(kind)
    say(folder, **BACKEND)
    with pytest.raises(
        OtherTokens, match=r"its tokenizer\.json makes .*, and Qwen\w+ of transformers 5\.\S+ makes"
    ) as raised:
        check(folder)
    assert "write another checkpoint; or, if the model has learnt the latter" in str(raised.value)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # as the message has it
    check(folder)


def test_an_option_that_changes_the_first_word_alone(smollm: Callable[[str], Path]) -> None:
    folder = smollm("gpt2")
    say(folder, tokenizer_class="GPT2Tokenizer", add_prefix_space=True)
    first = AutoTokenizer.from_pretrained(folder)("x")["input_ids"]
    assert first != AutoTokenizer.from_pretrained(SMOLLM)("x")["input_ids"]
    check(folder)


def test_padding_and_truncation_of_the_file_are_no_difference(smollm: Callable[[str], Path]) -> None:
    folder = smollm("llama")
    rust = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rust.enable_padding(length=64)
    rust.enable_truncation(3)
    rust.save(str(folder / "tokenizer.json"))
    check(folder)


def test_a_llama_2_that_begins_with_spaces(llama2: Path) -> None:
    with pytest.raises(
        OtherTokens, match=r'write a copy whose tokenizer_config\.json has "tokenizer_class": "TokenizersBackend"'
    ):
        check(llama2)
    say(llama2, **BACKEND)
    check(llama2)


def test_a_sentencepiece_file_alone(sentencepiece: Path) -> None:
    with pytest.raises(
        OtherTokens, match=r"its tokenizer\.model makes .*▁▁▁ ▁return .*write a copy with a tokenizer\.json"
    ):
        check(sentencepiece)


def test_a_file_of_tiktoken_is_nothing_for_sentencepiece(smollm: Callable[[str], Path]) -> None:
    folder = smollm("llama")
    loaded = AutoTokenizer.from_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    check_tokens(str(folder), loaded)


def test_a_run_is_refused(small_vocab: Path, tmp_path: Path) -> None:
    config = TandemConfig(stage="sft", model=ModelConfig(path=str(tmp_path / "model")))
    shutil.copytree(small_vocab, tmp_path / "model")
    assert checked_tokenizer(config)("x")
    said = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(said | {"model_type": "qwen2"}))
    with pytest.raises(ConfigError, match=r"model\.path=\S+: of .* its tokenizer\.json makes"):
        checked_tokenizer(config)


def test_a_judge_is_refused(llama2: Path) -> None:
    with pytest.raises(OtherTokens):
        judge._questions(judge.JudgeConfig(model=str(llama2), rubric="{{ completion }}"))
