"""The controller's side of the actors, on actors that answer when the test says so."""

import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import OutOfMemoryError, RayActorError

from contracts.config import ClusterConfig, PPOConfig, SamplingConfig
from contracts.interfaces import ActorLostError, CollectiveError, EngineLostError, LearnerLostError
from contracts.records import Assignment, Completion, Delivery, Prompt, Rollout, RolloutRequest
from contracts.weights import LoadReport, PublishReport, WeightUpdate
from controller.data.prompts import PromptStream
from controller.ledger.ledger import Ledger
from controller.loop.dispatcher import Dispatcher, Stopping, even_level
from controller.loop.fleet import Fleet

PROMPTS = [Prompt(i, f"prompt {i}", (1, 2, 3 + i)) for i in range(40)]


class Call:
    """What `.remote()` returns."""

    def __init__(self, result: Future[Any]):
        self._result = result

    def future(self) -> Future[Any]:
        return self._result


class Method:
    def __init__(self, function: Any):
        self.remote = function


class Actor:
    """Holds what it is assigned until the test lets it finish."""

    def __init__(self) -> None:
        self.work: list[Assignment] = []
        self.asked: list[tuple[Future[Delivery], int, float]] = []
        self.assign, self.collect = Method(self._assign), Method(self._collect)
        self.pulse, self.is_stopped, self.steps = Method(self._pulse), False, 0

    def _assign(self, work: list[Assignment], sampling: Any) -> None:
        self.work += work

    def _collect(self, score_batch: int, patience_s: float) -> Call:
        answer: Future[Delivery] = Future()
        self.asked.append((answer, score_batch, patience_s))
        return Call(answer)

    def _pulse(self) -> Call:
        answer: Future[int] = Future()
        if not self.is_stopped:
            self.steps += 1
            answer.set_result(self.steps)
        return Call(answer)

    def finish(self, *numbers: int, versions: tuple[int, ...] = (0,), generate_s: float = 0.0) -> None:
        """Deliver the assignments of those positions."""
        chosen = [self.work[i] for i in numbers]
        self.work = [a for i, a in enumerate(self.work) if i not in numbers]
        rollouts = [(a.lease, sampled(a, versions)) for a in chosen]
        self.asked.pop()[0].set_result(Delivery(rollouts, generate_s, generate_s / 2))

    @property
    def prompts(self) -> list[int]:
        return [a.request.prompt.prompt_id for a in self.work]


def sampled(assignment: Assignment, versions: tuple[int, ...]) -> Rollout:
    tokens = np.arange(len(versions), dtype=np.int32)
    completion = Completion(tokens, np.zeros(len(versions), np.float32), np.array(versions, np.int32), "stop", "")
    return Rollout(assignment.request.key, assignment.request.prompt, completion)


def start(
    actors: list[Actor],
    staleness: int = 0,
    rollouts: int = 4,
    samples: int = 1,
    gold: int = 0,
    timeout_s: float = 5.0,
    fleet: Fleet | None = None,
    **cluster: float,
) -> tuple[Dispatcher, Ledger]:
    ppo = PPOConfig(
        rollouts_per_update=rollouts, samples_per_prompt=samples, max_staleness=staleness, gold_rollouts=gold
    )
    ledger = Ledger(rollouts, staleness)
    stream = PromptStream(PROMPTS, samples, seed=1)
    scorers = ["proxy", "gold"] if gold else ["proxy"]
    crew = fleet or Fleet(actors, Learner(actors), "", lambda *_: False, 0, print)  # type: ignore[arg-type]
    config = ClusterConfig(step_timeout_s=timeout_s, **cluster)  # type: ignore[arg-type]
    return Dispatcher(crew, ledger, stream, ppo, scorers, config), ledger


def test_without_staleness_the_actors_share_one_update_and_score_at_its_end() -> None:
    actors = [Actor(), Actor()]
    dispatcher, ledger = start(actors)
    dispatcher.admit_rollouts(updates_left=3)
    assert [len(a.work) for a in actors] == [2, 2]
    # All that an actor was assigned, held-out prompts too: what is scored together does not go by the clock.
    assert [a.asked[-1][1:] for a in actors] == [(2**31 - 1, threading.TIMEOUT_MAX)] * 2
    expected = [*actors[0].prompts, *actors[1].prompts]
    actors[1].finish(1, 0)
    actors[0].finish(0, 1)
    batch = dispatcher.wait_for_batch(0)
    assert [r.prompt.prompt_id for r in batch] == expected  # in the order of admission, whoever came first
    dispatcher.admit_rollouts(updates_left=2)
    assert [a.work for a in actors] == [[], []]  # the batch is in training: no slot is free
    ledger.trained(1)
    dispatcher.admit_rollouts(updates_left=2)
    assert [len(a.work) for a in actors] == [2, 2]


def test_with_staleness_actors_work_ahead_within_the_bound() -> None:
    actor = Actor()
    dispatcher, ledger = start([actor], staleness=1)
    dispatcher.admit_rollouts(updates_left=5)
    assert len(actor.work) == 8
    actor.finish(0, 1, 2, 3)
    dispatcher.wait_for_batch(0)
    assert len(actor.work) == 4  # four in training, four here: the bound
    ledger.trained(1)
    dispatcher.admit_rollouts(updates_left=4)
    assert len(actor.work) == 8
    actor.finish(0, 1, 2, 3)
    dispatcher.wait_for_batch(1)
    assert ledger.staleness == [1, 1, 1, 1]


def test_who_is_idle_does_not_take_what_the_others_could_share() -> None:
    """Both have had an update's worth; one has delivered it, the other all but one. Of the next four each gets its part."""
    actors = [Actor(), Actor()]
    dispatcher, ledger = start(actors, staleness=1)
    dispatcher.admit_rollouts(updates_left=5)
    assert [len(actor.work) for actor in actors] == [4, 4]
    actors[1].finish(0, 1, 2)
    actors[0].finish(0, 1, 2, 3)
    dispatcher.wait_for_batch(0)
    ledger.trained(1)
    dispatcher.admit_rollouts(updates_left=4)
    assert [len(actor.work) for actor in actors] == [3, 2]


@given(st.lists(st.integers(0, 9), min_size=1), st.integers(1, 50))
def test_a_level_holds_all_and_no_lower_one_does(held: list[int], more: int) -> None:
    level = even_level(sorted(held), more)

    def room(height: int) -> int:
        return sum(max(0, height - has) for has in held)

    assert room(level - 1) < more <= room(level)


def test_nothing_is_admitted_that_no_update_will_use() -> None:
    actor = Actor()
    dispatcher, ledger = start([actor], staleness=3)
    dispatcher.admit_rollouts(updates_left=2)
    assert len(actor.work) == 8  # not 16
    for version in range(2):
        actor.finish(0, 1, 2, 3, versions=(version,))
        dispatcher.wait_for_batch(version)
        ledger.trained(version + 1)
        dispatcher.admit_rollouts(updates_left=1 - version)
    assert (actor.work, ledger.num_open) == ([], 0)


def test_the_actors_are_served_while_the_learner_works() -> None:
    actor = Actor()
    dispatcher, ledger = start([actor], staleness=1)
    dispatcher.admit_rollouts(updates_left=5)
    update: Future[Any] = Future()
    actor.finish(0, 1)
    update.set_result({"loss": 1.0})
    assert dispatcher.answers.wait([Call(update)], "the update") == [{"loss": 1.0}]
    assert (ledger.metrics()["ledger/scored"], len(actor.asked)) == (2, 1)


def test_results_come_in_the_order_of_the_calls_and_errors_at_once() -> None:
    dispatcher, _ = start([Actor()])
    first, second, never, failed = Future[Any](), Future[Any](), Future[Any](), Future[Any]()
    second.set_result("b")
    first.set_result("a")
    assert dispatcher.answers.wait([Call(first), Call(second)], "both") == ["a", "b"]
    failed.set_exception(ValueError("out of memory"))
    with pytest.raises(ValueError, match="out of memory"):
        dispatcher.answers.wait([Call(never), Call(failed)], "both")


def test_a_rollout_that_cannot_be_sampled_ends_the_run() -> None:
    actor = Actor()
    dispatcher, _ = start([actor])
    dispatcher.admit_rollouts(updates_left=1)
    actor.asked.pop()[0].set_exception(ValueError("the prompt leaves no room"))
    with pytest.raises(ValueError, match="leaves no room"):
        dispatcher.wait_for_batch(0)


def test_a_wait_ends_with_a_name() -> None:
    dispatcher, _ = start([Actor()], timeout_s=0.05)
    dispatcher.admit_rollouts(updates_left=1)
    with pytest.raises(TimeoutError, match=r"cluster.step_timeout_s\) for 4 rollouts for the update of version 0"):
        dispatcher.wait_for_batch(0)


def test_drained_actors_get_nothing_new() -> None:
    actor = Actor()
    dispatcher, ledger = start([actor], staleness=1, timeout_s=0.05)
    dispatcher.admit_rollouts(updates_left=5)
    actor.finish(0, 1, 2, 3)
    dispatcher.wait_for_batch(0)
    with pytest.raises(TimeoutError, match="the actors to finish"):
        dispatcher.drain()
    actor.finish(0, 1, 2, 3)
    dispatcher.drain()
    assert actor.work == []
    ledger.trained(1)
    dispatcher.admit_rollouts(updates_left=4)
    assert len(actor.work) == 4


def test_a_drain_ends_where_an_actor_was_lost_with_the_rest_of_a_group() -> None:
    """The half that was delivered keeps its lease until the other half, which nobody may be given now, is there."""
    actors = [Actor(), Actor()]
    fleet, _, _ = crew(actors)
    dispatcher, ledger = start(actors, staleness=1, rollouts=4, samples=2, fleet=fleet, timeout_s=1.0)
    dispatcher.admit_rollouts(updates_left=5)
    actors[0].finish(0, 1, 2, 3)
    dispatcher.wait_for_batch(0)
    actors[1].finish(0)
    trained: Future[Any] = Future()
    trained.set_result(None)
    dispatcher.answers.wait([Call(trained)], "the update")
    actors[1].asked.pop()[0].set_exception(EngineLostError("gone"))
    dispatcher.drain()
    assert ledger.metrics()["ledger/in_flight"] == 1
    assert not any(actor.work for actor in actors), "nothing new was handed out"


def test_rollout_groups_train_as_a_whole() -> None:
    """The second group is complete first; half of the first one waits for its sibling."""
    actor = Actor()
    dispatcher, ledger = start([actor], staleness=1, rollouts=2, samples=2)
    dispatcher.admit_rollouts(updates_left=5)
    groups = list(dict.fromkeys(actor.prompts))
    assert actor.prompts == [groups[0], groups[0], groups[1], groups[1]]
    actor.finish(1, 2, 3, versions=(0,))
    assert [r.prompt.prompt_id for r in dispatcher.wait_for_batch(0)] == [groups[1], groups[1]]
    ledger.trained(1)
    actor.finish(0, versions=(0, 1))
    batch = dispatcher.wait_for_batch(1)
    assert [(r.prompt.prompt_id, r.key[2]) for r in batch] == [(groups[0], 0), (groups[0], 1)]


def test_siblings_are_due_together() -> None:
    """The sibling of a straggler is as urgent as the straggler: an update takes both or none."""
    actor = Actor()
    dispatcher, ledger = start([actor], staleness=2, rollouts=2, samples=2)
    dispatcher.admit_rollouts(updates_left=9)
    straggler = actor.prompts[0]
    for version in range(1, 3):  # two updates go by on the other groups
        actor.finish(2, 3, versions=(version - 1,))
        dispatcher.wait_for_batch(version - 1)
        ledger.trained(version)
    dispatcher.admit_rollouts(updates_left=7)
    actor.finish(0, versions=(0, 1))
    done: Future[Any] = Future()
    done.set_result(None)
    dispatcher.answers.wait([Call(done)], "what came before it")
    actor.finish(0, 1, 2, versions=(2,))
    batch = dispatcher.wait_for_batch(2)
    assert [r.prompt.prompt_id for r in batch] == [straggler, straggler]
    assert ledger.staleness == [2, 2]


def test_groups_of_a_lost_actor_do_not_leave_more_due_than_an_update_takes() -> None:
    """One sibling of three groups is there when the actor with the others is lost, and a fourth group is as old. Sampled
    again, the siblings are as old as the delivered ones, so the update before the last possible one takes two of them."""
    kept, lost = Actor(), Actor()
    actors = [kept, lost]
    fleet, _, _ = crew(actors)
    dispatcher, ledger = start(actors, staleness=2, samples=2, fleet=fleet, timeout_s=2.0)
    dispatcher.admit_rollouts(updates_left=9)
    lost.finish(0, 2, 4)
    old = [prompt for prompt in lost.prompts for _ in range(2)]
    kept.finish(0, 1, 2, 3, 4, 5)
    dispatcher.wait_for_batch(0)
    dispatcher.publish(1)
    ledger.trained(1)
    dispatcher.admit_rollouts(updates_left=8)
    lost.asked.pop()[0].set_exception(EngineLostError("gone"))
    until(dispatcher, lambda: actors[1] is not lost and len(fleet.present()) == 2)
    dispatcher._publish_to_latecomers()
    kept.finish(0, 1, 2, 3, versions=(1,))  # an update's worth
    until(dispatcher, lambda: ledger.metrics()["ledger/scored"] == 10)
    assert not ledger.ready(4, 1), "three groups would be due in the one update of version 2"
    kept.finish(0, 1, versions=(1,))
    actors[1].finish(0, versions=(1,))
    until(dispatcher, lambda: ledger.metrics()["ledger/scored"] == 16)
    first = [r.prompt.prompt_id for r in dispatcher.wait_for_batch(1)]
    dispatcher.publish(2)
    ledger.trained(2)
    second = [r.prompt.prompt_id for r in dispatcher.wait_for_batch(2)]
    assert [p for p in first + second if p in old] == old


def test_the_gold_judge_sees_an_even_share() -> None:
    actors = [Actor(), Actor()]
    dispatcher, _ = start(actors, rollouts=8, gold=4)
    dispatcher.admit_rollouts(updates_left=1)
    for actor in actors:
        assert [a.scorers for a in actor.work] == [("proxy", "gold"), ("proxy",)] * 2


def test_usage_is_that_of_the_busiest_actor_since_the_last_time() -> None:
    actors = [Actor(), Actor()]
    dispatcher, _ = start(actors)
    dispatcher.admit_rollouts(updates_left=2)
    actors[0].finish(0, 1, versions=(0, 0, 0), generate_s=2.0)
    actors[1].finish(0, 1, versions=(0,), generate_s=1.0)
    dispatcher.wait_for_batch(0)
    assert dispatcher.usage() == {"perf/generate_s": 2.0, "perf/score_s": 1.0, "perf/gen_tokens_per_s": 4.0}
    assert dispatcher.usage() == {"perf/generate_s": 0.0, "perf/score_s": 0.0, "perf/gen_tokens_per_s": 0.0}


class Learner:
    """Publishes at once to the actors that it is connected to."""

    def __init__(self, actors: list[Actor]):
        self.calls: list[tuple[Any, ...]] = []
        self.actors, self.refuse = actors, dict[int, str]()
        self.is_stopped, self.keeps_updates = False, True

    def pulse(self, rank: int) -> Call:
        answer: Future[int] = Future()
        if not self.is_stopped:
            answer.set_result(time.monotonic_ns())
        return Call(answer)

    def start(self, method: str, *arguments: Any) -> list[Call]:
        self.calls.append((method, arguments[-1]))
        loaded = {i: LoadReport(arguments[-1]) for i in range(len(self.actors)) if i not in self.refuse}
        report: Future[Any] = Future()
        update = WeightUpdate("publisher", arguments[-1], ()) if self.keeps_updates else None
        report.set_result(PublishReport(arguments[-1], 0.0, 0.0, 0, 0, loaded, self.refuse, update))
        self.refuse = {}
        return [Call(report)]


def crew(actors: list[Actor], served: bool = True, restarts: int = 3) -> tuple[Fleet, Learner, list[str]]:
    learner, said = Learner(actors), list[str]()

    def replace(actors: list[Any], number: int, update: Any) -> bool:
        actors[number] = Actor()
        return served

    return Fleet(actors, learner, "shared", replace, restarts, said.append), learner, said  # type: ignore[arg-type]


def until(dispatcher: Dispatcher, condition: Any) -> None:
    """Let the dispatcher take in what comes until the condition holds."""
    dispatcher.answers.wait_until(condition, "the test")


def test_the_work_of_a_lost_actor_is_done_by_the_others_and_by_its_successor() -> None:
    lost, other = Actor(), Actor()
    actors = [lost, other]
    fleet, learner, said = crew(actors)
    dispatcher, ledger = start(actors, fleet=fleet)
    dispatcher.admit_rollouts(updates_left=2)
    expected = [*lost.prompts, *other.prompts]
    other.finish(0, 1)
    lost.asked.pop()[0].set_exception(EngineLostError("out of memory"))
    until(dispatcher, lambda: actors[0] is not lost and len(fleet.present()) == 2)
    actors[0].finish(*range(len(actors[0].work)))
    other.finish(*range(len(other.work)))
    assert [r.prompt.prompt_id for r in dispatcher.wait_for_batch(0)] == expected
    assert (dispatcher.num_lost, ledger.metrics()["ledger/released"]) == (1, 2)
    assert said == [
        "actor 0 is lost (EngineLostError: out of memory); 2 rollouts are sampled again, a new actor is starting",
        "actor 0 is back",
    ]
    dispatcher.publish(1)
    dispatcher.publish(2)
    assert learner.calls == [("connect", 1), ("publish", 2)]  # the learner learns of the new one


def test_an_answer_of_the_actor_before_counts_no_more() -> None:
    lost = Actor()
    actors = [lost]
    fleet, learner, _ = crew(actors)
    dispatcher, ledger = start(actors, fleet=fleet)
    dispatcher.admit_rollouts(updates_left=2)
    learner.refuse = {0: "it does not answer"}
    dispatcher.publish(1)  # lost, though its process still runs
    lost.finish(0, 1)
    until(dispatcher, lambda: actors[0] is not lost and bool(fleet.present()))
    assert ledger.metrics()["ledger/scored"] == 0


def test_a_new_actor_without_the_current_weights_gets_them_before_it_samples() -> None:
    lost = Actor()
    actors = [lost]
    fleet, learner, _ = crew(actors, served=False)
    dispatcher, _ = start(actors, fleet=fleet, timeout_s=0.3)
    dispatcher.admit_rollouts(updates_left=2)
    lost.asked.pop()[0].set_exception(EngineLostError("out of memory"))
    until(dispatcher, lambda: bool(fleet.present()) and actors[0] is not lost)
    assert actors[0].work == []
    with pytest.raises(TimeoutError):  # the learner is free now, and the new actor never finishes
        dispatcher.wait_for_batch(0)
    assert learner.calls == [("connect", 0)]
    assert len(actors[0].work) == 4


def test_an_actor_that_vllms_own_transport_left_out_joins_with_the_next_group() -> None:
    """NCCL keeps no copy of the weights for the new actor, which serves its checkpoint until it is connected."""
    kept, lost = Actor(), Actor()
    actors = [kept, lost]
    fleet, learner, _ = crew(actors)
    learner.keeps_updates = False
    dispatcher, ledger = start(actors, fleet=fleet)
    dispatcher.admit_rollouts(updates_left=2)
    kept.finish(0, 1)
    lost.finish(0, 1)
    dispatcher.wait_for_batch(0)
    learner.refuse = {1: "ActorDiedError: the process is gone"}
    dispatcher.publish(1)
    ledger.trained(1)
    until(dispatcher, lambda: actors[1] is not lost and len(fleet.present()) == 2)
    dispatcher.admit_rollouts(updates_left=1)
    assert (len(kept.work), actors[1].work) == (2, [])
    dispatcher._publish_to_latecomers()
    assert learner.calls == [("publish", 1), ("connect", 1)]
    assert len(actors[1].work) == 2


def test_an_actor_that_joins_within_a_publish_waits_for_the_next() -> None:
    kept, lost = Actor(), Actor()
    actors = [kept, lost]
    fleet, learner, _ = crew(actors)
    dispatcher, ledger = start(actors, fleet=fleet)
    dispatcher.admit_rollouts(updates_left=2)
    kept.finish(0, 1)
    lost.finish(0, 1)
    dispatcher.wait_for_batch(0)
    ledger.trained(1)
    slow, publish = Future[Any](), learner.start("publish", 1)[0].future().result()
    learner.start = lambda *_: [Call(slow)]  # type: ignore[assignment, method-assign, misc]

    def comes_back() -> None:  # while version 1 is under way; it has loaded version 0
        lost.asked.pop()[0].set_exception(EngineLostError("out of memory"))
        while actors[1] is lost or 1 not in fleet.present():
            time.sleep(0.01)
        slow.set_result(publish)

    thread = threading.Thread(target=comes_back)
    thread.start()
    dispatcher.publish(1)
    thread.join()
    del learner.start
    dispatcher._lease_to(1)
    assert actors[1].work == []
    dispatcher.admit_rollouts(updates_left=1)
    dispatcher._publish_to_latecomers()
    assert learner.calls[-1] == ("connect", 1)
    assert len(actors[1].work) == 2


def test_actors_are_replaced_so_many_times_only() -> None:
    lost = Actor()
    actors = [lost]
    fleet, _, _ = crew(actors, restarts=0)
    dispatcher, _ = start(actors, fleet=fleet)
    dispatcher.admit_rollouts(updates_left=2)
    lost.asked.pop()[0].set_exception(EngineLostError("out of memory"))
    with pytest.raises(ActorLostError, match=r"after 0 others: cluster\.max_actor_restarts is 0"):
        dispatcher.wait_for_batch(0)


def test_a_replacement_that_dies_before_it_is_there_is_no_other_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both actors of a host that is cut off are lost, and their replacements too, as Ray sends them there until it knows."""
    monkeypatch.setattr("controller.loop.fleet.AGAIN_S", 0.01)
    actors = [Actor(), Actor()]
    fleet, _, _ = crew(actors, restarts=4)
    begin, fails = fleet._replace_actor, [EngineLostError("its node has died") for _ in range(4)]

    def replace(actors: list[Any], number: int, update: Any) -> bool:
        if fails:
            raise fails.pop()
        return begin(actors, number, update)

    fleet._replace_actor = replace
    dispatcher, _ = start(actors, fleet=fleet, actor_silence_s=1e9)
    for actor in list(actors):
        actor.asked.pop()[0].set_exception(EngineLostError("gone"))
    until(dispatcher, lambda: dispatcher.num_lost == 2 and fleet.present() == {0, 1})
    assert fleet.num_not_started == 4


def test_failed_starts_of_a_surplus_place_do_not_count_when_another_is_lost() -> None:
    """Two are enough; a third place cannot be filled. Then one of the two is lost, and its replacement is under way."""
    fleet, _, _ = crew([Actor(), Actor()], restarts=1)
    gone = EngineLostError("no memory")
    for _ in range(5):
        fleet.not_started(2, gone, is_loss=True)
    fleet.lost(0, 0, "gone")
    fleet._starting = {0}
    fleet.not_started(2, gone, is_loss=True)
    fleet.not_started(2, ValueError("of another kind"), is_loss=False)
    fleet._starting = set()
    with pytest.raises(ValueError, match="of another kind"):
        fleet.not_started(2, ValueError("of another kind"), is_loss=False)
    with pytest.raises(ActorLostError, match=r"actor 2 did not start \(.*no memory\), and 8 times before"):
        fleet.not_started(2, gone, is_loss=True)


def test_the_learner_publishes_to_nobody_who_is_gone() -> None:
    """Beyond the fewest a lost actor is not replaced at once, or ever: nothing more is sent to it, or counted as missing."""
    calls: list[str] = []
    learner: Any = SimpleNamespace(start=lambda method, *_: calls.append(method) or [])
    fleet = Fleet([Actor()], learner, "", lambda *_: True, 1, print, most=2)
    fleet.joined(1)
    for version in (1, 2):
        fleet.start_publish(version)
    fleet.lost(1, 0, "gone")
    for version in (3, 4):
        fleet.start_publish(version)
    assert calls == ["connect", "publish", "connect", "publish"]


def test_a_replacement_that_never_starts_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.loop.fleet.AGAIN_S", 0.01)
    actors = [Actor()]
    fleet, _, _ = crew(actors, restarts=2)

    def replace(*_: Any) -> bool:
        raise EngineLostError("no memory")

    fleet._replace_actor = replace
    dispatcher, _ = start(actors, fleet=fleet)
    actors[0].asked.pop()[0].set_exception(EngineLostError("gone"))
    with pytest.raises(
        ActorLostError, match=r"actor 0 did not start \(.*no memory\), and 2 times before, in a row: cluster\.max"
    ):
        until(dispatcher, lambda: False)


def test_all_answers_are_heard_together_while_the_actors_are_served() -> None:
    actor = Actor()
    dispatcher, _ = start([actor])
    dispatcher.admit_rollouts(updates_left=1)
    first, second = Future[int](), Future[int]()
    heard: list[list[Any]] = []
    dispatcher.answers.on_answers([Call(first), Call(second)], heard.append)
    second.set_exception(OSError("full"))
    actor.finish(0, 1, 2, 3)
    first.set_result(7)
    assert len(dispatcher.wait_for_batch(0)) == 4
    dispatcher.answers.wait_for_learner(lambda: bool(heard), "the votes")
    [[mine, error]] = heard
    assert mine == 7
    assert str(error) == "full"
    dispatcher.answers.on_answers([Call(Future())], heard.append)
    dispatcher.answers._timeout_s = 0.05
    with pytest.raises(TimeoutError, match="for the votes"):
        dispatcher.answers.wait_for_learner(lambda: len(heard) > 1, "the votes")


def test_an_interrupt_ends_the_wait_for_rollouts_alone() -> None:
    actor = Actor()
    dispatcher, _ = start([actor])
    dispatcher.admit_rollouts(updates_left=1)
    timer = threading.Timer(0.1, dispatcher.interrupt)
    timer.start()
    with pytest.raises(Stopping):
        dispatcher.wait_for_batch(0)
    update: Future[int] = Future()
    update.set_result(3)
    assert dispatcher.answers.wait([Call(update)], "an update") == [3]  # what is under way ends


def test_after_a_rollback_late_answers_do_not_mix_with_new_ones() -> None:
    """Two siblings: one of before the rollback comes late, when one of after it is there."""
    actor = Actor()
    fleet, _, _ = crew([actor])
    dispatcher, ledger = start([actor], rollouts=2, samples=2, staleness=1, fleet=fleet)
    prompts = dispatcher._stream.state_dict()
    dispatcher.admit_rollouts(updates_left=1)
    before, actor.work = actor.work, []
    ledger._clear()
    dispatcher.abandon_leases()
    dispatcher._stream.load_state_dict(prompts)
    dispatcher.publish(0)
    dispatcher.admit_rollouts(updates_left=1)
    assert [a.request.key for a in actor.work] == [a.request.key for a in before]
    after, actor.work = actor.work, [before[0]]
    actor.finish(0, versions=(0, 0, 0))
    actor.work = after
    dispatcher.answers.wait_for_learner(lambda: ledger.counts["fenced"] == 1, "the late one")
    actor.finish(0, 1)
    assert [len(r.completion.token_ids) for r in dispatcher.wait_for_batch(0)] == [1, 1]


def test_a_silent_actor_is_replaced_as_a_dead_one() -> None:
    stopped = Actor()
    stopped.is_stopped = True
    actors = [stopped]
    fleet, _, said = crew(actors)
    dispatcher, ledger = start(actors, fleet=fleet, actor_silence_s=0.2)
    dispatcher.admit_rollouts(updates_left=1)
    until(dispatcher, lambda: actors[0] is not stopped and bool(fleet.present()))
    assert "has generated nothing for" in said[0]
    assert dispatcher.faults() == {"fault/actors_lost": 1, "fault/actors_silent": 1, "fault/rollouts_hedged": 0}
    actors[0].finish(0, 1, 2, 3)
    assert len(dispatcher.wait_for_batch(0)) == 4
    assert ledger.metrics()["ledger/released"] == 4


def test_a_replacement_that_dies_while_it_starts_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.loop.fleet.AGAIN_S", 0.01)
    lost, deaths = Actor(), ["while it loaded"]
    actors = [lost]

    def replace(actors: list[Any], number: int, update: Any) -> bool:
        if deaths:
            raise EngineLostError(deaths.pop())
        actors[number] = Actor()
        return True

    said: list[str] = []
    fleet = Fleet(actors, Learner(actors), "shared", replace, 2, said.append)  # type: ignore[arg-type]
    dispatcher, _ = start(actors, fleet=fleet)
    dispatcher.admit_rollouts(updates_left=1)
    lost.asked.pop()[0].set_exception(EngineLostError("out of memory"))
    until(dispatcher, lambda: actors[0] is not lost and bool(fleet.present()))
    assert (len(actors[0].work), dispatcher.num_lost) == (4, 1)
    assert "while it loaded" in said[1]


@pytest.mark.parametrize("samples", [1, 2])
def test_a_straggler_is_hedged_and_the_first_reply_counts(samples: int) -> None:
    slow, idle = Actor(), Actor()
    dispatcher, ledger = start([slow, idle], samples=samples, hedge_after_s=0.05)
    dispatcher.admit_rollouts(updates_left=1)
    late, kept = list(slow.work), [*slow.prompts, *idle.prompts]
    idle.finish(0, 1)
    until(dispatcher, lambda: len(idle.work) == 2)
    assert [a.request for a in idle.work] == [a.request for a in late]
    assert {a.lease for a in idle.work} & {a.lease for a in late} == set()
    slow.finish(0)  # the first reply for one of them, the second for the other is the hedge's
    until(dispatcher, lambda: len(slow.work) == 1 and not dispatcher.answers._inbox.qsize())
    idle.finish(1)
    assert [r.prompt.prompt_id for r in dispatcher.wait_for_batch(0)] == kept
    ledger.trained(1)
    slow.finish(0)
    idle.finish(0)
    until(dispatcher, lambda: ledger.metrics()["ledger/fenced"] == 2)
    assert dispatcher._parts == {}
    assert dispatcher.faults()["fault/rollouts_hedged"] == 2
    assert ledger.metrics()["ledger/trained"] == 4


def test_one_actor_is_never_hedged() -> None:
    slow = Actor()
    dispatcher, ledger = start([slow], hedge_after_s=0.01, timeout_s=0.7)
    dispatcher.admit_rollouts(updates_left=1)
    with pytest.raises(TimeoutError):
        dispatcher.wait_for_batch(0)
    assert ledger.metrics()["ledger/hedged"] == 0


@pytest.mark.parametrize(
    "error", [RayActorError(), OutOfMemoryError("killed"), CollectiveError("rank 0: connection closed by peer")]
)
def test_a_lost_rank_is_told_from_an_error_and_later_answers_count_no_more(error: Exception) -> None:
    dispatcher, _ = start([Actor()])
    gone, other, fine = Future[Any](), Future[Any](), Future[Any]()
    gone.set_exception(error)
    with pytest.raises(LearnerLostError, match="a learner rank is lost"):
        dispatcher.answers.wait([Call(gone), Call(other)], "the update")
    other.set_exception(CollectiveError("connection closed by peer"))
    fine.set_result("a new learner's")
    assert dispatcher.answers.wait([Call(fine)], "the update") == ["a new learner's"]


def test_a_rank_that_hangs_is_lost() -> None:
    actors = [Actor()]
    fleet, learner, _ = crew(actors)
    learner.is_stopped = True
    dispatcher, _ = start(actors, fleet=fleet, learner_silence_s=0.1)
    with pytest.raises(LearnerLostError, match="rank 0 has not got on for"):
        dispatcher.answers.wait([Call(Future())], "the update")


def test_after_a_rollback_actors_get_the_weights_of_the_commit_and_old_work_is_fenced(tmp_path: Path) -> None:
    first, second = Actor(), Actor()
    actors = [first, second]
    fleet, learner, _ = crew(actors)
    dispatcher, ledger = start(actors, fleet=fleet)
    state, arrays = ledger.state_dict()
    stream = dispatcher._stream.state_dict()
    dispatcher.admit_rollouts(updates_left=3)
    old = [*first.prompts, *second.prompts]
    second.finish(0, 1)
    until(dispatcher, lambda: ledger.metrics()["ledger/scored"] == 2)
    ledger.load_state_dict(state, arrays, tmp_path / "ledger.jsonl")
    dispatcher._stream.load_state_dict(stream)
    dispatcher.abandon_leases()
    dispatcher.publish(0)
    assert learner.calls == [("connect", 0)]
    dispatcher.admit_rollouts(updates_left=3)
    assert [*first.prompts[2:], *second.prompts] == old  # the same prompts again, beside what the first still works at
    first.finish(0, 1)
    until(dispatcher, lambda: ledger.metrics()["ledger/fenced"] == 2)
    first.finish(0, 1)
    second.finish(0, 1)
    assert [r.prompt.prompt_id for r in dispatcher.wait_for_batch(0)] == old


def test_an_actor_that_joins_with_weights_of_before_the_rollback_gets_new_ones(tmp_path: Path) -> None:
    lost, gate = Actor(), threading.Event()
    actors = [lost]

    def replace(actors: list[Any], number: int, update: Any) -> bool:
        assert gate.wait(5)
        actors[number] = Actor()
        return True

    learner = Learner(actors)
    fleet = Fleet(actors, learner, "shared", replace, 3, print)  # type: ignore[arg-type]
    dispatcher, ledger = start(actors, fleet=fleet)
    dispatcher.publish(0)
    state, arrays = ledger.state_dict()
    lost.asked.pop()[0].set_exception(EngineLostError("out of memory"))
    until(dispatcher, lambda: not fleet.present())
    ledger.load_state_dict(state, arrays, tmp_path / "ledger.jsonl")
    dispatcher.abandon_leases()
    dispatcher.publish(0)
    gate.set()
    until(dispatcher, lambda: bool(fleet.present()))
    dispatcher.admit_rollouts(updates_left=1)
    assert actors[0].work == []  # version 0, but of a learner that is gone
    dispatcher._publish_to_latecomers()
    assert len(actors[0].work) == 4


def held_out(count: int) -> list[RolloutRequest]:
    return [RolloutRequest(0, 0, Prompt(1000 + i, "held out", (1, i)), seed=i) for i in range(count)]


def in_background(dispatcher: Dispatcher, wanted: list[RolloutRequest]) -> "Future[list[Rollout]]":
    """The controller's wait, in a thread; the test is the actors."""
    found: Future[list[Rollout]] = Future()

    def ask() -> None:
        try:
            found.set_result(dispatcher.sample_held_out(wanted, SamplingConfig(max_completion_tokens=7)))
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return found


def eventually(holds: Any) -> None:
    end = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_held_out_prompts_are_no_rollouts_of_the_ledger() -> None:
    """Between two updates: spread over the actors, in the order of the requests; what trains is as without them."""
    actors, plain = [Actor(), Actor()], [Actor(), Actor()]
    (dispatcher, ledger), (other, _) = start(actors), start(plain)
    before, used = ledger.state_dict()[0], dispatcher.usage()
    found = in_background(dispatcher, wanted := held_out(5))
    eventually(lambda: [len(a.work) for a in actors] == [3, 2])
    assert [a.request for a in actors[0].work] == wanted[::2]
    assert all(a.scorers == ("proxy",) and a.lease < 0 for actor in actors for a in actor.work)
    actors[1].finish(1, 0, generate_s=3.0)
    actors[0].finish(0, 2, 1, generate_s=2.0)
    assert [r.prompt.prompt_id for r in found.result(5)] == [1000, 1001, 1002, 1003, 1004]
    assert ledger.state_dict()[0] == before
    assert dispatcher.usage() == used
    for one in (dispatcher, other):
        one.admit_rollouts(updates_left=3)
    with_them, without = ([[(a.request, a.scorers) for a in actor.work] for actor in crew] for crew in (actors, plain))
    assert with_them == without


@pytest.mark.parametrize("error", [RayActorError(), OutOfMemoryError("Ray's monitor of memory has ended it")])
def test_what_a_lost_actor_held_of_them_another_answers(error: Exception) -> None:
    actors = [Actor(), Actor()]
    dispatcher, _ = start(actors, fleet=Fleet(actors, Learner(actors), "", lambda *_: False, 1, print))  # type: ignore[arg-type]
    found = in_background(dispatcher, held_out(4))
    eventually(lambda: [len(a.work) for a in actors] == [2, 2])
    actors[0].asked.pop()[0].set_exception(error)
    eventually(lambda: len(actors[1].work) == 4)
    assert sorted(actors[1].prompts) == [1000, 1001, 1002, 1003]
    actors[1].finish(0, 1, 2, 3)
    assert [r.prompt.prompt_id for r in found.result(5)] == [1000, 1001, 1002, 1003]


def test_while_actors_work_ahead_their_rollouts_are_kept() -> None:
    actor = Actor()
    dispatcher, ledger = start([actor], staleness=1)
    dispatcher.admit_rollouts(updates_left=5)
    found = in_background(dispatcher, held_out(2))
    eventually(lambda: len(actor.work) == 10)
    actor.finish(*range(10), generate_s=5.0)
    assert [r.prompt.prompt_id for r in found.result(5)] == [1000, 1001]
    assert dispatcher.usage()["perf/gen_tokens_per_s"] == 2.0  # ten tokens, those of the rollouts among them
    assert len(dispatcher.wait_for_batch(0)) == 4
    assert ledger.counts["fenced"] == 0


def test_an_interrupt_ends_the_wait_for_held_out_prompts() -> None:
    dispatcher, _ = start([Actor()])
    found = in_background(dispatcher, held_out(2))
    dispatcher.interrupt()
    with pytest.raises(Stopping):
        found.result(5)
