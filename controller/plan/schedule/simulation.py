"""A run in virtual time: the dispatcher, the ledger and the fleet are the real ones, the engines are stand-ins.

    admit ──> wait for a batch ──> update ──> [drain] ──> publish ──> trained        as `controller/loop/controller.py` does

Left out: what fails and what joins, commits, held-out prompts, conversations, dynamic sampling, a KV cache that is full.
"""

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from common.microbatches import cut_microbatches
from contracts.config import TandemConfig
from contracts.estimators import chosen_estimator
from contracts.records import Delivery, Prompt, Rollout, RolloutRequest
from contracts.scorer_roles import has_gold
from controller.data.prompts import PromptStream
from controller.ledger.audit import audit
from controller.ledger.ledger import Ledger
from controller.loop.dispatcher import Dispatcher
from controller.loop.fleet import Fleet
from controller.plan.schedule.calibration import Calibration, CalibrationError, LearnerSpeed
from controller.plan.schedule.completion_lengths import Quantile
from controller.plan.schedule.spans import ACTOR, LEARNER, REWARD, Spans
from controller.plan.schedule.stand_in_actor import EngineLimits, StandInActor
from controller.plan.schedule.stand_in_sides import StandInLearner, StandInService
from controller.plan.schedule.virtual_time import Cores, VirtualTime

FILLING = 2  # updates at the start that count for nothing: memory is cold, and the pipeline fills
SIDES = (ACTOR, LEARNER, REWARD)
SEEDS = 2**31  # of requests, which lie below
CPU_STEP_TOKENS = 4096  # as `actors/vllm_engine.py` has it; GPUs cut long prompts, which comes to the same


@dataclass
class Forecast:
    """What a simulation has found. Times in seconds."""

    rollouts_per_update: int
    steps: list[float] = field(default_factory=list)  # of each update
    staleness: list[tuple[float, float]] = field(default_factory=list)  # mean and largest, of each update's rollouts
    ends: list[float] = field(default_factory=list)
    spans: Spans = field(default_factory=Spans)
    driver_s: float = 0.0  # in which the controller computed, after the first updates
    faults: list[str] = field(default_factory=list)  # of the ledger's audit

    @property
    def step_s(self) -> float:
        return fmean(self.steps[FILLING:])

    @property
    def rollouts_per_s(self) -> float:
        return self.rollouts_per_update / self.step_s

    @property
    def window(self) -> tuple[float, float]:
        return self.ends[FILLING - 1], self.ends[-1]

    def busy(self, side: str) -> float:
        return self.spans.busy(side, *self.window)

    @property
    def driver_busy(self) -> float:
        start_s, end_s = self.window
        return self.driver_s / (end_s - start_s)

    @property
    def mean_staleness(self) -> float:
        return fmean(mean for mean, _ in self.staleness[FILLING:])

    @property
    def most_stale(self) -> float:
        return max(most for _, most in self.staleness[FILLING:])


def check_planned(config: TandemConfig) -> None:
    """Raises CalibrationError for what a simulation leaves out, naming the key."""
    ppo, ranks = config.ppo, config.cluster.num_learner_ranks
    if config.environment.name != "single_turn":
        raise CalibrationError(
            f"environment={config.environment.name}: the time of conversations is not planned, of single_turn it is"
        )
    if config.cluster.layout == "colocated":
        raise CalibrationError("cluster.layout=colocated: devices that actors and ranks share are not planned")
    if ppo.dynamic_sampling.max_batches is not None:
        raise CalibrationError(
            "ppo.dynamic_sampling.max_batches: how often groups are sampled again is not known; write null"
        )
    if ppo.ptx_coef > 0:
        raise CalibrationError(
            f"ppo.ptx_coef={ppo.ptx_coef:g}: the texts of an optimizer step are not planned; write 0"
        )
    if ppo.rollouts_per_update < ranks * ppo.minibatches:
        raise CalibrationError(
            f"ppo.rollouts_per_update={ppo.rollouts_per_update} cannot fill {ppo.minibatches} minibatches on {ranks} ranks"
        )
    if ppo.rollouts_per_update % ppo.samples_per_prompt:
        raise CalibrationError(
            f"ppo.rollouts_per_update={ppo.rollouts_per_update} is no multiple of "
            f"ppo.samples_per_prompt={ppo.samples_per_prompt}"
        )


def simulate(
    config: TandemConfig,
    calibration: Calibration,
    prompts: Sequence[int],
    lengths: Quantile,
    updates: int = 8,
    seed: int = 1,
) -> Forecast:
    """The first `updates` of a run of `ppo.updates`, or all of them; the same of the same arguments. Those that train the
    value model alone are left out.

    Args:
        prompts: tokens of each prompt of the data.
        lengths: of completions, by a share that follows from a rollout's seed.

    Raises:
        CalibrationError: for what is not planned, or speeds that are missing.
        TimeoutError: where a step takes longer than `cluster.step_timeout_s`, naming the wait.
    """
    check_planned(config)
    updates = min(updates, config.ppo.updates)
    if updates <= FILLING:
        key = "ppo.updates" if updates == config.ppo.updates else "--updates"
        raise CalibrationError(f"{key}={updates}: the first {FILLING} do not count; write {FILLING + 1} or more")
    collects = gc.isenabled()
    gc.disable()  # many small objects that live long: looking for cycles among all of them is a third of the time
    try:
        return _Simulation(config, calibration, prompts, lengths, seed).run(updates)
    finally:
        if collects:
            gc.enable()


class _Simulation:
    def __init__(
        self, config: TandemConfig, calibration: Calibration, prompts: Sequence[int], lengths: Quantile, seed: int
    ):
        self._config, self._calibration, ppo, cluster = config, calibration, config.ppo, config.cluster
        self._found = Forecast(ppo.rollouts_per_update)
        self._driver = calibration.driver
        self._time = VirtualTime(self._hearing_s)
        engine, self._learning, reward, publish = calibration.speeds(config)
        self._shared = self._new_cores(calibration.cores) if calibration.cores else None
        scorers: list[str] = ["proxy", "gold"] if has_gold(config) and ppo.gold_rollouts else ["proxy"]
        spans, replicas = self._found.spans, config.reward_service.replicas
        judged = {name: [self._cores(cluster.threads_per_reward_replica) for _ in range(replicas)] for name in scorers}
        service = StandInService(self._time, judged, cluster.threads_per_reward_replica, reward, spans)
        ranks = [self._cores(cluster.threads_per_learner_rank) for _ in range(cluster.num_learner_ranks)]
        self._learner = StandInLearner(self._time, ranks, cluster.threads_per_learner_rank, publish, spans)
        most = max(CPU_STEP_TOKENS, config.engine.max_model_len)
        limits = EngineLimits(config.engine.max_num_seqs, most, cluster.threads_per_actor)
        cut = config.data.max_prompt_tokens
        texts = [Prompt(i, "", (0,) * min(tokens, cut)) for i, tokens in enumerate(prompts)]

        def length_of(request: RolloutRequest) -> int:
            return lengths(request.seed / SEEDS)

        actors = [
            StandInActor(
                number, self._time, self._cores(limits.threads), engine, limits, length_of, service.score, spans
            )
            for number in range(cluster.num_actors)
        ]
        self._learner.actors = actors
        learner: Any = self._learner  # as much of a `LearnerGroup` as a fleet asks
        fleet = Fleet([*actors], learner, "", lambda *_: False, 0, lambda line: None)
        self._ledger = Ledger(ppo.rollouts_per_update, ppo.max_staleness)
        stream = PromptStream(texts, ppo.samples_per_prompt, seed)
        self._dispatcher = Dispatcher(fleet, self._ledger, stream, ppo, scorers, cluster, self._time.clock)
        self._rng = np.random.default_rng(seed)

    def _new_cores(self, count: float) -> Cores:
        return Cores(self._time, count, self._calibration.beside)

    def _cores(self, threads: float) -> Cores:
        """Of a process: those of the machine, or a device of its own."""
        return self._shared or self._new_cores(threads)

    def _hearing_s(self, answer: Any) -> float:
        seconds = len(answer.rollouts) * self._driver.rollout_s if isinstance(answer, Delivery) else 0.0
        self._found.driver_s += seconds
        return seconds

    def run(self, updates: int) -> Forecast:
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "ledger.jsonl")
            for version in range(updates):
                start_s = self._time.now_s
                if version == FILLING:
                    self._found.driver_s = 0.0
                self._update(version)
                self._ledger.committed(log)
                gc.collect(1)
                metrics = self._ledger.metrics()
                self._found.steps.append(self._time.now_s - start_s)
                self._found.ends.append(self._time.now_s)
                self._found.staleness.append((metrics["staleness/mean"], metrics["staleness/max"]))
            self._found.faults = audit(log).faults
        return self._found

    def _update(self, version: int) -> None:
        dispatcher = self._dispatcher
        dispatcher.admit_rollouts(self._config.ppo.updates - version)
        rollouts = dispatcher.wait_for_batch(version)
        self._found.driver_s += self._driver.update_s
        self._time.spend(self._driver.update_s)
        calls = self._learner.update(update_seconds(self._config, self._learning, rollouts, self._rng))
        dispatcher.answers.wait(calls, f"the learner's update {version + 1}")
        if self._config.ppo.weight_update == "drain":
            dispatcher.drain()
        dispatcher.publish(version + 1)
        self._ledger.trained(version + 1)


class Share:
    """Tokens of a rank's rows and those of completions: of all rows, of the first minibatch, of what is held of it.

    Args:
        room: `learner.held_tokens`.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self.all, self.first, self.held = np.zeros(2), np.zeros(2), np.zeros(2)

    def add(self, tokens: int, again: int, completion: int, is_first: bool) -> None:
        """A microbatch of so many tokens, of which `again` are prompts that the packed row has already."""
        counts = np.array([tokens - again, completion])
        self.all += counts
        if is_first:
            self.first += counts
            if tokens <= self._room:
                self._room -= tokens
                self.held += counts


def update_seconds(
    config: TandemConfig, speed: LearnerSpeed, rollouts: Sequence[Rollout], rng: np.random.Generator
) -> list[float]:
    """What each rank takes for an update on rollouts, which are cut as `make_batches` cuts them."""
    ppo, cluster = config.ppo, config.cluster
    sizes = [(r.num_tokens, len(r.completion.token_ids)) for r in rollouts]
    numbers = {group: i for i, group in enumerate(sorted({r.group for r in rollouts}))}
    groups, has_prompt_once = [numbers[r.group] for r in rollouts], cluster.gpus_per_learner_rank == 0
    shares = [Share(config.learner.held_tokens) for _ in range(cluster.num_learner_ranks)]
    for number, rows in enumerate(np.array_split(rng.permutation(len(sizes)), ppo.minibatches)):
        cut = cut_microbatches(
            [sizes[r][0] for r in rows],
            config.learner.microbatch_tokens,
            cluster.num_learner_ranks,
            [groups[r] for r in rows],
        )
        for rank, parts in enumerate(cut):
            for part in parts:
                tokens, completion = (sum(sizes[rows[i]][which] for i in part) for which in (0, 1))
                again = (
                    [rows[b] for a, b in pairwise(part) if groups[rows[a]] == groups[rows[b]]]
                    if has_prompt_once
                    else []
                )
                prompts = sum(sizes[row][0] - sizes[row][1] for row in again)
                shares[rank].add(tokens, prompts, completion, is_first=number == 0)
    return [_rank_seconds(config, speed, share) for share in shares]


def passes(config: TandemConfig, share: Share) -> dict[str, tuple[float, float, float]]:
    """By phase: how often its fixed part counts, tokens, and completion tokens, as `learner/ppo_update.py` runs them."""
    epochs, estimator = config.ppo.epochs, chosen_estimator(config.ppo)

    def counts(times: int, but: Any = 0) -> tuple[float, float, float]:
        tokens, completion = (times * share.all - but).tolist()
        return 1.0, tokens, completion

    once, backward = counts(1), counts(epochs)
    forward = counts(1 + epochs, share.first if estimator.trains_at_once else share.held)
    found = {"reference": once, "policy_forward": forward, "policy_backward": backward, "rest": once}
    if estimator.has_value_model:
        found |= {"value_forward": counts(1 + epochs, share.first), "value_backward": backward}
    return found | {"optimizer": (float(epochs * config.ppo.minibatches), 0.0, 0.0)}


def _rank_seconds(config: TandemConfig, speed: LearnerSpeed, share: Share) -> float:
    ranks, steps = config.cluster.num_learner_ranks, config.ppo.epochs * config.ppo.minibatches
    total = steps * speed.reduce_s * (ranks - 1) / ranks  # a ring moves so much of the gradients through each rank
    for phase, counts in passes(config, share).items():
        total += sum(n * s for n, s in zip(counts, speed.phases.get(phase, (0.0, 0.0, 0.0)), strict=True))
    return total
