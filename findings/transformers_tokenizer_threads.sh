#!/usr/bin/env bash
# transformers 5.19.0: options of one call of a fast tokenizer change the calls of other threads, without an error.
#
# - `split_special_tokens`, `truncation`, `max_length` and `padding` look like arguments of a call. They are settings of the
#   Rust tokenizer that all calls share: transformers writes them there before it encodes, and encodes after that without a
#   lock. A thread that encodes in between gets what another one has asked for.
# - Two threads that share a tokenizer, as those of a server that reads rendered chats (markers are control tokens) and plain
#   texts (`split_special_tokens=True`), get other token ids now and then: markers as pieces of text, or texts that are cut.
# - Encoding the same texts one after another is right, and so is a tokenizer for each thread.
#
# Needs python3.11 and network for pip; takes about a minute. Exits 1 where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
export PATH=$folder/venv/bin:$PATH HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
pip install --quiet numpy==2.3.5 transformers==5.19.0 tokenizers==0.23.3
cd "$folder"

cat >race.py <<'PYTHON'
import copy
import threading
import time

import tokenizers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz <>|_")}
rust = Tokenizer(models.WordLevel(letters | {"?": len(letters)}, unk_token="?"))
rust.pre_tokenizer = pre_tokenizers.Split("", "isolated")
fast = transformers.PreTrainedTokenizerFast(tokenizer_object=rust, additional_special_tokens=["<|user|>", "<|end|>"])
chat, text = "<|user|>is this film good<|end|>" * 40, "a film that one would like to see again " * 40
chat_ids = fast(chat)["input_ids"]
text_ids = fast(text, split_special_tokens=True)["input_ids"]
print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)


def wrong(mine, other, **options):
    """Whether encodings of the chat ever differ while another thread encodes the text, for 5 seconds at most."""
    end, found = time.monotonic() + 5, []

    def chats():
        while not found and time.monotonic() < end:
            if mine(chat)["input_ids"] != chat_ids:
                found.append(True)

    def texts():
        while not found and time.monotonic() < end:
            other(text, **options)

    threads = [threading.Thread(target=work) for work in (chats, texts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return bool(found)


print("beside split_special_tokens=True:", wrong(fast, fast, split_special_tokens=True))
print("beside truncation=True, max_length=8:", wrong(fast, fast, truncation=True, max_length=8))
print("with a tokenizer for each thread:", wrong(fast, copy.deepcopy(fast), split_special_tokens=True, truncation=True, max_length=8))
print("one after another:", all(
    (fast(text, split_special_tokens=True)["input_ids"], fast(chat)["input_ids"]) == (text_ids, chat_ids) for _ in range(100)
))
PYTHON

python race.py 2>/dev/null | tee found.txt
printf '%s\n' "transformers 5.19.0 tokenizers 0.23.3" "beside split_special_tokens=True: True" \
    "beside truncation=True, max_length=8: True" "with a tokenizer for each thread: False" "one after another: True" | diff - found.txt
