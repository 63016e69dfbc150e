"""Takes updates of the weights for one engine: fetched and checked while it generates, then exchanged in one go.

load (any thread, one at a time)                                  the engine's thread
  newer than what is served? ── map, or get and check the bytes ──>  swap, between two decoding steps
"""

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError

from common.error_text import typed_line
from common.processes.shared_memory import SegmentReader, Superseded, Unreachable, layout, reachable
from contracts.weights import LoadReport, Parameters, SegmentAddress, WeightsRefused, WeightUpdate, checksum

KEPT_SEGMENTS = 3  # mappings; the publisher writes into another segment only while somebody still reads the last one


class WeightReceiver:
    """`swap(parameters, buffer, version)` replaces the engine's weights by the views into `buffer` (uint8) and returns the
    seconds in which nothing was generated; it may be called from any thread. `fetch_s` is what an update may take to come
    from Ray's object store: the publisher waits for `cluster.publish_timeout_s`."""

    def __init__(self, swap: Callable[[Parameters, torch.Tensor, int], float], fetch_s: float = 120.0):
        self._swap, self._fetch_s = swap, fetch_s
        self._one_at_a_time = threading.Lock()
        self._publisher: str | None = None
        self._version = -1  # what the engine has loaded itself is older than all that is published
        # By publisher, as one that has just been replaced may still write here.
        self._newest_offered: dict[str, int] = {}
        self._segments: dict[SegmentAddress, SegmentReader] = {}

    def connect(self, publisher: str, address: SegmentAddress | None) -> bool:
        """From now on take the weights of `publisher` alone, from whatever version on where it is a new one. Returns
        whether its segments can be read from here."""
        with self._one_at_a_time:
            if publisher != self._publisher:
                self._publisher = publisher
                self._version = -1
                self._forget(keep=0)
        return address is not None and reachable(address)

    def load(self, update: WeightUpdate) -> LoadReport:
        """Serve `update`, unless the engine serves it or a newer one already.

        Raises:
            WeightsRefused: it is another publisher's, its bytes are not the ones that were sent, or they cannot be had any
                more. The engine goes on with the weights that it has.
        """
        offered = self._newest_offered
        offered[update.publisher] = max(offered.get(update.publisher, -1), update.version)
        with self._one_at_a_time:
            if self._publisher is None:  # a replaced actor, which nobody has connected yet
                self._publisher = update.publisher
            if update.publisher != self._publisher:
                raise WeightsRefused(f"version {update.version} is of a publisher that is not connected any more")
            if update.version < offered[update.publisher] or update.version <= self._version:
                return LoadReport(self._version)
            start = time.perf_counter()
            with self._fetched(update) as buffer:
                fetch_s = time.perf_counter() - start
                pause_s = self._swap(update.parameters, as_tensor(buffer), update.version)
            self._version = update.version
            return LoadReport(update.version, fetch_s, pause_s)

    @contextmanager
    def _fetched(self, update: WeightUpdate) -> Iterator[np.ndarray]:
        wanted = layout(update.parameters)[1]
        try:
            reader = self._reader(update.address)
        except Unreachable as error:
            if not update.objects:
                raise WeightsRefused(f"version {update.version} cannot be read from here: {error}") from error
            try:
                array = ray.get(update.objects[0], timeout=self._fetch_s)
            except (ObjectLostError, GetTimeoutError) as lost:  # with the learner that sent it, or its node
                raise WeightsRefused(f"version {update.version} cannot be fetched: {typed_line(lost)}") from lost
            _check_size(array, wanted, update.version)
            if checksum(array) != update.checksum:
                raise WeightsRefused(f"the bytes of version {update.version} are not those that were sent") from None
            yield array
            return
        try:
            with reader.read(update.version) as array:
                _check_size(array, wanted, update.version)
                yield array
        except Superseded as error:
            raise WeightsRefused(str(error)) from error

    def _reader(self, address: SegmentAddress | None) -> SegmentReader:
        if address is None:
            raise Unreachable("it was sent through the object store alone")
        if address not in self._segments:
            self._forget(keep=KEPT_SEGMENTS - 1)
            self._segments[address] = SegmentReader(address)
        return self._segments[address]

    def _forget(self, keep: int) -> None:
        while len(self._segments) > keep:
            self._segments.pop(next(iter(self._segments))).close()


def as_tensor(buffer: np.ndarray) -> torch.Tensor:
    """The same memory as a tensor. Nothing may write to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the memory is read-only
        return torch.from_numpy(buffer)


def _check_size(array: np.ndarray, wanted: int, version: int) -> None:
    if array.nbytes != wanted:
        raise WeightsRefused(f"version {version} has {array.nbytes} bytes; its layout needs {wanted}")
