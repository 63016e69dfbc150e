"""A fleet that changes while the run goes on, on actors that answer when the test says so."""

import json
import os
import random
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import GetTimeoutError, ObjectLostError, OwnerDiedError

from contracts.config import ClusterConfig, PPOConfig
from contracts.interfaces import ActorLostError, EngineLostError
from contracts.records import Assignment, Completion, Delivery, Prompt, Rollout
from contracts.weights import LoadReport, PublishReport, WeightUpdate
from controller import scale
from controller.cluster.room import Room
from controller.data.prompts import PromptStream
from controller.ledger.ledger import Ledger
from controller.loop.dispatcher import Dispatcher
from controller.loop.fleet import Fleet
from controller.record import scale_file
from tests.unit.test_dispatch import Actor, Call, Learner, start, until


class Nodes(Room):
    """Room for so many actors beyond the first `least`; what was asked for, and given back."""

    def __init__(self, least: int, free: int = 9):
        self.least, self.free = least, free
        self.asked, self.given_back, self.draining = list[int](), list[int](), set[int]()

    def is_there(self, number: int) -> bool:
        self.asked.append(number)
        return number < self.least + self.free

    def give_back(self, actors: list[Any], number: int) -> None:
        self.given_back.append(number)
        actors[number] = None

    def warned(self, actors: list[Any]) -> dict[int, str]:
        return dict.fromkeys(self.draining, "its node is being drained")


class Wish:
    """How many actors are wanted."""

    def __init__(self, number: int):
        self.number = number

    def __call__(self) -> int:
        return self.number


def elastic(
    least: int, most: int, wanted: int, restarts: int = 0, free: int = 9, **more: Any
) -> tuple[list[Any], Fleet, Nodes, Wish, list[str]]:
    actors: list[Any] = [Actor() for _ in range(least)]
    nodes, wish, said = Nodes(least, free), Wish(wanted), list[str]()

    def begin(actors: list[Any], number: int, update: Any) -> bool:
        actors[number] = Actor()
        return True

    begin = more.pop("begin", begin)
    learner: Any = Learner(actors)
    fleet = Fleet(actors, learner, "shared", begin, restarts, said.append, room=nodes, most=most, wanted=wish)
    return actors, fleet, nodes, wish, said


def works(actors: list[Any]) -> list[int]:
    return [-1 if actor is None else len(actor.work) for actor in actors]


def test_others_join_as_there_is_room_and_nobody_waits_for_them() -> None:
    actors, fleet, nodes, _, said = elastic(least=1, most=3, wanted=3, free=0)
    dispatcher, ledger = start(actors, fleet=fleet)
    dispatcher.admit_rollouts(updates_left=3)
    assert works(actors) == [4, -1, -1]
    actors[0].finish(0, 1, 2, 3)
    assert len(dispatcher.wait_for_batch(0)) == 4  # without them
    assert set(nodes.asked) == {1, 2}
    nodes.free = 1
    dispatcher.answers._next_check_s = 0
    until(dispatcher, lambda: fleet.present() == {0, 1})
    dispatcher.publish(1)
    ledger.trained(1)
    dispatcher.admit_rollouts(updates_left=2)
    assert works(actors) == [2, 2, -1]
    assert fleet._learner.calls == [("connect", 1)]  # type: ignore[attr-defined]
    assert said == ["3 actors are wanted; there are 1", "actor 1 has joined"]
    assert fleet.metrics() == {
        "fleet/actors": 2,
        "fleet/joined": 1,
        "fleet/left": 0,
        "fault/actors_not_started": 0,
    }


def test_a_leaver_finishes_what_it_holds_and_gets_nothing_new() -> None:
    actors, fleet, nodes, wish, said = elastic(least=1, most=2, wanted=2)
    dispatcher, ledger = start(actors, fleet=fleet, staleness=1)
    until(dispatcher, lambda: fleet.present() == {0, 1})
    dispatcher.admit_rollouts(updates_left=9)
    leaver = actors[1]
    assert works(actors) == [4, 4]
    wish.number, dispatcher.answers._next_check_s = 1, 0
    until(dispatcher, lambda: fleet.present() == {0})
    actors[0].finish(0, 1)
    leaver.finish(0, 1)
    dispatcher.wait_for_batch(0)
    dispatcher.publish(1)
    ledger.trained(1)
    dispatcher.admit_rollouts(updates_left=8)
    assert works(actors) == [6, 2]  # the four that are free are the other's
    leaver.finish(0, 1)
    until(dispatcher, lambda: actors[1] is None)
    assert nodes.given_back == [1]
    assert said[-2:] == ["actor 1 leaves (fewer are wanted) when it has finished 4 rollouts", "actor 1 has left"]
    assert (ledger.counts["released"], ledger.counts["scored"], dispatcher.num_lost) == (0, 6, 0)
    assert (fleet.metrics()["fleet/actors"], fleet.metrics()["fleet/left"]) == (1, 1)


def test_what_a_leaver_has_not_finished_in_its_time_others_get() -> None:
    actors, fleet, _, wish, said = elastic(least=1, most=2, wanted=2)
    dispatcher, ledger = start(actors, fleet=fleet, leave_grace_s=0.1)
    until(dispatcher, lambda: fleet.present() == {0, 1})
    dispatcher.admit_rollouts(updates_left=2)
    leaver, expected = actors[1], [*actors[0].prompts, *actors[1].prompts]
    actors[0].finish(0, 1)
    wish.number, dispatcher.answers._next_check_s = 1, 0
    until(dispatcher, lambda: actors[1] is None)
    leaver.finish(0, 1)  # too late
    actors[0].finish(0, 1)
    assert [r.prompt.prompt_id for r in dispatcher.wait_for_batch(0)] == expected
    assert (ledger.counts["released"], ledger.counts["scored"]) == (2, 4)
    assert said[-1] == "actor 1 has left; 2 rollouts are given to others"


def test_a_leaver_that_dies_is_lost_and_not_replaced() -> None:
    actors, fleet, nodes, wish, _ = elastic(least=1, most=2, wanted=2, restarts=0)
    dispatcher, _ledger = start(actors, fleet=fleet)
    until(dispatcher, lambda: fleet.present() == {0, 1})
    dispatcher.admit_rollouts(updates_left=2)
    expected = [*actors[0].prompts, *actors[1].prompts]
    wish.number, dispatcher.answers._next_check_s = 1, 0
    until(dispatcher, lambda: fleet.present() == {0})
    actors[0].finish(0, 1)
    actors[1].asked.pop()[0].set_exception(EngineLostError("gone"))
    until(dispatcher, lambda: len(actors[0].work) == 2)
    actors[0].finish(0, 1)
    assert [r.prompt.prompt_id for r in dispatcher.wait_for_batch(0)] == expected
    assert (works(actors), dispatcher.num_lost, fleet.num_left) == ([0, -1], 1, 0)
    assert nodes.asked == [1]  # for the first one


def test_a_loss_counts_as_a_restart_only_where_too_few_are_left() -> None:
    actors, fleet, _, wish, _ = elastic(least=1, most=2, wanted=2, restarts=0)
    dispatcher, _ledger = start(actors, fleet=fleet)
    for _ in range(3):
        until(dispatcher, lambda: fleet.present() == {0, 1})
        actors[1].asked.pop()[0].set_exception(EngineLostError("its spot machine went without a word"))
        until(dispatcher, lambda: fleet.present() == {0})
    until(dispatcher, lambda: fleet.present() == {0, 1})
    wish.number = 1
    until(dispatcher, lambda: fleet.num_left == 1)
    actors[0].asked.pop()[0].set_exception(EngineLostError("gone"))
    with pytest.raises(ActorLostError, match=r"after 0 others: cluster\.max_actor_restarts is 0"):
        until(dispatcher, lambda: False)


def test_who_is_warned_leaves_and_another_starts_elsewhere() -> None:
    actors, fleet, nodes, _, said = elastic(least=1, most=3, wanted=2)
    dispatcher, ledger = start(actors, fleet=fleet)
    until(dispatcher, lambda: fleet.present() == {0, 1})
    dispatcher.admit_rollouts(updates_left=2)
    nodes.draining, dispatcher.answers._next_check_s = {1}, 0
    until(dispatcher, lambda: fleet.present() == {0, 2})  # before the other has left
    nodes.draining = set()
    assert works(actors) == [2, 2, 0]
    actors[1].finish(0, 1)
    actors[0].finish(0, 1)
    dispatcher.wait_for_batch(0)
    assert (works(actors), ledger.counts["released"]) == ([0, -1, 0], 0)
    assert "actor 1 leaves (its node is being drained) when it has finished 2 rollouts" in said


def test_the_only_actor_whose_process_is_asked_to_end_is_replaced_and_not_lost() -> None:
    """A fleet of one, fixed. What it holds is finished before."""
    [old] = actors = [Actor()]
    said: list[str] = []

    def begin(actors: list[Any], number: int, update: Any) -> bool:
        actors[number] = Actor()
        return True

    learner: Any = Learner(actors)
    fleet = Fleet(actors, learner, "shared", begin, 0, said.append)
    dispatcher, ledger = start(actors, fleet=fleet)
    dispatcher.admit_rollouts(updates_left=2)
    old.asked.pop()[0].set_result(Delivery([], is_leaving=True))
    until(dispatcher, lambda: not fleet.present())
    old.finish(0, 1, 2, 3)
    assert len(dispatcher.wait_for_batch(0)) == 4
    dispatcher.publish(1)
    ledger.trained(1)
    until(dispatcher, lambda: fleet.present() == {0})
    dispatcher.admit_rollouts(updates_left=1)
    dispatcher._publish_to_latecomers()
    assert actors[0] is not old
    assert works(actors) == [4]
    assert (dispatcher.num_lost, ledger.counts["released"], fleet.num_left) == (0, 0, 1)


def test_who_has_taken_a_leavers_place_between_two_publishes_is_known_to_the_learner() -> None:
    """Whose list of actors has its number already."""
    old, other = actors = [Actor(), Actor()]

    def begin(actors: list[Any], number: int, update: Any) -> bool:
        actors[number] = Actor()
        return True

    learner: Any = Learner(actors)
    fleet = Fleet(actors, learner, "shared", begin, 0, print)
    dispatcher, _ = start(actors, fleet=fleet)
    dispatcher.publish(0)
    assert learner.calls == [("publish", 0)]
    dispatcher.admit_rollouts(updates_left=2)
    old.finish(0, 1)
    other.finish(0, 1)
    dispatcher.wait_for_batch(0)
    old.asked.pop()[0].set_result(Delivery([], is_leaving=True))  # while the learner works
    until(dispatcher, lambda: actors[0] is not old and fleet.present() == {0, 1})
    dispatcher.publish(1)
    assert learner.calls[1:] == [("connect", 1)]
    assert (dispatcher.num_lost, fleet.num_left) == (0, 1)


def test_nobody_is_ended_while_weights_go_out() -> None:
    """Over NCCL or IPC the others would be left with half an update."""
    old, other = actors = [Actor(), Actor()]
    room = Nodes(least=2, free=0)
    learner: Any = Learner(actors)

    def begin(actors: list[Any], number: int, update: Any) -> bool:
        actors[number] = Actor()
        return True

    fleet = Fleet(actors, learner, "nccl", begin, 0, print, room=room)
    dispatcher, _ = start(actors, fleet=fleet)
    dispatcher.admit_rollouts(updates_left=2)
    old.finish(0, 1)
    other.finish(0, 1)
    dispatcher.wait_for_batch(0)
    slow, report = Future[Any](), learner.start("publish", 1)[0].future().result()
    learner.start = lambda *_: [Call(slow)]

    def leaves() -> None:
        old.asked.pop()[0].set_result(Delivery([], is_leaving=True))
        while 0 in fleet.present():
            time.sleep(0.01)
        for _ in range(3):  # checks of who has left
            dispatcher.answers._next_check_s = 0
            dispatcher.answers.wake()
            time.sleep(0.05)
        room.given_back.append(-1)  # the end of the publish
        slow.set_result(report)

    thread = threading.Thread(target=leaves)
    thread.start()
    dispatcher.publish(1)
    thread.join()
    assert room.given_back == [-1]
    until(dispatcher, lambda: room.given_back == [-1, 0])


def test_one_that_does_not_start_is_tried_again_later_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from controller.loop import fleet as module

    monkeypatch.setattr(module, "AGAIN_S", 0.05)
    failures, times = [TimeoutError("300 s"), EngineLostError("out of memory")], list[float]()

    def begin(actors: list[Any], number: int, update: Any) -> bool:
        times.append(time.monotonic())
        if failures:
            raise failures.pop(0)
        actors[number] = Actor()
        return True

    actors, fleet, nodes, _, said = elastic(least=1, most=2, wanted=2, begin=begin)
    dispatcher, _ = start(actors, fleet=fleet)
    dispatcher.admit_rollouts(updates_left=1)
    actors[0].finish(0, 1, 2, 3)
    assert len(dispatcher.wait_for_batch(0)) == 4
    until(dispatcher, lambda: fleet.present() == {0, 1})
    assert times[1] - times[0] >= 0.05
    assert times[2] - times[1] >= 0.1
    assert fleet.metrics()["fault/actors_not_started"] == 2
    assert said[1:] == [
        "actor 1 did not start (TimeoutError: 300 s); tried again in 0 s",
        "actor 1 did not start (EngineLostError: out of memory); tried again in 0 s",
        "actor 1 has joined",
    ]
    assert nodes.given_back == [1, 1]


def test_below_the_fewest_a_start_that_fails_ends_the_run() -> None:
    def begin(actors: list[Any], number: int, update: Any) -> bool:
        raise ValueError("no such model")

    actors, fleet, _, _, _ = elastic(least=1, most=2, wanted=1, restarts=1, begin=begin)
    dispatcher, _ = start(actors, fleet=fleet)
    actors[0].asked.pop()[0].set_exception(EngineLostError("gone"))
    with pytest.raises(ValueError, match="no such model"):
        until(dispatcher, lambda: False)


@pytest.mark.parametrize("error", [GetTimeoutError("it hangs"), OwnerDiedError("ab", None, "")])
def test_a_replacement_that_hangs_or_whose_weights_are_gone_is_tried_again(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    from controller.loop import fleet as module

    monkeypatch.setattr(module, "AGAIN_S", 0.05)
    failures = [error, error]

    def begin(actors: list[Any], number: int, update: Any) -> bool:
        if failures:
            raise failures.pop()
        actors[number] = Actor()
        return True

    actors, fleet, _, _, _ = elastic(least=1, most=1, wanted=1, restarts=2, begin=begin)
    dispatcher, _ = start(actors, fleet=fleet)
    dispatcher.admit_rollouts(updates_left=1)
    # Its node has gone with an answer that nobody had fetched.
    actors[0].asked.pop()[0].set_exception(ObjectLostError("ab", None, ""))
    until(dispatcher, lambda: not failures and fleet.present() == {0})
    assert works(actors) == [4]
    assert (dispatcher.num_lost, fleet.num_not_started) == (1, 2)


def test_two_wishes_in_a_row_are_the_last_one() -> None:
    gate = threading.Event()

    def begin(actors: list[Any], number: int, update: Any) -> bool:
        assert gate.wait(5)
        actors[number] = Actor()
        return True

    actors, fleet, nodes, wish, _ = elastic(least=1, most=4, wanted=1, free=1, begin=begin)
    dispatcher, _ = start(actors, fleet=fleet)
    dispatcher._change_fleet(0)
    wish.number = 4
    dispatcher._change_fleet(0)
    dispatcher._change_fleet(0)
    assert (nodes.asked, fleet._starting) == ([1, 2, 3, 2, 3], {1})
    wish.number = 1  # one is starting, two wait for room
    dispatcher._change_fleet(0)
    assert (nodes.given_back, fleet.present()) == ([2, 3], {0})
    gate.set()
    until(dispatcher, lambda: fleet.num_joined == 1)
    dispatcher._change_fleet(0)  # it is there, nobody wants it, and it holds nothing
    assert (works(actors), nodes.given_back, fleet.num_left) == ([0, -1, -1, -1], [2, 3, 1], 1)


@pytest.mark.parametrize(("asked", "there"), [(0, 2), (99, 3)])
def test_a_wish_counts_within_the_bounds(asked: int, there: int) -> None:
    actors, fleet, _, _, _ = elastic(least=2, most=3, wanted=asked)
    dispatcher, _ = start(actors, fleet=fleet)
    until(dispatcher, lambda: len(fleet.present()) == there)
    dispatcher._change_fleet(time.monotonic())
    assert len(fleet.present()) == there


# ---- what is trained does not depend on the fleet


class Sampler(Actor):
    """Its tokens and log-probabilities follow from a request's seed and its weights, in float32; it delivers what it holds
    a part at a time, in any order."""

    def __init__(self, weights: np.float32, version: int, order: random.Random):
        super().__init__()
        self.weights, self.version, self._order = weights, version, order
        self._free, self._waiting, self._is_dead = threading.Lock(), list[Future[Delivery]](), False

    def _assign(self, work: list[Assignment], sampling: Any) -> None:
        with self._free:
            self.work += work
        self.deliver()

    def _collect(self, score_batch: int, patience_s: float) -> Call:
        answer: Future[Delivery] = Future()
        self._waiting.append(answer)
        threading.Timer(0.001, self.deliver).start()
        return Call(answer)

    def deliver(self) -> None:
        with self._free:
            if self._is_dead:
                for answer in self._waiting:
                    answer.set_exception(EngineLostError("killed"))
                self._waiting = []
            if not (self.work and self._waiting):
                return
            self._order.shuffle(self.work)
            count = self._order.randint(1, len(self.work))
            done, self.work = self.work[:count], self.work[count:]
            answer = self._waiting.pop()
        answer.set_result(Delivery([(a.lease, self.sample(a)) for a in done]))

    def die(self) -> None:
        self._is_dead = True
        self.deliver()

    def sample(self, assignment: Assignment) -> Rollout:
        rng = np.random.default_rng(assignment.request.seed)
        tokens = rng.integers(0, 100, 5).astype(np.int32)
        logprobs = rng.standard_normal(5).astype(np.float32) * self.weights
        versions = np.full(5, self.version, np.int32)
        return Rollout(
            assignment.request.key, assignment.request.prompt, Completion(tokens, logprobs, versions, "stop", "")
        )


class Weights:
    """A learner of one number: who is connected gets it."""

    def __init__(self, actors: list[Any]):
        self.members, self.number, self.versions = list(actors), np.float32(1), {0: np.float32(1)}

    def pulse(self, rank: int) -> Call:
        answer: Future[int] = Future()
        answer.set_result(time.monotonic_ns())
        return Call(answer)

    def train(self, batch: list[Rollout], version: int) -> None:
        """In the order of the batch: float32 sums depend on it."""
        for rollout in batch:
            self.number = np.float32(self.number * np.float32(0.97) + rollout.completion.behavior_logprobs.sum() / 7)
        self.versions[version] = self.number

    def start(self, method: str, *arguments: Any) -> list[Call]:
        *_, version = arguments
        if method == "connect":
            self.members = arguments[1]
        for actor in self.members:
            if actor is not None:
                actor.weights, actor.version = self.versions[version], version
        loaded = {i: LoadReport(version) for i, actor in enumerate(self.members) if actor is not None}
        report: Future[PublishReport] = Future()
        report.set_result(PublishReport(version, 0.0, 0.0, 0, 0, loaded, {}, WeightUpdate("learner", version, ())))
        return [Call(report)]


class Training:
    """A run of updates, and all that was sampled in the order in which it was trained."""

    def __init__(self, seed: int, least: int, log: Path):
        self.order, self.wish, self.log = random.Random(seed), Wish(least), log
        actors: list[Any] = [Sampler(np.float32(1), 0, self.order) for _ in range(least)]
        self.actors, self.learner, self.found = actors, Weights(actors), list[Any]()

        def begin(actors: list[Any], number: int, update: WeightUpdate | None) -> bool:
            version = update.version if update else 0
            actors[number] = Sampler(self.learner.versions[version], version, self.order)
            return True

        learner: Any = self.learner
        self.fleet = Fleet(
            actors, learner, "shared", begin, 99, lambda _: None, room=Nodes(least), most=4, wanted=self.wish
        )
        self.ledger = Ledger(12, 0)
        prompts = [Prompt(i, f"prompt {i}", (1, 2, 3 + i)) for i in range(40)]
        self.stream = PromptStream(prompts, 2, seed=1)
        ppo = PPOConfig(rollouts_per_update=12, samples_per_prompt=2, max_staleness=0, gold_rollouts=0)
        cluster = ClusterConfig(step_timeout_s=20, leave_grace_s=0.02)
        self.dispatcher = Dispatcher(self.fleet, self.ledger, self.stream, ppo, ["proxy"], cluster)

    def update(self, size: int, kill: bool = False) -> None:
        """With so many actors wished for as its rollouts begin."""
        version, lost = self.ledger.version, self.dispatcher.num_lost
        self.wish.number = size
        self.dispatcher.admit_rollouts(updates_left=9)
        self.dispatcher._change_fleet(time.monotonic())
        if kill:
            self.actors[self.order.choice(sorted(self.fleet.present()))].die()
            until(self.dispatcher, lambda: self.dispatcher.num_lost == lost + 1)
        batch = self.dispatcher.wait_for_batch(version)
        for r in batch:
            self.found.append((r.key, r.completion.token_ids.tobytes(), r.completion.behavior_logprobs.tobytes()))
        self.learner.train(batch, version + 1)
        self.dispatcher.publish(version + 1)
        self.ledger.trained(version + 1)
        until(self.dispatcher, lambda: bool(self.fleet.present()))

    def state(self) -> Any:
        return self.ledger.state_dict(), self.stream.state_dict(), self.learner.number

    def resume(self, state: Any) -> None:
        (ledger, arrays), stream, number = state
        self.ledger.load_state_dict(ledger, arrays, self.log)
        self.stream.load_state_dict(stream)
        self.learner.number = self.learner.versions[self.ledger.version] = number
        self.dispatcher.abandon_leases()
        self.dispatcher.publish(self.ledger.version)


def trained(folder: Path, seed: int, sizes: list[int], kills: bool = False) -> Training:
    """So many updates as sizes; with kills an actor dies in every third."""
    run = Training(seed, 1, folder / "ledger.jsonl")
    for number, size in enumerate(sizes):
        run.update(size, kills and number % 3 == 1)
    counts = run.ledger.counts
    assert (counts["trained"], run.ledger.num_open, counts["quarantined"]) == (12 * len(sizes), 0, 0)
    return run


CHANGING = [1, 3, 3, 2, 1, 1, 4, 4, 2, 3, 1, 2]


def test_what_is_trained_is_bit_for_bit_that_of_a_fixed_fleet(tmp_path: Path) -> None:
    alone = trained(tmp_path, 1, [1] * 12)
    assert len(alone.found) == 12 * 12
    two, changing = trained(tmp_path, 2, [2] * 12), trained(tmp_path, 3, CHANGING)
    harmed = trained(tmp_path, 4, CHANGING, kills=True)
    for run in (two, changing, harmed):
        assert run.found == alone.found
        assert run.learner.number.tobytes() == alone.learner.number.tobytes()
    assert min(run.fleet.num_joined for run in (changing, harmed)) >= 3
    assert changing.fleet.num_left >= 3
    assert (changing.dispatcher.num_lost, harmed.dispatcher.num_lost) == (0, 4)


def test_a_run_goes_on_with_another_fleet(tmp_path: Path) -> None:
    """A driver that is started again has the bounds of its configuration, and no wish of before."""
    alone, first = trained(tmp_path, 1, [1] * 12), trained(tmp_path, 2, CHANGING[:5])
    second = Training(5, 3, tmp_path / "ledger.jsonl")
    second.resume(first.state())
    for size in (3, 4, 4, 3, 4, 3, 3):
        second.update(size)
    assert [*first.found, *second.found] == alone.found
    assert second.learner.number.tobytes() == alone.learner.number.tobytes()


# ---- the command


def running(run_dir: Path, **cluster: Any) -> None:
    import socket

    beat = {"state": "running", "pid": os.getpid(), "host": socket.gethostname(), "beat": time.time()}
    (run_dir / "status.json").write_text(json.dumps(beat))
    (run_dir / "config.yaml").write_text(json.dumps({"cluster": {"num_actors": 1, **cluster}}))


def test_a_run_is_asked_by_a_file_in_its_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running(tmp_path, min_actors=1, max_actors=6)
    assert scale_file.asked_for(tmp_path) is None
    assert [scale.main([str(tmp_path), number]) for number in ("2", "6")] == [0, 0]
    assert scale_file.asked_for(tmp_path) == 6
    assert "asked for 6 actors" in capsys.readouterr().out
    scale_file.forget(tmp_path)
    assert scale_file.asked_for(tmp_path) is None


@pytest.mark.parametrize(
    ("cluster", "actors", "told"),
    [
        (
            {"min_actors": 1, "max_actors": 6},
            "0",
            "must be from cluster.min_actors to cluster.max_actors of the run, 1 to 6",
        ),
        ({"min_actors": 1, "max_actors": 6}, "7", "found 7; write 1 to 6"),
        ({"min_actors": None, "max_actors": None}, "2", "the fleet of this run is fixed at 1"),
        ({}, "2", "the fleet of this run is fixed at 1"),
        ({"num_actors": None}, "2", "config.yaml cannot be read: TypeError"),
    ],
)
def test_a_wish_that_the_run_cannot_grant_is_refused(
    cluster: dict[str, Any], actors: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running(tmp_path, **cluster)
    assert scale.main([str(tmp_path), actors]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / scale_file.NAME).exists()


def test_only_a_running_job_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scale.main([str(tmp_path), "2"]) == 2
    assert "there is no run" in capsys.readouterr().err
    running(tmp_path, min_actors=1, max_actors=6)
    status = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps({**status, "state": "done"}))
    assert scale.main([str(tmp_path), "2"]) == 2
    assert "the run is done" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[" * 100_000, "6", '{"actors": true}', '{"actors": -1}', '{"actors": "6"}'])
def test_what_is_no_wish_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / scale_file.NAME).write_text(text)
    assert scale_file.asked_for(tmp_path) is None
