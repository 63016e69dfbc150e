#!/usr/bin/env bash
# transformers 5.24.0: a Llama tokenizer read from tokenizer.model splits runs of spaces in another way than SentencePiece.
#
# - SentencePiece joins the pair whose result has the highest score. `LlamaTokenizer` of transformers 5 makes a list of joins
#   from the file and orders it by the numbers of the pieces; the scores are not used. In the tokenizer of Mistral 7B, which
#   is in the wheel of mistral-common, the pieces of spaces have low numbers and the lowest score. "    return" is 3 spaces
#   and " return" for SentencePiece and for a model trained with it, and 4 spaces and "return" for transformers. Nothing is
#   said.
# - transformers 4.57.6, by its fast and its slow tokenizer, and mistral-common agree with SentencePiece everywhere. So does
#   5.24.0 itself where it takes another class for the same file: beside a config of Mistral, or without `tokenizer_class`.
#   `use_fast=False` and `legacy` change nothing.
# - `save_pretrained` writes the list into tokenizer.json, so that other engines and later versions read it from there.
# - Prose in one line is the same, so a greeting or a sum shows nothing. Indented code, lists and JSON are not: of the lines
#   of four modules of Python's library 78% are read as other tokens.
#
# So a policy or a reward model of Llama's kind that comes with tokenizer.model alone (as was usual before tokenizer.json)
# is trained, sampled and scored on tokens that it has not learnt there, and its ids are not those of other engines.
#
# Needs python3.11 and network for pip; takes 1 to 2 minutes. Exits 1 where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
export PATH=$folder/venv/bin:$PATH HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
cd "$folder"

cat >compare.py <<'PYTHON'
import importlib.resources
import inspect
import json
import shutil
from pathlib import Path

import mistral_common
import sentencepiece
import transformers
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

new = transformers.__version__.startswith("5")
here = Path("model")
here.mkdir(exist_ok=True)
source = importlib.resources.files(mistral_common) / "data" / "tokenizer.model.v1"
shutil.copy(str(source), here / "tokenizer.model")
(here / "config.json").write_text(json.dumps({"model_type": "llama"}))
(here / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
right = sentencepiece.SentencePieceProcessor(model_file=str(here / "tokenizer.model"))
mistral = MistralTokenizer.from_file(str(source)).instruct_tokenizer.tokenizer
library = [Path(inspect.getsourcefile(module)).read_text() for module in (json, json.decoder, inspect, shutil)]
texts = ["What is 17 + 25? Think step by step.", "def f(x):\n    return x + 1", "- a\n  - b", '{\n  "a": 1\n}', *library]

for options in ({}, {"use_fast": False}, {"legacy": False}):
    tokenizer = AutoTokenizer.from_pretrained("model", **options)
    name = f"transformers {transformers.__version__} {type(tokenizer).__name__} {options}"
    same = []
    for text in texts:
        expected, found = right.encode(text), tokenizer(text, add_special_tokens=False).input_ids
        assert expected == mistral.encode(text, bos=False, eos=False)
        same.append(expected == found)
        if text is texts[1]:
            print(f"found: {name}:", tokenizer.convert_ids_to_tokens(found))
    lines = ["x\n" + line for text in library for line in text.splitlines()]
    other = sum(right.encode(line) != tokenizer(line, add_special_tokens=False).input_ids for line in lines)
    print(f"found: {name}: equal in {sum(same)} of {len(texts)} texts, {other} of {len(lines)} lines differ")
    assert same == ([True] + [False] * 7 if new else [True] * 8), same
    assert other > 0.7 * len(lines) if new else other == 0, other
print("found: SentencePiece and mistral-common:", right.encode(texts[1], out_type=str))
print("found: scores:", {right.id_to_piece(i): right.get_score(i) for i in (259, 260, 264)}, "of pieces", (259, 260, 264))

if new:
    ways = (("beside a config of Mistral", "mistral", "LlamaTokenizer"), ("without tokenizer_class", "llama", None))
    for what, kind, named in ways:
        (here / "config.json").write_text(json.dumps({"model_type": kind}))
        (here / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named} if named else {}))
        other = AutoTokenizer.from_pretrained("model")
        same = [right.encode(text) == other(text, add_special_tokens=False).input_ids for text in texts]
        print(f"found: the same file {what}, {type(other).__name__}: equal in {sum(same)} of {len(texts)} texts")
        assert all(same)
    tokenizer.save_pretrained("saved")
    kept = Tokenizer.from_file("saved/tokenizer.json").encode(texts[1], add_special_tokens=False).ids
    print("found: saved as tokenizer.json and read by tokenizers alone: right", kept == right.encode(texts[1]))
    assert kept != right.encode(texts[1])
PYTHON

pip install --quiet numpy==2.3.5 sentencepiece==0.2.1 protobuf==6.33.0 mistral-common==1.13.1 transformers==4.57.6
python compare.py 2>errors.txt | grep "^found:" || { tail -5 errors.txt; exit 1; }
pip install --quiet transformers==5.24.0
python compare.py 2>errors.txt | grep "^found:" || { tail -5 errors.txt; exit 1; }
