"""The PPO loop.

      prompts ──requests──> rollout actors (vLLM) ──sequences──> reward service (Ray Serve)
                                 │        ▲  └────────scores────────┘
                         scored rollouts  │
                                 ▼        │ weights of version v+1, over vLLM's weight-transfer API
                        make_batches      │
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
of it to `ledger.jsonl`. Every `checkpoint.every` updates weights and ledger are committed together, while the run goes on;
`restore` goes back, or on, to a commit.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from common.error_text import typed_line
from common.processes.garbage import full_collections_on_request
from common.processes.ray_access import process_is_gone
from contracts.config import TandemConfig
from contracts.estimators import chosen_estimator, warmup_updates
from contracts.interfaces import CollectiveError, LearnerLostError, NonFiniteError
from contracts.records import Rollout
from controller.cluster.signals import Interrupted, Stop
from controller.commits.commit_store import Commit, RunFacts, State
from controller.commits.committer import Committer, load_learner
from controller.data.prompts import PromptStream
from controller.ledger.ledger import Ledger
from controller.ledger.log import NAME as LEDGER_FILE
from controller.loop.dispatcher import Dispatcher, Stopping
from controller.loop.dynamic_sampling import EQUAL, group_metrics, next_round, require_enough, with_spread
from controller.loop.fleet import Fleet
from controller.loop.held_out import HeldOut
from controller.loop.recovery import Recovery
from controller.loop.rewards import (
    ScoreNormalizer,
    episodes,
    overlong_metrics,
    paid_metrics,
    service_scores,
    shaped,
    turn_metrics,
)
from controller.loop.score_metrics import rollout_metrics, sample_row
from controller.loop.training_batches import make_batches, with_siblings
from controller.loop.unscored import save_rollouts, scored
from controller.record.run_log import RunLog
from controller.record.terminal import Progress, format_update
from learner.coefficients import Multiplier, make_kl_controller
from learner.learner_actor import LearnerGroup
from learner.rank_state import random_state, set_random_state

RECENT = 4  # updates whose mean score, by the gold judge where there is one, is the quality of a commit
PARTS = ("stream", "kl", "multiplier")  # of the controller, whose state a commit holds
NUMBERS = ("version", "updates", "first_score", "durations", "qualities")  # that it holds as they are


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
        run_facts: RunFacts | None = None,
        stop: Stop | None = None,
        held_out: HeldOut | None = None,
    ):
        """Without `run_facts`, which commits say of the run, there are none."""
        ppo = config.ppo
        scorers = ["proxy", "gold"] if has_gold and ppo.gold_rollouts else ["proxy"]
        self.config = config
        self.stream = stream
        self.fleet = fleet
        self.learner = learner
        self.log = log
        self.progress = progress
        self.held_out = held_out
        self.stop = stop or Stop(config.checkpoint.grace_s)
        self.kl = make_kl_controller(ppo.kl)
        self.multiplier = Multiplier(ppo.combined)
        self.normalizer = ScoreNormalizer()
        self.rng = np.random.default_rng(config.seed)
        self.version = 0
        self.updates = 0
        self.durations: list[float] = []  # of the last updates, seconds
        self.first_score: float | None = None  # mean of the first batch
        self.quality_metric = "reward/gold_mean" if "gold" in scorers else "reward/score_mean"
        self.qualities: list[float] = []  # of the last updates
        self.ledger = Ledger(ppo.rollouts_per_update, ppo.max_staleness)
        self.dispatcher = Dispatcher(fleet, self.ledger, stream, ppo, scorers, config.cluster)
        makes_commits = config.checkpoint.every > 0
        self.recovery = Recovery(learner, log.run_dir, makes_commits, config.cluster.max_learner_restarts, progress)
        self.commits: Committer | None = None
        if run_facts is not None and makes_commits:
            self.commits = Committer(
                log.run_dir,
                config.checkpoint,
                run_facts,
                learner,
                self.dispatcher.answers,
                self._append_to_ledger,
                progress.line,
            )
        self._start = self.state_dict()  # where a learner goes back to that is lost before the first commit
        self._boundary: State | None = None  # after the last update, with no rollout open

    def run(self) -> None:
        """All value-only and PPO updates of the configuration that are left.

        Raises:
            Interrupted: a signal asked for the end; what could be saved is.
            CheckpointError: `checkpoint.max_failures` commits in a row have failed.
        """
        total = warmup_updates(self.config.ppo) + self.config.ppo.updates
        with self.stop.deferred(self.dispatcher.interrupt), full_collections_on_request():
            try:
                while self.updates < total:
                    try:
                        self._next_update(total)
                        self._commit(total)
                    except (LearnerLostError, RayError) as error:
                        # A lost actor is the dispatcher's affair.
                        if not _is_loss(error):
                            raise
                        self._recover(error)
            except Stopping:
                self._commit_and_leave()
        if self.stop.signum is not None:  # it came with the last update
            self._commit_and_leave()

    def _next_update(self, total: int) -> None:
        train_policy, start = self.updates >= warmup_updates(self.config.ppo), time.perf_counter()
        held_out = self._answer_held_out() if train_policy else {}
        self.dispatcher.admit_rollouts(total - self.updates)
        metrics = held_out | self._update(train_policy, total - self.updates)
        self.durations = [*self.durations[-7:], time.perf_counter() - start]
        eta = (total - self.updates - 1) * float(np.median(self.durations))
        metrics |= {"perf/step_s": self.durations[-1], "progress/eta_s": eta, "progress/version": self.version}
        if self.commits:
            metrics |= self.commits.metrics()
        if self.quality_metric in metrics:
            self.qualities = [*self.qualities, metrics[self.quality_metric]][-RECENT:]
        self.log.log("ppo" if train_policy else "value_warmup", self.updates, metrics)
        self.updates += 1
        line = format_update(metrics, eta)
        self.progress.line(line if train_policy else f"fitting the value model  {line}")

    def _answer_held_out(self) -> dict[str, float]:
        """What the policy of this version scores on held-out prompts, where that is due. Nothing is admitted before, so that
        engines which take turns with the learner then sample the same rollouts beside the same neighbours as without."""
        if self.held_out is None or not self.held_out.is_due(self.version):
            return {}
        start, sampling = time.perf_counter(), self.held_out.config.sampling
        self.progress.waiting_for(f"held-out prompts, answered by version {self.version}")
        rollouts = self.dispatcher.sample_held_out(self.held_out.requests, sampling)
        return self.held_out.metrics(rollouts) | {"perf/heldout_s": time.perf_counter() - start}

    # ---- one update

    def _update(self, train_policy: bool, updates_left: int) -> dict[str, float]:
        rollouts, metrics = self._collect(updates_left)
        metrics |= self._train(rollouts, train_policy)
        if train_policy:
            metrics |= self._publish()
        self.ledger.trained(self.version)
        metrics["fault/learner_restarts"] = float(self.recovery.num_restarts)
        return (
            metrics | self.fleet.metrics() | self.dispatcher.faults() | self.ledger.metrics() | self.dispatcher.usage()
        )

    def _collect(self, updates_left: int) -> tuple[list[Rollout], dict[str, float]]:
        """What the update trains on, and metrics of all that was sampled for it: in one round, or with
        `ppo.dynamic_sampling` in several. Raises NoSpreadError where their budget is spent on too little."""
        ppo, start, rounds = self.config.ppo, time.perf_counter(), 0
        compares = chosen_estimator(ppo).needs_groups
        sampled, described, kept = list[Rollout](), list[Rollout](), list[Rollout]()
        unscored = alone = 0.0
        while missing := next_round(self.config, len(kept), len(sampled)):
            rounds += 1
            self.progress.waiting_for(f"rollouts for the update of version {self.version}")
            if rounds > 1:
                self.dispatcher.admit_rollouts(updates_left)
            fresh = self.dispatcher.wait_for_batch(self.version, missing)
            sampled += fresh
            # Counted over the update: a round may be a single group.
            known = {r.key for r in scored(sampled, ppo.max_failed_scores, self.version, self.log.run_dir)}
            rollouts = [r for r in fresh if r.key in known]
            unscored += self._set_aside(fresh, rollouts, lambda r: f"no score: {r.scores['proxy'].error}")
            if not self.normalizer.is_fitted:
                self.normalizer.fit(service_scores(rollouts))  # of the reference policy
            self.stream.measure(rollouts)
            described += rollouts
            if compares:
                # A rollout whose siblings all failed to be scored has nothing to be compared with.
                paired = with_siblings(rollouts)
                alone += self._set_aside(rollouts, paired, lambda _: "no scored sibling")
                rollouts = paired
            if ppo.dynamic_sampling.max_batches is not None:
                differ = with_spread(rollouts)
                keys = {r.key for r in differ}
                self.ledger.filter([r.key for r in rollouts if r.key not in keys], EQUAL)
                rollouts = differ
            kept += rollouts
        require_enough(self.config, kept, described, self.updates + 1)
        metrics = {"perf/rollout_s": time.perf_counter() - start, "fault/unscored": unscored}
        metrics |= self._describe(described)
        if compares:
            metrics |= {"fault/no_sibling": alone} | group_metrics(with_siblings(described), kept, rounds)
        return kept, metrics

    def _set_aside(self, rollouts: list[Rollout], kept: list[Rollout], reason: Callable[[Rollout], str]) -> float:
        """The others shall not train. Returns how many they are."""
        keys = {rollout.key for rollout in kept}
        others = [rollout for rollout in rollouts if rollout.key not in keys]
        for rollout in others:
            self.ledger.quarantine(rollout.key, reason(rollout))
        return float(len(others))

    def _describe(self, rollouts: list[Rollout]) -> dict[str, float]:
        """Metrics of the texts and scores, and a few samples into the log."""
        metrics = rollout_metrics(rollouts) | turn_metrics(rollouts)
        self.first_score = metrics["reward/score_mean"] if self.first_score is None else self.first_score
        metrics["reward/score_gain"] = metrics["reward/score_mean"] - self.first_score
        # As the update's line of metrics says.
        version = self.version + (self.updates >= warmup_updates(self.config.ppo))
        self.log.samples([sample_row(r, version) for r in rollouts[: self.config.logger.samples_per_update]])
        return metrics

    def _train(self, rollouts: list[Rollout], train_policy: bool) -> dict[str, float]:
        """The learner's update with them; then lambda of the combined loss takes in their scores."""
        ppo, multiplier = self.config.ppo, self.multiplier.value
        worth = [shaped(r, self.normalizer, ppo, self.config.environment) for r in rollouts]
        trained_on, paid = episodes(rollouts, worth, self.config.environment)
        batches = make_batches(
            trained_on,
            paid,
            ranks=self.config.cluster.num_learner_ranks,
            minibatches=ppo.minibatches,
            token_budget=self.config.learner.microbatch_tokens,
            rng=self.rng,
            policy_version=self.version,
            mask_truncated=ppo.mask_truncated,
        )
        metrics = paid_metrics(worth) | overlong_metrics(rollouts, ppo)
        start = time.perf_counter()
        references = [ray.put(batch) for batch in batches]
        update = self.learner.start_each("update", references, self.kl.coef, train_policy, multiplier)
        if self.commits is not None:
            self.commits.request_votes()  # behind the update, whose optimizer step waits for the writer
        gc.collect()  # while the learner works
        self.progress.waiting_for(what := f"the learner's update {self.version + 1}")
        try:
            metrics |= self.dispatcher.answers.wait(update, what)[0]
        except NonFiniteError as error:
            path = save_rollouts(self.log.run_dir / "non_finite.jsonl", rollouts)
            cause = error.cause if isinstance(error, RayTaskError) else error
            raise NonFiniteError(f"{cause}; no optimizer step was taken with it, its rollouts are in {path}") from None
        train_s = time.perf_counter() - start
        tokens = sum(r.num_tokens for r in rollouts)
        metrics |= {"perf/train_s": train_s, "perf/train_tokens_per_s": tokens / train_s}
        place = chosen_estimator(ppo).kl
        metrics |= {"kl/coef": self.kl.coef} if place != "none" else {}
        if place == "reward":
            metrics["reward/kl_penalty_mean"] = -self.kl.coef * metrics["kl/ref_seq"]
        if train_policy:
            self.kl.update(metrics["kl/ref_seq"], len(trained_on))
        if train_policy and ppo.combined.target is not None:
            mean_score = float(np.mean([row.sum() for row in worth]))
            metrics |= {"combined/lambda": multiplier, "combined/score_mean": mean_score}
            self.multiplier.update(mean_score)
        return metrics

    def _publish(self) -> dict[str, float]:
        """Give every engine the weights of the next version."""
        metrics = {}
        if self.config.ppo.weight_update == "drain":
            start = time.perf_counter()
            self.progress.waiting_for("the actors to finish what they hold")
            self.dispatcher.drain()
            metrics["perf/drain_s"] = time.perf_counter() - start
        start = time.perf_counter()
        self.progress.waiting_for(f"the engines to load version {self.version + 1}")
        metrics |= self.dispatcher.publish(self.version + 1)
        self.version += 1
        return metrics | {"perf/sync_s": time.perf_counter() - start}

    # ---- commits

    def _commit(self, total: int) -> None:
        """After an update: begin a commit where one is due. The last one is waited for."""
        if self.commits is None:
            self._append_to_ledger()
            return
        self.commits.wait_until_decided()
        due = self.updates % self.config.checkpoint.every == 0 or self.updates == total
        takes_turns = self.config.ppo.max_staleness == 0
        if due or takes_turns:
            self._boundary = self.state_dict()
        if due:
            self._begin_commit(self.commits, self._boundary)
            if takes_turns:
                self.commits.request_votes()  # the learner has nothing to do before the next rollouts are there
        if self.updates == total:
            self.commits.wait_until_decided()

    def _append_to_ledger(self, committed: State | None = None) -> None:
        """The rows of rollouts that a commit's state has closed; None: all there are, in a run without commits."""
        self.ledger.committed(self.log.run_dir / LEDGER_FILE, committed[0]["ledger"] if committed else None)

    def _recover(self, error: BaseException) -> None:
        """Go back to the last commit with new learner ranks; again, where one of these is lost meanwhile."""
        try:
            self.restore(self.recovery.restart(error))
        except (LearnerLostError, RayError, CollectiveError) as again:
            if self.recovery.is_spent or not _is_loss(again):
                raise
            self._recover(again)

    def _begin_commit(self, commits: Committer, state: State | None) -> None:
        quality = (self.quality_metric, float(np.mean(self.qualities))) if self.qualities else None
        commits.begin(self.updates, self.version, state or self.state_dict(), quality)

    def _commit_and_leave(self) -> None:
        """Rollouts that are sampled and scored are saved too, but not where actors and learner take turns: resumed, they
        are sampled again beside the same neighbours, or their log-probabilities would differ in the last bits."""
        if self.commits is not None and self.updates:
            self.progress.waiting_for(f"the commit of update {self.updates}")
            try:
                self._commit_now(self.commits)
            except (LearnerLostError, RayError) as error:
                # The next start goes on from the last commit, as this run would.
                if not _is_loss(error):
                    raise
                self.progress.line(f"WARNING: no commit of update {self.updates}: {typed_line(error)}")
        saved = self.commits.newest if self.commits else 0
        lost = "checkpoint.every is 0: nothing is saved" if self.commits is None else "no update has been committed"
        assert self.stop.signum is not None
        raise Interrupted(self.stop.signum, f"everything up to update {saved} is committed" if saved > 0 else lost)

    def _commit_now(self, commits: Committer) -> None:
        """Wait for a commit of the last update, which is begun where there is none."""
        commits.wait_until_decided()
        if commits.newest != self.updates:
            for key in self.ledger.of_broken_groups(self.config.ppo.samples_per_prompt):
                self.ledger.quarantine(key, "siblings had closed when the run was stopped")
            self._begin_commit(commits, self._boundary if self.config.ppo.max_staleness == 0 else None)
            commits.wait_until_decided()

    def complete_ledger(self) -> None:
        """Once the model of the last update is saved: where its commit has failed, the log lacks what trained since the one
        before. A resume from that one marks these rows as rolled back."""
        if self.ledger.num_unwritten:
            self._append_to_ledger()

    def state_dict(self) -> State:
        """What the driver adds to a commit."""
        ledger, arrays = self.ledger.state_dict()
        state = {
            "ledger": ledger,
            **{name: getattr(self, name).state_dict() for name in PARTS},
            **{name: getattr(self, name) for name in NUMBERS},
            "normalizer": asdict(self.normalizer),
            "rng": self.rng.bit_generator.state,
            "random": random_state(with_devices=False),  # it draws on no GPU, and a resume may see others
            "logs": self.log.mark("ppo"),
            "wandb_id": self.log.wandb_id,
        }
        return state, arrays

    def restore(self, commit: Commit | None) -> None:
        """Go to a commit, or with new ranks to the start of the run, in a new driver or in one that goes on: learner,
        ledger, prompts, random state and logs; then the engines get its weights, and nothing samples before. Leases of
        before are fenced. A learner that has published a later version must be a new one: engines take no older one of it.

        Raises:
            CheckpointError: a rank refuses the commit; nothing has been touched.
        """
        if commit is not None:
            load_learner(self.learner, commit)
        state, arrays = commit.driver_state() if commit is not None else self._start
        self.ledger.load_state_dict(state["ledger"], arrays, self.log.run_dir / LEDGER_FILE)
        self.dispatcher.abandon_leases()
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        for name in NUMBERS:
            setattr(self, name, state[name])
        self.normalizer = ScoreNormalizer(**state["normalizer"])
        self.rng.bit_generator.state = state["rng"]
        set_random_state(state["random"], with_devices=False)
        # Not the phases: what this driver was busy with stays true.
        self.log.cut("ppo", {name: count for name, count in state["logs"].items() if name != "phases.jsonl"})
        self._boundary = state, arrays
        if self.commits is not None:
            self.commits.resume_at(commit)
        self.dispatcher.publish(self.version)


def _is_loss(error: BaseException) -> bool:
    """Whether the learner cannot go on as it is."""
    return process_is_gone(error) or isinstance(error, (LearnerLostError, CollectiveError))
