"""A run that is killed and resumed is the run that was never broken: same weights, same metrics, every rollout once."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from controller.commits import commit_store
from controller.ledger.audit import audit
from tests.conftest import ROOT, VADER, cache_in
from tests.preloaded import Python

TIMES = ("perf/", "progress/eta_s", "wall_s")
UPDATES = 5  # one of them fits the value model alone
ROLLOUTS = 64  # more than one call of the reward service
# What the unbroken run does not do: nothing that trains may differ by it.
HELD_OUT = (
    "evaluate.every=2",
    "evaluate.prompts=6",
    "evaluate.success=0",
    "evaluate.sampling.max_completion_tokens=12",
    f"data.eval_prompts.path={VADER}/test.jsonl",
)


class Run:
    """One run directory, and as many drivers as it takes."""

    def __init__(self, folder: Path, model: Path, judge: Path, *overrides: str):
        self.folder, self.dir = folder, folder / "run"
        self.command = [
            sys.executable,
            "train.py",
            "stage=ppo",
            f"run_dir={self.dir}",
            f"cache_dir={cache_in(folder)}",
            *(f"{key}={model}" for key in ("model.path", "sft_model")),
            f"proxy_model={judge}",
            "data.gold=null",
            *(f"data.{part}.path={VADER}/sft.jsonl" for part in ("sft", "prompts", "preferences", "test")),
            *(f"data.{part}.max_rows=24" for part in ("sft", "prompts", "preferences", "test")),
            f"ppo.updates={UPDATES - 1}",
            "ppo.value_warmup_updates=1",
            f"ppo.rollouts_per_update={ROLLOUTS}",
            "ppo.gold_rollouts=0",
            "ppo.kl.controller=adaptive",
            "ppo.ptx_coef=0.1",
            "ppo.ptx_batch_size=2",
            "ppo.combined.target=1",
            "ppo.trainable_layers=1",
            "ppo.value_trainable_layers=null",
            "ppo.sampling.max_completion_tokens=12",
            "checkpoint.every=1",
            "engine.kv_cache_gib=0.25",
            "cluster.min_memory_gib=3",
            "logger.wandb=disabled",
            *overrides,
        ]
        self.printed = ""

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, *overrides], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self, *overrides: str) -> int:
        with self.start(*overrides) as driver:
            assert driver.stdout is not None
            self.printed = driver.stdout.read()
        return driver.returncode

    def wait_for(self, driver: subprocess.Popen[str], text: str) -> None:
        assert driver.stdout is not None
        for line in driver.stdout:
            self.printed += line
            if text in line:
                return
        raise AssertionError(f"the driver ended without saying {text!r}: {self.printed[-4000:]}")

    def stop_after(self, version: int) -> None:
        """Go on until then, and be asked to end: saved, and out."""
        self.printed = ""
        with self.start() as driver:
            self.wait_for(driver, f"version {version} ")
            driver.send_signal(signal.SIGTERM)
            assert driver.stdout is not None
            self.printed += driver.stdout.read()
        assert driver.returncode == 75, self.printed[-4000:]
        assert 0 < commit_store.steps(self.dir)[-1] < UPDATES

    @property
    def metrics(self) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (self.dir / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]

    def without_held_out(self) -> list[dict[str, Any]]:
        return [{n: value for n, value in row.items() if not n.startswith("heldout/")} for row in self.metrics]

    @property
    def model(self) -> bytes:
        [file] = (self.folder / "cache/stages").glob("ppo-*/model/model.safetensors")
        return file.read_bytes()


def worker(driver: subprocess.Popen[str], name: str) -> psutil.Process:
    children = psutil.Process(driver.pid).children(recursive=True)
    [found] = [c for c in children if c.status() != psutil.STATUS_ZOMBIE and name in " ".join(c.cmdline())]
    return found


def freeze_and_kill(driver: subprocess.Popen[str], process: psutil.Process, after_s: float) -> psutil.Process:
    """Stop a process of the run, so that the driver waits for it, and then end the driver."""
    process.suspend()
    time.sleep(after_s)
    driver.kill()
    driver.wait()
    return process


def in_rollouts(run: Run, driver: subprocess.Popen[str]) -> psutil.Process:
    run.wait_for(driver, "version 1 ")
    return freeze_and_kill(driver, worker(driver, "RolloutActor"), 3)


def in_update(run: Run, driver: subprocess.Popen[str]) -> psutil.Process:
    run.wait_for(driver, "version 1 ")
    return freeze_and_kill(driver, worker(driver, "LearnerActor"), 3)


def in_commit(run: Run, driver: subprocess.Popen[str]) -> psutil.Process:
    """The learner stands still when a part of its file is there."""
    run.wait_for(driver, "fitting the value model")
    learner, file = worker(driver, "LearnerActor"), run.dir / "checkpoints/step_3.partial/rank_0.safetensors"
    while not (file.exists() and file.stat().st_size):
        time.sleep(0.0005)
    freeze_and_kill(driver, learner, 0)
    assert file.exists()
    assert not (run.dir / "checkpoints/step_3").exists()
    return learner


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, reward_model: Path) -> Run:
    run = Run(tmp_path_factory.mktemp("unbroken"), tiny_model, reward_model)
    assert run.finish() == 0, run.printed[-4000:]
    return run


def require_same(run: Run, unbroken: Run) -> None:
    """But for the commits, which another `checkpoint.every` makes at other updates."""
    assert run.without_held_out() == unbroken.metrics
    assert (run.dir / "samples.jsonl").read_text() == (unbroken.dir / "samples.jsonl").read_text()
    assert run.model == unbroken.model
    accounts = audit(run.dir / "ledger.jsonl")
    assert accounts.faults == []
    assert (accounts.admitted, accounts.trained, accounts.open) == (UPDATES * ROLLOUTS, UPDATES * ROLLOUTS, 0)


def test_an_unbroken_run_keeps_its_newest_commits_and_the_best(unbroken: Run) -> None:
    assert [row["stage"] for row in unbroken.metrics] == ["value_warmup"] + ["ppo"] * (UPDATES - 1)
    kept = commit_store.steps(unbroken.dir)
    assert set(kept) >= {UPDATES - 1, UPDATES}
    assert len(kept) <= 3
    best = commit_store.best(unbroken.dir)
    assert best is not None
    assert best.step in kept
    newest = commit_store.verified(unbroken.dir, UPDATES)
    assert (newest.version, newest.world_size) == (UPDATES - 1, 1)
    assert oct((unbroken.dir / "checkpoints").stat().st_mode & 0o777) == "0o700"
    assert {row["fault/commits_failed"] for row in unbroken.metrics} == {0}
    # The plain checkpoint in the last commit is what the stage leaves.
    assert (newest.path / "policy/model.safetensors").read_bytes() == unbroken.model


def test_a_commit_is_exported_as_a_plain_checkpoint(unbroken: Run, tmp_path: Path, python: Python) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = python(["controller/export.py", str(unbroken.dir), str(tmp_path / "out")])
    assert done.returncode == 0, done.stderr
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "proxy: version `" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("kill", "is_stopped"),
    [
        (in_update, False),
        pytest.param(in_update, True, marks=pytest.mark.full),
        pytest.param(in_rollouts, True, marks=pytest.mark.full),
        pytest.param(in_commit, True, marks=pytest.mark.full),
    ],
)
def test_killed_stopped_and_resumed(
    kill: Callable[..., psutil.Process],
    is_stopped: bool,
    unbroken: Run,
    tmp_path: Path,
    tiny_model: Path,
    reward_model: Path,
) -> None:
    run = Run(tmp_path, tiny_model, reward_model, *HELD_OUT)
    with run.start() as driver:
        frozen = kill(run, driver)
    reached = commit_store.steps(run.dir)[-1]
    printed = ""
    if is_stopped:
        run.stop_after(2)
        printed = run.printed
        assert f"go on with: python train.py stage=ppo {run.command[4]}" in printed
    assert run.finish() == 0, run.printed[-4000:]
    printed = printed or run.printed
    assert "of an earlier attempt were still there and have been ended" in printed
    assert not frozen.is_running() or frozen.status() == psutil.STATUS_ZOMBIE
    assert "going on from" in printed
    assert f"after update {reached}" in printed
    require_same(run, unbroken)
    assert commit_store.steps(run.dir) == commit_store.steps(unbroken.dir)
    answered = [row for row in run.metrics if "heldout/accuracy" in row]
    assert [row["progress/version"] for row in answered] == [1, 3]  # after updates by versions 0 and 2
    assert all(0 <= row["heldout/accuracy"] <= 1 and row["heldout/unscored"] == 0 for row in answered)


@pytest.mark.full
def test_stopped_after_an_update_that_is_not_due(
    unbroken: Run, tmp_path: Path, tiny_model: Path, reward_model: Path
) -> None:
    run = Run(tmp_path, tiny_model, reward_model, "checkpoint.every=3")
    run.stop_after(1)
    assert commit_store.steps(run.dir) == [2]  # the first update fits the value model
    assert run.finish() == 0, run.printed[-4000:]
    assert "after update 2" in run.printed
    require_same(run, unbroken)


@pytest.mark.full
def test_exactly_once_where_actors_work_ahead(tmp_path: Path, tiny_model: Path, reward_model: Path) -> None:
    run = Run(tmp_path, tiny_model, reward_model, "ppo.max_staleness=1", "ppo.score_batch=2", "checkpoint.every=2")
    for text in ("version 2 ", "version 3 "):
        with run.start() as driver:
            run.wait_for(driver, text)
            driver.kill()
    assert run.finish() == 0, run.printed[-4000:]
    accounts = audit(run.dir / "ledger.jsonl")
    assert accounts.faults == []
    assert (accounts.trained, accounts.quarantined, accounts.open) == (UPDATES * ROLLOUTS, 0, 0)
    assert [row["progress/version"] for row in run.metrics] == list(range(UPDATES))


def test_another_configuration_is_refused(unbroken: Run, python: Python) -> None:
    before, config = unbroken.metrics, (unbroken.dir / "config.yaml").read_bytes()
    done = python([*unbroken.command[1:], "ppo.clip=0.3", "data.prompts.max_rows=23", "reuse_stages=false"])
    assert done.returncode == 2
    assert "ppo.clip: the commit has 0.2, this configuration 0.3" in done.stderr
    assert "prompts: the commit has " in done.stderr
    assert "starting Ray" not in done.stdout
    assert unbroken.metrics == before
    assert (unbroken.dir / "config.yaml").read_bytes() == config


def test_two_drivers_in_one_directory(unbroken: Run, python: Python) -> None:
    import fcntl

    with (unbroken.dir / "driver.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = python(unbroken.command[1:])
    assert done.returncode == 2
    assert "another driver is working there" in done.stderr
