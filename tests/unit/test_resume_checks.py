"""What a driver finds in its run directory: a lock, an earlier attempt, commits of another run."""

import os
import shlex
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from common.flatten import flat
from contracts.checks.validation import ConfigError
from contracts.config import ScorerConfig, TandemConfig
from controller.commits import commit_store
from controller.commits.commit_store import Commit
from controller.commits.resume import (
    RunDirectory,
    differences,
    end_orphans,
    is_ray_session,
    other_versions,
    require_scorers,
    resume_command,
)
from controller.stages import ppo
from tests.unit.test_commits import commit


@dataclass
class Part:
    clip: float = 0.2
    betas: tuple[float, float] = (0.9, 0.95)


def test_nested_configuration_is_compared_by_key() -> None:
    ours = flat({"seed": 1, "ppo": Part(), "prompts": "a" * 64})
    assert ours == {"seed": 1, "ppo.clip": 0.2, "ppo.betas": [0.9, 0.95], "prompts": "a" * 64}
    theirs = flat({"seed": 1, "ppo": Part(clip=0.3), "prompts": "b" * 64, "gone": None})
    assert differences(theirs, ours) == [
        'gone: the commit has null, this configuration "nothing"',
        "ppo.clip: the commit has 0.3, this configuration 0.2",
        "prompts: the commit has bbbbbbbbbbbb…, this configuration aaaaaaaaaaaa…",
    ]


def test_a_commit_of_another_run_is_refused(tmp_path: Path) -> None:
    commit(tmp_path, 2)
    directory = RunDirectory(tmp_path, print)
    with pytest.raises(ConfigError, match=r"of another run(.|\n)*seed: the commit has 1, this configuration 2"):
        directory.find("auto", {"seed": 2})
    found = directory.find("auto", {"seed": 1})
    assert found is not None
    assert found.step == 2


def test_never_sets_the_commits_aside(tmp_path: Path) -> None:
    commit(tmp_path, 2)
    said: list[str] = []
    directory = RunDirectory(tmp_path, said.append)
    (tmp_path / "metrics.jsonl").write_text("before\nppo\n")
    assert directory.find("never", {"seed": 2}) is None
    assert (tmp_path / "checkpoints.before-attempt-1/step_2/MANIFEST.json").exists()
    assert (tmp_path / "checkpoints.before-attempt-1/metrics.jsonl").read_text() == "before\nppo\n"
    assert "starting afresh" in said[0]
    assert commit_store.steps(tmp_path) == []


@pytest.mark.parametrize("is_stale", [True, False])
def test_the_end_of_what_is_made_anew_is_no_place_to_go_on_from(is_stale: bool, tmp_path: Path) -> None:
    """Nothing would train, and the old policy would stand for the new one."""
    commit(tmp_path, 2)
    said: list[str] = []
    directory = RunDirectory(tmp_path, said.append)
    found = directory.find("auto", {"seed": 1}, lambda commit: is_stale)
    assert (found is None) == is_stale
    assert (tmp_path / "checkpoints.before-attempt-1/step_2/MANIFEST.json").exists() == is_stale
    assert any("the end of a run by other code" in line for line in said) == is_stale


def test_a_limit_that_was_too_tight_may_be_widened(tmp_path: Path) -> None:
    """What bounds the work of a scorer decides no score."""
    scorer = ScorerConfig(kind="function", function="rules:score", options={"timeout_s": 1})
    before = flat({"seed": 1, "scorers": {"proxy": asdict(scorer)}}, keeps_empty=False)
    commit(tmp_path, 2, identity=before)
    directory = RunDirectory(tmp_path, print)
    wider = replace(scorer, timeout_s=20.0, processes=2, batch_size=8, memory_gib=4.0)
    wider.judge = replace(
        wider.judge, timeout_s=90.0, concurrency=4, engine=replace(wider.judge.engine, kv_cache_gib=2.0)
    )
    assert directory.find("auto", flat({"seed": 1, "scorers": {"proxy": asdict(wider)}}, keeps_empty=False))
    for other in (replace(scorer, function="rules:other"), replace(scorer, options={"timeout_s": 2})):
        with pytest.raises(ConfigError, match=r"scorers\.proxy\.(function|options\.timeout_s): the commit has"):
            directory.find("auto", flat({"seed": 1, "scorers": {"proxy": asdict(other)}}, keeps_empty=False))


def found_by_ppo(run_dir: Path, config: TandemConfig, said: list[str], code: str = "ours") -> Commit | None:
    """What stage PPO goes on from, with a log that forgets nothing that a test would miss."""
    log = SimpleNamespace(forget=lambda stage: said.append(f"forgot {stage}"), cut=lambda stage, counts: None)
    context = SimpleNamespace(
        config=config, directory=RunDirectory(run_dir, said.append), log=log, result="ppo",
        progress=SimpleNamespace(phase=lambda words: nullcontext(), line=said.append),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "_code", lambda context: code)
        patch.setattr(Commit, "driver_state", lambda commit: ({"logs": {}}, {}))
        return ppo._find_commit(context, {"seed": 1})  # type: ignore[arg-type]


def test_a_start_without_commits_leaves_those_that_are_there(tmp_path: Path) -> None:
    """It would take their lines of the log, and who goes on from them later would mix two runs."""
    commit(tmp_path, 2)
    (tmp_path / "metrics.jsonl").write_text("ppo\n")
    config, said = TandemConfig(), list[str]()
    config.checkpoint.every = 0
    assert found_by_ppo(tmp_path, config, said) is None
    assert (tmp_path / "checkpoints.before-attempt-1/step_2/MANIFEST.json").exists()
    assert (tmp_path / "checkpoints.before-attempt-1/metrics.jsonl").read_text() == "ppo\n"
    assert "checkpoint.every=0: starting afresh" in said[0]


@pytest.mark.parametrize(("reuse", "goes_on"), [("auto", False), (True, True), (False, False)])
def test_a_last_commit_of_other_code_is_taken_where_other_code_is(reuse: Any, goes_on: bool, tmp_path: Path) -> None:
    """A run that ended at it, before its stage was stored."""
    commit(tmp_path, 40, code="theirs")
    config = TandemConfig(reuse_stages=reuse)
    config.ppo.updates, config.ppo.value_warmup_updates = 36, 4
    found = found_by_ppo(tmp_path, config, [])
    assert (found is not None) == goes_on


def test_a_second_driver_is_refused(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path, print)
    with pytest.raises(ConfigError, match="another driver is working there"):
        RunDirectory(tmp_path, print)
    assert first.attempt == 1
    del first  # as when a process ends
    assert RunDirectory(tmp_path, print).attempt == 2


def test_processes_of_an_earlier_attempt_are_ended(tmp_path: Path) -> None:
    session, other = tmp_path / "session_1", tmp_path / "session_11"
    processes = []
    for folder in (session, other):
        folder.mkdir()
        with (folder / "worker.out").open("w") as log:
            processes.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=log))
    said: list[str] = []
    run = tmp_path / "run"
    RunDirectory(run, said.append).started_ray(str(session))
    RunDirectory(run, said.append)
    assert said == ["1 processes of an earlier attempt were still there and have been ended"]
    assert not psutil.pid_exists(processes[0].pid)
    assert processes[1].poll() is None  # of another session
    assert end_orphans(str(other)) == 1
    processes[1].wait(10)


def test_who_reads_the_logs_of_an_earlier_attempt_or_is_another_program_is_left_alone(tmp_path: Path) -> None:
    session = tmp_path / "session_1"
    session.mkdir()
    log = session / "worker.out"
    log.write_text("a line\n")
    reads = [
        sys.executable,
        "-c",
        "import sys, time; f = open(sys.argv[1]); print(f.read(), flush=True); time.sleep(60)",
    ]
    writes = ["sh", "-c", "echo a line; echo a line >&2; exec sleep 60"]
    with log.open("a") as own:
        somebody = [
            subprocess.Popen([*reads, log], stdout=subprocess.PIPE),
            subprocess.Popen(["tail", "-f", log], stdout=subprocess.PIPE),
            subprocess.Popen(writes, stdout=own, stderr=subprocess.PIPE),
        ]
    for process in somebody:
        pipe = process.stdout or process.stderr
        assert pipe is not None
        pipe.readline()  # it has the file open
    assert all(str(log) in {f.path for f in psutil.Process(p.pid).open_files()} for p in somebody)
    assert end_orphans(str(session)) == 0
    for process in somebody:
        assert process.poll() is None
        process.kill()
        process.wait(10)


@pytest.mark.parametrize(
    "written", ["", "/", "session_1", "/tmp", "\0", "/nowhere/session_1", "/session_1/../..", "/proc/1/session_"]
)
def test_what_is_no_ray_session_of_ours_ends_nobody(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty file, left by a full disk, would match the files of every process: nobody is even looked at."""

    def nobody() -> Any:
        raise AssertionError("processes were looked at")

    monkeypatch.setattr(psutil, "process_iter", nobody)
    tmp_path.joinpath("ray_session").write_text(written)
    said: list[str] = []
    RunDirectory(tmp_path, said.append)
    [line] = said
    assert line.startswith(f"{tmp_path}/ray_session names no Ray session of this user that is there: ignored (")
    assert not (tmp_path / "ray_session").exists()
    with pytest.raises(ValueError, match="no Ray session"):
        end_orphans(written)


def test_another_users_session_is_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "session_1").mkdir()
    assert is_ray_session(str(tmp_path / "session_1"))
    if os.getuid() == 0:
        os.chown(tmp_path / "session_1", 12345, -1)
        assert not is_ray_session(str(tmp_path / "session_1"))


def test_nobody_ends_itself_or_its_parents(tmp_path: Path) -> None:
    """A driver that writes into the session, and so does the process that started it."""
    session = tmp_path / "session_1"
    session.mkdir()
    code = "import sys\nfrom controller.commits.resume import end_orphans\nprint(end_orphans(sys.argv[1]))"
    child = f"import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', {code!r}, sys.argv[1]], text=True, "
    child += "stdout=subprocess.PIPE, stderr=open(sys.argv[1] + '/child.err', 'w')).stdout, end='')"
    with (session / "parent.err").open("w") as errors:
        done = subprocess.run(
            [sys.executable, "-c", child, session], stdout=subprocess.PIPE, stderr=errors, text=True, timeout=60
        )
    assert (done.returncode, done.stdout) == (0, "0\n"), (session / "child.err").read_text()


def test_a_torn_lock_file_counts_from_one(tmp_path: Path) -> None:
    (tmp_path / "driver.lock").write_text("\0\0 7")
    assert RunDirectory(tmp_path, print).attempt == 1


def test_a_refused_start_leaves_the_configuration_of_the_attempt_before(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path, print)
    first.write_config({"seed": 1})
    first.refused()  # there is none before, and this one says what was refused
    assert (tmp_path / "config.yaml").read_text() == "seed: 1\n"
    del first
    second = RunDirectory(tmp_path, print)
    second.write_config({"seed": 2})
    assert (tmp_path / "config.yaml").read_text() == "seed: 2\n"
    second.refused()
    assert (tmp_path / "config.yaml").read_text() == "seed: 1\n"


def test_other_packages_and_scorers(tmp_path: Path) -> None:
    found: Commit = commit(tmp_path, 2)
    said: list[str] = []
    other_versions(found, {"torch": "2"}, said.append)
    assert said == []
    other_versions(found, {"torch": "3"}, said.append)
    assert "torch 2 -> 3" in said[0]
    require_scorers(found, {})
    with pytest.raises(commit_store.CheckpointError, match="scored by other versions"):
        require_scorers(found, {"proxy": "v2"})


def test_the_command_to_go_on() -> None:
    numbers = "ppo.sampling.max_completion_tokens=12"
    assert (
        resume_command([numbers, "x.api_key=123"], "r") == f"python train.py {numbers} 'x.api_key=[redacted]' run_dir=r"
    )
    overrides = ["stage=ppo", "run_dir=elsewhere", "name=my run", "checkpoint.resume=never"]
    assert resume_command(overrides, "runs/x") == "python train.py stage=ppo 'name=my run' run_dir=runs/x"
    again = resume_command(["++run_dir=x", "+checkpoint.resume=never", "seed=2"], "/müller/r", ["--config-name=own"])
    assert shlex.split(again)[2:] == ["--config-name=own", "seed=2", "run_dir='/müller/r'"]
    # As the directory of a sweep's member, which Hydra takes in quotes alone.
    member = "runs/x/0-ppo.kl.coef=0.02,ppo.seed=1"
    *_, last = shlex.split(resume_command([], member))
    assert OverridesParser.create().parse_override(last).value() == member
