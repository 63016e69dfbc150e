"""Reads the clock in a trainer of TRL: seconds of every update, whole and by phase. It imports nothing of Tandem."""

import functools
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Seconds of every update, whole and by phase."""

    def __init__(self) -> None:
        self.updates: list[dict[str, float]] = []
        self._phases: dict[str, float] = {}
        self._last = 0.0
        self._busy = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.updates.append({"step_s": now - self._last} | self._phases)
        self._last, self._phases = now, {}

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its seconds counted as `phase` unless it runs inside another timed phase."""

        @functools.wraps(function)  # `generate` looks at the signature of `forward`
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._busy:
                return function(*args, **kwargs)
            self._busy, start = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._busy = False
                self._phases[phase] = self._phases.get(phase, 0.0) + time.perf_counter() - start

        return call
