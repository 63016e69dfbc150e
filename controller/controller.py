"""The PPO loop.

      prompts ──requests──> rollout actors (vLLM) ──sequences──> reward service (Ray Serve)
                                 │        ▲  └────────scores────────┘
                         scored rollouts  │
                                 ▼        │ weights of version v+1, over vLLM's weight-transfer API
                              batcher     │
                                 │        │
                          training batch  │
                                 ▼        │
                            learner ranks (DeepSpeed): ref, policy, values -> rewards -> advantages -> PPO steps

    max_staleness 0: rollouts of version v  ->  update to v+1  ->  publish v+1  ->  rollouts of version v+1 ...
    max_staleness s: the same steps, while the actors go on with up to (s + 1) * rollouts_per_update rollouts. Engines take
                     new weights between two decoding steps; no token is older than s updates when it trains.

What the loop waits for, and what unblocks it (every wait ends after `cluster.step_timeout_s` with an error that names it;
in each of them the dispatcher goes on serving the actors):
    rollouts   enough are sampled and scored, and none of those left behind will be too old
    update     all learner ranks have taken the optimizer steps
    publish    every engine has loaded the weights and carries their version; only then are slots free again

The controller holds references and numbers, never a model. The ledger knows where every rollout is, and writes what became
of it to `ledger.jsonl`.
"""

import time
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayTaskError

from contracts.config import TandemConfig
from contracts.estimators import chosen_estimator, warmup_updates
from contracts.interfaces import NonFiniteError
from contracts.records import Rollout
from controller.batcher import make_batches, with_siblings
from controller.dispatch import Dispatcher
from controller.evidence import save_rollouts
from controller.fleet import Fleet
from controller.ledger import Ledger
from controller.ledger_log import NAME as LEDGER_FILE
from controller.metrics import RunLog
from controller.progress import Progress, format_update
from controller.prompts import PromptStream
from controller.scores import score_metrics
from controller.shaping import ScoreNormalizer, service_scores, shaped, turn_metrics
from controller.statistics import distinct_n, repeat_fraction
from learner.kl import make_kl_controller
from learner.learner_actor import LearnerGroup


class ScoreError(RuntimeError):
    """Too many rollouts came back without a score."""


class PPOController:
    def __init__(
        self,
        config: TandemConfig,
        stream: PromptStream,
        fleet: Fleet,
        learner: LearnerGroup,
        log: RunLog,
        progress: Progress,
        has_gold: bool,
    ):
        self.config, self.learner, self.log, self.progress = config, learner, log, progress
        self.kl = make_kl_controller(config.ppo.kl)
        self.normalizer = ScoreNormalizer()
        self.rng = np.random.default_rng(config.seed)
        ppo, scorers = config.ppo, ["proxy", "gold"] if has_gold and config.ppo.gold_rollouts else ["proxy"]
        self.ledger = Ledger(ppo.rollouts_per_update, ppo.max_staleness)
        self.dispatcher = Dispatcher(fleet, self.ledger, stream, ppo, scorers, config.cluster)
        self.first_score: float | None = None
        self.version = 0

    def run(self) -> None:
        """All value-only and PPO updates of the configuration."""
        warmup = warmup_updates(self.config.ppo)
        total = warmup + self.config.ppo.updates
        durations: list[float] = []
        for index in range(total):
            train_policy = index >= warmup
            start = time.perf_counter()
            self.dispatcher.feed(total - index)
            metrics = self._update(train_policy)
            durations.append(time.perf_counter() - start)
            metrics["perf/step_s"] = durations[-1]
            metrics["progress/eta_s"] = eta = (total - index - 1) * float(np.median(durations[-8:]))
            metrics["progress/version"] = self.version
            self.log.log("ppo" if train_policy else "value_warmup", index, metrics)
            line = format_update(metrics, eta)
            self.progress.line(line if train_policy else f"fitting the value model  {line}")

    def _update(self, train_policy: bool) -> dict[str, float]:
        start = time.perf_counter()
        self.progress.waiting_for(f"rollouts for the update of version {self.version}")
        rollouts = self.dispatcher.next_batch(self.version)
        metrics = {"perf/rollout_s": time.perf_counter() - start}
        failed = [r for r in rollouts if r.scores["proxy"].value is None]
        if len(failed) > self.config.ppo.max_failed_scores * len(rollouts):
            reasons = sorted({str(r.scores["proxy"].error) for r in failed})
            raise ScoreError(
                f"{len(failed)} of {len(rollouts)} rollouts of version {self.version} have no score "
                f"(ppo.max_failed_scores allows {self.config.ppo.max_failed_scores:.0%}), listed in "
                f"{save_rollouts(self.log.run_dir / 'unscored.jsonl', failed)}; reasons: {reasons[:3]}"
            )
        scored = [r for r in rollouts if r.scores["proxy"].value is not None]
        for rollout in failed:
            self.ledger.quarantine(rollout.key, f"no score: {rollout.scores['proxy'].error}")
        metrics["fault/unscored"] = float(len(failed))
        metrics |= self._describe(scored)

        ppo, learner, estimator = self.config.ppo, self.config.learner, chosen_estimator(self.config.ppo)
        if estimator.needs_groups:
            # A rollout whose siblings all failed to be scored has no baseline.
            paired = {r.key: r for r in with_siblings(scored)}
            alone = [r.key for r in scored if r.key not in paired]
            for key in alone:
                self.ledger.quarantine(key, "no scored sibling")
            metrics["fault/no_sibling"] = float(len(alone))
            scored = list(paired.values())
        batches = make_batches(
            scored,
            [shaped(r, self.normalizer, ppo, self.config.environment) for r in scored],
            self.config.cluster.num_learner_ranks,
            ppo.minibatches,
            learner.microbatch_tokens,
            self.rng,
            self.version,
        )
        start = time.perf_counter()
        references = [ray.put(batch) for batch in batches]
        update = self.learner.start_each("update", references, self.kl.coef, train_policy)
        try:
            metrics |= self._wait(update, f"the learner's update {self.version + 1}")[0]
        except NonFiniteError as error:
            path = save_rollouts(self.log.run_dir / "non_finite.jsonl", scored)
            cause = error.cause if isinstance(error, RayTaskError) else error
            raise NonFiniteError(f"{cause}; no optimizer step was taken with it, its rollouts are in {path}") from None
        train_s = time.perf_counter() - start
        tokens = sum(r.num_tokens for r in scored)
        metrics |= {
            "perf/train_s": train_s,
            "perf/train_tokens_per_s": tokens / train_s,
            "kl/coef": self.kl.coef,
        }
        if estimator.kl == "reward":
            metrics["reward/kl_penalty_mean"] = -self.kl.coef * metrics["kl/ref_seq"]
        if train_policy:
            self.kl.update(metrics["kl/ref_seq"], len(scored))
            metrics |= self._publish()
        self.ledger.trained(self.version)
        self.ledger.committed(self.log.run_dir / LEDGER_FILE)
        return metrics | self.dispatcher.faults() | self.ledger.metrics() | self.dispatcher.usage()

    def _wait(self, calls: list[Any], what: str) -> list[Any]:
        self.progress.waiting_for(what)
        return self.dispatcher.wait(calls, what)

    def _describe(self, rollouts: list[Rollout]) -> dict[str, float]:
        """Metrics of the texts and scores, and a few samples into the log."""
        scores = [r.scores["proxy"].value for r in rollouts]
        values = [s for s in scores if s is not None]
        if not self.normalizer.is_fitted:
            self.normalizer.fit(service_scores(rollouts))
        gold = [(r, g.value) for r in rollouts if (g := r.scores.get("gold")) and g.value is not None]
        lengths = [len(r.completion.sampled_ids) for r in rollouts]
        tokens = [r.completion.sampled_ids.tolist() for r in rollouts]
        mean = float(np.mean(values))
        self.first_score = mean if self.first_score is None else self.first_score
        metrics = {
            "reward/score_mean": mean,
            "reward/score_std": float(np.std(values)),
            "reward/score_gain": mean - self.first_score,
            "completion/len_mean": float(np.mean(lengths)),
            "completion/len_p95": float(np.percentile(lengths, 95)),
            "completion/eos_frac": float(np.mean([r.completion.finish_reason == "stop" for r in rollouts])),
            "completion/distinct_2": distinct_n(tokens, 2),
            "completion/repeat_frac": float(np.mean([repeat_fraction(t, 4) for t in tokens])),
        }
        metrics |= turn_metrics(rollouts)
        metrics["completion/truncated_frac"] = 1 - metrics["completion/eos_frac"]
        if gold:
            metrics["reward/gold_mean"] = float(np.mean([value for _, value in gold]))
        metrics |= score_metrics(rollouts)
        self.log.samples([_sample(r, self.version) for r in rollouts[: self.config.logger.samples_per_update]])
        return metrics

    def _publish(self) -> dict[str, float]:
        """Give every engine the weights of the next version."""
        start = time.perf_counter()
        if self.config.ppo.weight_update == "drain":
            self.progress.waiting_for("the actors to finish what they hold")
            self.dispatcher.drain()
        self.progress.waiting_for(f"the engines to load version {self.version + 1}")
        metrics = self.dispatcher.publish(self.version + 1)
        self.version += 1
        return metrics | {"perf/sync_s": time.perf_counter() - start}


def _sample(rollout: Rollout, version: int) -> dict[str, Any]:
    completion = rollout.completion
    row = {"stage": "ppo", "step": version, "prompt_id": rollout.prompt.prompt_id, "prompt": rollout.prompt.text}
    row |= {"completion": completion.text, "tokens": len(completion.sampled_ids)}
    row |= {name: score.value for name, score in rollout.scores.items()}
    return row | {"eos": completion.finish_reason == "stop"}
