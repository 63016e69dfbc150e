"""What submit.py composes, checks and writes, without a cluster."""

import copy
import json
import re
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf

import submission.job
import submit
from common.files.outcome import read_outcome, write_outcome
from common.models.precision import choose_dtypes
from contracts.checks.overrides import quoted, unknown_overrides
from contracts.checks.validation import ConfigError
from contracts.config import TandemConfig, to_config
from controller.pipeline.ingredients import made_of
from controller.record.redaction import redacted
from controller.sweep import group_of
from hydra_plugins.tandem_ray_jobs import RayJobsLauncher, RayJobsLauncherConf, check_travels
from submission.job import CONF, Job, next_id, recorded, to_job
from submission.ray_jobs import Cluster
from submission.targets import KubeRay, RayJobs, Slurm, changed, composed, to_target
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
    assert refusal("ppo.updates=many", *PLACES) == [
        "ppo.updates must be a whole number; found many; write for example 50 (the default)"
    ]


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("model.revision=12e4567", "found 12e4567, which is read as inf; write model.revision='\"12e4567\"'"),
        ("name=1.10", "found 1.10, which is read as 1.1; write name='\"1.10\"'"),
        ("+target.env.V=12.10", "found 12.10, which is read as 12.1; write +target.env.V='\"12.10\"'"),
        ("+target.env.TOKENIZERS_PARALLELISM=false", "found false, which is read as False; write"),
        ("+target.env.X=1_000", "found 1_000, which is read as 1000; write"),
        ("target.account=12e3", "found 12e3, which is read as 12000.0; write target.account='\"12e3\"'"),
        ("+target.options.constraint=1e5", "found 1e5, which is read as 100000.0; write"),
        ("+target.env={V: 1.10}", "found one that is read as 1.1; write it in quotes within {V: 1.10}"),
        ("target.setup=[1.10]", "found one that is read as 1.1; write it in quotes within [1.10]"),
    ],
)
def test_a_text_that_is_read_as_something_else_is_refused(word: str, text: str) -> None:
    [found] = refusal("target=slurm", word, *TWO_NODES)
    assert " must be a text; " in found
    assert text in found


def test_texts_of_a_target_that_read_as_they_are_written() -> None:
    words = ["+target.env.A=8", '+target.env.B="1.10"', "+target.env.C=1.5"]
    assert to_target(words) == RayJobs(env={"A": "8", "B": "1.10", "C": "1.5"})


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


@pytest.mark.parametrize(
    ("path", "holds"), [(".", True), ("./x", True), ("runs", False), ("../x.jsonl", False), ("a/../../x", False)]
)
def test_a_path_is_uploaded_where_it_lies_below_and_is_not_left_out(path: str, holds: bool) -> None:
    words = [*PLACES, f"data.sft.path={path}"]
    if holds:
        to_job(words)
    else:
        assert "data.sft.path must be absolute, or below a directory that is uploaded" in "\n".join(refusal(*words))


def test_what_cannot_be_resolved_is_named() -> None:
    why = "KeyError raised while resolving interpolation: \"Environment variable 'NOPE' not found\""
    for key in ("run_dir", "data.sft.path", "+target.env.V"):
        assert refusal(*PLACES, f"{key}=${{oc.env:NOPE}}") == [f"{key.lstrip('+')}: {why}"]


def test_configuration_that_lies_elsewhere_is_sent_where_the_nodes_can_reach_it() -> None:
    lines = refusal(*PLACES, "hydra.searchpath=[pkg://conf,file://conf]", "++cluster.address=local")
    assert [line.strip("- ").split(" must be ")[0] for line in lines[1:]] == ["cluster.address", "hydra.searchpath"]
    word = "hydra.searchpath=[pkg://conf]"
    assert word in to_job([*PLACES, word])[0].overrides


@pytest.mark.parametrize("flag", [["-cn", "own"], ["--config-name=own"], ["--config-dir", "d"], ["-cp", "d"]])
def test_flags_of_hydra_are_none_of_submit(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        submit.main([*flag, *PLACES])
    assert (end.value.code, flag[0] in capsys.readouterr().err) == (2, True)


@pytest.mark.parametrize("target", ["ray_jobs", "slurm", "kuberay"])
def test_a_job_is_not_killed_before_it_has_saved(target: str) -> None:
    places = [*TWO_NODES, *(["target.volume_claim=data"] if target == "kuberay" else [])]
    [_, line] = refusal(f"target={target}", "checkpoint.grace_s=110.5", *places)
    assert line == (
        "  - target.stop_wait_s must be at least 15 s above checkpoint.grace_s (110.5 s), in which the job saves its state; "
        "found 120; write target.stop_wait_s=126, or a smaller checkpoint.grace_s"
    )
    to_job([f"target={target}", "checkpoint.grace_s=105", *places])


def test_slurm_and_kuberay_need_the_size_of_the_nodes() -> None:
    [_, line] = refusal("target=slurm", *PLACES)
    assert "set with target=slurm" in line
    assert "cluster=multi_node" in line


def test_a_job_that_the_stated_nodes_cannot_hold_is_refused() -> None:
    lines = refusal("target=slurm", *TWO_NODES, "cluster.num_actors=9")
    assert "9 actors x 1 GPU + 8 learner ranks x 1 GPU" in "\n".join(lines)


@pytest.mark.parametrize(
    "value",
    [
        *(
            "/a/b-c_d.e",
            "/a b",
            "/a=b,c",
            "/it's",
            "/back\\slash",
            "/[x]{y}",
            "/müller/josé",
            "é",
            "",
            " a ",
            "-",
            "a:b",
        ),
        *("1.10", "1e5", "1_000", "007", "true", "NULL", "nan", "-inf", ".5", "1.2.3"),
    ],
)
def test_quoted_values_come_back_from_hydras_grammar(value: str) -> None:
    [override] = OverridesParser.create().parse_overrides([f"run_dir={quoted(value)}"])
    assert override.value() == value
    assert type(override.value()) is str


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


@pytest.mark.parametrize("verb", ["resume", "stop"])
def test_what_a_written_script_has_settled_is_not_taken_for_changed(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submission.job, "RECORDS", tmp_path)
    ran: list[list[str]] = []
    monkeypatch.setattr(submit, "run", lambda command: ran.append(command) or 0)
    for kind, override in ((Slurm, "target.time=4:00:00"), (KubeRay, "target.retries=2")):
        job = Job(f"demo-{kind.__name__}", [], "/shared/run", kind())
        job.record()
        assert submit.main([verb, job.id, override]) == 2
        said = capsys.readouterr().err
        assert f"{override} is nothing that {verb} can change with target={kind.__name__.lower()}" in said
        assert ("submit it again" in said) == (verb == "resume")
        assert ran == []
    assert submit.main(["status", job.id]) == 0
    assert ran == [["kubectl", "--namespace=default", "get", "rayjob", job.id]]


@pytest.mark.parametrize(
    ("squeue", "said"),
    [
        ("echo '4711 RUNNING'", "demo is there (4711 RUNNING): python submit.py stop demo, and wait for its end"),
        ("echo down >&2; exit 1", "does not say whether demo still runs: down"),
        ("exit 0", ""),
    ],
)
def test_a_job_that_is_there_is_not_sent_a_second_time(
    squeue: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submission.job, "RECORDS", tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name, text in {"squeue": squeue, "sbatch": f"echo sent >>{tmp_path}/log"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    Job("demo", [], "/shared/run", Slurm()).record()
    assert submit.main(["resume", "demo"]) == (2 if said else 0)
    assert said in capsys.readouterr().err
    assert (tmp_path / "log").exists() is not bool(said)


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
    claim = ["target.volume_claim=data"] if words[0] == "target=kuberay" and "..." in words else []
    to_job([*overrides, *places, *claim])


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


def test_the_launcher_gets_plain_values() -> None:
    launcher = instantiate(OmegaConf.structured(RayJobsLauncherConf(address="http://head:8265")))
    assert launcher.target == RayJobs(address="http://head:8265")
    assert type(launcher.target.excludes) is list
    assert launcher.max_parallel == 4


def test_a_sweep_whose_configuration_would_not_reach_its_jobs_is_refused() -> None:
    def hydra(name: str = "config", overrides: tuple[str, ...] = (), **sources: str) -> Any:
        found = [{"provider": provider, "path": path} for provider, path in {"main": str(CONF), **sources}.items()]
        task = {"job": {"config_name": name}, "runtime": {"config_sources": found}}
        return OmegaConf.create({**task, "overrides": {"hydra": list(overrides)}})

    check_travels(hydra(overrides=("hydra.launcher.max_parallel=2", "hydra.sweep.dir=/shared/x")))
    for given, words in (
        (hydra("own"), "--config-name=own"),
        (hydra("own", **{"command-line": "/my conf"}), "--config-name=own --config-dir=/my conf"),
        (hydra(main="/other"), "--config-path=/other"),
        (hydra(overrides=("hydra.searchpath=[file:///x]",)), "hydra.searchpath=[file:///x]"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_travels(given)
        assert str(caught.value).startswith(f"{words}: a job of hydra/launcher=ray_jobs composes conf/config.yaml with")
    with pytest.raises(
        ConfigError, match=r"hydra\.launcher\.env\.V must be a text; found 12\.10, which is read as 12\.1"
    ):
        check_travels(hydra(overrides=("+hydra.launcher.env.V=12.10",)))


class NoCluster:
    """Stands for a cluster: takes every job and ends it well."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def check_capacity(self, config: TandemConfig) -> None: ...

    def submit(self, job: Job) -> None:
        self.jobs.append(job)
        write_outcome(Path(job.run_dir), 0.5)

    def wait(self, job_id: str) -> int:
        return 0


def test_a_member_that_is_done_is_not_sent_again_and_the_others_share_a_group(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher: RayJobsLauncher = instantiate(OmegaConf.structured(RayJobsLauncherConf(python=sys.executable)))
    launcher.running, launcher.is_ending = set(), False
    model, cluster = tmp_path / "model", NoCluster()
    model.mkdir()
    (model / "config.json").write_text("{}")
    words = ["stage=evaluate", "method=none", "data=files", "data.eval_prompts.path=p.jsonl", f"model.path={model}"]
    words += [f"cache_dir={tmp_path}/c", f"sft_model={model}", f"proxy_model={model}", f"gold_model={model}"]
    results = []
    for number in (0, 1):
        run_dir = tmp_path / f"my sweep/{number}"
        run_dir.mkdir(parents=True, exist_ok=True)
        task = composed(
            "config", [*words, f"ppo.seed={number}", f"run_dir={quoted(str(run_dir))}", "cluster.address=auto"]
        )
        task.logger.group = group_of(task, str(run_dir.parent))
        if number == 0:  # as its run has left it
            config = to_config(copy.deepcopy(task))
            choose_dtypes(config)
            (run_dir / "config.yaml").write_text(yaml.safe_dump(redacted(asdict(config))))
            (run_dir / "status.json").write_text(json.dumps({"state": "done", "made_of": made_of(config)}))
            write_outcome(run_dir, 0.25)
        whole = OmegaConf.create(
            {"hydra": {"overrides": {"task": [*words, f"ppo.seed={number}"]}, "job": {"name": "train"}}}
        )
        results.append(launcher._run(cluster, number, task, whole))  # type: ignore[arg-type]
    assert [result.return_value for result in results] == [0.25, 0.5], capsys.readouterr()
    [job] = cluster.jobs
    assert job.run_dir == f"{tmp_path}/my sweep/1"
    assert "logger.group='my sweep'" in job.overrides
    assert f"#0: {tmp_path}/my sweep/0 is done already" in capsys.readouterr().out


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


def test_a_job_on_another_address_keeps_the_rest_of_its_target() -> None:
    known = RayJobs(python="/opt/python", env={"A": "1", "B": "2"}, stop_wait_s=315)
    found = changed(known, ["target.address=http://10.0.0.1:8265", "+target.env.B=3"])
    assert found == replace(known, address="http://10.0.0.1:8265", env={"A": "1", "B": "3"})
    assert changed(known, []) == known
    assert isinstance(changed(known, ["target=slurm"]), Slurm)


class Jobs:
    """One job that has ended, as Ray's Jobs API tells of it; keeps what is submitted."""

    def __init__(self, overrides: list[str]):
        self.sent: dict[str, Any] = {}
        metadata = {"overrides": json.dumps(overrides), "run_dir": "/shared/runs/a", "python": "/opt/python"}
        environment = {"env_vars": {"HF_HOME": "/shared/hf", "RAY_JOB_STOP_WAIT_TIME_S": "120"}}
        status = SimpleNamespace(is_terminal=lambda: True, value="STOPPED")
        self.info = SimpleNamespace(metadata=metadata, runtime_env=environment, status=status)

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        return self.info

    def submit_job(self, **options: Any) -> None:
        self.sent = options


def test_what_another_machine_has_sent_is_resumed_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(submission.job, "RECORDS", tmp_path)
    cluster = object.__new__(Cluster)
    cluster.client, cluster.target = Jobs(["stage=sft", "checkpoint.resume=never"]), RayJobs(address="http://a:1")  # type: ignore[assignment]
    job = cluster.resume("a-job")
    sent = cluster.client.sent  # type: ignore[attr-defined]
    assert job.target == RayJobs(address="http://a:1", python="/opt/python", env={"HF_HOME": "/shared/hf"})
    assert job.overrides == ["stage=sft"]  # it goes on where the first one has saved
    assert sent["runtime_env"]["env_vars"] == {"HF_HOME": "/shared/hf", "RAY_JOB_STOP_WAIT_TIME_S": "120"}
    assert sent["entrypoint"].endswith("exec /opt/python train.py stage=sft")


def test_an_elastic_job_needs_room_for_its_fewest_actors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = object.__new__(Cluster)
    monkeypatch.setattr(cluster, "nodes", lambda: [{"CPU": 4.0, "GPU": 4.0}])
    sizes = ["cluster.gpus_per_actor=1", "cluster.gpus_per_learner_rank=1", "cluster.gpus_per_reward_replica=0.5"]
    _, elastic = to_job([*PLACES, *sizes, "cluster.min_actors=1", "cluster.max_actors=6"])
    cluster.check_capacity(elastic)
    _, fixed = to_job([*PLACES, *sizes, "cluster.num_actors=6"])
    with pytest.raises(ConfigError, match="6 actors x 1 GPU"):
        cluster.check_capacity(fixed)
