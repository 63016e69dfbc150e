"""Base, SFT and what `method` made of it on the same held-out prompts with the same seeds: judged by the gold reward model,
VADER and the proxy.

One engine serves all, its weights replaced through the same transfer that training uses. The KL of a model against
SFT is the mean over its own samples of log p - log p_SFT, both computed by that engine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError

from common import statistics
from contracts.config import TandemConfig
from contracts.lora_roles import role_model
from contracts.methods import method_config, method_title
from contracts.records import Prompt, Rollout, RolloutRequest
from controller.data.prompts import sampling_seed
from controller.evaluation import best_of_n, pass_at
from controller.evaluation.verdict import verdict
from controller.record.evaluation import against_sft, judged_model
from controller.record.terminal import Progress

REFERENCE = "sft"
WAVES = 8  # so many times what an engine samples together is asked of it at once


@dataclass
class Judged:
    """One model's completions of the held-out prompts, in prompt order."""

    rollouts: list[Rollout]
    # float64 [N], log p - log p_SFT of each completion, nats; of best-of-n the bound of its mean; NaN where samples do not
    # tell it
    log_ratio: np.ndarray
    candidates: list[list[Rollout]] = field(default_factory=list)  # [N][n], what best-of-n chose from
    others: list[list[Rollout]] = field(default_factory=list)  # [n][N], more completions, to count right ones among

    @property
    def groups(self) -> list[tuple[Rollout, ...]]:
        """All completions of each prompt."""
        return list(zip(self.rollouts, *self.others, strict=True))

    @property
    def is_scored(self) -> bool:
        """Whether every completion has all of its scores."""
        return all(score.value is not None for group in self.groups for r in group for score in r.scores.values())

    def score(self, judge: str) -> np.ndarray:
        """float64 [N]; NaN where the judge gave no score."""
        if judge == "vader":
            return np.array(vader_scores([r.prompt.text + r.completion.text for r in self.rollouts]))
        return np.array([np.nan if (v := r.scores[judge].value) is None else v for r in self.rollouts])

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(r.completion.sampled_ids) for r in self.rollouts])


def vader_scores(texts: list[str]) -> list[float]:
    """VADER's rule-based compound sentiment in [-1, 1]."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


def judge_models(
    config: TandemConfig,
    models: dict[str, str],
    prompts: list[Prompt],
    actors: list[Any],
    judges: list[str],
    progress: Progress,
    kept: Mapping[str, Judged] | None = None,
) -> dict[str, Judged]:
    """Generate with every model and score; `actors` serve the first model of `models` already, and SFT comes last. Of `kept`
    is what has been judged before."""
    from learner.weight_publisher import BACKEND, WeightPublisher
    from learner.weight_sources import stored_source

    sampling, timeout_s = config.evaluate.sampling, config.cluster.step_timeout_s
    # Samples of a sharpened distribution do not estimate the KL of the models. Where EOS is banned at first, they do that of
    # what is sampled then from SFT as it is; both without the ban would tell the nearer, the sooner a model wants to end.
    has_kl = sampling.temperature == sampling.top_p == 1

    def sample(epoch: int, index: int) -> list[Rollout]:
        """One scored completion of every prompt."""
        seeds = [sampling_seed(config.evaluate.seed, epoch, p.prompt_id, index) for p in prompts]
        requests = [RolloutRequest(epoch, index, p, seed) for p, seed in zip(prompts, seeds, strict=True)]
        found = _answers(config, actors, requests, lambda a, part: a.rollout.remote(part, sampling, judges, timeout_s))
        return sorted(found, key=lambda r: r.key)

    rollouts: dict[str, list[Rollout]] = {}
    others: dict[str, list[list[Rollout]]] = {}
    own: dict[str, list[list[float]]] = {}
    judged = dict(kept or {})
    for version, (name, path) in enumerate(models.items()):
        if name in judged and name != REFERENCE:
            continue
        with progress.phase(f"evaluating {name}: {len(prompts)} held-out prompts"):
            if version:
                source = stored_source(path, role_model(config.model, "policy"))
                publisher = WeightPublisher(BACKEND, source, timeout_s=config.cluster.publish_timeout_s)
                publisher.connect(actors)
                report = publisher.send(version)
                assert report is not None
                report.require_all()
                publisher.shutdown()
            if name in judged:
                continue
            rollouts[name] = sample(0, 0)
            others[name] = [sample(0, index) for index in range(1, config.evaluate.samples)]
            own[name] = [r.completion.behavior_logprobs.tolist() for r in rollouts[name]]
    with progress.phase("KL against SFT"):
        for name in rollouts:
            is_known = has_kl and name != REFERENCE
            reference = _token_logprobs(config, actors, rollouts[name]) if is_known else own[name]
            ratio = np.array([sum(a) - sum(b) for a, b in zip(own[name], reference, strict=True)])
            judged[name] = Judged(rollouts[name], ratio if has_kl else ratio * np.nan, others=others[name])
    judged = {name: judged[name] for name in models}
    if config.method == "best_of_n":
        judged[config.method] = _best_of_n(config, sample, progress)
    return judged


def _answers(
    config: TandemConfig, actors: list[Any], items: list[Any], ask: Callable[[Any, list[Any]], Any]
) -> list[Any]:
    """What the actors answer for each item, in order. They are asked for WAVES times what their engines sample together, so
    that `cluster.step_timeout_s` bounds the wait for these and not for however many there are; and not for fewer, as an
    engine that has room takes the next one, and the last bits of a log-probability depend on its neighbours.

    Args:
        ask: calls an actor for some of the items, whose answers come in their order.

    Raises:
        TimeoutError: the actors took longer for those of one time.
    """
    at_once = WAVES * config.engine.max_num_seqs * len(actors)
    timeout_s, found = config.cluster.step_timeout_s, list[Any]()
    for start in range(0, len(items), at_once):
        wanted = items[start : start + at_once]
        calls = [ask(actor, wanted[i :: len(actors)]) for i, actor in enumerate(actors)]
        try:
            answers = ray.get(calls, timeout=timeout_s)
        except GetTimeoutError:
            raise TimeoutError(
                f"{len(wanted)} of {len(items)} held-out prompts were not answered within cluster.step_timeout_s "
                f"({timeout_s:g} s), {start} before them were: write a larger cluster.step_timeout_s, or a smaller "
                f"engine.max_num_seqs, as each engine is asked for {WAVES} times so many at once"
            ) from None
        ordered: list[Any] = [None] * len(wanted)
        for i, answer in enumerate(answers):
            ordered[i :: len(actors)] = answer
        found += ordered
    return found


def _token_logprobs(config: TandemConfig, actors: list[Any], rollouts: list[Rollout]) -> list[list[float]]:
    """log p of the sampled tokens, by the model that the actors serve now."""
    sequences = [([*r.prompt.token_ids, *r.completion.token_ids.tolist()], len(r.prompt.token_ids)) for r in rollouts]
    result = _answers(config, actors, sequences, lambda actor, part: actor.token_logprobs.remote(part))
    masks = [r.completion.loss_mask for r in rollouts]  # an observation is nobody's sample
    return [row if mask is None else np.array(row)[mask].tolist() for row, mask in zip(result, masks, strict=True)]


def _best_of_n(config: TandemConfig, sample: Callable[[int, int], list[Rollout]], progress: Progress) -> Judged:
    """Of completions that SFT, which the actors serve, samples anew: the one that it is compared with is none of them."""
    n, epoch = config.evaluate.best_of_n, 1 + method_config(config).seed  # 0 is the completions that are judged
    with progress.phase(f"sampling {n} completions a prompt from SFT, for the best of them"):
        rounds = [sample(epoch, index) for index in range(1, n + 1)]
    candidates = [list(group) for group in zip(*rounds, strict=True)]
    best = [best_of_n.choose(group) for group in candidates]
    return Judged(best, np.full(len(best), best_of_n.kl_bound(n)), candidates)


def summarize(judged: dict[str, Judged], judges: list[str], config: TandemConfig) -> dict[str, Any]:
    """The content of evaluation.json. Prompts where a judge failed on any model leave that judge's comparison."""
    judges = [*judges, "vader"]
    options: dict[str, Any] = {"samples": config.evaluate.bootstrap_samples, "seed": config.evaluate.seed}
    scores = {name: {judge: j.score(judge) for judge in judges} for name, j in judged.items()}
    models: dict[str, Any] = {}

    def mean(values: np.ndarray) -> dict[str, float]:
        return statistics.bootstrap_mean(values, **options).as_dict()

    for name, j in judged.items():
        tokens = [r.completion.sampled_ids.tolist() for r in j.rollouts]
        models[name] = {judge: mean(v[np.isfinite(v)]) for judge, v in scores[name].items()} | {
            "length": mean(j.lengths),
            "kl": mean(j.log_ratio[np.isfinite(j.log_ratio)]),
            "eos_share": float(np.mean([r.completion.finish_reason == "stop" for r in j.rollouts])),
            "distinct_1": statistics.distinct_n(tokens, 1),
            "distinct_2": statistics.distinct_n(tokens, 2),
            "repeat_fraction": float(np.mean([statistics.repeat_fraction(t, 4) for t in tokens])),
            "prompts": len(j.rollouts),
        }
        if j.candidates:
            models[name]["best_of_n"] = best_of_n.curve(j.candidates, judges[:-1], options)
    counted = judged if config.evaluate.success is not None else {}
    rates = {name: pass_at.rates(j.groups, config.evaluate) for name, j in counted.items()}
    for name, found in rates.items():
        prompts = [r.prompt for r in judged[name].rollouts]
        models[name] |= pass_at.summary(found, prompts, config.evaluate, options)
    comparisons = {
        f"{name}_vs_{REFERENCE}": _compare(scores[name], scores[REFERENCE], j, judged[REFERENCE], options)
        for name, j in judged.items()
        if name != REFERENCE
    }
    for name in rates.keys() - {REFERENCE}:
        comparisons[f"{name}_vs_{REFERENCE}"] |= pass_at.gains(rates[name], rates[REFERENCE], options)
    title = method_title(config.method, config.ppo.estimator)
    result = {"method": config.method, "title": title, "models": models, "comparisons": comparisons}
    if config.method in models and "gold" in judges:
        result["verdict"] = verdict(judged_model(result), against_sft(result), config.evaluate)
    return result


def _compare(
    mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray], a: Judged, b: Judged, options: dict[str, Any]
) -> dict[str, Any]:
    judge = "gold" if "gold" in mine else "proxy"
    valid = np.isfinite(mine[judge]) & np.isfinite(theirs[judge])
    gain = {
        f"{j}_gain": statistics.paired_gain(mine[j][ok], theirs[j][ok], **options).as_dict()
        for j in mine
        if (ok := np.isfinite(mine[j]) & np.isfinite(theirs[j])).any()
    }
    x, y = mine[judge][valid], theirs[judge][valid]
    difference = (a.lengths - b.lengths)[valid].astype(float)
    same = statistics.matched_length(x, y, a.lengths[valid], b.lengths[valid])
    matched: dict[str, Any] = {"pairs": len(same)}
    if len(same) >= 2:
        matched[f"{judge}_gain"] = statistics.paired_gain(x[same], y[same], **options).as_dict()
        matched["win_rate"] = statistics.win_rate(x[same], y[same], **options).as_dict()
    return gain | {
        "judge": judge,
        "win_rate": statistics.win_rate(x, y, **options).as_dict(),
        "length_ratio": float(a.lengths.mean() / b.lengths.mean()),
        "length_adjusted_gain": statistics.length_adjusted_gain(x - y, difference, **options).as_dict(),
        "matched_length": matched,
    }


def sample_rows(judged: dict[str, Judged], judges: list[str]) -> list[dict[str, Any]]:
    """One line a completion for samples.jsonl."""
    rows = []
    for name, j in judged.items():
        scores = {judge: j.score(judge) for judge in [*judges, "vader"]}
        for i, r in enumerate(j.rollouts):
            row = {"stage": "evaluate", "model": name, "prompt_id": r.prompt.prompt_id, "prompt": r.prompt.text}
            row |= {"completion": r.completion.text, "tokens": len(r.completion.sampled_ids)}
            row |= {judge: float(values[i]) for judge, values in scores.items()}
            rows.append(
                row | {"kl": float(j.log_ratio[i]), "eos": r.completion.finish_reason == "stop"} | r.shown_fields
            )
    return rows
