"""Which architectures are right: tiny random models of many, each held against its own class in transformers.

    tests/tiny_models.py ──> vLLM: A from disk, B and A published ──> log-probabilities against the class's ──> JSON, table

A row is what the proof at the start of a run says of such a model (a number, or why it is refused), and beside it the same
measured with the model itself: a row that is accepted and differs is `WRONG`. Started again, it goes on after the last row.
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from contracts.process_env import worker_env

os.environ.update(worker_env(1, on_cpu=True))  # one thread: its processes are forked

import torch

from actors.engine_proof import Differences, compare, in_fork, prove_here, save_tokenizer, verdict
from contracts.config import ModelConfig
from tests.tiny_models import TINY, make

RESULTS = Path(__file__).parent / "results" / "models.json"
MAX_MODEL_LEN = 64  # tokens: longer than the windows of the variants that have one


def engine(name: str, dtypes: list[str]) -> dict[str, Any]:
    """What the proof says of vLLM for a tiny model in these number formats, and what the model itself gives: {"proof",
    "model": {dtype: differences}}."""
    import actors.vllm_engine  # noqa: F401  # once, for all forks

    config = TINY[name]()

    def itself(result: Path, dtype: str) -> None:
        paths = [result.parent / str(seed) for seed in (0, 1)]
        for seed, path in enumerate(paths):
            make(name, seed, getattr(torch, dtype)).save_pretrained(path)
            save_tokenizer(path, config.vocab_size)
        compare(paths[0], paths[1], ModelConfig(path=name, dtype=dtype), result)

    proof = prove_here(config, ModelConfig(path=name, dtype=dtypes[-1]), MAX_MODEL_LEN)
    return {"proof": proof, "model": {dtype: in_fork(partial(itself, dtype=dtype)) for dtype in dtypes}}


def cell(found: dict[str, Any], dtype: str) -> str:
    """As the table says it. A run in float32 needs no proof in another format."""
    proof = found["proof"]
    formats = {name: numbers for name, numbers in proof["formats"].items() if name in ("float32", dtype)}
    error = {} if dtype in formats else {"error": proof["errors"][dtype]}
    if refused := verdict({"formats": formats} | error):
        return f"refused: {refused}"
    numbers = found["model"][dtype]
    fault = numbers.get("error") or Differences(**numbers).fault()
    return f"WRONG: {fault}" if fault else f"exact ({max(numbers['loaded'], numbers['published']):.0e})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of tests/tiny_models.py; all by default, but for those that are done")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in arguments.names or TINY:
        row = rows.setdefault(name, {})
        if arguments.names or "engine" not in row:
            row["engine"] = engine(name, arguments.dtypes)
            arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
            print(name, *(cell(row["engine"], dtype) for dtype in arguments.dtypes), sep="; ", file=sys.stderr)
    print("| architecture | " + " | ".join(f"vLLM, {dtype}" for dtype in arguments.dtypes) + " |")
    print("|---" * (1 + len(arguments.dtypes)) + "|")
    for name in TINY:
        if found := rows.get(name, {}).get("engine"):
            print(f"| {name} | " + " | ".join(cell(found, dtype) for dtype in arguments.dtypes) + " |")


if __name__ == "__main__":
    main()
