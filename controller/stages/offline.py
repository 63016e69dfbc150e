"""The stages that train on data alone: SFT, reward models, SFT on the best texts, preferences. Each writes a checkpoint and
returns its numbers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from common import statistics
from contracts.config import TandemConfig
from contracts.methods import chosen_preference
from contracts.preference_losses import PreferenceLoss, find_preference_loss
from contracts.records import Example, PreferencePair, RatedExample, RatedText

if TYPE_CHECKING:
    from controller.stages.pipeline import Pipeline

T = TypeVar("T")
CHUNK = 256  # texts a call, so that progress and deadlines stay fine-grained


def method_config(config: TandemConfig) -> TandemConfig:
    """With the seed of what comes after SFT."""
    return config if config.ppo.seed is None else replace(config, seed=config.ppo.seed)


def chunks(items: Sequence[T], ranks: int) -> list[Sequence[T]]:
    """In order, each with an item for every rank where there are so many."""
    starts = list(range(0, len(items), CHUNK))
    if len(starts) > 1 and len(items) - starts[-1] < ranks:
        starts.pop()
    return [items[a:b] for a, b in zip(starts, [*starts[1:], len(items)], strict=True)]


def train_sft(run: "Pipeline", path: Path) -> dict[str, Any]:
    return _supervised(run, "sft", "SFT", run.config, run.data.sft, path)


def train_filtered_sft(run: "Pipeline", path: Path) -> dict[str, Any]:
    """Go on from the SFT model, on the texts that people rated highest."""
    config = method_config(run.config)
    config = replace(config, model=replace(config.model, path=run.checkpoint("sft"), revision=None))
    best = run.data.best_sft
    return _supervised(run, "filtered_sft", "filtered SFT", config, best, path) | {"texts": len(best)}


def _supervised(
    run: "Pipeline", stage: str, title: str, config: TandemConfig, texts: list[Example], path: Path
) -> dict[str, Any]:
    order = np.random.default_rng(config.seed).permutation(len(texts))
    held = max(config.cluster.num_learner_ranks, len(order) // 20)
    examples = [texts[i] for i in order]
    with run.learner(stage, "sft", config, examples[held:], examples[:held]) as group:
        with run.phase(stage, f"{title} on {len(examples) - held} texts"):
            steps = group.call("num_steps")[0]
            before = group.call("evaluate")[0]
            run.log.log(stage, 0, before)
            for step in range(steps):
                metrics = group.call("step", step)[0]
                last = step == steps - 1
                if last or step % 10 == 9:
                    metrics |= group.call("evaluate")[0] if last else {}
                    loss = " ".join(f"{k.split('/')[1]} {v:.3f}" for k, v in metrics.items() if "loss" in k)
                    speed = metrics["perf/train_tokens_per_s"]
                    run.progress.line(f"  {title} step {step + 1}/{steps} | {loss} | {speed:.0f} tok/s")
                run.log.log(stage, step + 1, metrics)
        group.call("save", str(path))
    return {"eval_loss_before": before.get("sft/eval_loss"), "eval_loss": metrics.get("sft/eval_loss")}


def train_reward_model(run: "Pipeline", name: str, path: Path) -> dict[str, Any]:
    stage, examples = f"reward_model/{name}", run.data.preferences[name]
    with run.learner(stage, "reward_model", run.config, examples) as group:
        with run.phase(stage, f"{name} reward model on {len(examples)} preferences"):
            _pair_steps(run, group, stage, f"{name} reward model")

        def score(texts: list[list[int]]) -> list[float]:
            return [s for chunk in chunks(texts, len(group.actors)) for s in group.call("score", chunk)[0]]

        with run.phase(stage, f"held-out accuracy of the {name} reward model"):
            accuracy = _accuracy_of_scores(run, score)
        group.call("save", str(path))
    run.progress.line(
        f"  {name} reward model: {accuracy['accuracy']:.1%} of {accuracy['pairs']} held-out pairs right"
        + (f" (VADER's rules: {accuracy['vader_accuracy']:.1%})" if "vader_accuracy" in accuracy else "")
    )
    return accuracy


def train_preference(run: "Pipeline", path: Path) -> dict[str, Any]:
    config, settings, stage = method_config(run.config), chosen_preference(run.config), "preference"
    loss, examples, test = find_preference_loss(str(settings.loss)), run.data.completions, run.data.test_completions
    texts = [text for item in test for text in item.texts]
    with run.learner(stage, stage, config, settings, run.checkpoint("sft"), examples) as group:

        def likelihoods() -> np.ndarray:
            parts = [group.call("logprobs", chunk)[0] for chunk in chunks(texts, len(group.actors))]
            return np.concatenate(parts)

        def accuracy(now: np.ndarray) -> dict[str, float]:
            return _accuracy_of_likelihoods(run, loss, now, before, texts)

        with run.phase(stage, f"log-probabilities of the reference on {len(test)} held-out and {len(examples)} items"):
            before = likelihoods()
            if loss.has_reference:
                for part in chunks(range(len(examples)), len(group.actors)):
                    group.call("compute_reference", part[0], part[-1] + 1)
        with run.phase(stage, f"{settings.loss} on {len(examples)} preferences"):
            _pair_steps(run, group, stage, str(settings.loss))
        with run.phase(stage, "held-out accuracy of the policy's own ranking"):
            found = accuracy(likelihoods())
            # Without a reference SFT ranks too: what it knew before. With one all scores were equal.
            start = accuracy(before) if not loss.has_reference else {}
        group.call("save", str(path))
    known = f" (SFT: {start['accuracy']:.1%})" if start else ""
    run.progress.line(f"  {settings.loss}: {found['accuracy']:.1%} of {found['pairs']} held-out pairs right{known}")
    return found | {f"sft_{name}": value for name, value in start.items() if name.startswith("accuracy")}


def _pair_steps(run: "Pipeline", group: Any, stage: str, title: str) -> None:
    """All steps of a task that compares texts; every 20 steps a line with the means."""
    steps, kind = group.call("num_steps")[0], stage.split("/")[0]
    recent: list[dict[str, float]] = []
    for step in range(steps):
        metrics = group.call("step", step)[0]
        run.log.log(stage, step + 1, metrics)
        recent.append(metrics)
        if step == steps - 1 or step % 20 == 19:
            means = {k: float(np.mean([m[k] for m in recent])) for k in metrics}
            recent = []
            run.progress.line(
                f"  {title} step {step + 1}/{steps} | loss {means[f'{kind}/loss']:.3f} | pairs right "
                f"{means[f'{kind}/accuracy']:.1%} | {means['perf/train_tokens_per_s']:.0f} tok/s"
            )


# ---- accuracy on held-out preferences


def _accuracy_of_scores(run: "Pipeline", score: Callable[[list[list[int]]], list[float]]) -> dict[str, float]:
    """Held-out pairs on which the higher score goes to the text that people rated higher, with 95% intervals."""
    test, config = run.data.test, run.config
    rated = [item for item in test if isinstance(item, RatedText)]
    if not rated:
        pairs = [item for item in test if isinstance(item, PreferencePair) and item.preference != 0.5]
        return _pairs_right(config, score([p.chosen_ids for p in pairs]), score([p.rejected_ids for p in pairs]))
    from controller.stages.evaluate import vader_scores

    ratings = [float(np.mean(item.ratings)) for item in rated]
    count = config.reward_model.eval_pairs
    found = _ranked_right(config, score([item.token_ids for item in rated]), ratings, count)
    vader = _ranked_right(config, vader_scores([item.text for item in rated]), ratings, count)
    return found | {f"vader_{name}": value for name, value in vader.items() if name.startswith("accuracy")}


def _accuracy_of_likelihoods(
    run: "Pipeline", loss: PreferenceLoss, now: np.ndarray, before: np.ndarray, texts: list[Example]
) -> dict[str, float]:
    """As `_accuracy_of_scores`, by the scores that the policy implies."""
    tokens = torch.tensor([max(1, sum(text.loss_mask[1:])) for text in texts])
    scores = loss.scores(torch.from_numpy(now), torch.from_numpy(before), tokens, 1.0).tolist()
    rated = [item for item in run.data.test_completions if isinstance(item, RatedExample)]
    if not rated:
        known = [2 * i for i, item in enumerate(run.data.test_completions) if item.preference != 0.5]  # type: ignore[union-attr]
        return _pairs_right(run.config, [scores[i] for i in known], [scores[i + 1] for i in known])
    ratings = [float(np.mean(item.ratings)) for item in rated]
    return _ranked_right(run.config, scores, ratings, run.config.preference.eval_pairs)


def _pairs_right(config: TandemConfig, chosen: list[float], rejected: list[float]) -> dict[str, float]:
    options = {"samples": config.evaluate.bootstrap_samples, "seed": config.seed}
    return statistics.win_rate(chosen, rejected, **options).row("accuracy") | {"pairs": len(chosen)}


def _ranked_right(config: TandemConfig, scores: list[float], ratings: list[float], count: int) -> dict[str, float]:
    options = {"samples": config.evaluate.bootstrap_samples, "seed": config.seed}
    pairs = statistics.random_pairs(ratings, count, config.seed)
    found = statistics.pair_accuracy(scores, ratings, pairs, **options)
    return found.row("accuracy") | {"pairs": len(pairs), "texts": len(scores)}
