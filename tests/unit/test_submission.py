"""What submit.py composes, checks and writes, without a cluster."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import fields
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import psutil
import pytest
import requests
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

import submission.job
import submit
from contracts.outcome import read_outcome, write_outcome
from contracts.overrides import unknown_overrides
from contracts.validation import ConfigError
from hydra_plugins.tandem_ray_jobs import RayJobsLauncherConf
from submission import kuberay, slurm
from submission.job import Job, next_id, quoted, recorded, to_job
from submission.ray_jobs import Cluster
from submission.targets import KubeRay, RayJobs, Slurm, to_target
from tests.conftest import ROOT

PLACES = ["run_dir=/shared/runs/a", "cache_dir=/shared/cache"]
TWO_NODES = [*PLACES, "cluster=multi_node"]


def refusal(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        to_job(list(arguments))
    return str(caught.value).splitlines()


# ---- targets


def test_targets_and_their_defaults() -> None:
    assert to_target([]) == RayJobs()
    assert to_target(["target=slurm", "target.time=1:00:00"]) == Slurm(time="1:00:00")
    kuberay_target = to_target(["target=kuberay", "target.memory_gib=8", "+target.env.HF_HOME=/shared/hf"])
    assert kuberay_target == KubeRay(memory_gib=8, env={"HF_HOME": "/shared/hf"})


def test_unknown_targets_and_keys_are_refused_with_the_closest() -> None:
    assert refusal("target=slrm") == ["target must be one of ray_jobs, kuberay, slurm; found slrm; write target=slurm"]
    assert refusal("target.adress=x", "target.pythn=y") == [
        "target.adress is not a key of target=ray_jobs; write target.address",
        "target.pythn is not a key of target=ray_jobs; write target.python",
    ]
    assert refusal("seed=1", "ppo.updats=3", "sead=2") == [
        "ppo.updats is not a key of the configuration; write ppo.updates",
        "sead is not a key of the configuration; write seed",
    ]


def test_a_value_of_the_wrong_type_is_refused() -> None:
    assert "could not be converted to Integer" in "\n".join(refusal("target.stop_wait_s=long"))
    assert "could not be converted to Integer" in "\n".join(refusal("ppo.updates=many", *PLACES))


# ---- the job


def test_a_job_takes_the_overrides_and_joins_the_cluster() -> None:
    job, config = to_job(["seed=3", "name=My run", "target.python=/opt/py", *PLACES])
    assert job.overrides == [
        "seed=3",
        "name=My run",
        "cache_dir=/shared/cache",
        "run_dir=/shared/runs/a",
        "cluster.address=auto",
    ]
    assert job.command == (
        "exec /opt/py train.py seed=3 'name=My run' cache_dir=/shared/cache run_dir=/shared/runs/a cluster.address=auto"
    )
    assert json.loads(job.metadata["overrides"]) == job.overrides
    assert job.metadata["run_dir"] == job.run_dir == "/shared/runs/a"
    assert config.cluster.address == "auto"
    assert job.id.startswith("my-run-pipeline-")


def test_a_run_directory_is_settled_once() -> None:
    """A resumed job takes the same directory, whatever the time."""
    job, _ = to_job(["run_dir=/shared/runs/${name}-${now:%S%f}", "cache_dir=/shared/cache"])
    assert "$" not in job.run_dir
    assert f"run_dir={job.run_dir}" in job.overrides


def test_everything_that_a_cluster_could_not_find_is_refused_at_once() -> None:
    lines = refusal("cluster.address=local", "sft_model=runs/old/sft", "ppo.lam=2", "target.excludes=[runs]")
    assert [line.strip("- ").split(" must be ")[0] for line in lines] == [
        "1 conflict in the configuration:",
        "ppo.lam",
        "4 conflicts in the configuration:",
        "run_dir",
        "cache_dir",
        "cluster.address",
        "sft_model",
    ]


def test_slurm_and_kuberay_need_the_size_of_the_nodes() -> None:
    [_, line] = refusal("target=slurm", *PLACES)
    assert "set with target=slurm" in line
    assert "cluster=multi_node" in line


def test_a_job_that_the_stated_nodes_cannot_hold_is_refused() -> None:
    lines = refusal("target=slurm", *TWO_NODES, "cluster.num_actors=9")
    assert "9 actors x 1 GPU + 8 learner ranks x 1 GPU" in "\n".join(lines)


@pytest.mark.parametrize("value", ["/a/b-c_d.e", "/a b", "/a=b,c", "/it's", "/back\\slash", "/[x]{y}"])
def test_quoted_values_come_back_from_hydras_grammar(value: str) -> None:
    [override] = OverridesParser.create().parse_overrides([f"run_dir={quoted(value)}"])
    assert override.value() == value


def test_names_of_jobs() -> None:
    job, _ = to_job(["name=" + "Very_long-" * 9 + "end", *PLACES])
    assert len(job.id) <= 44
    assert job.id.replace("-", "").isalnum()
    assert job.id == job.id.lower()
    assert next_id("demo-7f3a") == "demo-7f3a-r2"
    assert next_id("demo-7f3a-r2") == "demo-7f3a-r3"
    assert next_id("for-rest") == "for-rest-r2"


def test_a_submitted_job_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission.job, "RECORDS", tmp_path / "jobs")
    job = Job("a", ["seed=1"], "/run", Slurm(partition="gpu", env={"A": "b"}))
    job.record()
    assert recorded("a") == job
    assert recorded("b") is None


def test_submit_starts_without_an_engine() -> None:
    code = "import sys, submit; print([m for m in ('ray', 'torch', 'vllm', 'deepspeed') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_outcome_of_a_run(tmp_path: Path) -> None:
    for value in (0.25, None):
        write_outcome(tmp_path, value)
        assert read_outcome(tmp_path) == value
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_verbs_say_what_they_want(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in {
        ("status",): "write python submit.py status JOB; found 0 names of jobs",
        ("sttus", "a"): "sttus is neither key=value nor one of status, logs, stop, resume",
        ("resume", "a", "seed=2"): "seed=2 is nothing that resume can change; resume takes the overrides of the job",
        ("logs", "a", "target=slurm"): "a has not been submitted from this directory",
    }.items():
        assert submit.main(list(words)) == 2
        assert message in capsys.readouterr().err


def documented() -> list[list[str]]:
    """The words of each `python submit.py` in the documentation."""
    text = (ROOT / "docs/submission.md").read_text() + (ROOT / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "submit.py" in line]
    return [shlex.split(line, comments=True)[2:] for line in lines]


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_the_documented_commands_are_valid(words: list[str]) -> None:
    if words[0] in submit.VERBS:
        assert words[1:] == ["JOB"]
        return
    overrides = [word for word in words if word not in ("...", "--dry-run")]
    places = [] if "run_dir" in " ".join(words) else [*PLACES, "cluster=multi_node"]
    to_job([*overrides, *places])


def test_the_documented_sweep_is_valid() -> None:
    text = (ROOT / "docs/submission.md").read_text().replace("\\\n", " ")
    [line] = re.findall(r"^python train.py -m (.*)$", text, re.MULTILINE)
    words = shlex.split(line)
    assert unknown_overrides(words) == []
    known = {field.name for field in fields(RayJobsLauncherConf)}
    launcher = [
        word.removeprefix("hydra.launcher.").split("=")[0] for word in words if word.startswith("hydra.launcher.")
    ]
    assert set(launcher) <= known
    for member in product(*[word.split("=")[1].split(",") for word in words if word.startswith(("ppo", "seed"))]):
        to_job([f"ppo.kl.coef={member[0]}", f"seed={member[1]}", *PLACES])


# ---- Ray Jobs


def test_a_log_goes_on_where_the_connection_was_lost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("submission.ray_jobs.POLL_S", 0.0)
    monkeypatch.setattr("submission.ray_jobs.RECONNECT_S", 0.0)
    log, answers = "first line\nsecond line\nthird line\n", iter([12, 5, None])

    class Client:
        async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
            until = next(answers)
            for start in range(0, until or len(log), 4):
                yield log[start : min(start + 4, until or len(log))]
            self.ended = until is None
            if until is not None:
                raise RuntimeError("closed")

        def get_job_info(self, job_id: str) -> SimpleNamespace:
            self.asked = getattr(self, "asked", 0) + 1
            if self.asked == 3:
                raise requests.ConnectionError
            return SimpleNamespace(
                status=SimpleNamespace(is_terminal=lambda: getattr(self, "ended", False)), driver_exit_code=-9
            )

    cluster = object.__new__(Cluster)
    cluster.client, cluster.target = Client(), RayJobs()
    assert cluster.follow("job") == 128 + 9
    assert capsys.readouterr().out == log


# ---- SLURM


def rendered(tmp_path: Path, *options: str) -> Path:
    """A batch script of one node, in `tmp_path`."""
    arguments = ["stage=sft", "cluster.num_nodes=1", "cluster.gpus_per_node=0", "cluster.cpus_per_node=2"]
    places = [f"run_dir={tmp_path}/it's a run", f"cache_dir={tmp_path}/cache"]
    job, config = to_job(["target=slurm", *options, *arguments, *map(hydra_word, places)])
    Path(job.run_dir).mkdir(exist_ok=True)
    script = tmp_path / "job.sbatch"
    script.write_text(slurm.render(job, config.cluster))
    return script


def hydra_word(override: str) -> str:
    key, value = override.split("=", 1)
    return f"{key}={quoted(value)}"


def test_the_options_of_sbatch() -> None:
    job, config = to_job(
        ["target=slurm", "target.partition=gpu", "+target.options.qos=high", "target.stop_wait_s=300", *TWO_NODES]
    )
    lines = slurm.render(job, config.cluster).splitlines()
    assert [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")] == [
        f"--job-name={job.id}",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=32",
        "--exclusive",
        "--time=24:00:00",
        "--signal=TERM@300",
        "--requeue",
        "--open-mode=append",
        "--output=/shared/runs/a/slurm.log",
        "--partition=gpu",
        "--gpus-per-node=8",
        "--qos=high",
    ]
    assert "--num-cpus=32 --num-gpus=8" in "\n".join(lines)


def test_the_script_is_valid_shell(tmp_path: Path) -> None:
    script = rendered(tmp_path, "target.setup=[module load cuda]", "+target.env.A=b c")
    assert "export A='b c'" in script.read_text()
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "--severity=warning", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


STUBS = {
    "scontrol": '[[ $1 == requeue ]] && echo "requeue $2" >>"$LOG" || echo localhost',
    "squeue": 'echo "${STATE:-RUNNING}"',
    "srun": 'while [[ $1 == --* ]]; do shift; done\n"$@"',
    "ray": '[[ ${RAY_FAILS:-} ]] && exit 0\nwhile [[ $1 != -- ]]; do shift; done\nshift\n"$@"',
}
# Stands for train.py: waits for a signal where it is told to, leaves the mark where it ends well.
DRIVER = """#!/usr/bin/env python3
import os, signal, sys, time
print(sys.argv[1:], flush=True)
if os.environ.get("WAITS"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    open(os.environ["LOG"], "w").write(f"{os.getpid()}\\n")
    time.sleep(30)
code = int(os.environ.get("CODE", 0))
if code == 0:
    open(os.environ["MARK"], "w").write("{}")
sys.exit(code)
"""


def batch(tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    """The batch script as SLURM would start it, with programs that stand for SLURM and Ray."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {**{name: f"#!/bin/bash\n{text}\n" for name, text in STUBS.items()}, "python": DRIVER}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    script = rendered(tmp_path, f"target.python={programs}/python", f"target.directory={tmp_path}")
    known = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "LOG": str(tmp_path / "log"),
        "MARK": f"{tmp_path}/it's a run/result.json",
    }
    job = {"SLURM_JOB_ID": f"t{tmp_path.name}", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}
    return subprocess.Popen(["bash", script], env=known | job | environment, stdout=subprocess.PIPE, text=True)


def requeued(tmp_path: Path) -> bool:
    return (tmp_path / "log").exists() and "requeue" in (tmp_path / "log").read_text()


def test_success_is_train_pys_own(tmp_path: Path) -> None:
    job = batch(tmp_path)
    printed = job.communicate()[0]
    assert job.returncode == 0
    assert repr(f"run_dir={quoted(f'{tmp_path}/it' + chr(39) + 's a run')}") in printed
    assert not requeued(tmp_path)


def test_nodes_share_a_token_that_nobody_else_can_read(tmp_path: Path) -> None:
    assert batch(tmp_path).wait() == 0
    token = tmp_path / "it's a run/ray_token"
    first = token.read_text()
    assert len(bytes.fromhex(first)) == 32
    assert token.stat().st_mode & 0o777 == 0o600
    shutil.rmtree(tmp_path / "bin")
    assert batch(tmp_path).wait() == 0
    assert token.read_text() != first


def test_a_ray_that_did_not_start_fails_the_job(tmp_path: Path) -> None:
    """symmetric-run exits 0 then. A mark of an earlier attempt does not count."""
    (tmp_path / "it's a run").mkdir()
    (tmp_path / "it's a run/result.json").touch()
    assert batch(tmp_path, RAY_FAILS="1").wait() == 1


@pytest.mark.parametrize(
    ("code", "state", "again"), [("75", "RUNNING", True), ("75", "CANCELLED", False), ("2", "RUNNING", False)]
)
def test_a_saved_state_is_queued_again(tmp_path: Path, code: str, state: str, again: bool) -> None:
    assert batch(tmp_path, CODE=code, STATE=state).wait() == int(code)
    assert requeued(tmp_path) is again


def test_sigterm_for_the_task_reaches_train_py_alone(tmp_path: Path) -> None:
    """And the shells wait for it: it exits with the requeue code, and the job is queued again."""
    job = batch(tmp_path, WAITS="1")
    log = tmp_path / "log"
    while not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.05)
    [srun] = [p for p in psutil.Process(job.pid).children() if "srun" in " ".join(p.cmdline()[:2])]
    [task] = srun.children()
    task.send_signal(signal.SIGTERM)
    assert job.wait(20) == 75
    assert requeued(tmp_path)


# ---- KubeRay

POD = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "spec": {
            "type": "object",
            "required": ["containers"],
            "additionalProperties": False,
            "properties": {
                "terminationGracePeriodSeconds": {"type": "integer", "minimum": 0},
                "volumes": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["name"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string"},
                            "emptyDir": {"type": "object"},
                            "persistentVolumeClaim": {"type": "object", "required": ["claimName"]},
                        },
                    },
                },
                "containers": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "image"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
                            "image": {"type": "string"},
                            "workingDir": {"type": "string"},
                            "env": {"type": "array", "items": {"required": ["name", "value"]}},
                            "resources": {
                                "additionalProperties": False,
                                "properties": {
                                    kind: {"additionalProperties": {"type": "string", "pattern": r"^[0-9.]+(Gi)?$"}}
                                    for kind in ("requests", "limits")
                                },
                            },
                            "volumeMounts": {"type": "array", "items": {"required": ["name", "mountPath"]}},
                            "lifecycle": {"properties": {"preStop": {"required": ["exec"]}}},
                        },
                    },
                },
            },
        }
    },
}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
# The fields that we use, as KubeRay's reference documents them; no package has the schema of its CRD.
RAY_JOB = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": {
            "required": ["name"],
            "properties": {"name": {"pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}},
        },
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "entrypoint": {"type": "string"},
                "jobId": {"type": "string"},
                "metadata": STRINGS,
                "runtimeEnvYAML": {"type": "string"},
                "backoffLimit": {"type": "integer", "minimum": 0},
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "rayClusterSpec": {
                    "type": "object",
                    "required": ["headGroupSpec"],
                    "additionalProperties": False,
                    "properties": {
                        "rayVersion": {"type": "string"},
                        "authOptions": {"type": "object", "properties": {"mode": {"enum": ["disabled", "token"]}}},
                        "headGroupSpec": {
                            "type": "object",
                            "required": ["rayStartParams", "template"],
                            "additionalProperties": False,
                            "properties": {"rayStartParams": STRINGS, "template": POD},
                        },
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
                                "additionalProperties": False,
                                "properties": {
                                    "groupName": {"type": "string"},
                                    "rayStartParams": STRINGS,
                                    "template": POD,
                                    **{f: {"type": "integer"} for f in ("replicas", "minReplicas", "maxReplicas")},
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}


def manifest(*arguments: str) -> dict[str, Any]:
    """As it is read from the file."""
    job, config = to_job(["target=kuberay", *arguments])
    found = yaml.safe_load(kuberay.render(job, config.cluster))
    jsonschema.validate(found, RAY_JOB)
    return found


def test_a_manifest_has_the_documented_fields_and_the_size_of_the_layout() -> None:
    found = manifest(
        *TWO_NODES, "target.volume_claim=data", "target.image=registry/tandem:1", "+target.env.HF_HOME=/shared/hf"
    )
    cluster = found["spec"]["rayClusterSpec"]
    [workers] = cluster["workerGroupSpecs"]
    head = cluster["headGroupSpec"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 1
    for group in (head, workers):
        [container] = group["template"]["spec"]["containers"]
        assert group["rayStartParams"]["num-gpus"] == "8"
        assert container["resources"]["limits"] == {"cpu": "32", "memory": "64Gi", "nvidia.com/gpu": "8"}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/dev/shm", "/shared"]
        assert container["env"] == [{"name": "HF_HOME", "value": "/shared/hf"}]
    assert found["spec"]["entrypoint"].startswith("exec python train.py cache_dir=/shared/cache cluster=multi_node")


def test_a_pod_that_must_go_stops_the_job_and_waits_for_it() -> None:
    found = manifest(*TWO_NODES, "target.stop_wait_s=200")
    spec = found["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert (
        spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        == found["spec"]["jobId"]
        == found["metadata"]["name"]
    )
    assert spec["terminationGracePeriodSeconds"] > 200
    assert yaml.safe_load(found["spec"]["runtimeEnvYAML"])["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "200"}


def test_a_layout_of_one_node_has_no_workers() -> None:
    found = manifest(*PLACES, "cluster=single_node_8gpu")
    assert found["spec"]["rayClusterSpec"]["workerGroupSpecs"] == []


def test_the_programs_behind_the_verbs() -> None:
    job = Job("a", [], "/run", KubeRay(namespace="ml"))
    assert kuberay.commands(job, "f.yaml")["stop"] == ["kubectl", "--namespace=ml", "delete", "rayjob", "a"]
    assert slurm.commands(Job("a", [], "/run", Slurm()), "f")["stop"] == ["scancel", "--name=a"]
