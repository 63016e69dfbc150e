"""`python -m controller.study.negation RUN`: how much of a negation do cross-entropy and reward models notice?

    data.test ── negation_rules ──> triples ── SFT model, reward models ──> RUN/negation.json

RUN is a finished run, or the directory of a study, whose members share SFT and reward models. Held-out texts alone: neither
model has seen them. In float32, since the change of a single word may be smaller than the rounding of bfloat16.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from omegaconf import OmegaConf

from common.statistics import FloatArray
from common.text.encoding import encode_example
from contracts.config import TandemConfig, to_config
from contracts.records import RatedText
from controller.data.datasets import LoadReport, load_preferences
from controller.record.reader import is_run
from studies.five_reasons import contrasts
from studies.five_reasons.contrasts import Estimate, absent
from studies.five_reasons.negation_rules import Triple, triple
from studies.five_reasons.registration import RECORD, Bootstrap, StudyError, recorded, sha256

NAME = "negation.json"
STAGES = {"sft": "sft", "reward_model/proxy": "proxy", "reward_model/gold": "gold"}
Scored = dict[str, list[list[float]]]  # by measure, for each triple: of the text, its negation and its control


# ---- what is concluded, pure


def changes(scored: Scored, measure: str) -> tuple[FloatArray, FloatArray]:
    """How much each negation [n] and each control [n] changes a measure: the size of the change, or with `_signed` the
    rise."""
    table = np.array(scored[measure.removesuffix("_signed")], dtype=np.float64)
    negation, control = table[:, 1] - table[:, 0], table[:, 2] - table[:, 0]
    return (negation, control) if measure.endswith("_signed") else (np.abs(negation), np.abs(control))


def wins(negation: FloatArray, control: FloatArray) -> FloatArray:
    """[n, n]: 1 where negation i changes more than control j, 1/2 where alike. Their mean is the area under the curve."""
    difference = negation[:, None] - control[None, :]
    return (difference > 0) + 0.5 * (difference == 0)


def auc_draws(table: FloatArray, bootstrap: Bootstrap) -> FloatArray:
    """Areas over bootstrap draws of triples, a triple with its negation and its control: [samples]."""
    count = len(table)
    rng = np.random.default_rng(bootstrap.seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=bootstrap.samples).astype(float) / count
    return ((drawn @ table) * drawn).sum(axis=1)


def auc(scored: Scored, weights: dict[str, float], bootstrap: Bootstrap) -> Estimate:
    """A weighted sum of the areas of measures, on the same draws of triples."""
    missing = [m for m in weights if m.removesuffix("_signed") not in scored]
    if missing:
        return absent(f"not measured: {', '.join(missing)}")
    tables = {measure: wins(*changes(scored, measure)) for measure in weights}
    count = len(next(iter(tables.values())))
    if count < 2:
        return absent(f"{count} triples")
    mean = float(sum(weight * tables[m].mean() for m, weight in weights.items()))
    draws = sum((weight * auc_draws(tables[m], bootstrap) for m, weight in weights.items()), start=np.zeros(()))
    return Estimate(mean, draws, prompts=count)


# ---- what is measured


def find_run(path: Path) -> Path:
    """The run itself, or the first of a sweep's members whose models are there.

    Raises:
        StudyError: there is none.
    """
    if not path.is_dir():
        raise StudyError(f"{path} is not a directory; write a run directory or that of a study")
    for run in [path] if is_run(path) and (path / "config.yaml").exists() else sorted(path.iterdir()):
        if (run / "stages.json").exists() and {"sft", "proxy"} <= set(checkpoints(run)):
            return run
    raise StudyError(f"{path} has no run with an SFT model and a reward model in its stages.json")


def checkpoints(run: Path) -> dict[str, str]:
    """Paths of the SFT model and the reward models that a run used, given ones included."""
    rows = json.loads((run / "stages.json").read_text())
    found = {STAGES[row["name"]]: row["path"] for row in rows if row["name"] in STAGES}
    config = yaml.safe_load((run / "config.yaml").read_text())
    given = {name: config.get(f"{name}_model") for name in STAGES.values()}
    return found | {name: path for name, path in given.items() if path}


def loaded_config(run: Path) -> TandemConfig:
    return to_config(OmegaConf.merge(OmegaConf.structured(TandemConfig), OmegaConf.load(run / "config.yaml")))  # type: ignore[arg-type]


def find_triples(config: TandemConfig, tokenizer: Any) -> tuple[list[Triple], dict[str, int]]:
    """Triples of the held-out texts, and how many were left out for each reason."""
    source, limit = config.data.test, config.reward_model.max_tokens
    rated = load_preferences(source, config.data, tokenizer, limit, LoadReport(), "data.test")
    found = [triple(item.text, float(np.mean(item.ratings))) for item in rated if isinstance(item, RatedText)]
    left_out = Counter(item for item in found if isinstance(item, str))
    return [item for item in found if isinstance(item, Triple)], dict(left_out.most_common())


def cross_entropy(path: str, config: TandemConfig, tokenizer: Any) -> Callable[[str], tuple[float, int]]:
    """A function from a text to its loss in nats under a language model, as SFT computes it, and its number of tokens."""
    from learner.examples import example_nll, loss_tokens
    from learner.models import load_policy

    model = load_policy(path, replace(config.model, dtype="float32"), config.learner, on_cpu=True)

    @torch.inference_mode()
    def loss(text: str) -> tuple[float, int]:
        example = encode_example(tokenizer, "", text, chat=False)
        return float(example_nll(model, [example], torch.device("cpu"))), loss_tokens([example])

    return loss


def scorer(path: str, tokenizer: Any) -> Callable[[Sequence[str]], list[float]]:
    """A function from texts to their scores by a reward model, as the reward service computes them."""
    from reward_service.model import RewardModel

    model = RewardModel(path, dtype="float32")

    def score(texts: Sequence[str]) -> list[float]:
        ids = [encode_example(tokenizer, "", text, chat=False).token_ids for text in texts]
        return [math.nan if (s := item.value) is None else s for item in model.score(ids)]

    return score


def measure(run: Path, registration: str) -> dict[str, Any]:
    """Every triple with every measure, and what was left out. `registration`: SHA-256 of the study's pre-registration."""
    from transformers import AutoTokenizer

    config, paths = loaded_config(run), checkpoints(run)
    tokenizer = AutoTokenizer.from_pretrained(paths["sft"], trust_remote_code=False)
    triples, left_out = find_triples(config, tokenizer)
    if len(triples) < 2:
        raise StudyError(f"{len(triples)} of the texts of data.test can be negated by the rules; left out: {left_out}")
    texts = [text for item in triples for text in (item.text, item.negated, item.control)]
    loss = cross_entropy(paths["sft"], config, tokenizer)
    losses = [loss(text) for text in texts]
    columns = {"cross_entropy": [nats / tokens for nats, tokens in losses], "cross_entropy_sum": [n for n, _ in losses]}
    columns |= {name: scorer(paths[name], tokenizer)(texts) for name in ("proxy", "gold") if name in paths}
    return {
        "preregistration": registration,
        "models": paths,
        "texts": len(triples) + sum(left_out.values()),
        "left_out": left_out,
        "triples": [asdict(item) for item in triples],
        "scored": {name: np.array(column).reshape(-1, 3).tolist() for name, column in columns.items()},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m controller.study.negation", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished run, or the directory of a study")
    parser.add_argument("--into", type=Path, metavar="DIR", help=f"where {NAME} is written (default: RUN)")
    given = parser.parse_args(arguments)
    folder = given.into or given.run
    target, note = folder / NAME, folder / RECORD
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before hours of scoring
        registration = recorded(note)["sha256"] if note.exists() else sha256()
        if given.into and target.exists() and json.loads(target.read_text())["preregistration"] == registration:
            print(f"negation: {target} is there, of the models that were first: the verdict is theirs")
            return
        run = find_run(given.run)
        result = measure(run, registration)
    except StudyError as error:
        raise SystemExit(f"negation: {error}") from error
    target.write_text(json.dumps(result, indent=1) + "\n")
    plan = Bootstrap(samples=2000, seed=0)
    for name in (*result["scored"], "cross_entropy_signed"):
        found = auc(result["scored"], {name: 1.0}, plan)
        low, high = found.interval(contrasts.statistics.LEVEL)
        print(f"  {name:<22} AUC {found.mean:.3f} [{low:.3f}, {high:.3f}]")
    print(f"negation: {len(result['triples'])} triples of {run}: {target}")


if __name__ == "__main__":
    main()
