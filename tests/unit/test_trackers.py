"""Trackers are read back by their own libraries, and none holds up a run: whatever it does, the run's files are whole."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from omegaconf import OmegaConf

from common.files.source_code import PACKAGES
from contracts.checks.tracker_checks import tracker_conflicts
from contracts.checks.validation import ConfigError, validate
from contracts.config import LoggerConfig, TandemConfig
from contracts.plugins import names
from contracts.trackers import TRACKERS, TrackedRun, Tracker
from controller.alarms.rules import faults
from controller.record.reader import load
from controller.record.redaction import REDACTED
from controller.record.run_log import RunLog
from controller.record.trackers.mlflow import MLflow
from controller.record.trackers.wandb import Wandb
from tests.conftest import ROOT, wandb_records

CANARY = "canary-3f9c1d77"
PROMPT = "private-prompt-text"
CONFIG = {"name": "demo", "ppo": {"updates": 7}, "extra": {"api_key": CANARY}}
OURS = ["wandb", "tensorboard", "mlflow"]


def logged(run_dir: Path, logger: LoggerConfig, attempt: int = 1) -> RunLog:
    """A run of two versions and one step of a reward model, which is closed."""
    (run_dir / "model").mkdir(parents=True, exist_ok=True)
    (run_dir / "model/weights").touch()
    with RunLog(run_dir, CONFIG, logger, "pipeline", attempt=attempt) as log:
        log.log("reward_model/gold", 5, {"reward_model/loss": 0.5})
        for version in (1, 2):
            values = {"reward/score_mean": version / 4, "kl/ref_seq": float("nan"), "progress/version": version}
            log.log("ppo", version, values)
            log.samples([{"stage": "ppo", "step": version, "prompt": PROMPT, "completion": "a|b\nc", "proxy": 0.1}])
        log.artifact("demo-ppo", "model", str(run_dir / "model"))
        log.alert("Clipped", "policy/clipfrac above 0.3")
    return log


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def forget_settings(patch: pytest.MonkeyPatch) -> None:
    """Of whoever runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI"):
        patch.delenv(name, raising=False)
    patch.setenv("NETRC", "no-netrc")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    forget_settings(monkeypatch)
    return monkeypatch


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A run with all trackers without and one with texts. The latter has two attempts, and MLflow's own variable leads it to
    the other's database, as to a server."""
    folders = {text: tmp_path_factory.mktemp("texts" if text else "plain") / "run" for text in (False, True)}
    with pytest.MonkeyPatch.context() as patch:
        forget_settings(patch)
        patch.setattr(Wandb, "init_s", 60.0)  # what it writes is tested here, on a machine that may be busy
        patch.setattr(Tracker, "close_s", staticmethod(lambda logger: 180.0))
        assert logged(folders[False], LoggerConfig(trackers=OURS, wandb="offline")).tracker_faults == {}
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folders[False]}/mlruns/mlflow.db")
        patch.chdir(folders[True].parent)  # where MLflow keeps the artifacts of a database by default
        logger = LoggerConfig(trackers=OURS, wandb="offline", project="texts", wandb_text=True, table_every=2)
        for attempt in (1, 2):
            assert logged(folders[True], logger, attempt).tracker_faults == {}
    return folders


def tensorboard_run(run_dir: Path, attempt: int = 1) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run_dir / f"tensorboard/demo-run-a{attempt}"))
    found.Reload()
    return found


def text_of(events: Any, tag: str) -> str:
    [event] = events.Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def mlflow_runs(both: dict[bool, Path], project: str) -> tuple[Any, dict[str, Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{both[False]}/mlruns/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name(project).experiment_id])
    return client, {run.info.run_name: run for run in runs}


def test_wandb_reads_a_run_back(both: dict[bool, Path]) -> None:
    items = [row["item"] for row in wandb_records(both[False]) if row["type"] == "history"]
    scores = [(item["progress/version"], item.get("reward/score_mean")) for item in items if "progress/version" in item]
    assert scores == [(1, 0.25), (2, 0.5)]
    losses = [(item["reward_model/gold/step"], item["reward_model/gold/loss"]) for item in items[:1]]
    assert losses == [(5, 0.5)]


def test_tensorboard_reads_a_run_back(both: dict[bool, Path]) -> None:
    events = tensorboard_run(both[False])
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars == {
        "reward_model/gold/loss": [(5, 0.5)],
        "reward/score_mean": [(1, 0.25), (2, 0.5)],
        "progress/version": [(1, 1.0), (2, 2.0)],
    }
    config = OmegaConf.create(re.sub("^    ", "", text_of(events, "config"), flags=re.MULTILINE))
    assert config == CONFIG | {"extra": {"api_key": REDACTED}}
    assert text_of(events, "alerts") == "**Clipped** policy/clipfrac above 0.3"
    assert text_of(events, "artifacts/demo-ppo") == f"model: `{both[False]}/model`"
    assert not any("samples" in tag for tag in events.Tags()["tensors"])


def test_mlflow_reads_a_run_back(both: dict[bool, Path]) -> None:
    client, runs = mlflow_runs(both, "tandem")
    [(name, run)] = runs.items()
    assert (name, run.info.status) == ("demo-run-a1", "FINISHED")
    histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    assert {key: [(m.step, m.value) for m in metrics] for key, metrics in histories.items()} == {
        "reward_model/gold/loss": [(5, 0.5)],
        "reward/score_mean": [(1, 0.25), (2, 0.5)],
        "progress/version": [(1, 1.0), (2, 2.0)],
    }
    assert run.data.params == {"name": "demo", "ppo.updates": "7", "extra.api_key": REDACTED}
    assert run.data.tags == {
        "mlflow.runName": "demo-run-a1",
        "group": "demo-run",
        "job_type": "pipeline",
        "name": "demo",
        "alert.Clipped": "policy/clipfrac above 0.3",
        "artifact.demo-ppo": f"model: {both[False]}/model",
    }


def test_texts_and_further_attempts_read_back(both: dict[bool, Path]) -> None:
    run_dir = both[True]
    for attempt in (1, 2):
        [event] = tensorboard_run(run_dir, attempt).Tensors("samples/ppo/text_summary")
        assert event.step == 2  # of `table_every`
        table = event.tensor_proto.string_val[0].decode().splitlines()
        assert table[0] == "| completion | prompt | proxy | stage | step |"
        assert table[2:] == [f"| a\\|b<br>c | {PROMPT} | 0.1 | ppo | 2 |"]
    client, runs = mlflow_runs(both, "texts")
    assert not (run_dir / "mlruns").exists()
    assert sorted(runs) == ["demo-run-a1", "demo-run-a2"]
    assert {run.data.tags["group"] for run in runs.values()} == {"demo-run"}
    for run in runs.values():
        path = client.download_artifacts(run.info.run_id, "samples/ppo/000002.json")
        assert json.loads(Path(path).read_text()) == {
            "columns": ["completion", "prompt", "proxy", "stage", "step"],
            "data": [["a|b\nc", PROMPT, 0.1, "ppo", 2]],
        }


def test_no_tracker_keeps_a_secret_nor_by_default_a_text(both: dict[bool, Path]) -> None:
    for text, run_dir in both.items():
        files = [path for path in run_dir.rglob("*") if path.is_file() and path.name != "samples.jsonl"]
        assert {"wandb", "tensorboard"} <= {path.relative_to(run_dir).parts[0] for path in files}
        for path in files:
            assert CANARY.encode() not in path.read_bytes(), path
            assert text or PROMPT.encode() not in path.read_bytes(), path


class Bad(Tracker):
    """Logs nothing for minutes."""

    @staticmethod
    def close_s(logger: LoggerConfig) -> float:
        return 0.5

    def log(self, values: dict[str, float], *, stage: str, step: int, wall_s: float) -> None:
        time.sleep(600)


class NeverStarts(Bad):
    def __init__(self, run: TrackedRun) -> None:
        time.sleep(600)


class Raises(Bad):
    def log(self, values: dict[str, float], *, stage: str, step: int, wall_s: float) -> None:
        values.clear()  # what it is given is its own
        raise OSError("disk full")

    def close(self) -> None:
        raise OSError("disk full")


class Exits(Raises):
    def log(self, values: dict[str, float], *, stage: str, step: int, wall_s: float) -> None:
        raise SystemExit(1)  # which ends a thread without a word


def test_a_tracker_that_exits_is_counted(tmp_path: Path) -> None:
    name = f"{__name__}:Exits"
    log = RunLog(tmp_path, CONFIG, LoggerConfig(trackers=[name]), "ppo")
    for version in range(3):
        log.log("ppo", version, {"reward/score_mean": 1.0})
    log.close()
    assert log.tracker_faults == {name: 4}  # its end too


def test_a_tracker_that_raises_or_hangs_costs_the_run_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bad = {f"{__name__}:{kind.__name__}": kind for kind in (Bad, NeverStarts, Raises)}
    start = time.perf_counter()
    log = RunLog(tmp_path / "run", CONFIG, LoggerConfig(trackers=[*bad, "tensorboard"]), "ppo")
    for version in range(1, 201):
        log.log("ppo", version, {"reward/score_mean": version / 4})
        log.samples([{"stage": "ppo", "step": version, "prompt": PROMPT}])
    assert time.perf_counter() - start < 20.0  # three of the trackers would wait longer, or for ever
    log.close()
    assert time.perf_counter() - start < 30.0  # TensorBoard has PyTorch to import
    good = [row for row in rows(tmp_path / "run") if row["stage"] == "ppo"]
    assert [row["reward/score_mean"] for row in good] == [version / 4 for version in range(1, 201)]
    assert len((tmp_path / "run/samples.jsonl").read_text().splitlines()) == 200
    hangs, never, raises = bad
    assert log.tracker_faults == {hangs: 1, never: 1, raises: 201}
    said = capsys.readouterr().err
    assert all(said.count(f"{name} ") == 1 for name in bad)
    assert [e.value for e in tensorboard_run(tmp_path / "run").Scalars("reward/score_mean")][-1] == 50.0
    alarms = faults(load(tmp_path / "run")) or []
    assert {alarm.finding for alarm in alarms} == {
        f"fault/{name} reached {count}." for name, count in ((hangs, 1), (never, 1), (raises, 201))
    }


def test_a_tracker_of_another_package(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The example of docs/extending.md, with nothing of Tandem changed."""
    section = (ROOT / "docs/extending.md").read_text().split("\n## A tracker\n")[1]
    [example] = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "csv_tracker.py").write_text(example)
    environment.syspath_prepend(str(tmp_path))
    logger = LoggerConfig(trackers=["my_package.csv_tracker:CsvTracker"])
    assert tracker_conflicts(logger) == []
    assert logged(tmp_path / "run", logger).tracker_faults == {}
    assert (tmp_path / "run/demo-run-a1.csv").read_text().splitlines() == [
        "reward_model/gold,5,reward_model/gold/loss,0.5",
        "ppo,1,reward/score_mean,0.25",
        "ppo,1,progress/version,1",
        "ppo,2,reward/score_mean,0.5",
        "ppo,2,progress/version,2",
    ]


def test_an_attempt_ends_in_its_trackers_as_it_ended(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An error of the run is a failure, a signal an interruption; wandb has one word for both."""
    (tmp_path / "mlruns").mkdir()
    environment.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    environment.chdir(tmp_path)
    environment.setattr(Wandb, "init_s", 60.0)
    environment.setattr(Tracker, "close_s", staticmethod(lambda logger: 180.0))
    logger = LoggerConfig(trackers=["wandb", "mlflow"], wandb="offline")
    codes = {}
    for state, error in {"done": None, "failed": ValueError("no"), "interrupted": KeyboardInterrupt()}.items():
        log = RunLog(tmp_path / state, CONFIG, logger, "ppo")
        with contextlib.suppress(ValueError, KeyboardInterrupt), log:
            if error is not None:
                raise error
        assert log.tracker_faults == {}
        [codes[state]] = [row.get("exit_code", 0) for row in wandb_records(tmp_path / state) if row["type"] == "exit"]
    assert codes == {"done": 0, "failed": 1, "interrupted": 1}
    _, runs = mlflow_runs({False: tmp_path}, "tandem")
    statuses = {name: run.info.status for name, run in runs.items()}
    assert statuses == {"demo-done-a1": "FINISHED", "demo-failed-a1": "FAILED", "demo-interrupted-a1": "KILLED"}


class FlushingWandb(Wandb):
    """What it has left goes out before the run of the tool ends, or cannot."""

    def close(self) -> None:
        self._run.log({"mine/flushed": 1.0})
        raise OSError("disk full")


class FlushingMLflow(MLflow):
    def close(self) -> None:
        assert self._client.get_run(self._id).info.status == "RUNNING"
        self._client.set_tag(self._id, "flushed", "yes")


def test_every_end_goes_through_close(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setattr(Wandb, "init_s", 60.0)
    environment.setattr(Tracker, "close_s", staticmethod(lambda logger: 180.0))
    ours = [f"{__name__}:{kind.__name__}" for kind in (FlushingWandb, FlushingMLflow)]
    log = RunLog(tmp_path / "run", CONFIG, LoggerConfig(trackers=ours, wandb="offline"), "ppo")
    log.close("failed")
    assert log.tracker_faults == {ours[0]: 1}
    found = wandb_records(tmp_path / "run")
    assert [row["item"]["mine/flushed"] for row in found if row["type"] == "history"] == [1.0]
    assert [row["exit_code"] for row in found if row["type"] == "exit"] == [1]
    _, runs = mlflow_runs({False: tmp_path / "run"}, "tandem")
    assert [(run.info.status, run.data.tags["flushed"]) for run in runs.values()] == [("FAILED", "yes")]


class Steps(Tracker):
    """Which step each line and each sample has, by stage."""

    seen: ClassVar[list[tuple[str, str, int]]] = []

    def log(self, values: dict[str, float], *, stage: str, step: int, wall_s: float) -> None:
        self.seen.append(("log", stage, step))

    def samples(self, rows: list[dict[str, Any]], *, stage: str, step: int) -> None:
        self.seen.append(("samples", stage, step))


def test_the_step_of_ppo_is_the_version(tmp_path: Path) -> None:
    """Two updates fit the value model alone, so the first of the policy is the third update; their lines stay apart."""
    logger = LoggerConfig(trackers=[f"{__name__}:Steps"], wandb_text=True, table_every=1)
    with RunLog(tmp_path, CONFIG, logger, "ppo") as log:
        for update, version in enumerate((0, 0, 1, 2)):
            log.samples([{"stage": "ppo", "step": version}])
            log.log("ppo" if version else "value_warmup", update, {"value/loss": 0.5, "progress/version": version})
    warm_up = [("samples", "ppo", 0), ("log", "value_warmup", 0), ("samples", "ppo", 0), ("log", "value_warmup", 1)]
    assert Steps.seen == [*warm_up, *((kind, "ppo", v) for v in (1, 2) for kind in ("samples", "log"))]


class Missing(Tracker):
    packages: ClassVar = {"a_module_that_no_one_has": "its-package", "json": "json-package"}


class OnlyWithWandb(Missing):
    @staticmethod
    def is_on(logger: LoggerConfig) -> bool:
        return logger.wandb != "disabled"


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        (["tensorbord"], "logger.trackers: 'tensorbord' is no tracker; write tensorboard, or package.module:NAME"),
        (["no_such_module:X"], "No module named 'no_such_module'; write package.module:NAME"),
        ([f"{__name__}:ROOT"], "must be a subclass of contracts.trackers.Tracker; found"),
        ([f"{__name__}:Missing"], "write `python -m pip install its-package json-package`, or leave"),
        (["wandb", "mlflow", "wandb"], "logger.trackers must name each of them once; found wandb, mlflow, wandb"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(trackers: list[str], message: str) -> None:
    config = TandemConfig(run_dir="r", cache_dir="c", logger=LoggerConfig(trackers=trackers))
    with pytest.raises(ConfigError) as error:
        validate(config)
    [conflict] = [conflict for conflict in error.value.conflicts if "logger.trackers" in conflict]
    assert message in conflict


def test_what_is_off_needs_no_package() -> None:
    trackers = [f"{__name__}:OnlyWithWandb"]
    assert len(tracker_conflicts(LoggerConfig(trackers=trackers))) == 1
    assert tracker_conflicts(LoggerConfig(trackers=trackers, wandb="disabled")) == []
    assert tracker_conflicts(LoggerConfig(trackers=OURS)) == []


def test_a_tracker_is_one_file() -> None:
    """No other product file knows one, and none imports its library before a run asks for it."""
    assert names(TRACKERS) == ("mlflow", "tensorboard", "wandb")
    product = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    for name in ("tensorboard", "mlflow"):
        knowing = {path for path in product if name in path.read_text().lower()}
        knowing.discard(ROOT / "learner/engine.py")  # it keeps out what DeepSpeed imports
        assert knowing == {ROOT / f"controller/record/trackers/{name}.py"}
    code = (
        "import sys; from contracts.plugins import find, names; from contracts.trackers import TRACKERS\n"
        "for name in names(TRACKERS): find(TRACKERS, name)\n"
        "print(sorted({'wandb', 'tensorboard', 'mlflow', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True, check=True)  # fmt: skip
    assert done.stdout.strip() == "[]"
