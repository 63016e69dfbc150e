"""Which updates a receiver takes. The swap is a stand-in that keeps a copy; segments and checks are real."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from ray.exceptions import GetTimeoutError, OwnerDiedError

from actors.rollout_actor import RolloutActor
from actors.weight_receiver import WeightReceiver
from common.processes.shared_memory import Segment, layout
from contracts.config import EngineConfig, EnvironmentConfig, ModelConfig
from contracts.weights import LoadReport, Parameters, WeightsRefused, WeightUpdate, checksum
from learner.engine import TrainEngine
from learner.models import load_policy
from learner.ranks import Ranks
from learner.weight_sources import CheckpointSource, EngineSource
from tests.conftest import make_config

PARAMETERS: Parameters = (("a", "float32", (3,)), ("b", "bfloat16", (2, 2)))
SIZE = layout(PARAMETERS)[1]


class Engine:
    """Keeps what it was given; `gate` lets a test hold it inside a swap."""

    def __init__(self) -> None:
        self.versions: list[int] = []
        self.bytes: list[int] = []
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def swap(self, parameters: Parameters, buffer: torch.Tensor, version: int) -> float:
        self.entered.set()
        assert self.gate.wait(10)
        self.versions.append(version)
        self.bytes = buffer.tolist()
        return 0.25


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def receiver(engine: Engine) -> WeightReceiver:
    return WeightReceiver(engine.swap)


class Sender:
    def __init__(self, name: str = "one"):
        self.name, self.segment = name, Segment(SIZE)

    def update(self, version: int) -> WeightUpdate:
        assert self.segment.begin()
        self.segment.payload[:] = version
        self.segment.commit(version)
        return WeightUpdate(self.name, version, PARAMETERS, self.segment.address)


def test_an_update_arrives(engine: Engine, receiver: WeightReceiver) -> None:
    sender = Sender()
    assert receiver.connect("one", sender.segment.address)
    report = receiver.load(sender.update(5))
    assert (report.version, report.pause_s) == (5, 0.25)
    assert engine.versions == [5]
    assert engine.bytes == [5] * SIZE
    assert sender.segment.begin(), "nothing reads it any more"


def test_an_older_version_or_the_same_changes_nothing(engine: Engine, receiver: WeightReceiver) -> None:
    sender = Sender()
    old = sender.update(2)
    new = sender.update(3)
    receiver.load(new)
    assert receiver.load(old) == receiver.load(new) == LoadReport(3)
    assert engine.versions == [3]


def test_a_late_actor_takes_the_newest_alone(engine: Engine, receiver: WeightReceiver) -> None:
    """Three updates come while the first is still being loaded."""
    senders = [Sender() for _ in range(3)]
    updates = [sender.update(version) for version, sender in enumerate(senders)]
    engine.gate.clear()
    reports: dict[int, LoadReport] = {}

    def load(i: int) -> None:
        reports[i] = receiver.load(updates[i])

    threads = [threading.Thread(target=load, args=(i,)) for i in range(3)]
    threads[0].start()
    assert engine.entered.wait(10)
    for thread in threads[1:]:
        thread.start()
    while receiver._newest_offered.get("one", -1) < 2:
        pass
    engine.gate.set()
    for thread in threads:
        thread.join(10)
    assert engine.versions == [0, 2]
    assert reports[2].version == 2


def test_the_publisher_cannot_write_while_a_swap_reads(engine: Engine, receiver: WeightReceiver) -> None:
    sender = Sender()
    update = sender.update(1)
    engine.gate.clear()
    thread = threading.Thread(target=receiver.load, args=(update,))
    thread.start()
    assert engine.entered.wait(10)
    assert not sender.segment.begin()
    engine.gate.set()
    thread.join(10)
    assert engine.bytes == [1] * SIZE


def test_other_bytes_than_were_sent_are_refused(
    engine: Engine, receiver: WeightReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that travel, as those through the object store, are compared with the sender's checksum."""
    monkeypatch.setattr("ray.get", lambda array, timeout: array)
    sent = np.arange(SIZE, dtype=np.uint8)
    arrived = sent.copy()
    update = WeightUpdate("one", 2, PARAMETERS, objects=[arrived], checksum=checksum(sent))
    arrived[SIZE // 2] ^= 1  # one bit
    with pytest.raises(WeightsRefused, match="the bytes of version 2 are not those that were sent"):
        receiver.load(update)
    assert engine.versions == []
    arrived[SIZE // 2] ^= 1
    receiver.load(update)
    assert engine.bytes == sent.tolist()


def test_bytes_may_travel_as_long_as_the_publisher_waits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    sent = np.arange(SIZE, dtype=np.uint8)

    def get(array: np.ndarray, timeout: float) -> np.ndarray:
        waits.append(timeout)
        return array

    monkeypatch.setattr("ray.get", get)
    update = WeightUpdate("one", 2, PARAMETERS, objects=[sent], checksum=checksum(sent))
    assert WeightReceiver(engine.swap, fetch_s=300.0).load(update).version == 2
    assert waits == [300.0]


@pytest.mark.parametrize("error", [OwnerDiedError("ab", None, ""), GetTimeoutError("60 s")])
def test_bytes_that_are_gone_with_their_sender_are_refused(
    error: Exception, engine: Engine, receiver: WeightReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.get", Mock(side_effect=error))
    update = WeightUpdate("one", 2, PARAMETERS, objects=[None], checksum=0)
    with pytest.raises(WeightsRefused, match=f"version 2 cannot be fetched: {type(error).__name__}"):
        receiver.load(update)
    assert engine.versions == []


def test_a_layout_of_another_size_is_refused(engine: Engine, receiver: WeightReceiver) -> None:
    sender = Sender()
    update = replace(sender.update(1), parameters=(*PARAMETERS, ("c", "float32", (1,))))
    with pytest.raises(WeightsRefused, match=f"version 1 has {SIZE} bytes; its layout needs {SIZE + 64}"):
        receiver.load(update)
    assert engine.versions == []


def test_what_has_been_replaced_meanwhile_is_refused(engine: Engine, receiver: WeightReceiver) -> None:
    sender = Sender()
    old = sender.update(1)
    sender.update(2)
    with pytest.raises(WeightsRefused, match="version 1 has been replaced by 2"):
        receiver.load(old)
    assert engine.versions == []


def test_a_learner_that_was_replaced_cannot_send_any_more(engine: Engine, receiver: WeightReceiver) -> None:
    """A new learner goes on from a commit, so its versions begin below those of the one before."""
    before, after = Sender("before"), Sender("after")
    receiver.connect("before", before.segment.address)
    receiver.load(before.update(7))
    receiver.connect("after", after.segment.address)
    with pytest.raises(WeightsRefused, match="not connected any more"):
        receiver.load(before.update(8))
    receiver.load(after.update(4))
    assert engine.versions == [7, 4]


def test_a_number_that_comes_as_the_next_learner_connects_does_not_count_for_that_one(
    engine: Engine, receiver: WeightReceiver
) -> None:
    """Version 9 of the learner before is looked at while the one after it connects, whose versions begin at 4."""
    before, after = Sender("before"), Sender("after")
    receiver.connect("before", before.segment.address)

    class Overtaken:
        publisher, is_first = "before", True

        @property
        def version(self) -> int:
            if self.is_first:
                self.is_first = False
                receiver.connect("after", after.segment.address)
            return 9

    with pytest.raises(WeightsRefused, match="version 9 is of a publisher that is not connected any more"):
        receiver.load(Overtaken())  # type: ignore[arg-type]
    assert receiver.load(after.update(4)).version == 4
    assert engine.versions == [4]


def test_an_actor_that_nobody_connected_takes_the_publisher_it_hears_first(receiver: WeightReceiver) -> None:
    one, two = Sender("one"), Sender("two")
    receiver.load(one.update(3))
    with pytest.raises(WeightsRefused, match="not connected any more"):
        receiver.load(two.update(4))


def test_an_ended_publisher_is_unreachable(receiver: WeightReceiver) -> None:
    sender = Sender()
    update = sender.update(1)
    sender.segment.close()
    assert not receiver.connect("one", sender.segment.address)
    with pytest.raises(WeightsRefused, match="version 1 cannot be read from here"):
        receiver.load(update)


def test_a_failing_swap_is_the_callers_error(receiver: WeightReceiver) -> None:
    def fail(parameters: Parameters, buffer: torch.Tensor, version: int) -> float:
        raise RuntimeError("out of memory")

    sender = Sender()
    broken = WeightReceiver(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        broken.load(sender.update(1))
    assert sender.segment.begin(), "the lock went with the error"


def test_an_engine_is_given_the_time_of_a_publish(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, float]] = []

    class Started:
        def __init__(self, *_: Any, **times: float):
            made.append(times)

        def run(self) -> None: ...

    monkeypatch.setattr("actors.vllm_engine.VLLMEngine", Started)
    monkeypatch.setattr("actors.conversation.start_conversations", lambda *_: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # that of this process is pytest's
    model, options, environment = ModelConfig(), EngineConfig(), EnvironmentConfig()
    arguments = (model, options, "shared_memory", True, (), None, environment)
    RolloutActor(*arguments, leave_grace_s=1.0, publish_timeout_s=300.0).serve()  # type: ignore[operator]
    assert made == [{"publish_timeout_s": 300.0}]


# ---- what is sent


def test_checkpoint_and_engine_have_the_same_weights(small_vocab: Path, tmp_path: Path, ranks: Ranks) -> None:
    config = make_config(small_vocab, tmp_path, dtype="float32")
    model = load_policy(str(small_vocab), config.model, config.learner, on_cpu=True)
    engine = TrainEngine(model, config.ppo.optimizer, config.learner, ranks, total_steps=1)
    mine = {name: tensor.clone() for name, tensor in EngineSource(engine)}
    theirs = dict(CheckpointSource(str(small_vocab)))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_zero_3_holds_one_gathered_layer_at_a_time(small_vocab: Path, tmp_path: Path, ranks: Ranks) -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    config = make_config(small_vocab, tmp_path, dtype="float32")
    config.learner.zero_stage = 3
    model = load_policy(str(small_vocab), config.model, config.learner, on_cpu=True)
    whole = sum(p.numel() for p in model.parameters())
    engine = TrainEngine(model, config.ppo.optimizer, config.learner, ranks, total_steps=1)
    source, theirs = EngineSource(engine), dict(CheckpointSource(str(small_vocab)))
    gathered, seen = [], 0
    for (name, tensor), meta in zip(source, source.metadata(), strict=True):
        assert (name, tuple(tensor.shape)) == (meta.name, meta.shape)
        assert np.array_equal(tensor.numpy(), theirs[name].numpy())
        available = [p for p in model.parameters() if p.ds_status == ZeroParamStatus.AVAILABLE]
        gathered.append(sum(p.numel() for p in available))
        seen += tensor.numel()
    assert seen == whole
    # Two decoder layers, an embedding, a head: each at most a third of the model here.
    assert max(gathered) < whole / 2.5
    assert all(p.ds_status != ZeroParamStatus.AVAILABLE for p in model.parameters())
