"""The stage of docs/extending.md: found, ordered, checked, cached and run with its two files alone."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import controller.stages
from common.files.code_digest import stage_code
from contracts import plugins
from contracts.checks.validation import ConfigError, validate
from contracts.config import SourceConfig, TandemConfig
from contracts.methods import (
    checkpoints_read,
    method_stage,
    method_title,
    reads,
    results_needed,
    sources_read,
    stages_to_run,
)
from contracts.placement import needs
from contracts.records import Example
from contracts.stages import TASKS, find_stage
from controller.data.inputs import Inputs
from controller.pipeline.pipeline import Pipeline
from controller.pipeline.stage_cache import StageStore, code_of
from tests.unit.test_stages import run_of

PAGE = Path(__file__).parents[2] / "docs/extending.md"


@pytest.fixture(params=["my_package.more_sft:STAGE", "more_sft"])
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """By import path, and by a name of ours: then the file is one of controller/stages/."""
    section = PAGE.read_text().partition("## A method with a stage")[2].partition("\n## ")[0]
    files = re.findall(r"```python\n# (\S+)\n(.*?)```", section, re.DOTALL)
    assert [file for file, _ in files] == ["my_package/more_sft.py", "my_package/more_sft_task.py"]  # and no other
    (tmp_path / "my_package").mkdir()
    for file, text in files:
        (tmp_path / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    if request.param == "more_sft":
        monkeypatch.setattr(controller.stages, "__path__", [*controller.stages.__path__, str(tmp_path / "my_package")])
    # Where the file is found, the task of the page is one too; it is no stage.
    (tmp_path / "my_package/more_sft_task.py").rename(tmp_path / "task.py")
    (tmp_path / "my_package/more_sft.py").write_text(files[0][1].replace("my_package.more_sft_task:", "task:"))
    plugins.names.cache_clear()
    yield request.param
    plugins.names.cache_clear()
    vars(controller.stages).pop("more_sft", None)


@pytest.fixture
def config(small_vocab: Path, tmp_path: Path) -> TandemConfig:
    config = TandemConfig(run_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"), gold_model="gold")
    config.model.path = str(small_vocab)
    for source in ("sft", "preferences", "test", "eval_prompts"):
        setattr(config.data, source, SourceConfig(path=f"{source}.jsonl"))
    return config


def test_everything_reads_its_declaration(name: str, config: TandemConfig) -> None:
    config.method = name
    validate(config)
    assert stages_to_run(config) == ["sft", "reward_model", name, "evaluate"]
    assert results_needed(config) == {"sft", "reward_model/proxy", name}
    assert (method_stage(config), method_title(name, None)) == (name, "More SFT")
    config.stage, config.sft_model = name, "sft"
    validate(config)
    assert sources_read(config) == {"sft"}
    assert checkpoints_read(config) == {"sft_model": "sft"}
    assert reads(config, "sft.batch_size")
    assert not reads(config, "ppo.clip")
    assert [need.count for need in needs(config)] == [0, 1, 0]
    assert find_stage("more_stf") is None
    config.stage, config.method = "pipeline", name.replace("more", "mroe")
    with pytest.raises(ConfigError, match="method must be one of ppo, dpo, rank, filtered_sft, "):
        validate(config)


def test_its_code_is_its_two_files_and_what_they_import(name: str, tmp_path: Path) -> None:
    before = stage_code(name)
    assert {"torch", "learner/sft.py", "learner/losses.py"} <= set(before)  # of which its task is made
    for file in ("my_package/more_sft.py", "task.py"):
        (tmp_path / file).write_text((tmp_path / file).read_text() + "\nchanged = 1\n")
    changed = {part for part, digest in stage_code(name).items() if before[part] != digest}
    stage = "controller.stages.more_sft:STAGE" if name == "more_sft" else name
    assert changed == {stage, "task:TASK"}


class Ranks:
    """In place of the learner: two steps, and a file for a checkpoint."""

    def call(self, method: str, *arguments: Any) -> list[Any]:
        if method == "save":
            Path(arguments[0]).mkdir()
            (Path(arguments[0]) / "weights").write_text("trained")
        return [{"num_steps": 2, "step": {"sft/loss": 2.5}}.get(method)]


def test_it_runs_once_and_is_cached(name: str, config: TandemConfig, tmp_path: Path) -> None:
    started: list[Any] = []

    class Context:
        data, log = Inputs({"sft": [Example([1, 2], [False, True])]}), None
        phase = staticmethod(lambda text: nullcontext())

        def __init__(self, result: str, path: Path = Path()):
            self.config, self.result, self.path = config, result, path

        @contextmanager
        def learner(self, *arguments: Any) -> Iterator[Ranks]:
            started.append(arguments)
            yield Ranks()

        def log_step(self, step: int, metrics: dict[str, float]) -> None:
            log.log(self.result, step, metrics)

        def common_inputs(self) -> dict[str, Any]:
            return {"seed": 1}

        def checkpoint(self, name: str) -> str:
            return name

        def fingerprint(self, path: str) -> str:
            return path

        data_fingerprint = fingerprint

    store, log = run_of(tmp_path, "run")
    pipeline: Any = object.__new__(Pipeline)  # without its proofs and checks
    pipeline.config, pipeline.run_dir, pipeline.log = config, tmp_path / "run", log
    pipeline.store = StageStore(store.cache_dir, log, "auto", print, partial(code_of, config))
    pipeline.context = type("Shared", (), {"made_for": staticmethod(Context)})()
    pipeline.progress = type("Progress", (), {"line": print, "phase": Context.phase})
    config.stage = name
    for cached in (False, True):
        pipeline.results, pipeline.seconds = {}, {}
        pipeline._run(find_stage(name))
        result = pipeline.results[name]
        assert (result.cached, result.metrics) == (cached, {"loss": 2.5})
        assert (Path(result.path) / "weights").read_text() == "trained"
        assert (tmp_path / "run/stages.json").exists()
    [(task, _, policy, texts)] = started
    assert (policy, len(texts)) == ("sft", 1)
    from learner.sft import SFTTask

    assert issubclass(plugins.find(TASKS, task), SFTTask)
