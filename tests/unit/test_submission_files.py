"""The batch script of SLURM and the manifest of KubeRay."""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml

from contracts.checks.overrides import quoted
from contracts.checks.validation import ConfigError
from submission import kuberay, slurm
from submission.job import Job, checked_job, to_job
from submission.ray_jobs import entrypoint
from submission.targets import SETTLED, KubeRay, RayJobs, Slurm
from tests.conftest import ROOT

PLACES = ["run_dir=/shared/runs/a", "cache_dir=/shared/cache"]
TWO_NODES = [*PLACES, "cluster=multi_node"]

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


@pytest.mark.parametrize(
    ("option", "written"),
    [
        ("target.time", "4:00:00"),
        ("+target.options.time-min", "1:30:00"),
        ("target.time", "30:00"),
        ("+target.options.begin", "16:00"),
    ],
)
def test_a_time_that_yaml_has_read_as_a_number_is_refused(option: str, written: str) -> None:
    number = yaml.safe_load(f"time: {written}")["time"]
    assert isinstance(number, int)  # of seconds, as YAML 1.1 has it; sbatch would read minutes
    with pytest.raises(
        ConfigError, match=rf"{option.lstrip('+')} must be .*; found {number}; write for example .* with its quotes"
    ):
        to_job(["target=slurm", f"{option}={number}", *TWO_NODES])
    to_job(["target=slurm", f"{option}={written}", *TWO_NODES])


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [
        (
            "target.time",
            ["90:00", "0:30:00", "1-0", "2-12:30", "7-00:00:00", "UNLIMITED"],
            ["240", "4h", "1:2", "now", "4:00:00:00"],
        ),
        ("+target.options.mem", ["64G", "512000M", "64GB", "0"], ["64", "64000", "64 G", "1.5"]),
        ("+target.options.mem-per-cpu", ["4G"], ["4096"]),
        ("+target.options.deadline", ["2026-12-01T16:00:00"], ["57600"]),
    ],
)
def test_the_form_of_times_and_sizes(option: str, good: list[str], bad: list[str]) -> None:
    for value in good:
        to_job(["target=slurm", hydra_word(f"{option}={value}"), *TWO_NODES])
    for value in bad:
        with pytest.raises(ConfigError, match=f"{option.lstrip('+')} must be"):
            to_job(["target=slurm", hydra_word(f"{option}={value}"), *TWO_NODES])


def test_the_time_is_said_once() -> None:
    with pytest.raises(ConfigError, match=r"target\.options\.time must be absent; found 1:00:00; write target\.time"):
        to_job(["target=slurm", "+target.options.time=1:00:00", *TWO_NODES])


def test_what_the_script_relies_on_is_no_option() -> None:
    job, config = to_job(["target=slurm", "target.partition=a", "target.account=b", *TWO_NODES])
    said = {option.removeprefix("--").split("=")[0] for option in slurm.directives(job, job.target, config.cluster)}  # type: ignore[arg-type]
    assert said - {"gpus-per-node"} == SETTLED.keys() - {"no-requeue"}
    options = {name: "x" for name in (*SETTLED, "out", "sig")}  # sbatch takes the beginning of a name, too
    with pytest.raises(ConfigError) as caught:
        checked_job(config, job.overrides, Slurm(options=options))
    for name in options:
        assert f"target.options.{name} must be absent; found x" in str(caught.value)
    assert "target.options.out must be absent; found x; write run_dir" in str(caught.value)
    for name in ("gpus-per-node", "time-min", "nodelist", "reservation", "qos", "mem-per-gpu", "exclude"):
        value = {"time-min": "1:00:00", "mem-per-gpu": "8G"}.get(name, "x")
        checked_job(config, job.overrides, Slurm(options={name: value}))


def as_sbatch_reads(line: str) -> list[str]:
    """The rules of `_get_argument` in opt.c of SLURM, written anew: words of a directive."""
    words, word, quote, escaped, begun = [], "", "", False, False
    for character in line:
        if not quote and character.isspace():
            words, word, begun = [*words, word] if begun else words, "", False
        elif escaped:
            word, escaped = word + character, False
        elif character == "\\":
            escaped = begun = True
        elif quote and character == quote:
            quote = ""
        elif not quote and character in "\"'":
            quote, begun = character, True
        elif not quote and character == "#":
            break
        else:
            word, begun = word + character, True
    assert not quote
    return [*words, word] if begun else words


VALUES = ["high", "a b", "it's", 'say "x"', "a\\b", "\\", "a#b", "# x", "$HOME `id` $(id); x", "a&b|c>d", "ü é"]
VALUES += ["", " x ", "'", '"']


@pytest.mark.parametrize("value", VALUES)
def test_sbatch_reads_a_directive_as_it_was_written(value: str) -> None:
    job = Job("a", [], f"/runs/{value}", Slurm(partition=value, options={"comment": value}))
    _, config = to_job(["target=slurm", *TWO_NODES])
    lines = slurm.render(job, config.cluster).splitlines()
    words = [as_sbatch_reads(line.removeprefix("#SBATCH ")) for line in lines if line.startswith("#SBATCH ")]
    assert words == [[option] for option in slurm.directives(job, job.target, config.cluster)]  # type: ignore[arg-type]
    assert [f"--comment={value}"] in words
    assert [f"--partition={value}"] in words


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run_dir", "/shared/a\nb"),
        ("target.partition", "a\nhostname"),
        ("target.account", "a\rb"),
        ("+target.options.comment", "a\n#SBATCH --uid=0"),
    ],
)
def test_what_a_directive_cannot_carry_is_refused(key: str, value: str) -> None:
    job, config = to_job(["target=slurm", *TWO_NODES])
    target = Slurm()
    if key == "run_dir":
        config.run_dir = value
    elif key.startswith("target."):
        setattr(target, key.removeprefix("target."), value)
    else:
        target.options["comment"] = value
    name = re.escape(key.lstrip("+"))
    with pytest.raises(
        ConfigError, match=f"{name} must be one line without control characters.*found {re.escape(repr(value))}"
    ):
        checked_job(config, job.overrides, target)


def test_names_of_options_and_variables() -> None:
    job, config = to_job(["target=slurm", *TWO_NODES])
    target = Slurm(options={"a b": "c"}, env={"A;B": "c", "OK_1": "d"})
    with pytest.raises(ConfigError) as error:
        checked_job(config, job.overrides, target)
    assert "target.options.'a b' must be the long name of an option of sbatch" in str(error.value)
    assert "target.env.'A;B' must be a name of letters, digits and _" in str(error.value)
    assert "OK_1" not in str(error.value)


def test_a_percent_sign_of_the_run_directory_is_one() -> None:
    _, config = to_job(["target=slurm", *TWO_NODES])
    found = slurm.directives(Job("a", [], "/a%j", Slurm()), Slurm(), config.cluster)
    assert "--output=/a%%j/slurm.log" in found


def test_the_pid_file_has_a_name_that_nobody_guesses(tmp_path: Path) -> None:
    script = rendered(tmp_path).read_text()
    assert "/tmp/" not in script.replace(str(tmp_path), "").replace(str(ROOT), "")
    assert batch(tmp_path, TMPDIR=str(tmp_path)).wait() == 0
    assert [path for path in tmp_path.iterdir() if path.name.startswith("tmp.")] == []  # and it is gone


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
    "ray": '[[ ${RAY_FAILS:-} ]] && exit 0\n[[ ${RAY_WAITS:-} ]] && echo waits >"$LOG" && sleep 1\n'
    'while [[ $1 != -- ]]; do shift; done\nshift\n"$@"',
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
    warn(job, tmp_path / "log")
    assert job.wait(20) == 75
    assert requeued(tmp_path)


def test_sigterm_while_ray_starts_is_remembered(tmp_path: Path) -> None:
    """train.py is not started at all."""
    job = batch(tmp_path, RAY_WAITS="1")
    warn(job, tmp_path / "log")
    assert job.communicate(timeout=20)[0] == "train.py has saved its state; the job is queued again\n"
    assert job.returncode == 75
    assert requeued(tmp_path)


def warn(job: subprocess.Popen[str], log: Path) -> None:
    """SIGTERM for the task, as SLURM sends it, when something has been written to the log."""
    while not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.05)
    [srun] = [p for p in psutil.Process(job.pid).children() if "srun" in " ".join(p.cmdline()[:2])]
    [task] = srun.children()
    task.send_signal(signal.SIGTERM)


def test_nodes_share_a_token_that_nobody_else_can_read(tmp_path: Path) -> None:
    assert batch(tmp_path).wait() == 0
    token = tmp_path / "it's a run/ray_token"
    first = token.read_text()
    assert len(bytes.fromhex(first)) == 32
    assert token.stat().st_mode & 0o777 == 0o600
    shutil.rmtree(tmp_path / "bin")
    assert batch(tmp_path).wait() == 0
    assert token.read_text() != first


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
# The fields that we use, as KubeRay's reference (1.7) documents them; PyPI, npm and Debian have no package with its CRD.
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
                        "enableInTreeAutoscaling": {"type": "boolean"},
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
    job, config = to_job(["target=kuberay", "target.volume_claim=data", *arguments])
    found = yaml.safe_load(kuberay.render(job, config))
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
    assert cluster["enableInTreeAutoscaling"] is False
    for group in (head, workers):
        [container] = group["template"]["spec"]["containers"]
        assert group["rayStartParams"]["num-gpus"] == "8"
        assert container["resources"]["limits"] == {"cpu": "32", "memory": "64Gi", "nvidia.com/gpu": "8"}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/dev/shm", "/shared"]
        assert container["env"] == [{"name": "HF_HOME", "value": "/shared/hf"}]
    assert found["spec"]["entrypoint"].startswith("exec python train.py cache_dir=/shared/cache cluster=multi_node")


@pytest.mark.parametrize(
    ("fleet", "replicas", "least", "most"),
    [
        ([], 5, 5, 5),  # fixed: what the layout states, used or not
        (["cluster.min_actors=1", "cluster.max_actors=30"], 1, 1, 5),  # 1 + 8 + 0.5 of 16
        # The job starts once the first ones are there: 9 + 8 + 0.5, and not 20 + 8 + 0.5.
        (["cluster.min_actors=9", "cluster.num_actors=20", "cluster.max_actors=30"], 2, 2, 5),
        (["reward_service.max_replicas=4"], 1, 1, 5),  # Serve asks for more of them
    ],
)
def test_the_pods_of_an_elastic_fleet_come_as_they_are_asked_for(
    fleet: list[str], replicas: int, least: int, most: int
) -> None:
    cluster = manifest(*TWO_NODES, "cluster.num_nodes=6", *fleet)["spec"]["rayClusterSpec"]
    [workers] = cluster["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (replicas, least, most)
    assert cluster["enableInTreeAutoscaling"] is bool(fleet)


def test_a_pod_that_must_go_stops_the_job_and_waits_for_it() -> None:
    found = manifest(*TWO_NODES, "target.stop_wait_s=200", "target.python=/opt/tandem/.venv/bin/python")
    spec = found["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert (
        spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        == found["spec"]["jobId"]
        == found["metadata"]["name"]
    )
    assert spec["terminationGracePeriodSeconds"] > 200
    [workers] = found["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    command = workers["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert command == ["/opt/tandem/.venv/bin/python", "-m", "actors.leave", "--within", "200"]
    assert yaml.safe_load(found["spec"]["runtimeEnvYAML"])["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "200"}


@pytest.mark.full
def test_pods_pass_the_schema_of_kubernetes() -> None:
    """Its own, of every field, where it is installed: 108 MB, too much for every environment."""
    kubernetes = pytest.importorskip("kubernetes_validate", reason="pip install --no-deps kubernetes-validate==1.37.0")
    cluster = manifest(*TWO_NODES, "target.volume_claim=data", "+target.env.A=b")["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        known = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": group["template"]}
        kubernetes.validate(known, "1.34", strict=True)
        group["template"]["spec"]["containers"][0]["lifecycles"] = {}
        with pytest.raises(kubernetes.ValidationError, match="lifecycles"):
            kubernetes.validate(known, "1.34", strict=True)


@pytest.mark.parametrize("name", ["7b", "2026", "-x", "ÄÖ", "a" * 90, "7" * 90])
def test_names_begin_with_a_letter(name: str) -> None:
    found = manifest(*TWO_NODES, f"name='{name}'")["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", found)
    assert len(found) <= 47 - len("-r99")


@pytest.mark.parametrize(
    "option", ["target.namespace=ML", "target.namespace=a.b", "target.namespace=-a", "target.volume_claim=a_b"]
)
def test_names_of_kubernetes_have_its_form(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"{option.split('=')[0]} must be a name of lower-case letters"):
        to_job(["target=kuberay", "target.volume_claim=data", option, *TWO_NODES])
    to_job(["target=kuberay", "target.volume_claim=a.b-1", "target.namespace=7ml", *TWO_NODES])


def test_nothing_that_a_shell_would_expand_stands_where_kuberay_writes_double_quotes() -> None:
    found = manifest(*TWO_NODES, "sft_model=${model.path}", "+target.env.WHERE='$HOME/x'", "name='a`b'")
    assert "metadata" not in found["spec"]
    assert "$" not in found["spec"]["runtimeEnvYAML"]
    assert "'sft_model=${model.path}'" in found["spec"]["entrypoint"]
    [container] = found["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "WHERE", "value": "$HOME/x"} in container["env"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "target.volume_claim must be the PersistentVolumeClaim that holds the run directory"),
        (["target.volume_claim=data", "run_dir=/data/x"], r"run_dir must be below target.volume_path \(/shared\)"),
        (
            ["target.volume_claim=data", "target.volume_path=/mnt"],
            r"cache_dir must be below target.volume_path \(/mnt\)",
        ),
        (
            ["target.volume_claim=data", "cluster.cpus_per_node=7.5"],
            "cluster.cpus_per_node must be a whole number .* write 7",
        ),
        (["target.volume_claim=data", "checkpoint.resume=never"], "checkpoint.resume must be auto with target=kuberay"),
    ],
)
def test_what_pods_would_lose_or_could_not_start_is_refused(options: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        to_job(["target=kuberay", *TWO_NODES, *options])


def test_a_layout_of_one_node_has_no_workers() -> None:
    found = manifest(*PLACES, "cluster=single_node_8gpu")
    assert found["spec"]["rayClusterSpec"]["workerGroupSpecs"] == []


def test_the_programs_behind_the_verbs() -> None:
    job = Job("a", [], "/run", KubeRay(namespace="ml"))
    assert kuberay.commands(job, "f.yaml")["stop"] == ["kubectl", "--namespace=ml", "delete", "rayjob", "a"]
    assert slurm.commands(Job("a", [], "/run", Slurm()), "f")["stop"] == ["scancel", "--name=a"]


# ---- Ray Jobs


@pytest.mark.parametrize("python", ["absent-python", "bare"])
def test_a_python_without_tandems_packages_is_named(python: str, tmp_path: Path) -> None:
    bare = tmp_path / "bare python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # without site-packages
    bare.chmod(0o755)
    given = str(bare) if python == "bare" else python
    done = subprocess.run(
        ["sh", "-c", entrypoint(Job("a", [], "/run", RayJobs(python=given)))], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"target.python={given} must be the Python of Tandem's environment on the head node" in done.stderr
    assert "hydra" in done.stderr.splitlines()[-1]


def test_a_python_that_has_them_runs_the_job_in_the_place_of_the_shell(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import os, sys; print(os.getpid(), sys.argv[1:])")
    job = Job("a", ["name=a b"], "/run", RayJobs(python=sys.executable))
    started = subprocess.Popen(["sh", "-c", entrypoint(job)], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert started.communicate()[0] == f"{started.pid} ['name=a b']\n"
    assert started.returncode == 0
