#!/usr/bin/env bash
# transformers 5.24.0: a model of type qwen2 with a tokenizer of its own gets Qwen's rules of splitting when it is loaded.
#
# - `AutoTokenizer` has a list of model types whose tokenizer_config.json is not believed; its comment says that they are
#   "forced to use TokenizersBackend", the class that takes tokenizer.json as it is. For qwen2, qwen3_5, qwen3_5_moe,
#   qwen3_5_moe_text and qwen4_exp it is the other way: whatever class is named, TokenizersBackend included, Qwen's is
#   taken. It keeps vocabulary and joins of tokenizer.json and puts its own normalizer, splitting and decoder over them.
#   Nothing is said.
# - A tokenizer that takes up to three digits at once then gives single digits. One with joins of SentencePiece's kind loses
#   the spaces: what is encoded and decoded comes back as one word.
# - The file is right as the tokenizers library or `PreTrainedTokenizerFast` reads it, and so is the same folder as llama,
#   qwen2_moe, qwen3 or qwen3_moe, or without config.json: beside an adapter it is one tokenizer, beside the model another.
# - `save_pretrained` of what was loaded writes the change into tokenizer.json; from then on every reader has it.
# - For Llama the library says itself what to do (set tokenizer_class to TokenizersBackend). That is what is written here.
#
# So a policy that has learnt with one tokenizer is trained further, sampled and scored on the ids of another one; numbers
# change most. CodeQwen1.5 is a published model of this type whose file names PreTrainedTokenizerFast.
#
# Needs python3.11 and network for pip; takes about a minute. Exits 1 where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
export PATH=$folder/venv/bin:$PATH HF_HUB_OFFLINE=1
pip install --quiet numpy==2.3.5 transformers==5.24.0
cd "$folder"

cat >own.py <<'PYTHON'
import json
from pathlib import Path

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

TEXT = "In 2024 the fox had 1234567 dogs"
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
corpus = [f"the quick brown fox had {n} lazy dogs in {n + 1900}" for n in range(1000)]


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=1400, special_tokens=["<unk>", "<eos>"], initial_alphabet=alphabet, show_progress=False,
    ))
    return made


def sentencepiece_like() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=1400, special_tokens=special, show_progress=False))
    return made


print("found: transformers", transformers.__version__)
for name, rust in (("three digits at once", byte_level()), ("SentencePiece's kind", sentencepiece_like())):
    expected = rust.encode(TEXT)
    print(f"found: {name}: right {expected.tokens}")
    right, wrong = [], []
    qwen = ("qwen2_moe", "qwen3", "qwen3_moe", "qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp")
    for kind in ("llama", *qwen, None):
        where = Path(f"{name} {kind}")
        PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="<unk>", eos_token="<eos>").save_pretrained(where)
        assert json.loads((where / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
        if kind:
            AutoConfig.for_model(kind).save_pretrained(where)
        assert Tokenizer.from_file(str(where / "tokenizer.json")).encode(TEXT).ids == expected.ids
        assert PreTrainedTokenizerFast.from_pretrained(where)(TEXT).input_ids == expected.ids
        loaded = AutoTokenizer.from_pretrained(where)
        ids = loaded(TEXT).input_ids
        (right if ids == expected.ids else wrong).append(kind)
        if kind == "qwen2":
            print(f"found: {name}: as qwen2, {type(loaded).__name__} {loaded.convert_ids_to_tokens(ids)}")
            print(f"found: {name}: {len(expected.ids)} and {len(ids)} ids; encoded and decoded: {loaded.decode(ids)!r}")
            loaded.save_pretrained("again")
            again = Tokenizer.from_file("again/tokenizer.json").encode(TEXT)
            assert again.ids == ids != expected.ids
            spaces = loaded.decode(ids) == TEXT
    print(f"found: {name}: right as {right}, wrong as {wrong}")
    assert right == ["llama", "qwen2_moe", "qwen3", "qwen3_moe", None], right
    assert spaces == (name == "three digits at once")
PYTHON
python own.py 2>errors.txt | grep "^found:" || { tail -5 errors.txt; exit 1; }
! grep -iE "qwen|backend|pre_tokenizer|regex" errors.txt
