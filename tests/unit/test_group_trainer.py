"""Transports whose transfers need every receiver, on receivers that die when the test says so. The engine is a stand-in for
vLLM's: it holds the group that it was opened with, and nothing arrives where a member of it is dead."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from learner.group_trainer import GroupTrainer
from learner.receivers import Receivers, ReceiversLost
from learner.weight_publisher import WeightPublisher


class Source(WeightSource):
    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta("a", torch.bfloat16, (5, 3))]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones((5, 3), dtype=torch.bfloat16)


class Processes(Receivers):
    """Without Ray: `dead` is shared by all that are connected one after another, as the processes are."""

    def __init__(self, count: int, dead: set[int], tensor_parallel_size: int = 1):
        super().__init__([object()] * count, tensor_parallel_size, timeout_s=1.0)
        self.dead, self.asked = dead, list[tuple[str, dict[int, Any]]]()

    def call(self, method: str, arguments: Callable[[int], tuple[Any, ...]]) -> tuple[dict[int, Any], dict[int, str]]:
        self.asked.append((method, {i: arguments(i) for i in self.members}))
        return {i: None for i in self.members if i not in self.dead}, {
            i: "gone" for i in self.members if i in self.dead
        }


class Engine:
    """vLLM's trainer engine, as far as it is used. The group is fixed when it is opened."""

    def __init__(self, receivers: Processes):
        self.client, self.group = receivers, tuple(receivers.members)
        self.sent, self.is_shut_down, self.dies = 0, False, set[int]()
        self.client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 1 + len(self.group)})

    def send_weights(self) -> None:
        assert not self.is_shut_down
        assert not self.client.dead & {*self.group}, "a broadcast would wait for the dead for ever"
        self.client.start_weight_update()
        self.client.dead |= self.dies
        self.client.update_weights({})
        self.client.finish_weight_update()
        self.sent += 1

    def shutdown(self) -> None:
        self.is_shut_down = True


class Opened(list[Engine]):
    """All engines, in the order in which they were opened."""

    def __call__(self, receivers: Any) -> Any:
        self.append(Engine(receivers))
        return self[-1]


class Sized(Source):
    """Weights that nobody makes: one of `largest` bytes among small ones."""

    def __init__(self, largest: int):
        self.largest = largest

    def metadata(self) -> list[ParamMeta]:
        return [*super().metadata(), ParamMeta("b", torch.bfloat16, (self.largest // 2,)), *super().metadata()]


@pytest.mark.parametrize(
    ("rows", "buffer"),
    [
        (152_064, 152_064 * 3584 * 2),  # the embedding of Qwen2.5-7B: 1,089,994,752 bytes
        (32_000, 2**30),  # vLLM's own buffer is enough
    ],
)
def test_the_buffer_of_an_ipc_transfer_holds_the_largest_weight(
    rows: int, buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's packer refuses a weight that is larger."""
    opened: list[Any] = []
    monkeypatch.setattr(
        "learner.weight_publisher.WeightTransferTrainerFactory.trainer_init", lambda info, **_: opened.append(info)
    )
    WeightPublisher("ipc", Sized(rows * 3584 * 2))._open(Processes(1, set()))
    [info] = opened
    assert (info.backend, info.packed, info.packed_buffer_size_bytes) == ("ipc", True, buffer)


def test_a_dead_actor_is_left_out_and_the_others_get_the_version() -> None:
    opened, receivers = Opened(), Processes(3, set())
    trainer = GroupTrainer(opened, Source(), True, receivers)
    report = trainer.send_weights(1)
    assert report is not None
    assert (sorted(report.loaded), report.missing, report.nbytes) == ([0, 1, 2], {}, 30)
    receivers.dead.add(1)
    for version in (2, 3):
        report = trainer.send_weights(version)
        assert report is not None
        assert (sorted(report.loaded), report.missing) == ([0, 2], {1: "gone"})
        assert receivers.asked[-1] == ("update_weight_version", {0: (str(version),), 2: (str(version),)})
    assert [(engine.group, engine.sent) for engine in opened] == [((0, 1, 2), 1), ((0, 2), 2)]
    assert opened[0].is_shut_down


def test_ranks_of_the_group_have_no_gap_where_an_actor_was_lost() -> None:
    receivers = Processes(3, {1}, tensor_parallel_size=2)
    GroupTrainer(Opened(), Source(), True, receivers).send_weights(1)
    [requests] = [asked for method, asked in receivers.asked if method == "init_weight_transfer_engine"]
    assert {i: request.init_info["rank_offset"] for i, (request,) in requests.items()} == {0: 1, 2: 3}


def test_a_new_actor_joins_when_it_is_connected() -> None:
    opened, dead = Opened(), {0}
    trainer = GroupTrainer(opened, Source(), True, Processes(2, dead))
    trainer.send_weights(1)
    dead.clear()
    trainer.connect(Processes(2, dead))
    report = trainer.send_weights(1)
    assert report is not None
    assert (sorted(report.loaded), report.missing) == ([0, 1], {})
    assert [engine.group for engine in opened] == [(1,), (0, 1)]


def test_with_nobody_left_the_ranks_still_gather_together() -> None:
    opened = Opened()
    report = GroupTrainer(opened, Source(), True, Processes(1, {0})).send_weights(4)
    assert report is not None
    assert (report.loaded, report.missing) == ({}, {0: "gone"})
    assert [(engine.group, engine.sent) for engine in opened] == [((), 1)]


def test_the_other_ranks_ask_nobody_and_open_once() -> None:
    opened, receivers = Opened(), Processes(2, set())
    trainer = GroupTrainer(opened, Source(), False, receivers)
    assert [trainer.send_weights(version) for version in (1, 2)] == [None, None]
    assert [engine.sent for engine in opened] == [2]
    assert "ready" not in [method for method, _ in receivers.asked]


def test_an_actor_that_dies_within_a_transfer_ends_the_run_and_says_how_to_go_on() -> None:
    opened, receivers = Opened(), Processes(2, set())
    trainer = GroupTrainer(opened, Source(), True, receivers)
    trainer.send_weights(1)
    opened[0].dies = {1}
    with pytest.raises(ReceiversLost, match=r"update_weights did not reach every actor: actor 1: gone; .*resume=auto"):
        trainer.send_weights(2)
