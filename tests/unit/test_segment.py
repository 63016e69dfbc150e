"""Shared memory between processes: who may read and write when, and what becomes of it when one of them dies."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from common.processes.shared_memory import Segment, SegmentReader, Superseded, Unreachable, reachable
from contracts.weights import SegmentAddress
from tests.conftest import ROOT

# Reads version 1, says what it sees, and goes on reading until its input ends.
READER = """
import pickle, sys
from common.processes.shared_memory import SegmentReader
with SegmentReader(pickle.loads(bytes.fromhex(sys.argv[1]))).read(1) as payload:
    print(payload.tolist(), flush=True)
    sys.stdin.read()
"""


def written(version: int, values: list[int]) -> Segment:
    segment = Segment(len(values))
    assert segment.begin()
    segment.payload[:] = values
    segment.commit(version)
    return segment


def start_reader(address: SegmentAddress) -> subprocess.Popen[str]:
    import pickle

    command = [sys.executable, "-c", READER, pickle.dumps(address).hex()]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_another_process_reads_in_place_and_its_death_frees_the_segment() -> None:
    segment = written(1, [3, 1, 4, 1, 5])
    with start_reader(segment.address) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline().strip() == "[3, 1, 4, 1, 5]"
        assert not segment.begin(), "somebody reads it"
        reader.kill()  # SIGKILL: nothing in the reader gets to release the lock
        reader.wait()
    assert segment.begin()


def test_a_reader_gets_the_version_that_it_asked_for_or_none() -> None:
    segment = written(1, [1, 1])
    reader = SegmentReader(segment.address)
    with reader.read(1) as payload:
        assert payload.tolist() == [1, 1]
        assert not payload.flags.writeable
    assert segment.begin()
    segment.payload[0] = 2
    with pytest.raises(Superseded, match="being replaced"), reader.read(1):
        pass  # half written
    segment.commit(2)
    with pytest.raises(Superseded, match="version 1 has been replaced by 2"), reader.read(1):
        pass
    with reader.read(2) as payload:
        assert payload.tolist() == [2, 1]


def test_what_was_never_finished_cannot_be_read() -> None:
    segment = Segment(4)
    with pytest.raises(Superseded), SegmentReader(segment.address).read(0):
        pass


def test_the_payload_is_aligned() -> None:
    assert Segment(100).payload.ctypes.data % 64 == 0


@pytest.mark.parametrize(
    "change",
    [
        {"pid": 2**22 + 1},  # above the kernel's largest process id
        {"descriptor": 0},
        {"token": bytes(16)},
        {"payload_bytes": 9},
    ],
)
def test_an_address_that_leads_elsewhere(change: dict[str, object]) -> None:
    segment = written(1, [7] * 8)  # kept: with it goes all that its address leads to
    assert reachable(segment.address)
    assert not reachable(replace(segment.address, **change))  # type: ignore[arg-type]


def test_a_closed_segment_is_gone_for_new_readers_only() -> None:
    segment = written(1, [9, 9])
    reader = SegmentReader(segment.address)
    segment.close()
    assert not reachable(segment.address)
    with pytest.raises(Unreachable):
        SegmentReader(segment.address)
    with reader.read(1) as payload:
        assert payload.tolist() == [9, 9]


def test_closing_a_reader_leaves_no_descriptor() -> None:
    segment = written(1, [1] * 100)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        SegmentReader(segment.address).close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert np.all(segment.payload == 1)
