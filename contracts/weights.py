"""What a publish of weights says to a receiver, and what the receiver answers. Small: the weights lie elsewhere."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Parameters = tuple[tuple[str, str, tuple[int, ...]], ...]  # (name, dtype, shape) in the order of the packed buffer


class WeightsRefused(ValueError):
    """A receiver does not take what it was given; it goes on with what it has."""


class ActorsMissing(RuntimeError):
    """A version of the weights did not reach every actor."""


@dataclass(frozen=True)
class SegmentAddress:
    """How another process of the node finds a segment."""

    pid: int
    descriptor: int
    token: bytes  # 16 random bytes at its start: process ids come again, and other containers have their own
    payload_bytes: int


@dataclass(frozen=True)
class WeightUpdate:
    """One version of all weights, and where it can be read."""

    publisher: str  # a receiver takes weights of the publisher that it was connected to last, and of no other
    version: int
    parameters: Parameters
    address: SegmentAddress | None = None  # for receivers on the publisher's node
    # The same bytes as one reference into Ray's object store, for receivers elsewhere; in a list, because Ray resolves a
    # reference that is an argument itself.
    objects: list[Any] = field(default_factory=list)
    checksum: int | None = None  # of `objects`; a segment is the sender's own memory, whose header says what it holds


@dataclass(frozen=True)
class LoadReport:
    """What a receiver did with an update."""

    version: int  # that it serves now; above the update's where it had a newer one
    fetch_s: float = 0.0  # to get at the bytes, and check those that travelled, while generation goes on
    pause_s: float = 0.0  # in which no token was generated


@dataclass(frozen=True)
class PublishReport:
    """Which actors serve a version, and why others do not."""

    version: int
    seconds: float
    pack_s: float
    nbytes: int
    calls: int  # to actors
    loaded: dict[int, LoadReport]  # by the actor's number
    missing: dict[int, str]  # reason by the actor's number
    update: WeightUpdate | None = None  # what a replaced actor needs to get the same; None with vLLM's own transports

    def metrics(self) -> dict[str, float]:
        reports = self.loaded.values()
        return {
            "perf/sync_s": self.seconds,
            "perf/sync_pack_s": self.pack_s,
            "perf/sync_fetch_s": max((r.fetch_s for r in reports), default=0.0),
            "perf/sync_pause_s": max((r.pause_s for r in reports), default=0.0),
            "fault/actors_without_update": float(len(self.missing)),
        }

    def require_all(self) -> None:
        """Raises ActorsMissing where an actor does not serve this version."""
        if self.missing:
            reasons = "; ".join(f"actor {i}: {reason}" for i, reason in sorted(self.missing.items()))
            raise ActorsMissing(f"version {self.version} of the weights did not reach every actor: {reasons}")


def checksum(buffer: np.ndarray) -> int:
    """xxh3 of uint8 [n]; 16 GB/s, so that checking costs less than copying."""
    import xxhash  # only who sends bytes needs it

    return xxhash.xxh3_64_intdigest(buffer.data)
