"""Supervised fine-tuning: the model that everything else starts from."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from contracts.config import SFTConfig, TandemConfig
from contracts.records import Example
from contracts.stages import Reading, Stage

if TYPE_CHECKING:
    from controller.data.inputs import Inputs
    from controller.pipeline.context import StageContext
    from learner.learner_actor import LearnerGroup

UNREAD = ("held_tokens", "weight_transfer")  # of the learner
TEXTS = Reading("sft", "sft", "load_sft", ("sft.max_tokens",))


def supervised_settings(sft: SFTConfig) -> dict[str, Any]:
    """What decides a supervised stage; `top_fraction` only decides which texts it gets."""
    return {key: value for key, value in asdict(sft).items() if key != "top_fraction"}


def inputs(context: "StageContext") -> dict[str, Any]:
    settings = supervised_settings(context.config.sft)
    return context.common_inputs(unread=UNREAD) | {"sft": settings, "data": context.data_fingerprint("sft")}


def problems(config: TandemConfig, data: "Inputs") -> list[str]:
    ranks, count = config.cluster.num_learner_ranks, len(different_texts(data["sft"]))
    if count >= 2 * ranks:
        return []
    return [
        f"data.sft must have an example to train on and one to hold out for each of cluster.num_learner_ranks "
        f"({ranks}); found {count} usable; give {2 * ranks} or more"
    ]


def run(context: "StageContext") -> dict[str, Any]:
    return train_supervised(context, STAGE.title, context.config, context.data["sft"])


def _said(text: Example) -> tuple[int, ...]:
    return tuple(text.token_ids)


def different_texts(texts: Sequence[Example]) -> list[tuple[int, ...]]:
    """Their tokens, in order: one may stand in several rows, as in the pairs of an answer."""
    return list(dict.fromkeys(map(_said, texts)))


def train_supervised(
    context: "StageContext", title: str, config: TandemConfig, texts: Sequence[Example]
) -> dict[str, Any]:
    """Train the model of `config` on `texts`, of which some are held out."""
    import numpy as np

    texts = [texts[i] for i in np.random.default_rng(config.seed).permutation(len(texts))]
    different = different_texts(texts)
    told = {*different[: max(config.cluster.num_learner_ranks, len(different) // 20)]}
    held_out = [text for text in texts if _said(text) in told]
    trained = [text for text in texts if _said(text) not in told]
    with context.learner("sft", config, trained, held_out) as group:
        with context.phase(f"{title} on {len(trained)} texts"):
            steps = group.call("num_steps")[0]
            before = _held_out_loss(group, len(held_out))
            context.log_step(0, before)
            for step in range(steps):
                metrics = group.call("step", step)[0]
                last = step == steps - 1
                if last or step % 10 == 9:
                    metrics |= _held_out_loss(group, len(held_out)) if last else {}
                    loss = " ".join(f"{k.split('/')[1]} {v:.3f}" for k, v in metrics.items() if "loss" in k)
                    speed = metrics["perf/train_tokens_per_s"]
                    context.progress.line(f"  {title} step {step + 1}/{steps} | {loss} | {speed:.0f} tok/s")
                context.log_step(step + 1, metrics)
        group.call("save", str(context.path))
    return {"eval_loss_before": before.get("sft/eval_loss"), "eval_loss": metrics.get("sft/eval_loss")}


def _held_out_loss(group: "LearnerGroup", count: int) -> dict[str, float]:
    """In nats a token; some at a time, which `cluster.step_timeout_s` bounds."""
    from controller.pipeline.pair_training import CHUNK

    parts = max(1, count // max(CHUNK, len(group.actors)))
    ends = [count * part // parts for part in range(parts + 1)]
    found = [group.call("evaluate", *both)[0] for both in pairwise(ends)]
    return {"sft/eval_loss": sum(nats for nats, _ in found) / sum(tokens for _, tokens in found)}


STAGE = Stage(
    name="sft",
    title="SFT",
    inputs=inputs,
    run=run,
    position=10,
    starts_from=(),
    results={"": "sft_model"},
    reads=lambda config, role: [TEXTS],
    keys=("sft",),
    problems=problems,
    task="sft",
)
