"""A run whose fleet changes, by command and by a signal to an actor's process, is the run of a fixed fleet, bit for bit."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from controller import scale
from controller.ledger.audit import audit
from tests.integration.conftest import processes
from tests.integration.test_resume import Run

# Every sequence alone in its batch, of the engine as of the scorer: what is computed beside it changes its last bits.
ALONE = (
    "model.dtype=float32",
    "engine.max_num_seqs=1",
    "reward_service.dtype=float32",
    "reward_service.batch_tokens=1",
)
ENDLESS = (
    "ppo.updates=100000",
    "ppo.value_warmup_updates=0",
    "ppo.rollouts_per_update=8",
    "ppo.max_staleness=0",
    "checkpoint.every=100000",
)
OF_THE_FLEET = ("fleet/", "ledger/", "fault/", "progress/")


def stop(run: Run, driver: subprocess.Popen[str]) -> None:
    driver.send_signal(signal.SIGTERM)
    assert driver.stdout is not None
    run.printed += driver.stdout.read()
    assert driver.wait() == 75, run.printed[-4000:]


def until_alone() -> psutil.Process:
    """The only actor's process. Another that has left ends within the moment."""
    end = time.monotonic() + 30
    while len(found := processes("RolloutActor")) != 1:
        assert time.monotonic() < end, found
        time.sleep(0.1)
    return found[0]


def trained(run: Run) -> list[dict[str, Any]]:
    """Numbers and samples of every update."""
    samples = [json.loads(line) for line in (run.dir / "samples.jsonl").read_text().splitlines()]
    return [
        {
            **{name: value for name, value in row.items() if not name.startswith(OF_THE_FLEET)},
            "samples": [sample for sample in samples if sample["step"] == row["progress/version"]],
        }
        for row in run.metrics
    ]


@pytest.mark.full
def test_a_fleet_that_changes_trains_what_a_fixed_one_does(
    tmp_path: Path, tiny_model: Path, reward_model: Path
) -> None:
    bounds = ("cluster.num_actors=1", "cluster.min_actors=1", "cluster.max_actors=2")
    run = Run(tmp_path / "elastic", tiny_model, reward_model, *ENDLESS, *ALONE, *bounds)
    with run.start() as driver:
        try:
            run.wait_for(driver, "version 1 ")
            assert scale.main([str(run.dir), "2"]) == 0
            run.wait_for(driver, "actor 1 has joined")
            run.wait_for(driver, "version ")
            run.wait_for(driver, "version ")
            assert scale.main([str(run.dir), "1"]) == 0
            run.wait_for(driver, "actor 1 has left")
            until_alone().send_signal(signal.SIGTERM)
            run.wait_for(driver, "actor 0 leaves (its process was asked to end)")
            run.wait_for(driver, "actor 0 has joined")
            run.wait_for(driver, "version ")
            stop(run, driver)
        finally:
            driver.terminate()
    assert "are given to others" not in run.printed  # all was finished in time
    last = run.metrics[-1]
    assert (last["fleet/actors"], last["fleet/joined"], last["fleet/left"]) == (1, 2, 2)
    assert (last["fault/actors_lost"], last["ledger/released"]) == (0, 0)
    accounts = audit(run.dir / "ledger.jsonl")
    assert (accounts.faults, accounts.trained) == ([], 8 * len(run.metrics))

    fixed = Run(tmp_path / "fixed", tiny_model, reward_model, *ENDLESS, *ALONE)
    with fixed.start() as driver:
        try:
            fixed.wait_for(driver, f"version {len(run.metrics)} ")
            stop(fixed, driver)
        finally:
            driver.terminate()
    assert len(run.metrics) > 6
    assert trained(fixed)[: len(run.metrics)] == trained(run)
