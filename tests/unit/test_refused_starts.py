"""A start that is refused leaves what an earlier attempt in its directory has found out."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from common.flatten import flat
from contracts.checks.validation import ConfigError
from contracts.config import LoggerConfig, TandemConfig
from contracts.stages import Stage, find_stage
from controller.commits.resume import RunDirectory
from controller.data.inputs import Inputs
from controller.pipeline import pipeline as pipelines
from controller.pipeline.context import StageContext
from controller.pipeline.ingredients import UNSEEN
from controller.pipeline.pipeline import Pipeline
from controller.pipeline.stage_cache import StageStore, code_of
from controller.record.run_log import LOGS, RunLog
from controller.record.status_file import StatusFile, read_status
from tests.unit.test_commits import commit

pytestmark = pytest.mark.usefixtures("made_up_metrics")


class Cluster:
    """In place of a runtime: it has room or not."""

    def __init__(self, has_room: bool = True):
        self.has_room = has_room

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None: ...

    def start(self) -> None:
        if not self.has_room:
            raise ConfigError("the cluster cannot hold the job")


@pytest.fixture
def config(small_vocab: Path, tmp_path: Path) -> TandemConfig:
    config = TandemConfig(run_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"))
    config.data.gold, config.ppo.gold_rollouts = None, 0
    config.model.path = config.proxy_model = str(small_vocab)
    config.logger = LoggerConfig(wandb="disabled")
    return config


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A start of a pipeline whose stages train nothing; their names go to `ran`."""
    opened: list[Any] = []
    ran: list[str] = []

    def of(config: TandemConfig, has_room: bool = True) -> Pipeline:
        while opened:
            opened.pop().close()
        directory = RunDirectory(Path(config.run_dir), print)
        log = RunLog(config.run_dir, {}, config.logger, "pipeline", attempt=directory.attempt)
        opened.extend([log, directory._lock])
        made: Any = object.__new__(Pipeline)  # without the proofs of models
        made.config, made.log, made.run_dir = config, log, directory.path
        made.results, made.seconds, made._begun = {}, {}, set()
        made.progress = SimpleNamespace(line=print, phase=lambda text: nullcontext())
        made.store = StageStore(Path(config.cache_dir), log, config.reuse_stages, print, partial(code_of, config))
        parts: dict[str, Any] = {"log": log, "progress": made.progress, "directory": directory, "tokenizer": None}
        parts |= {"stop": SimpleNamespace(kept=nullcontext), "runtime": Cluster(has_room)}
        parts |= {"checkpoint": made.checkpoint, "will_run": made._will_run, "begin": made._begin}
        made.context = StageContext(config=config, data=Inputs(), **parts)
        return made

    def run(context: StageContext) -> dict[str, Any]:
        context.start_ray()
        ran.append(context.result)
        with context.phase("training"):
            context.log_step(1, {"loss": float(context.config.seed)})
        context.path.mkdir()
        (context.path / "weights").write_text(str(context.config.seed))
        return {}

    def running(config: TandemConfig) -> list[Stage]:
        return [stage if stage.resumes else replace(stage, run=run) for stage in running_stages(config)]

    running_stages = pipelines.running_stages
    monkeypatch.setattr(pipelines, "running_stages", running)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr("controller.pipeline.context.ray_session", lambda: None)
    of.ran = ran  # type: ignore[attr-defined]
    yield of
    while opened:
        opened.pop().close()


@pytest.fixture
def record(config: TandemConfig, start: Any) -> dict[str, bytes]:
    """A finished run: a commit, lines of SFT and of the evaluation, and what that has found out."""
    pipeline = start(config)
    pipeline._is_running = True
    pipeline._run(next(stage for stage in pipelines.running_stages(config) if stage.name == "sft"))
    inputs = find_stage("ppo").inputs(pipeline.context.made_for("ppo"))  # type: ignore[union-attr]
    seen = {name: value for name, value in inputs.items() if name not in UNSEEN}
    commit(pipeline.run_dir, 4, identity=flat(seen, keeps_empty=False))
    pipeline.log.log("evaluate", 0, {"loss": 3.0})
    pipeline.log.samples([{"stage": "evaluate", "completion": "b"}])
    (pipeline.run_dir / "evaluation.json").write_text('{"x": 1}')
    start.ran.clear()
    return files_of(pipeline.run_dir)


def files_of(run_dir: Path) -> dict[str, bytes]:
    return {name: (run_dir / name).read_bytes() for name in (*LOGS, "evaluation.json")}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("ppo.kl.coef", 0.1, "ppo.kl.coef: the commit has 0.05, this configuration 0.1"),
        ("seed", 2, "seed: the commit has 1, this configuration 2"),  # and SFT would be made anew first
        ("model.dtype", "float64", 'dtype: the commit has "auto", this configuration "float64"'),
        ("ppo.init_from", "base", "policy: the commit has"),
    ],
)
def test_another_run_is_refused_before_its_first_stage(
    key: str, value: Any, said: str, config: TandemConfig, start: Any, record: dict[str, bytes]
) -> None:
    *sections, name = key.split(".")
    section: Any = config
    for part in sections:
        section = getattr(section, part)
    setattr(section, name, value)
    pipeline = start(config)
    with pytest.raises(ConfigError, match="is of another run than this configuration describes") as raised:
        pipeline._check_stages()
    assert said in str(raised.value)
    assert files_of(pipeline.run_dir) == record
    assert not pipeline.context.directory.has_begun
    for harmless in ("never", "auto"):
        config.checkpoint.resume, config.checkpoint.every = harmless, int(harmless == "never")
        start(config)._check_stages()  # they set the commits aside


def test_the_same_run_goes_on(config: TandemConfig, start: Any, record: dict[str, bytes]) -> None:
    start(config)._check_stages()
    config.cache_dir += "-elsewhere"  # where SFT is still to be made
    pipeline = start(config)
    pipeline._check_stages()
    assert files_of(pipeline.run_dir) == record


def test_what_is_found_out_later_leaves_the_record_too(
    config: TandemConfig, start: Any, record: dict[str, bytes]
) -> None:
    """That the cluster has no room, and that an evaluation alone has nothing to judge."""
    config.stage = "evaluate"
    pipeline = start(config, has_room=False)
    with pytest.raises(ConfigError, match="cannot hold"):
        pipeline.run()
    left = files_of(pipeline.run_dir)
    assert {name: left[name] for name in record if name != "phases.jsonl"} == {
        name: text for name, text in record.items() if name != "phases.jsonl"
    }
    assert left["phases.jsonl"].startswith(record["phases.jsonl"])
    assert not pipeline.context.directory.has_begun


def test_a_stage_that_begins_sets_aside_what_was_found_out(
    config: TandemConfig, start: Any, record: dict[str, bytes]
) -> None:
    config.stage, config.seed = "sft", 2
    pipeline = start(config)
    pipeline.run()
    assert start.ran == ["sft"]
    assert pipeline.context.directory.has_begun
    assert (pipeline.run_dir / "evaluation.before.json").read_text() == '{"x": 1}'
    rows = [json.loads(line) for line in (pipeline.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["loss"]) for row in rows] == [("sft", 2.0)]
    phases = [json.loads(line)["phase"] for line in (pipeline.run_dir / "phases.jsonl").read_text().splitlines()]
    assert phases == ["starting Ray", "training"]


def test_a_look_at_the_cache_takes_no_lines(
    config: TandemConfig, start: Any, record: dict[str, bytes], tmp_path: Path
) -> None:
    config.run_dir += "-2"
    pipeline = start(config)
    sft = find_stage("sft")
    assert sft is not None
    assert not pipeline._will_run(sft)
    assert pipeline.checkpoint("sft")
    assert (pipeline.run_dir / "metrics.jsonl").read_text() == ""
    config.stage = "sft"
    (lock,) = (tmp_path / "cache/stages").glob("*.lock")
    lock.unlink()
    pipeline.run()
    assert start.ran == []
    assert not lock.exists()  # who finds a stage need not be able to write beside it
    assert '"loss": 1.0' in (pipeline.run_dir / "metrics.jsonl").read_text()


@contextmanager
def status_of(run_dir: Path) -> Iterator[StatusFile]:
    with StatusFile(run_dir, lambda: ("", 0.0)) as status:
        yield status


@pytest.mark.parametrize(
    ("before", "has_begun", "after"),
    [("done", False, "done"), ("done", True, "refused"), ("refused", False, "refused"), (None, False, "refused")],
)
def test_a_refused_start_leaves_the_status_of_a_run_that_it_did_not_touch(
    before: str | None, has_begun: bool, after: str, tmp_path: Path
) -> None:
    """A finished member of a sweep stays done."""
    if before:
        with status_of(tmp_path) as status:
            status.end(before, made_of="x", error="of before")
    kept = read_status(tmp_path)
    with status_of(tmp_path) as status:
        assert read_status(tmp_path).state == "running"
        status.refuse("a word", has_begun)
    found = read_status(tmp_path)
    assert found.state == after
    assert found == kept if after == "done" else found.facts["error"] == "a word"
