"""One block of a trainer of TRL, and seconds of every update, whole and by phase. It imports nothing of Tandem."""

import functools
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
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


def run_block(clock: Clock, make_trainer: Callable[..., Any], job_path: Path, out_path: Path) -> None:
    """Train what `make_trainer(job, directory, clock)` makes; writes seconds, peak memory and what trained."""
    job = json.loads(job_path.read_text())
    torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory(prefix="trl-bench-") as directory:
        trainer = make_trainer(job, directory, clock)
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {"updates": clock.updates, "peak_gib": peak, "trainable_parameters": trainable}
    out_path.write_text(json.dumps(result))
