"""Stages are reused while nothing that went in has changed, and never half done."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contracts.config import LoggerConfig, ScorerConfig, SFTConfig, TandemConfig
from contracts.validation import ConfigError
from controller.metrics import RunLog
from controller.stages import LOGS, UNSEEN, StageStore, checkpoint_fingerprint, unseen

INPUTS: dict[str, Any] = {"seed": 1, "sft": SFTConfig(), "data": "abc"}


def run_of(tmp_path: Path, name: str, reuse: bool = True) -> tuple[StageStore, RunLog]:
    log = RunLog(tmp_path / name, {}, LoggerConfig(wandb="disabled"), "test")
    return StageStore(tmp_path / "cache", tmp_path / name, reuse), log


def work_with(log: RunLog, loss: float, stage: str = "sft") -> Any:
    def work(path: Path) -> dict[str, Any]:
        path.mkdir()
        (path / "weights").write_text(str(loss))
        log.log(stage, 1, {"loss": loss})
        with log.phase(stage, "training"):
            log.samples([{"stage": stage, "text": "x"}])
        return {"eval_loss": loss}

    return work


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_finished_stage_is_found_again(tmp_path: Path) -> None:
    store, log = run_of(tmp_path, "first")
    assert store.find("sft", INPUTS) is None
    made = store.run("sft", INPUTS, work_with(log, 2.5))
    found = store.find("sft", {"data": "abc", "sft": SFTConfig(), "seed": 1})  # equal inputs in another order
    assert found is not None
    assert (made.cached, found.cached) == (False, True)
    assert found.path == made.path
    assert found.metrics == made.metrics == {"eval_loss": 2.5}
    assert (Path(found.path) / "weights").read_text() == "2.5"


@pytest.mark.parametrize(
    "change",
    [{"seed": 2}, {"sft": replace(SFTConfig(), batch_size=8)}, {"data": "abd"}, {"more": None}],
    ids=lambda change: next(iter(change)),
)
def test_another_input_is_another_stage(change: dict[str, Any], tmp_path: Path) -> None:
    store, log = run_of(tmp_path, "first")
    made = store.run("sft", INPUTS, work_with(log, 2.5))
    assert store.find("sft", INPUTS | change) is None
    assert store.find("reward_model/proxy", INPUTS) is None
    other = store.run("sft", INPUTS | change, work_with(log, 3.5))
    assert other.path != made.path
    assert (Path(made.path) / "weights").read_text() == "2.5"
    assert store.directory("reward_model/proxy", INPUTS).parent == tmp_path / "cache/stages"


def test_without_reuse_nothing_is_found_and_the_result_is_replaced(tmp_path: Path) -> None:
    store, log = run_of(tmp_path, "first", reuse=False)
    first = store.run("sft", INPUTS, work_with(log, 2.5))
    assert store.find("sft", INPUTS) is None
    second = store.run("sft", INPUTS, work_with(log, 3.5))
    assert first.path == second.path
    assert (Path(second.path) / "weights").read_text() == "3.5"


def test_side_by_side_a_stage_is_made_once(tmp_path: Path) -> None:
    made: list[str] = []
    waited: list[str] = []

    def member(name: str) -> None:
        store, log = run_of(tmp_path, name)

        @contextmanager
        def wait() -> Iterator[None]:
            waited.append(name)
            yield

        def slowly(path: Path) -> dict[str, Any]:
            made.append(name)
            time.sleep(0.3)
            return work_with(log, 2.5)(path)

        with store.alone("sft", INPUTS, wait):
            assert store.find("sft", INPUTS) or store.run("sft", INPUTS, slowly)

    members = [threading.Thread(target=member, args=(f"member-{i}",)) for i in range(3)]
    for thread in members:
        thread.start()
    for thread in members:
        thread.join()
    assert len(made) == 1
    assert sorted(waited) == sorted({f"member-{i}" for i in range(3)} - set(made))


def test_a_crash_leaves_no_stage_and_the_next_run_works(tmp_path: Path) -> None:
    store, log = run_of(tmp_path, "first")

    def crash(path: Path) -> dict[str, Any]:
        path.mkdir()
        (path / "half").write_text("of it")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        store.run("sft", INPUTS, crash)
    assert store.find("sft", INPUTS) is None
    made = store.run("sft", INPUTS, work_with(log, 2.5))
    assert [p.name for p in Path(made.path).iterdir()] == ["weights"]
    assert [p.name for p in (tmp_path / "cache/stages").iterdir()] == [Path(made.path).parent.name]


def test_a_crash_keeps_the_result_that_was_there(tmp_path: Path) -> None:
    store, log = run_of(tmp_path, "first", reuse=False)
    made = store.run("sft", INPUTS, work_with(log, 2.5))

    def crash(path: Path) -> dict[str, Any]:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        store.run("sft", INPUTS, crash)
    assert (Path(made.path) / "weights").read_text() == "2.5"


def test_a_reused_stage_brings_its_own_log_lines_alone(tmp_path: Path) -> None:
    store, log = run_of(tmp_path, "first")
    log.log("before", 1, {"loss": 9.0})
    made = store.run("sft", INPUTS, work_with(log, 2.5))
    log.log("after", 1, {"loss": 9.0})

    later, log = run_of(tmp_path, "second")
    log.log("earlier", 1, {"loss": 8.0})
    assert later.find("sft", INPUTS) is not None
    assert [(row["stage"], row["loss"]) for row in lines(tmp_path / "second/metrics.jsonl")] == [
        ("earlier", 8.0),
        ("sft", 2.5),
    ]
    assert [row["text"] for row in lines(tmp_path / "second/samples.jsonl")] == ["x"]
    assert [row["phase"] for row in lines(tmp_path / "second/phases.jsonl")] == ["training"]
    assert sorted(p.name for p in (Path(made.path).parent / "log").iterdir()) == sorted(LOGS)


def test_stage_json_says_what_went_in(tmp_path: Path) -> None:
    store, log = run_of(tmp_path, "first")
    made = store.run("sft", INPUTS, work_with(log, 2.5))
    content = json.loads((Path(made.path).parent / "stage.json").read_text())
    assert content["inputs"]["sft"]["optimizer"]["learning_rate"] == SFTConfig().optimizer.learning_rate
    assert content["inputs"]["seed"] == 1
    assert (content["name"], content["metrics"]) == ("sft", {"eval_loss": 2.5})
    assert content["seconds"] >= 0


def test_checkpoint_fingerprint(tmp_path: Path) -> None:
    def checkpoint(name: str, files: dict[str, bytes]) -> str:
        for file, content in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(content)
        return str(tmp_path / name)

    big = bytes(3 << 20)
    base = {"config.json": b"{}", "sub/model.safetensors": big}
    same = checkpoint_fingerprint(checkpoint("a", base))
    assert checkpoint_fingerprint(checkpoint("b", base)) == same
    changes: list[dict[str, bytes]] = [
        {"config.json": b"[]"},
        {"sub/model.safetensors": b"x" + big[1:]},
        {"sub/model.safetensors": big[:-1] + b"x"},  # the end of a large file
        {"sub/model.safetensors": big + b"\0"},
        {"more": b""},
    ]
    for i, change in enumerate(changes):
        assert checkpoint_fingerprint(checkpoint(f"changed{i}", base | change)) != same
    hub = checkpoint_fingerprint("owner/model")
    assert hub != checkpoint_fingerprint("owner/other")
    assert hub != checkpoint_fingerprint("owner/model", "v1.0")


def test_lines_that_a_run_has_are_not_added_again(tmp_path: Path) -> None:
    """A second attempt in the same run directory finds the stage, and its lines in the log."""
    store, log = run_of(tmp_path, "first")
    store.run("sft", INPUTS, work_with(log, 2.5))
    before = {name: (tmp_path / "first" / name).read_text() for name in LOGS}
    assert store.find("sft", INPUTS) is not None
    assert {name: (tmp_path / "first" / name).read_text() for name in LOGS} == before
    other, _ = run_of(tmp_path, "second")
    other.find("sft", INPUTS)
    assert {name: (tmp_path / "second" / name).read_text() for name in LOGS} == before


def test_a_resumed_stage_keeps_the_lines_of_its_first_attempt(tmp_path: Path) -> None:
    store, log = run_of(tmp_path, "first")
    log.log("before", 1, {})
    began = log.mark()
    log.log("sft", 1, {"loss": 3.0})  # the first attempt, up to its commit

    def work(path: Path) -> dict[str, Any]:
        store.starts = began
        log.log("sft", 2, {"loss": 2.0})
        path.mkdir()
        return {}

    made = store.run("sft", INPUTS, work)
    assert [row["step"] for row in lines(Path(made.path).parent / "log/metrics.jsonl")] == [1, 2]


def test_what_a_scorer_is_made_of_and_what_is_blanked_are_inputs(tmp_path: Path) -> None:
    rules, model = tmp_path / "rules.py", tmp_path / "model"
    rules.write_text("def brevity(prompt, completion):\n    return 1.0\n")
    model.mkdir()
    (model / "config.json").write_text("{}")
    config = TandemConfig()
    config.environment.options = {"keyword": "film"}
    config.reward_service.scorers = {
        "token_count": ScorerConfig(kind="function", function=f"{rules}:brevity"),
        "second": ScorerConfig(path=str(model)),
    }
    seen = [unseen(config)]
    rules.write_text("def brevity(prompt, completion):\n    return -1.0\n")
    seen.append(unseen(config))
    (model / "config.json").write_text('{"trained": "again"}')
    seen.append(unseen(config))
    config.environment.options = {"keyword": "movie"}
    seen.append(unseen(config))
    config.reward_service.scorers["token_count"].std_coef = 2.0
    seen.append(unseen(config))
    config.reward_service.max_tokens = 64
    seen.append(unseen(config))
    assert len({json.dumps(each) for each in seen}) == len(seen)
    assert all(tuple(each) == UNSEEN for each in seen)
    assert "film" not in json.dumps(seen)
    rules.unlink()
    with pytest.raises(ConfigError, match=r"reward_service\.scorers\.token_count: "):
        unseen(config)
