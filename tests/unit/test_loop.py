"""The whole PPO loop, on actors that finish at once and a learner that keeps what it is given."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from common.files import durable
from contracts.config import LoggerConfig, PPOConfig, TandemConfig
from contracts.records import Assignment, Delivery, Prompt, Rollout, Score, TrainingBatch
from controller.cluster.signals import Interrupted
from controller.commits import commit_store
from controller.commits.commit_store import RunFacts
from controller.data.prompts import PromptStream
from controller.ledger.audit import audit
from controller.loop.controller import PPOController
from controller.loop.fleet import Fleet
from controller.record.run_log import RunLog
from controller.record.terminal import Progress
from tests.unit import test_dispatch as dispatch

ROLLOUTS = 6  # an update
# In the order of admission. The first batch has mean 3 and deviation 2.
SCORES = [1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 3.0, 7.0, 3.0, -1.0, 3.0, 9.0, 5.0, 5.0, 3.0, 3.0, 1.0, 7.0]
# (score - 3) / 2, and 0.25 less of every third one, which the limit cuts off.
WORTH = [-1.25, -1.0, -1.0, 0.75, 1.0, 1.0, -0.25, 2.0, 0.0, -2.25, 0.0, 3.0, 0.75, 1.0, 0.0, -0.25, -1.0, 2.0]


class Actor(dispatch.Actor):
    """Finishes at once what it is given."""

    def __init__(self, learner: "Learner") -> None:
        super().__init__()
        self.learner = learner

    def _assign(self, work: list[Assignment], sampling: Any) -> None:
        super()._assign(work, sampling)
        self.deliver()

    def _collect(self, score_batch: int, patience_s: float) -> dispatch.Call:
        call = super()._collect(score_batch, patience_s)
        self.deliver()
        return call

    def deliver(self) -> None:
        if self.work and self.asked:
            done, self.work = self.work, []
            self.asked.pop()[0].set_result(Delivery([(a.lease, self.rollout(a)) for a in done], 0.0, 0.0))

    def rollout(self, assignment: Assignment) -> Rollout:
        rollout = dispatch.sampled(assignment, (self.learner.version,))
        rollout.scores["proxy"] = Score(float(assignment.lease % 3))
        return rollout


class Learner(dispatch.Learner):
    """Also keeps the batches of every update, and what else it is told with them."""

    def __init__(self) -> None:
        super().__init__([])
        self.version = 0
        self.updates: list[tuple[list[TrainingBatch], tuple[Any, ...]]] = []

    def start(self, method: str, *arguments: Any) -> list[dispatch.Call]:
        self.version = arguments[-1]
        return super().start(method, *arguments)

    def start_each(self, method: str, batches: list[Any], *arguments: Any) -> list[dispatch.Call]:
        self.updates.append((batches, arguments))
        answer = dispatch.Future[Any]()
        answer.set_result({"kl/ref_seq": 1.0})
        return [dispatch.Call(answer)]


@contextmanager
def started(
    config: TandemConfig, run_dir: Path, actors: int = 1, kind: Callable[[Learner], Actor] = Actor
) -> Iterator[tuple[PPOController, Learner, list[Any]]]:
    """A controller, its learner and its actors; `ray.put` has to hand on what it gets."""
    learner: Any = Learner()
    learner.actors = crew = [kind(learner) for _ in range(actors)]
    with Progress(0, stream=open(os.devnull, "w")) as progress, RunLog(run_dir, {}, config.logger, "ppo") as log:
        fleet = Fleet(crew, learner, "", lambda *_: False, 0, print)  # type: ignore[arg-type]
        stream = PromptStream([Prompt(i, "", (1, 2, i)) for i in range(1000)], 1, seed=1)
        yield PPOController(config, stream, fleet, learner, log, progress, has_gold=False), learner, crew


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TandemConfig:
    monkeypatch.setattr(ray, "put", lambda value: value)
    config = TandemConfig(stage="ppo", run_dir=str(tmp_path))
    config.ppo = PPOConfig(
        rollouts_per_update=ROLLOUTS, max_staleness=0, gold_rollouts=0, value_warmup_updates=0, missing_eos_penalty=0.25
    )
    # K = 1, and a KL of 1 is far below the target of 6: each update takes a fifth of the coefficient.
    config.ppo.kl = replace(config.ppo.kl, controller="adaptive", coef=0.5, horizon=ROLLOUTS)
    config.checkpoint.every, config.logger = 0, LoggerConfig(wandb="disabled")
    return config


class Scripted(Actor):
    """Two tokens a completion, with the scores of SCORES, and every third one is cut off."""

    def __init__(self, learner: Learner) -> None:
        super().__init__(learner)
        self.given: list[Rollout] = []

    def rollout(self, assignment: Assignment) -> Rollout:
        number, rollout = len(self.given), dispatch.sampled(assignment, (self.learner.version,) * 2)
        rollout.completion.finish_reason = "stop" if number % 3 else "length"
        rollout.scores["proxy"] = Score(SCORES[number])
        self.given.append(rollout)
        return rollout


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_what_the_learner_is_given(mask_truncated: bool, config: TandemConfig, tmp_path: Path) -> None:
    """One update of the value model and two of the policy, by hand."""
    ppo = config.ppo
    ppo.updates, ppo.value_warmup_updates, ppo.minibatches, ppo.mask_truncated = 2, 1, 3, mask_truncated
    ppo.combined = replace(ppo.combined, target=0.75, learning_rate=0.5, initial=2.0)
    config.cluster.num_learner_ranks = 2
    with started(config, tmp_path, kind=Scripted) as (loop, learner, [actor]):
        loop.run()
    # The second batch is worth 2.5 / 6 on average: lambda grows by half of what the target is above.
    expected = [(0.5, False, 2.0), (0.5, True, 2.0), (0.4, True, 2.0 + 0.5 * (0.75 - 2.5 / 6))]
    assert [arguments for _, arguments in learner.updates] == [pytest.approx(one) for one in expected]

    rows = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    number = {rollout.key: i for i, rollout in enumerate(actor.given)}
    for update, (batches, _) in enumerate(learner.updates, 1):
        assert [len(batch.minibatches) for batch in batches] == [3, 3]
        assert all(batch.global_sequences == [2, 2, 2] for batch in batches)
        given = {}
        for micro in (m for batch in batches for minibatch in batch.minibatches for m in minibatch):
            for i, sequence in enumerate(micro.sequences):
                given[tuple(sequence.tolist())] = micro.scores[i].tolist(), bool(micro.trains[i])
        assert sum(len(m.sequences) for batch in batches for part in batch.minibatches for m in part) == len(given)
        trained = [number[tuple(row["key"])] for row in rows if row.get("update") == update and "trained" in row]
        assert sorted(trained) == [*range(ROLLOUTS * (update - 1), ROLLOUTS * update)]
        assert given == {
            (*actor.given[i].prompt.token_ids, 0, 1): ([0.0, WORTH[i]], not (mask_truncated and i % 3 == 0))
            for i in trained
        }


class Committer:
    """Commits at once: `made` has (step, version, state, updates that the weights have taken)."""

    def __init__(self, learner: Learner) -> None:
        self.learner, self.newest = learner, -1
        self.made: list[tuple[int, int, dict[str, Any], int]] = []

    def begin(self, step: int, version: int, state: Any, quality: Any) -> None:
        self.newest = step
        self.made.append((step, version, json.loads(json.dumps(state[0])), len(self.learner.updates)))

    def request_votes(self) -> None: ...

    def wait_until_decided(self) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}


@pytest.mark.parametrize(("after", "steps"), [(1, [1]), (3, [3]), (5, [3, 5]), (6, [3, 6])])
def test_a_stop_commits_the_driver_as_it_was_with_those_weights(
    after: int, steps: list[int], config: TandemConfig, tmp_path: Path
) -> None:
    """Also after an update that is not due: nothing of the next one, whose rollouts are sampled, is in it."""
    config.ppo.updates, config.checkpoint.every = 9, 3
    with started(config, tmp_path) as (loop, learner, [actor]):
        commits: Any = Committer(learner)
        loop.commits = commits

        def stop_in_the_next(work: list[Assignment], sampling: Any) -> None:
            actor._assign(work, sampling)
            if loop.updates == after:
                loop.stop.signum = 15
                loop.dispatcher.interrupt()

        actor.assign = dispatch.Method(stop_in_the_next)
        with pytest.raises(Interrupted, match=f"everything up to update {after} is committed"):
            loop.run()
    assert [step for step, *_ in commits.made] == steps
    assert loop.ledger.num_open == ROLLOUTS  # of the next update
    for step, version, state, taken in commits.made:
        assert (version, taken) == (step, step)
        assert (state["updates"], state["version"]) == (step, step)
        assert (state["ledger"]["updates"], state["ledger"]["version"]) == (step, step)
        assert state["ledger"]["counts"]["admitted"] == state["ledger"]["counts"]["trained"] == step * ROLLOUTS
        assert state["stream"] == {"epoch": 0, "position": step * ROLLOUTS}
        assert state["kl"]["coef"] == pytest.approx(0.5 * 0.8**step)
        assert state["logs"]["metrics.jsonl"] == step


class Writing(Learner):
    """Its rank writes for commits; `harm(number)` may have something against that of so many updates. Started again, it is
    at the commit that it is given."""

    def __init__(self, harm: Callable[[int], BaseException | None]) -> None:
        super().__init__()
        self.harm, self.is_lost, self.restarts, self.folder = harm, False, 0, Path()

    def start(self, method: str, *arguments: Any) -> list[dispatch.Call]:
        if method not in ("begin_commit", "state.result"):
            return super().start(method, *arguments)
        answer = dispatch.Future[Any]()
        if method == "begin_commit":
            self.folder = Path(*arguments)
            answer.set_result(None)
        elif (error := self.harm(len(self.updates))) is not None:
            self.is_lost = self.is_lost or isinstance(error, RayActorError)
            answer.set_exception(error)
        else:
            name = "rank_0.safetensors"
            answer.set_result({name: durable.write_json(self.folder / name, len(self.updates))})
        return [dispatch.Call(answer)]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        if self.is_lost:
            raise RayActorError
        if method == "load_commit":
            del self.updates[json.loads((Path(arguments[0]) / "rank_0.safetensors").read_text()) :]
        return [1000]

    def votes(self, method: str, *arguments: Any) -> list[Any]:
        return [None]

    def stacks(self) -> str:
        return ""

    def restart(self) -> None:
        self.is_lost, self.restarts = False, self.restarts + 1


@contextmanager
def committing(
    config: TandemConfig, run_dir: Path, harm: Callable[[int], BaseException | None] = lambda _: None
) -> Iterator[tuple[PPOController, Writing]]:
    """As `started`, with commits on the disk."""
    config.cluster.step_timeout_s = 10.0
    learner: Any = Writing(harm)
    learner.actors = [Actor(learner)]
    with Progress(0, stream=open(os.devnull, "w")) as progress, RunLog(run_dir, {}, config.logger, "ppo") as log:
        fleet = Fleet(learner.actors, learner, "", lambda *_: False, 0, print)  # type: ignore[arg-type]
        stream = PromptStream([Prompt(i, "", (1, 2, i)) for i in range(1000)], 1, seed=1)
        facts = RunFacts({}, {}, packages={})
        yield PPOController(config, stream, fleet, learner, log, progress, False, facts), learner


def once(updates: int, error: BaseException) -> Callable[[int], BaseException | None]:
    """The first commit of so many updates fails with `error`."""
    left = [error]
    return lambda number: left.pop() if number == updates and left else None


@pytest.mark.parametrize("after", [2, 4])
def test_a_rank_that_is_gone_while_a_commit_is_written_is_started_again(
    after: int, config: TandemConfig, tmp_path: Path
) -> None:
    """Also in the last commit: whoever saves the model finds a learner that is alive and has all updates."""
    config.ppo.updates, config.checkpoint.every, config.checkpoint.max_failures = 4, 1, 1
    with committing(config, tmp_path, once(after, RayActorError())) as (loop, learner):
        loop.run()
        assert learner.call("save", "x")
    assert (learner.restarts, len(learner.updates), loop.updates) == (1, 4, 4)
    assert commit_store.steps(tmp_path) == [3, 4]
    found = audit(tmp_path / "ledger.jsonl")
    assert (found.trained, found.open, found.updates, found.faults) == (4 * ROLLOUTS, 0, 4, [])


@pytest.mark.parametrize("asked", ["state.num_bytes", "state.result"])
def test_a_stop_that_finds_the_learner_gone_is_a_stop(asked: str, config: TandemConfig, tmp_path: Path) -> None:
    """Update 1 is committed, update 2 cannot be: the next start goes on from the first."""
    config.ppo.updates, config.checkpoint.every, config.ppo.max_staleness = 9, 5, 1
    with committing(config, tmp_path) as (loop, learner):
        loop.commits.newest = 1  # type: ignore[union-attr]
        loop.updates, loop.stop.signum = 2, 15
        if asked == "state.num_bytes":
            learner.is_lost = True
        else:
            learner.harm = lambda _: RayActorError()
        with pytest.raises(Interrupted, match="everything up to update 1 is committed"):
            loop._commit_and_leave()


def test_the_ledger_of_a_run_whose_last_commit_fails_has_all_that_trained(config: TandemConfig, tmp_path: Path) -> None:
    """A resume goes on from the commit before, and its rows count in place of those."""
    config.ppo.updates, config.checkpoint.every = 4, 2
    log = tmp_path / "ledger.jsonl"
    with committing(config, tmp_path, once(4, OSError(28, "No space left on device"))) as (loop, learner):
        loop.run()
        assert audit(log).trained == 2 * ROLLOUTS
        loop.complete_ledger()
        for _ in range(2):
            found = audit(log)
            assert (found.trained, found.open, found.updates, found.faults) == (4 * ROLLOUTS, 0, 4, [])
            loop.complete_ledger()  # and nothing twice
    assert commit_store.steps(tmp_path) == [2]
    with committing(config, tmp_path) as (loop, learner):
        learner.updates = [([], ())] * 2
        loop.restore(commit_store.verified(tmp_path, 2))
        found = audit(log)
        assert (found.trained, found.rolled_back, found.updates) == (2 * ROLLOUTS, 2 * ROLLOUTS, 2)
        loop.run()
        loop.complete_ledger()
    found = audit(log)
    assert (found.trained, found.open, found.rolled_back, found.faults) == (4 * ROLLOUTS, 0, 2 * ROLLOUTS, [])
    assert dict(found.by_version) == dict.fromkeys(range(1, 5), ROLLOUTS)
    assert commit_store.steps(tmp_path) == [2, 4]


def test_rows_that_the_last_commit_could_not_append_follow(config: TandemConfig, tmp_path: Path) -> None:
    """It is whole on the disk, but nothing comes after it that would append them."""
    config.ppo.updates, config.checkpoint.every = 2, 1
    with committing(config, tmp_path) as (loop, _):
        commits: Any = loop.commits
        append = commits.committed

        def fails_at_the_end(state: Any) -> None:
            if state[0]["updates"] == 2:
                raise OSError(28, "No space left on device")
            append(state)

        commits.committed = fails_at_the_end
        loop.run()
        assert commit_store.steps(tmp_path) == [1, 2]
        loop.complete_ledger()
    found = audit(tmp_path / "ledger.jsonl")
    assert (found.trained, found.open, found.faults) == (2 * ROLLOUTS, 0, [])
