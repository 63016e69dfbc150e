"""Runs whose processes are killed and stopped, from outside, at chosen moments. What must hold after each: it ends as it
should, says what happened in one line, counts it, and its ledger balances.

Those without the mark are a small part of it, for `make test`; the others are `make test-chaos`.
"""

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from controller.commits import commit_store
from tests.chaos import Run, overrides

Start = Callable[..., Run]
CANARY = "canary-5b7e0c41d2"
SILENCE_S = 8


@pytest.fixture
def start(tmp_path: Path, tiny_model: Path, reward_model: Path) -> Iterator[Start]:
    runs: list[Run] = []

    def begin(*more: str, env: dict[str, str] | None = None) -> Run:
        bounds = (f"cluster.actor_silence_s={SILENCE_S}", f"cluster.learner_silence_s={SILENCE_S}")
        run = Run(tmp_path, overrides(tmp_path, tiny_model, reward_model, *bounds, *more), env)
        runs.append(run)
        return run

    yield begin
    for run in runs:
        run.kill()


def check_ledger(run: Run, trained: int, quarantined: int = 0) -> None:
    found = run.audit()
    assert found.faults == []
    assert (found.trained, found.quarantined, found.open) == (trained, quarantined, 0)


def secrets_in(folder: Path) -> list[str]:
    """Files that hold the canary."""
    found = [p for p in folder.rglob("*") if p.is_file() and CANARY.encode() in p.read_bytes()]
    return [str(p.relative_to(folder)) for p in found]


@pytest.mark.parametrize("actors", [1, pytest.param(2, marks=pytest.mark.chaos)])
def test_actors_reward_replica_and_learner_are_lost_in_one_run(start: Start, actors: int, tmp_path: Path) -> None:
    run = start(
        "ppo.updates=100000",
        "ppo.max_staleness=1",
        "checkpoint.every=2",
        f"cluster.num_actors={actors}",
        "logger.wandb=offline",
        "environment.name=tests.stand_ins:Keyed",
        f"+environment.options.api_key={CANARY}",
        env={"HF_TOKEN": CANARY, "WANDB_API_KEY": CANARY * 4},
    )
    at_s = run.wait_for(r"^version 3 ")
    stopped_s, _ = run.harm("actor", signal.SIGSTOP)
    assert run.wait_for(r"^actor \d is lost \(it has generated nothing") - stopped_s < 2 * SILENCE_S
    at_s = run.wait_for(r"^actor \d is back")
    run.harm("reward", signal.SIGKILL)
    at_s = run.wait_for(r"^version \d", after_s=at_s)
    run.harm("rank", signal.SIGKILL)
    at_s = run.wait_for(r"learner rank is lost: .* back to update \d+", after_s=at_s)
    run.wait_for(r"^version ([6-9]|\d\d)", after_s=at_s)
    run.stop()
    assert "go on with: python train.py stage=ppo name=chaos" in run.printed
    found, last = run.audit(), run.rows()[-1]
    assert commit_store.steps(run.run_dir)[-1] == last["progress/version"]
    assert (found.faults, found.quarantined) == ([], 0)
    assert found.trained == 16 * last["progress/version"] >= 16 * 6
    assert (last["fault/actors_silent"], last["fault/learner_restarts"]) == (1, 1)
    assert max(row["fault/unscored"] for row in run.rows()) == 0
    # Nothing that a run writes holds a secret of the configuration, the command line or the environment.
    assert CANARY not in run.printed
    assert list((run.run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert secrets_in(tmp_path) == []  # the run directory, and the cache of stages
    assert (run.run_dir.stat().st_mode & 0o777) == 0o700


@pytest.mark.chaos
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_actor_is_lost_idle_at_work_and_in_a_transfer(start: Start, how: signal.Signals) -> None:
    run = start("ppo.updates=10", "ppo.max_staleness=0", "cluster.max_actor_restarts=9")
    at_s = run.wait_for(r"^version 1 ")
    for moment in ("rollouts", "update", "transfer"):
        run.reach(moment, at_s)
        if moment != "transfer" or how == signal.SIGKILL:
            run.harm("actor", how)
        lost_s = run.wait_for("actor 0 is lost", after_s=at_s)
        at_s = run.wait_for("actor 0 is back", after_s=lost_s)
        at_s = run.wait_for(r"^version \d", after_s=at_s)
    assert run.end() == 0, run.printed
    check_ledger(run, 10 * 16)
    last = run.rows()[-1]
    assert last["fault/actors_lost"] == 3
    assert last["staleness/max"] == 0


@pytest.mark.chaos
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_reward_replica_is_lost(start: Start, how: signal.Signals) -> None:
    run = start("ppo.updates=6", "ppo.max_staleness=1", "reward_service.replicas=2", "reward_service.deadline_s=60")
    run.wait_for(r"^version 1 ")
    run.harm("reward", how)
    assert run.end() == 0, run.printed
    check_ledger(run, 6 * 16)
    assert max(row["fault/unscored"] for row in run.rows()) == 0


@pytest.mark.chaos
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_learner_rank_is_lost_at_work_in_a_transfer_and_in_a_save(start: Start, how: signal.Signals) -> None:
    """Two ranks: the other one waits in a collective for the one that is gone."""
    run = start("ppo.updates=10", "ppo.max_staleness=1", "checkpoint.every=1", "cluster.num_learner_ranks=2")
    at_s = run.wait_for(r"^version 2 ")
    for moment in ("update", "transfer", "commit"):
        run.reach(moment, at_s)
        run.harm("rank", how, which=1)
        if moment == "transfer":
            run.harm("actor", signal.SIGCONT)
        at_s = run.wait_for("back to update", after_s=at_s)
        at_s = run.wait_for(r"^version \d", after_s=at_s)
    assert run.end() == 0, run.printed
    check_ledger(run, 10 * 16)
    assert run.rows()[-1]["fault/learner_restarts"] == 3


@pytest.mark.chaos
def test_a_learner_that_is_lost_before_the_first_commit_begins_again(start: Start) -> None:
    run = start("ppo.updates=4", "ppo.max_staleness=1", "checkpoint.every=4")
    run.wait_for(r"^version 2 ")
    run.harm("rank", signal.SIGKILL)
    run.wait_for("back to update 0")
    assert run.end() == 0, run.printed
    check_ledger(run, 4 * 16)


@pytest.mark.chaos
def test_a_learner_that_cannot_be_kept_ends_the_run_and_the_next_goes_on(start: Start) -> None:
    run = start("ppo.updates=6", "checkpoint.every=1", "cluster.max_learner_restarts=0")
    run.wait_for(r"^version 2 ")
    run.harm("rank", signal.SIGKILL)
    assert run.end() == 1
    assert "cluster.max_learner_restarts is 0" in run.printed
    again = start("ppo.updates=6", "checkpoint.every=1")
    assert again.end() == 0, again.printed
    assert "going on from" in again.printed
    check_ledger(again, 6 * 16)


@pytest.mark.chaos
def test_other_stages_begin_again_once_and_what_is_finished_stays(start: Start) -> None:
    road = ("stage=pipeline", "sft_model=null", "proxy_model=null", "ppo.updates=1", "evaluate.prompts=8")
    run = start(*road)
    run.wait_for("… SFT on")
    run.harm("rank", signal.SIGKILL)
    run.wait_for("^sft has lost a process and begins again")
    run.wait_for("… proxy reward model on")
    run.harm("rank", signal.SIGKILL)
    at_s = run.wait_for("^reward_model/proxy has lost a process and begins again")
    run.wait_for("… proxy reward model on", after_s=at_s)
    run.harm("rank", signal.SIGKILL)
    assert run.end() == 1
    assert "finished stages are kept" in run.printed
    again = start(*road)
    again.wait_for("✓ sft: nothing has changed, reusing")
    again.wait_for("… evaluation|… evaluating base", 400)
    again.harm("actor", signal.SIGKILL)
    again.wait_for("^evaluate has lost a process and begins again")
    assert again.end() == 0, again.printed
    steps = [(row["stage"], row["step"]) for row in again.log("metrics.jsonl")]
    assert len(steps) == len(set(steps))  # what the lost processes had done is not in the log
    assert {stage for stage, _ in steps} >= {"sft", "reward_model/proxy", "ppo", "evaluate"}


@pytest.mark.chaos
def test_a_loss_that_is_not_finite_ends_the_run_with_its_batch(start: Start) -> None:
    """The first minibatch sends the weights out of range, the second meets them."""
    run = start("ppo.updates=4", "ppo.minibatches=2", "ppo.optimizer.learning_rate=1e30")
    assert run.end() == 1
    assert re.search(r"NonFiniteError: the .* no optimizer step was taken with it, its rollouts are in", run.printed)
    dump = run.run_dir / "non_finite.jsonl"
    assert len(dump.read_text().splitlines()) == 16
    assert dump.stat().st_mode & 0o777 == 0o600


@pytest.mark.chaos
def test_too_many_rollouts_without_a_score_end_the_run_with_the_list(start: Start, tmp_path: Path) -> None:
    rule = tmp_path / "rule.py"
    rule.write_text("def good(completions):\n    return [float('nan')] * len(completions)\n")
    run = start(
        "ppo.updates=4",
        "reward_service=brevity",  # the proxy is the sum of reward model and rule
        f"reward_service.scorers.brevity.function={rule}:good",
    )
    assert run.end() == 1
    assert "16 of 16 rollouts of version 0 have no score" in run.printed
    assert len((run.run_dir / "unscored.jsonl").read_text().splitlines()) == 16
