"""Stages are reused while nothing that went in has changed, and never half done."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.files import fingerprints
from contracts.checks.validation import ConfigError
from contracts.config import LoggerConfig, ScorerConfig, SFTConfig, TandemConfig
from controller.pipeline.ingredients import UNSEEN, environment_hidden, own_source, unseen
from controller.pipeline.stage_cache import StageStore
from controller.pipeline.summary import summary_rows
from controller.record.reader import read
from controller.record.run_log import LOGS, RunLog
from tests.unit.test_strict_json import strict

pytestmark = pytest.mark.usefixtures("made_up_metrics")

INPUTS: dict[str, Any] = {"seed": 1, "sft": SFTConfig(), "data": "abc"}


CODE = {"learner/sft.py": "1", "learner/engine.py": "2", "torch": "2.13.0"}


def run_of(
    tmp_path: Path, name: str, reuse: Any = "auto", code: dict[str, str] = CODE, say: Any = print
) -> tuple[StageStore, RunLog]:
    log = RunLog(tmp_path / name, {}, LoggerConfig(wandb="disabled"), "test")
    return StageStore(tmp_path / "cache", log, reuse, say, lambda stage: code), log


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


@pytest.mark.parametrize("reuse", ["auto", True])
def test_without_reuse_the_result_lies_beside_that_of_who_may_be_reading_it(reuse: Any, tmp_path: Path) -> None:
    store, log = run_of(tmp_path, "first", reuse=False)
    made = []
    for loss in (2.5, 3.5, 4.5):
        made.append(Path(store.run("sft", INPUTS, work_with(log, loss)).path))
        assert store.find("sft", INPUTS) is None
    assert [(path / "weights").read_text() for path in made] == ["2.5", "3.5", "4.5"]
    code = CODE if reuse == "auto" else other_code(learner__sft="9")
    later, _ = run_of(tmp_path, "second", reuse=reuse, code=code)
    found = later.find("sft", INPUTS)
    assert found is not None
    assert (found.path, found.metrics) == (str(made[2]), {"eval_loss": 4.5})  # the newest


def test_the_lock_of_a_stage_of_ones_own_is_its_own(tmp_path: Path) -> None:
    store, _ = run_of(tmp_path, "first")
    with store.alone("my_package.more_sft:STAGE", INPUTS, lambda: pytest.fail("nobody else makes it")):
        (lock,) = (tmp_path / "cache/stages").iterdir()
    assert lock.name == f"{store.directory('my_package.more_sft:STAGE', INPUTS).name}.lock"


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


def test_unknown_metrics_of_a_stage(tmp_path: Path) -> None:
    store, log = run_of(tmp_path, "first")

    def work(path: Path) -> dict[str, Any]:
        work_with(log, 2.5)(path)
        return {"accuracy": 1.0, "accuracy_low": math.nan, "accuracy_high": math.nan, "pairs": 1}

    made = store.run("reward_model/proxy", INPUTS, work)
    file = Path(made.path).parent / "stage.json"
    content = strict(file)
    assert content["metrics"] == {"accuracy": 1.0, "accuracy_low": None, "accuracy_high": None, "pairs": 1}
    before = re.sub(r'(accuracy_\w+": )null', r"\1NaN", file.read_text())  # as earlier versions have written it
    for text in (file.read_text(), before):
        file.write_text(text)
        found = store.find("reward_model/proxy", INPUTS)
        assert found is not None
        [row, *_] = summary_rows(TandemConfig(), {"reward_model/proxy": found.metrics}, Path("report.html"))
        assert row == ("reward model (proxy)", "100.0% [–, –] of 1 held-out pairs")


def test_lines_that_a_run_has_are_not_added_again(tmp_path: Path) -> None:
    """A second attempt in the same run directory finds the stage, and its lines in the log."""
    store, log = run_of(tmp_path, "first")
    store.run("sft", INPUTS, work_with(log, 2.5))
    before = {name: (tmp_path / "first" / name).read_text() for name in LOGS}
    assert store.find("sft", INPUTS) is not None
    assert {name: (tmp_path / "first" / name).read_text() for name in LOGS} == before
    other, _ = run_of(tmp_path, "second")
    for _ in range(2):
        other.find("sft", INPUTS)
        rows = {name: lines(tmp_path / "second" / name) for name in LOGS}
        assert rows["metrics.jsonl"] == [{"stage": "sft", "step": 1, "loss": 2.5}]
        assert rows["phases.jsonl"] == [{"stage": "sft", "phase": "training"}]
        assert (tmp_path / "second/samples.jsonl").read_text() == before["samples.jsonl"]


def test_the_time_of_a_run_is_not_that_of_the_stages_that_it_found(tmp_path: Path) -> None:
    def at(name: str, *times: float) -> tuple[StageStore, RunLog]:
        clock = iter(times)
        log = RunLog(tmp_path / name, {}, LoggerConfig(wandb="disabled"), "test", clock=lambda: next(clock))
        return StageStore(tmp_path / "cache", log, "auto", print, lambda stage: CODE), log

    store, log = at("first", 0, 100, 100, 150)
    store.run("sft", INPUTS, work_with(log, 2.5))
    assert read(tmp_path / "first").wall_s == 150
    later, log = at("second", 0, 10, 30, 40)
    later.find("sft", INPUTS)
    log.log("ppo", 1, {"loss": 1.0})
    with log.phase("ppo", "training"):
        pass
    found = read(tmp_path / "second")
    assert found.wall_s == 40
    assert [row["stage"] for row in found.phases] == ["ppo"]
    assert [row["stage"] for row in found.metrics] == ["sft", "ppo"]


def test_lines_of_an_earlier_attempt_with_other_settings_give_way_to_those_of_the_stage(tmp_path: Path) -> None:
    store, log = run_of(tmp_path, "first")
    store.run("sft", INPUTS, work_with(log, 2.5))
    later, log = run_of(tmp_path, "second")
    for step in range(1, 4):
        log.log("sft", step, {"loss": 7.0})  # of other settings, and interrupted
    log.log("ppo", 1, {"loss": 1.0})
    assert later.find("sft", INPUTS) is not None
    found = [(row["stage"], row["step"], row["loss"]) for row in lines(tmp_path / "second/metrics.jsonl")]
    assert found == [("ppo", 1, 1.0), ("sft", 1, 2.5)]


def test_a_resumed_stage_keeps_the_lines_of_its_first_attempt(tmp_path: Path) -> None:
    store, log = run_of(tmp_path, "first")
    log.log("sft", 1, {})
    log.log("value_warmup", 0, {"loss": 4.0})
    log.log("ppo", 1, {"loss": 3.0})  # the first attempt, up to its commit

    def work(path: Path) -> dict[str, Any]:
        log.log("ppo", 2, {"loss": 2.0})
        path.mkdir()
        return {}

    made = store.run("ppo", INPUTS, work)
    assert [row["step"] for row in lines(Path(made.path).parent / "log/metrics.jsonl")] == [0, 1, 2]


# ---- what cannot be believed


def other_code(**changed: str) -> dict[str, str]:
    return CODE | {name.replace("__", "/") + ".py": digest for name, digest in changed.items()}


def test_a_stage_that_other_code_made_is_named_and_made_anew(tmp_path: Path) -> None:
    store, log = run_of(tmp_path, "first")
    old = store.run("sft", INPUTS, work_with(log, 2.5))
    said: list[str] = []
    fixed = other_code(learner__sft="9", learner__new="1") | {"torch": "2.14.0"}
    store, log = run_of(tmp_path, "second", code=fixed, say=said.append)
    assert store.find("sft", INPUTS) is None
    assert store.find("sft", INPUTS) is None
    assert said == [
        f"{Path(old.path).parent} was made by other code (learner/new.py, learner/sft.py, torch): sft has to be made "
        "anew, or reuse_stages=true takes it"
    ]
    new = store.run("sft", INPUTS, work_with(log, 1.5))
    assert store.find("sft", INPUTS) == replace(new, cached=True)
    # Who goes back to the old code finds the old result: neither has replaced the other.
    store, _ = run_of(tmp_path, "third")
    assert store.find("sft", INPUTS) == replace(old, cached=True)


def test_whatever_code_made_it_is_taken_where_that_is_asked_for(tmp_path: Path) -> None:
    store, log = run_of(tmp_path, "first")
    old = store.run("sft", INPUTS, work_with(log, 2.5))
    said: list[str] = []
    store, _ = run_of(tmp_path, "second", reuse=True, code=other_code(learner__sft="9"), say=said.append)
    assert store.find("sft", INPUTS) == replace(old, cached=True)
    assert said == [f"WARNING: reuse_stages=true: {Path(old.path).parent} was made by other code (learner/sft.py)"]


def _torn_json(stage: Path) -> None:
    content = (stage / "stage.json").read_bytes()
    (stage / "stage.json").write_bytes(content[: len(content) // 2])


def _foreign(stage: Path) -> None:
    content = json.loads((stage / "stage.json").read_text())
    content["inputs"]["seed"] = 7
    (stage / "stage.json").write_text(json.dumps(content))


DAMAGES: dict[str, Any] = {
    "torn": (_torn_json, "JSONDecodeError"),
    "empty": (lambda stage: (stage / "stage.json").write_text(""), "JSONDecodeError"),
    "binary": (lambda stage: (stage / "stage.json").write_bytes(b"\xff\x00"), "UnicodeDecodeError"),
    "no stage.json": (lambda stage: (stage / "stage.json").unlink(), "FileNotFoundError"),
    "a list": (lambda stage: (stage / "stage.json").write_text("[]"), "TypeError"),
    "foreign": (_foreign, "stage.json is of another stage"),
    "no model": (lambda stage: shutil.rmtree(stage / "model"), "model"),
    "a weight": (lambda stage: (stage / "model/weights").write_text("2.6"), "not those that were written"),
    "a file less": (lambda stage: (stage / "model/weights").unlink(), "not those that were written"),
    "a file more": (lambda stage: (stage / "model/more.bin").write_text(""), "not those that were written"),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda name: name.replace(" ", "-"))
def test_a_torn_or_foreign_stage_is_named_and_made_anew(damage: str, tmp_path: Path) -> None:
    store, log = run_of(tmp_path, "first")
    stage = Path(store.run("sft", INPUTS, work_with(log, 2.5)).path).parent
    harm, reason = DAMAGES[damage]
    harm(stage)
    said: list[str] = []
    store, log = run_of(tmp_path, "second", say=said.append)
    assert store.find("sft", INPUTS) is None
    [line] = said
    assert line.startswith(f"WARNING: {stage} cannot be used (")
    assert reason in line
    assert line.endswith("): sft has to be made anew")
    assert (tmp_path / "second/metrics.jsonl").read_text() == ""  # nothing of it is in the log
    store.run("sft", INPUTS, work_with(log, 1.5))
    found = store.find("sft", INPUTS)
    assert found is not None
    assert found.metrics == {"eval_loss": 1.5}
    assert sorted(p.name for p in stage.iterdir()) == ["log", "model", "stage.json"]


@pytest.mark.parametrize("file", ["stage.json", "log/metrics.jsonl", "model/weights"])
def test_a_stage_that_cannot_be_read_now_is_not_made_anew(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, log = run_of(tmp_path, "first")
    made = store.run("sft", INPUTS, work_with(log, 2.5))
    stage = Path(made.path).parent
    whole, opened = Path.read_text, Path.open

    def failing(of: Any) -> Any:
        def fails(path: Path, *arguments: Any, **named: Any) -> Any:
            if path == stage / file:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return of(path, *arguments, **named)

        return fails

    monkeypatch.setattr(fingerprints, "_known", {})
    monkeypatch.setattr(Path, "read_text", failing(whole))
    monkeypatch.setattr(Path, "open", failing(opened))
    with pytest.raises(
        ConfigError, match=rf"{stage} cannot be read now and may be whole \(OSError: .*Input/output error"
    ):
        store.find("sft", INPUTS)
    anew, log = run_of(tmp_path, "second", reuse=False)
    other = anew.run("sft", INPUTS, work_with(log, 3.5))
    assert other.path != made.path
    monkeypatch.undo()
    assert (Path(made.path) / "weights").read_text() == "2.5"


def test_a_cache_that_remembers_nothing_is_still_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a full disk, or of somebody else's."""

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    store, log = run_of(tmp_path, "first")
    made = store.run("sft", INPUTS, work_with(log, 2.5))
    for file in (Path(made.path) / "weights", tmp_path / "cache"):
        os.utime(file, (1e9, 1e9))
    monkeypatch.setattr(fingerprints, "SETTLED_S", -60.0)
    monkeypatch.setattr(fingerprints, "_known", {})
    monkeypatch.setattr(fingerprints, "replace_text", full)
    assert store.find("sft", INPUTS) == replace(made, cached=True)
    assert not (tmp_path / "cache/fingerprints.json").exists()


# ---- code that is edited meanwhile


def test_what_ran_while_its_code_was_edited_is_of_no_code(tmp_path: Path) -> None:
    """Its workers have imported what was there when they started: neither run may take it for its own."""
    said: list[str] = []
    store, log = run_of(tmp_path, "first", say=said.append)
    clean = store.run("sft", INPUTS, work_with(log, 2.5))
    store.reuse, store.edited = False, lambda stage: {"learner/sft.py (edited while it ran)": "9"}
    made = store.run("sft", INPUTS, work_with(log, 3.5))
    assert said == ["WARNING: sft counts as made by code of its own: learner/sft.py (edited while it ran)"]
    store, _ = run_of(tmp_path, "second")
    assert store.find("sft", INPUTS) == replace(clean, cached=True)
    shutil.rmtree(Path(clean.path).parent)
    for code in (CODE, other_code(learner__sft="9")):
        told: list[str] = []
        store, _ = run_of(tmp_path, "third", code=code, say=told.append)
        assert store.find("sft", INPUTS) is None
        assert "learner/sft.py (edited while it ran)" in told[0]
        store.reuse = True
        assert store.find("sft", INPUTS) == replace(made, cached=True)


# ---- a cache of several users


def test_another_users_lock_is_waited_for_as_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be read and not written."""
    opened = os.open

    def as_another(path: Any, flags: int, *mode: int) -> int:
        if str(path).endswith(".lock") and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, flags, *mode)

    first, _ = run_of(tmp_path, "first")
    second, _ = run_of(tmp_path, "second")
    waited: list[str] = []

    @contextmanager
    def wait() -> Iterator[None]:
        waited.append("waits")
        yield

    def member() -> None:
        with second.alone("sft", INPUTS, wait):
            waited.append("is alone")

    thread = threading.Thread(target=member)
    with first.alone("sft", INPUTS, lambda: pytest.fail("nobody else makes it")):
        monkeypatch.setattr(os, "open", as_another)
        thread.start()
        until = time.monotonic() + 10
        while not waited and time.monotonic() < until:
            time.sleep(0.01)
        assert waited == ["waits"]
    thread.join()
    assert waited == ["waits", "is alone"]


@pytest.mark.parametrize("fault", [errno.EROFS, errno.EACCES, errno.EBADF])
def test_a_cache_that_cannot_be_written_is_named(fault: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EBADF: NFS locks no file that is open for reading alone."""

    def fails(*_: Any) -> Any:
        raise OSError(fault, os.strerror(fault))

    store, _ = run_of(tmp_path, "first")
    monkeypatch.setattr("fcntl.flock" if fault == errno.EBADF else "os.open", fails)
    told = rf"^cache_dir must be .* found {tmp_path}/cache \(.*{os.strerror(fault)}"
    with pytest.raises(ConfigError, match=told), store.alone("sft", INPUTS, nullcontext):
        pass


# ---- inputs of ppo


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


def test_an_environment_is_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "games_of_mine.py").write_text("from rules_of_mine import x\nclass Guess: ...\n")
    (tmp_path / "rules_of_mine.py").write_text("x = 1\n")
    config = TandemConfig()
    assert own_source("environment.name", config.environment.name) is None
    config.environment.name = "games_of_mine:Guess"
    before = own_source("environment.name", config.environment.name)
    (tmp_path / "rules_of_mine.py").write_text("x = 2\n")
    assert own_source("environment.name", config.environment.name) != before
    config.environment.name = "games_of_nobody:Guess"
    with pytest.raises(ConfigError, match=r"environment\.name: games_of_nobody:Guess: there is no source file"):
        own_source("environment.name", config.environment.name)


def test_what_is_blanked_of_an_environment_has_a_digest() -> None:
    config = TandemConfig()
    assert environment_hidden(config) == {}
    config.environment.options = {"keyword": "film", "turns": 3, "game": {"key": 3}, "site": "https://me:pw@host/x"}
    found = environment_hidden(config)
    film = hashlib.sha256(b'["options.keyword", "film"]').hexdigest()[:16]
    assert found["options.keyword"] == film
    assert sorted(found) == ["options.game.key", "options.keyword", "options.site"]
    config.environment.options |= {"keyword": "movie", "turns": 4}
    assert {name for name, digest in environment_hidden(config).items() if digest != found[name]} == {"options.keyword"}
