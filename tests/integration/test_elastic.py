"""A run whose fleet changes, by command and by a signal to an actor's process, is the run of a fixed fleet, bit for bit."""

import signal
from pathlib import Path

from controller import scale
from controller.ledger.audit import audit
from tests.integration.test_resume import Run, worker

UPDATES, ROLLOUTS = 40, 8
# Every sequence alone in its batch, of the engine as of the scorer: what is computed beside it changes its last bits.
ALONE = (
    "model.dtype=float32",
    "engine.max_num_seqs=1",
    "reward_service.dtype=float32",
    "reward_service.batch_tokens=1",
)
SMALL = (
    f"ppo.updates={UPDATES}",
    "ppo.value_warmup_updates=0",
    f"ppo.rollouts_per_update={ROLLOUTS}",
    "ppo.max_staleness=0",
    "ppo.trainable_layers=null",
    "checkpoint.every=0",
    "logger.table_every=1",
)
OF_THE_FLEET = ("fleet/", "ledger/", "fault/")


def test_a_fleet_that_changes_trains_what_a_fixed_one_does(
    tmp_path: Path, tiny_model: Path, reward_model: Path
) -> None:
    fixed = Run(tmp_path / "fixed", tiny_model, reward_model, *SMALL, *ALONE)
    assert fixed.finish() == 0, fixed.printed[-4000:]
    bounds = ("cluster.num_actors=1", "cluster.min_actors=1", "cluster.max_actors=2")
    run = Run(tmp_path / "elastic", tiny_model, reward_model, *SMALL, *ALONE, *bounds)
    with run.start() as driver:
        try:
            run.wait_for(driver, "version 1 ")
            assert scale.main([str(run.dir), "2"]) == 0
            run.wait_for(driver, "actor 1 has joined")
            run.wait_for(driver, "version ")
            run.wait_for(driver, "version ")
            assert scale.main([str(run.dir), "1"]) == 0
            run.wait_for(driver, "actor 1 has left")
            worker(driver, "RolloutActor").send_signal(signal.SIGTERM)
            run.wait_for(driver, "actor 0 has left")
            assert driver.stdout is not None
            run.printed += driver.stdout.read()
        finally:
            driver.terminate()
    print(run.printed)
    assert driver.returncode == 0
    assert "actor 0 leaves (its process was asked to end)" in run.printed
    assert "are given to others" not in run.printed  # all was finished in time

    last = run.metrics[-1]
    assert (last["fleet/actors"], last["fleet/joined"], last["fleet/left"]) == (1, 2, 2)
    assert (last["fault/actors_lost"], last["ledger/released"]) == (0, 0)
    assert run.model == fixed.model
    assert (run.dir / "samples.jsonl").read_text() == (fixed.dir / "samples.jsonl").read_text()
    for one, other in zip(run.metrics, fixed.metrics, strict=True):
        trained = {name for name in one if not name.startswith(OF_THE_FLEET)}
        assert {name: one[name] for name in trained} == {name: other[name] for name in trained}
    accounts = audit(run.dir / "ledger.jsonl")
    assert accounts.faults == []
    assert (accounts.admitted, accounts.trained, accounts.open) == (UPDATES * ROLLOUTS, UPDATES * ROLLOUTS, 0)
