"""Which architectures are right: tiny random models of many, each held against its own class in transformers.

    tests/tiny_models.py ──> learner, reward service: several sequences at once
                         ──> vLLM: A from disk, B and A published    ──> numbers against the class's ──> JSON, docs/models.md

A cell is what the proof at the start of a run says of such a model (its form, or why it is refused), with a number
measured on the model itself, saved and loaded as any checkpoint: one that is accepted and differs is `WRONG`. Started
again, it goes on after the last row. Without names it writes the table into docs/models.md.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.processes.process_env import worker_env

os.environ.update(worker_env(1, on_cpu=True))  # one thread: its processes are forked

import torch
from transformers import AutoModelForSequenceClassification

from actors.engine_proof import Differences, class_logprobs, compare, in_fork, prove_here, save_tokenizer, verdict
from common.models.packed_attention import Packed
from common.models.proof import TOLERANCE, Unproven
from contracts.config import LearnerConfig, ModelConfig
from learner.models import load_policy, load_scalar
from reward_service.model import RewardModel
from tests.tiny_models import TINY, make

RESULTS = Path(__file__).parent / "results" / "models.json"
DOCS = Path(__file__).parent.parent / "docs" / "models.md"
HEADING = "## Table\n"
ROWS = (19, 4, 33, 1, 12)  # tokens of the sequences that are computed together
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


def learner(name: str) -> dict[str, dict[str, Any]]:
    """What learner and reward service do with a tiny model, by use: {"form", "difference" in nats or score units} or
    {"refused"}."""
    found: dict[str, dict[str, Any]] = {}
    generator = torch.Generator().manual_seed(5)
    with tempfile.TemporaryDirectory(prefix="tandem-table-") as folder:
        made, scorer = Path(folder, "lm"), Path(folder, "scorer")
        plain = make(name, 1)
        plain.save_pretrained(made)
        vocabulary = plain.config.get_text_config().vocab_size
        rows = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in ROWS]
        packed, model = Packed.of(rows, torch.device("cpu")), ModelConfig(dtype="float32")
        try:
            policy = load_policy(str(made), model, LearnerConfig(), on_cpu=True)
            before = torch.arange(packed.input_ids.shape[1])[
                ~torch.isin(torch.arange(packed.input_ids.shape[1]), packed.last)
            ]
            with torch.no_grad():
                logprobs = policy(packed, before, packed.input_ids[0, before + 1])[0]
            difference = (logprobs - class_logprobs(made, rows)).abs().max().item()
            found["policy"] = {"form": form_of(policy.lm, policy.layout), "difference": difference}
        except Unproven as error:
            found["policy"] = {"refused": str(error)}
        try:
            scalar = load_scalar(str(made), model, LearnerConfig(), on_cpu=True, seed=1)
            scalar.lm.save_pretrained(scorer)
            with torch.no_grad():
                values, expected = scalar(packed, packed.last), class_scores(scorer, rows)
            form = form_of(scalar.lm, scalar.layout)
            found["value"] = {"form": form, "difference": (values - expected).abs().max().item()}
            scores = torch.tensor([score.raw for score in RewardModel(str(scorer), "float32").score(rows)])
            found["scorer"] = {"form": form, "difference": (scores - expected).abs().max().item()}
        except Unproven as error:
            found |= {use: {"refused": str(error)} for use in ("value", "scorer") if use not in found}
    return found


def form_of(lm: Any, layout: str) -> str:
    return f"{lm.config._attn_implementation}, {layout}"


@torch.no_grad()
def class_scores(path: Path, rows: list[list[int]]) -> torch.Tensor:
    """Of every row at its last token, by the checkpoint's own class, row by row in float32."""
    classifier = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    )
    classifier.eval().config.get_text_config().pad_token_id = None  # else the class takes the last token for padding
    return torch.cat([classifier(torch.tensor([row]), use_cache=False).logits[0] for row in rows])


def learner_cell(found: dict[str, Any]) -> str:
    if "refused" in found:
        return f"refused: {found['refused']}"
    if not found["difference"] <= TOLERANCE:
        return f"WRONG: differs by {found['difference']:.2g}"
    return f"exact ({found['difference']:.0e}; {found['form']})"


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


def table(rows: dict[str, Any], dtypes: list[str]) -> str:
    uses = {"policy": "policy", "value": "value, reward model", "scorer": "reward service"}
    heads = ["architecture", *uses.values(), *(f"vLLM, {dtype}" for dtype in dtypes)]
    lines = [" | ".join(heads), "|".join(["---"] * len(heads))]
    for name in TINY:
        if found := rows.get(name):
            cells = [learner_cell(found["learner"][use]) for use in uses]
            lines.append(
                " | ".join(
                    [
                        name,
                        *cells,
                        *(cell(found["engine"], dtype) if "engine" in found else "not run" for dtype in dtypes),
                    ]
                )
            )
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of tests/tiny_models.py; all by default, but for those that are done")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    names = arguments.names or list(TINY)

    def measure(part: str, name: str, work: Callable[[], dict[str, Any]]) -> None:
        row = rows.setdefault(name, {})
        if arguments.names or part not in row:
            row[part] = work()
            arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
            print(f"{name}: {part}", file=sys.stderr)

    for name in names:  # first what takes seconds
        measure("learner", name, partial(in_fork, partial(write_learner, name)))
    for name in names:
        measure("engine", name, partial(engine, name, arguments.dtypes))
    if arguments.names:
        print(table({name: rows[name] for name in arguments.names}, arguments.dtypes))
    else:
        before, heading, _ = DOCS.read_text().partition(HEADING)
        DOCS.write_text(before + heading + "\n" + table(rows, arguments.dtypes))


def write_learner(name: str, result: Path) -> None:
    result.write_text(json.dumps(learner(name)))


if __name__ == "__main__":
    main()
