"""What a driver finds in its run directory: a lock, an earlier attempt, commits of another run."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from contracts.validation import ConfigError
from controller import commits
from controller.commits import Commit
from controller.resume import (
    RunDirectory,
    differences,
    end_orphans,
    flat,
    other_versions,
    require_scorers,
    resume_command,
)
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
    directory.start_log({"metrics.jsonl": 7})
    assert directory.find("never", {"seed": 2}) is None
    assert (tmp_path / "checkpoints.before-attempt-1/step_2/MANIFEST.json").exists()
    assert (tmp_path / "checkpoints.before-attempt-1/metrics.jsonl").read_text() == "before\nppo\n"
    assert directory.start_log({"metrics.jsonl": 11}) == {"metrics.jsonl": 7}
    assert "starting afresh" in said[0]
    assert commits.steps(tmp_path) == []


def test_a_second_driver_is_refused(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path, print)
    with pytest.raises(ConfigError, match="another driver is working there"):
        RunDirectory(tmp_path, print)
    assert first.attempt == 1
    del first  # as when a process ends
    assert RunDirectory(tmp_path, print).attempt == 2


def test_the_log_begins_where_the_first_attempt_began(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path, print)
    assert directory.start_log({"metrics.jsonl": 70}) == {"metrics.jsonl": 70}
    assert directory.start_log({"metrics.jsonl": 900}) == {"metrics.jsonl": 70}


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
    log = tmp_path / "worker.out"
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
    assert end_orphans(str(tmp_path)) == 0
    for process in somebody:
        assert process.poll() is None
        process.kill()
        process.wait(10)


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
    with pytest.raises(commits.CheckpointError, match="scored by other versions"):
        require_scorers(found, {"proxy": "v2"})


def test_the_command_to_go_on() -> None:
    numbers = "ppo.sampling.max_completion_tokens=12"
    assert (
        resume_command([numbers, "x.api_key=123"], "r") == f"python train.py {numbers} 'x.api_key=[redacted]' run_dir=r"
    )
    overrides = ["stage=ppo", "run_dir=elsewhere", "name=my run", "checkpoint.resume=never"]
    assert resume_command(overrides, "runs/x") == "python train.py stage=ppo 'name=my run' run_dir=runs/x"
