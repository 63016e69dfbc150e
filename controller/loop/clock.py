"""The time that the control plane lives in, and the queue of answers at which it waits: a simulation has its own."""

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Clock:
    now: Callable[[], float] = time.monotonic  # seconds
    inbox: Callable[[], Any] = queue.SimpleQueue  # one whose `get(timeout=seconds)` raises queue.Empty


WALL_CLOCK = Clock()
