"""Publishing to several actors, of which some are dead, late, new or on another node. The actors and the transfer are real;
the engines are stand-ins that keep a copy of what they were given (`test_engines.py` has the real ones)."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from contracts.weights import PublishReport
from learner.receivers import Receivers, ReceiversLost
from learner.weight_publisher import WeightPublisher
from tests.conftest import kill
from tests.stand_ins import StandIn

pytestmark = pytest.mark.usefixtures("ray_runtime")
TIMEOUT_S = 120.0


class Source(WeightSource):
    """Two tensors whose bytes all have the value that the test wants."""

    value = 0

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta("a", torch.uint8, (1000, 1000)), ParamMeta("b", torch.uint8, (64,))]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for meta in self.metadata():
            yield meta.name, torch.full(meta.shape, self.value, dtype=meta.dtype)


SIZE = 1000 * 1000 + 64
Start = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def pool() -> Iterator[list[Any]]:
    """Processes that live through several tests, as each takes seconds to start."""
    actors: list[Any] = [StandIn.remote() for _ in range(4)]
    yield actors
    kill(actors)


@pytest.fixture
def start(pool: list[Any]) -> Start:
    """Actors that know nothing of what was before."""
    given = 0

    def start(count: int, on_another_node: bool = False) -> list[Any]:
        nonlocal given
        for i in range(given, given + count):
            try:
                ray.get(pool[i].reset.remote(on_another_node), timeout=TIMEOUT_S)
            except ray.exceptions.RayActorError:  # an earlier test has killed it
                pool[i] = StandIn.remote()
                ray.get(pool[i].reset.remote(on_another_node), timeout=TIMEOUT_S)
        given += count
        return pool[given - count : given]

    return start


def states(actors: list[Any]) -> list[tuple[int, float, int]]:
    return ray.get([actor.state.remote() for actor in actors], timeout=TIMEOUT_S)


def publisher(actors: list[Any], backend: str = "shared_memory", timeout_s: float = TIMEOUT_S) -> WeightPublisher:
    made = WeightPublisher(backend, Source(), timeout_s=timeout_s)
    made.connect(actors)
    return made


def send(publisher: WeightPublisher, version: int, value: int) -> PublishReport:
    publisher._source.value = value  # type: ignore[attr-defined]
    report = publisher.send(version)
    assert report is not None
    return report


@pytest.mark.parametrize("backend", ["shared_memory", "ray_object"])
def test_one_publish_serves_every_actor(start: Start, backend: str) -> None:
    actors = start(4)
    sender = publisher(actors, backend)
    for version, value in [(1, 3), (2, 5), (3, 7)]:
        report = send(sender, version, value)
        assert sorted(report.loaded) == [0, 1, 2, 3]
        assert report.missing == {}
        assert report.calls == 4
        assert states(actors) == [(version, value * SIZE, version)] * 4
    assert len(sender._trainer._segments) == 1, "one packed copy, whatever the number of actors"  # type: ignore
    assert report.update is not None
    assert len(report.update.objects) == (1 if backend == "ray_object" else 0)
    assert (report.update.address is None) == (backend == "ray_object")


def test_actors_of_other_nodes_get_the_same_bytes(start: Start) -> None:
    actors = [*start(1), *start(2, on_another_node=True)]
    report = send(publisher(actors), 1, 9)
    assert states(actors) == [(1, 9 * SIZE, 1)] * 3
    assert report.update is not None
    assert len(report.update.objects) == 1


def test_a_dead_actor_is_reported_and_the_others_are_served(start: Start) -> None:
    actors = start(3)
    sender = publisher(actors)
    kill([actors[1]])
    report = send(sender, 1, 2)
    assert sorted(report.loaded) == [0, 2]
    assert "ActorDiedError" in report.missing[1]
    assert report.seconds < TIMEOUT_S / 2
    assert states([actors[0], actors[2]]) == [(1, 2 * SIZE, 1)] * 2


def test_an_actor_that_dies_while_it_reads(start: Start) -> None:
    actors = start(2)
    sender = publisher(actors)
    ray.get(actors[0].set.remote("dies", True))
    report = send(sender, 1, 4)
    assert sorted(report.missing) == [0]
    report = send(sender, 2, 6)
    assert states(actors[1:]) == [(2, 6 * SIZE, 2)]
    assert len(sender._trainer._segments) == 1, "its lock died with it"  # type: ignore


def test_a_late_actor_blocks_nobody_and_reads_no_mixture(start: Start) -> None:
    actors = start(2)
    sender = publisher(actors, timeout_s=1.5)
    ray.get(actors[0].hold.remote())
    report = send(sender, 1, 10)  # actor 0 has read half of it
    assert report.missing == {0: "no answer to load_weights within 1.5 s"}
    for version in (2, 3):
        report = send(sender, version, 10 * version)
        assert sorted(report.missing) == [0]
        assert report.seconds < 1.4, "nobody waits twice for the same actor"
    assert states(actors[1:]) == [(3, 30 * SIZE, 3)]
    assert len(sender._trainer._segments) == 2, "one more, as the first is still read"  # type: ignore
    ray.get(actors[0].release.remote())
    while states(actors[:1])[0][2] < 2:
        time.sleep(0.05)
    assert states(actors[:1]) == [(3, 30 * SIZE, 2)], "version 1 whole, then the newest"
    report = send(sender, 4, 1)
    assert report.missing == {}
    assert len(sender._trainer._segments) == 1  # type: ignore


def test_a_mixture_would_show(start: Start) -> None:
    """The proof that the test above can fail: without the lock the late actor reads two versions."""
    [actor] = start(1)
    sender = publisher([actor], timeout_s=0.5)
    ray.get(actor.hold.remote())
    assert list(send(sender, 1, 10).missing) == [0]
    sender._trainer._segments[0].payload[:] = 20  # type: ignore
    ray.get(actor.release.remote())
    while states([actor])[0][2] < 1:
        time.sleep(0.05)
    assert 10 * SIZE < states([actor])[0][1] < 20 * SIZE


def test_a_new_actor_gets_the_current_version_before_it_serves(start: Start) -> None:
    actors = start(2)
    sender = publisher(actors)
    update = send(sender, 5, 3).update
    kill([actors[0]])
    actors[0] = start(1)[0]
    # Without the learner, which may be in the middle of an update.
    report = ray.get(actors[0].load_weights.remote(update), timeout=TIMEOUT_S)
    assert report.version == 5
    assert states(actors) == [(5, 3 * SIZE, 1)] * 2
    sender.connect(actors)
    assert send(sender, 5, 99).missing == {}, "sent again as it was: the learner's version 5 has not changed"
    assert states(actors) == [(5, 3 * SIZE, 1)] * 2, "nobody loads what it has"
    send(sender, 6, 4)
    assert states(actors) == [(6, 4 * SIZE, 2)] * 2


def test_connecting_again_serves_a_new_actor_of_another_node(start: Start) -> None:
    actors = start(1)
    sender = publisher(actors)
    send(sender, 5, 3)
    actors += start(1, on_another_node=True)
    sender.connect(actors)
    assert send(sender, 5, 3).missing == {}
    assert states(actors) == [(5, 3 * SIZE, 1)] * 2


def test_a_refusal_is_a_reason(start: Start) -> None:
    """A second learner has connected to one of the actors."""
    actors = start(2)
    first = publisher(actors)
    publisher(actors[:1])
    report = send(first, 1, 1)
    assert report.missing == {0: "WeightsRefused: version 1 is of a publisher that is not connected any more"}
    with pytest.raises(
        RuntimeError, match="version 1 of the weights did not reach every actor: actor 0: WeightsRefused"
    ):
        report.require_all()


def test_every_worker_of_every_engine_has_a_rank_of_its_own(start: Start) -> None:
    """vLLM's NCCL group: the learner is 0, and engines of two workers each follow."""
    actors = start(3)
    Receivers(actors, 2, TIMEOUT_S).init_weight_transfer_engine({"rank_offset": 1, "world_size": 7})
    found = ray.get([actor.first_init_info.remote() for actor in actors], timeout=TIMEOUT_S)
    assert found == [{"rank_offset": offset, "world_size": 7} for offset in (1, 3, 5)]


def test_a_transport_that_needs_everybody_hears_of_the_dead_first(start: Start) -> None:
    actors = start(3)
    receivers = Receivers(actors, 1, TIMEOUT_S)
    assert not receivers.leave_out_lost()
    kill([actors[1]])
    with pytest.raises(ReceiversLost, match="ready did not reach every actor: actor 1: ActorDiedError"):
        receivers.call_all("ready")
    assert receivers.leave_out_lost()
    assert receivers.members == [0, 2]
    receivers.call_all("ready")
