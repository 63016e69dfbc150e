"""Results that outlive their runs, and a sweep that is run in pieces. The runs are invented."""

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from studies.five_reasons import run_missing
from studies.five_reasons.contrasts import cells
from studies.five_reasons.kept import FOLDER, MOST_BYTES, keep, kept_members, read_kept
from studies.five_reasons.members import members_of_study
from studies.five_reasons.registration import (
    PREREGISTRATION,
    RECORD,
    Contrast,
    Preregistration,
    StudyError,
    parse,
    record,
    sha256,
)
from studies.five_reasons.results import as_json, study_of
from studies.five_reasons.run_missing import ROOT, Job, Pieces, Sweep, run_sweep, sweep_of
from studies.five_reasons.tuning import main as say_tuning
from studies.five_reasons.tuning import tuned
from tests.unit.test_report import jsonl
from tests.unit.test_study_page import make_member, make_study, negation


def study_plan(**changed: object) -> Preregistration:
    return parse(PREREGISTRATION.read_text()).model_copy(update=changed)


def with_models(run: Path, fingerprints: dict[str, str]) -> None:
    """As a run that has these stages in the cache."""
    rows = []
    for name, fingerprint in fingerprints.items():
        folder = run.parent / "cache" / fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stage.json").write_text(json.dumps({"fingerprint": fingerprint}))
        rows.append({"name": name, "path": str(folder / "model"), "seconds": 1.0, "metrics": {}})
    (run / "stages.json").write_text(json.dumps(rows))


def test_a_page_from_what_is_kept_is_that_of_the_runs(tmp_path: Path) -> None:
    runs = make_study(tmp_path / "runs/five_reasons")
    kept = tmp_path / "results/five_reasons"
    registered = record(kept)["sha256"]
    for folder in (runs, kept):
        negation(folder, registered)
    for member in members_of_study(runs):
        if member.is_judged:
            keep(member, registered, kept)
    whole, small = as_json(study_of(runs)), as_json(study_of(kept))
    assert len(small["members"]) == len(whole["members"]) - 2  # one failed and one was refused: nothing to keep
    for a, b in zip(whole["claims"], small["claims"], strict=True):
        assert a["verdict"] == b["verdict"]
        assert b["estimate"]["mean"] == pytest.approx(a["estimate"]["mean"], abs=5e-4)
        assert b["estimate"]["seeds"] == a["estimate"]["seeds"]
    assert small["problems"] == whole["problems"] == []
    theirs = {(m["arm"], m["seed"]): m for m in whole["members"]}
    for row in small["members"]:
        assert row["diverged"] == theirs[row["arm"], row["seed"]]["diverged"]
        assert row["constraint"] == theirs[row["arm"], row["seed"]]["constraint"]
    assert {row["arm"]: row["episodes"] for row in small["arms"]} == {
        row["arm"]: row["episodes"] for row in whole["arms"] if row["arm"] != "dpo"
    }
    gains = [{(row["arm"], row["seed"]): row["ppo_gain"] for row in page["matched_kl"]} for page in (whole, small)]
    assert gains[1].keys() == gains[0].keys()
    assert [v for v in gains[1].values() if v is not None] == pytest.approx(
        [gains[0][key] for key, v in gains[1].items() if v is not None]
    )


def test_what_is_kept_is_small_and_says_what_it_is_of(tmp_path: Path) -> None:
    make_member(tmp_path, 7, "rank", 3)
    (member,) = members_of_study(tmp_path)
    member.scores["own"]["gold"][4] = math.nan
    path = keep(member, "a" * 64, tmp_path / "kept")
    assert path == tmp_path / "kept" / FOLDER / "arm=rank,ppo.seed=3.json"
    assert path.stat().st_size < MOST_BYTES / 4
    back = read_kept(path)
    assert (back.arm, back.seed, back.state, back.facts["registration"]) == ("rank", 3, "done", "a" * 64)
    assert math.isnan(back.scores["own"]["gold"][4])
    assert back.scores["own"]["gold"][5] == round(member.scores["own"]["gold"][5], 3)
    assert back.mean("own", "ended") == member.mean("own", "ended")
    assert back.kl == member.kl
    assert back.run.stage("preference")["metrics"] == member.run.stage("preference")["metrics"]  # for its check
    assert "prompt" not in json.loads(path.read_text())["scores"]["own"]


def test_nothing_is_kept_of_a_run_that_was_not_judged_or_of_too_much(tmp_path: Path) -> None:
    make_member(tmp_path, 0, "ppo", 1, failed=True)
    with pytest.raises(StudyError, match="was not judged"):
        keep(members_of_study(tmp_path)[0], "a" * 64, tmp_path / "kept")
    make_member(tmp_path, 1, "ppo", 2)
    member = members_of_study(tmp_path)[1]
    member.scores["own"]["gold"] = {prompt: 0.123 for prompt in range(20000)}
    with pytest.raises(StudyError, match=f"more than {MOST_BYTES}"):
        keep(member, "a" * 64, tmp_path / "kept")
    assert kept_members(tmp_path / "kept") == []
    (tmp_path / "kept" / FOLDER).mkdir(parents=True)
    (tmp_path / "kept" / FOLDER / "x.json").write_text("{}")
    with pytest.raises(StudyError, match="is no kept result of a member"):
        kept_members(tmp_path / "kept")


def test_a_seed_whose_arms_had_other_models_is_named(tmp_path: Path) -> None:
    for number, (arm, sft) in enumerate((("ppo", "first"), ("raft", "second"))):
        make_member(tmp_path, number, arm, 1)
        with_models(tmp_path / f"{number}-arm={arm},ppo.seed=1", {"sft": sft, "reward_model/gold": "same"})
    record(tmp_path / "kept")
    for member in members_of_study(tmp_path):
        keep(member, "b" * 64, tmp_path / "kept")
    other, models = study_of(tmp_path / "kept").problems
    assert other == f"Members were kept under another pre-registration: {'b' * 12}."
    assert models == "raft, seed 1, had another model than the first arm of its seed: sft."


def test_the_tuning_is_read_from_what_is_kept_by_the_keys_of_its_sweep(tmp_path: Path) -> None:
    folder = tmp_path / "tuning"
    for number, (arm, rate) in enumerate((("ppo", 0.1), ("ppo", 0.2), ("ppo_from_base", 0.1))):
        make_member(folder, number, arm, 100 + number)
        path = next(folder.glob(f"{number}-*"))
        given = ["+experiment=x", f"arm={arm}", "ppo.seed=100", f"ppo.optimizer.learning_rate={rate}", "ppo.updates=8"]
        (path / "hydra/overrides.yaml").write_text(yaml.safe_dump([*given, "cluster.threads_per_actor=1"]))
        config = yaml.safe_load((path / "config.yaml").read_text())
        config["ppo"]["optimizer"]["learning_rate"] = rate
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    for member in members_of_study(folder):
        keep(member, "a" * 64, tmp_path / "kept")
    plan = study_plan(tuning_avoids_divergence=True)
    rows = tuned([tmp_path / "kept"], members_of_study(folder)[:1], plan)
    keys = "ppo.optimizer.learning_rate, ppo.updates"
    assert [(row.arm, row.key, row.value, row.is_used) for row in rows] == [
        ("ppo", keys, "0.1, 8", True),
        ("ppo", keys, "0.2, 8", False),
        ("ppo_from_base", keys, "0.1, 8", None),
    ]
    assert rows[2].diverged  # and the best all the same, as nothing else was tried
    assert rows[2].is_best


def test_what_an_arm_keeps_of_an_earlier_tuning_is_what_it_used(tmp_path: Path) -> None:
    """None of the new settings could be chosen, so it runs with an old one."""
    for number, (folder, setting) in enumerate((("old", "lower"), ("old", "upper"), ("new", "middle"))):
        make_member(tmp_path / folder, number, "ppo", 100, setting=setting)
    ran = [member for member in members_of_study(tmp_path / "old") if member.run.path.name.endswith("upper")]
    rows = tuned([tmp_path / "new", tmp_path / "old"], ran, study_plan())
    assert {(row.source, row.setting): row.is_used for row in rows} == {
        ("new", "middle"): False, ("old", "lower"): False, ("old", "upper"): True
    }  # fmt: skip


def test_of_settings_that_diverged_none_is_chosen_where_one_did_not(tmp_path: Path) -> None:
    for number, setting in enumerate(("lower", "upper")):  # of PPO, which gains more at the upper rate
        make_member(tmp_path, number, "ppo", 100, setting=setting)
    path = tmp_path / "1-arm=ppo,ppo.seed=100,tuning=upper/evaluation.json"
    path.write_text(path.read_text().replace('"distinct_2": 0.8', '"distinct_2": 0.1'))
    for avoids, best in ((False, "upper"), (True, "lower")):
        rows = tuned([tmp_path], [], study_plan(tuning_avoids_divergence=avoids))
        assert [row.setting for row in rows if row.is_best] == [best]


def test_a_setting_whose_drift_is_not_known_is_not_chosen(tmp_path: Path) -> None:
    """It would cost nothing: upper gains more than lower, and says nothing of how far it went for that."""
    for number, setting in enumerate(("lower", "upper")):
        make_member(tmp_path, number, "ppo", 100, setting=setting)
    path = tmp_path / "1-arm=ppo,ppo.seed=100,tuning=upper/samples.jsonl"
    path.write_text(path.read_text().replace('"kl": 4.0', '"kl": null'))
    rows = tuned([tmp_path], [], study_plan())
    assert [(row.setting, row.objective is None, row.is_best) for row in rows] == [
        ("lower", False, True), ("upper", True, False)
    ]  # fmt: skip


# ---- a sweep in pieces


class Runs:
    """In place of train.py: a run that is done at once, with the models of this machine."""

    def __init__(self, folder: Path, sft: str, failing: tuple[str, ...] = (), state: str = "failed") -> None:
        self.folder, self.sft, self.failing, self.state = folder, sft, failing, state
        self.started: list[tuple[str, str]] = []
        self.most = 0
        self.running: list[subprocess.Popen[bytes]] = []

    def __call__(self, job: Job) -> "subprocess.Popen[bytes]":
        self.started.append((job["arm"], job["ppo.seed"]))
        number = len(self.started)
        fails = job["arm"] in self.failing
        make_member(self.folder, number, job["arm"], int(job["ppo.seed"]), failed=fails)
        if fails:
            status = next(self.folder.glob(f"{number}-*")) / "status.json"
            status.write_text(json.dumps(json.loads(status.read_text()) | {"state": self.state}))
        else:
            run = next(self.folder.glob(f"{number}-*"))
            with_models(run, {"sft": self.sft})
            (run / "phases.jsonl").write_text(json.dumps({"name": "PPO", "start_s": 0.0, "end_s": 3600.0}) + "\n")
        self.running = [p for p in self.running if p.poll() is None]
        self.running.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.2)"]))
        self.most = max(self.most, len(self.running))
        return self.running[-1]


def pieces(tmp_path: Path, runs: Runs, seeds: tuple[int, ...] = (1, 2), minutes: float = 1e6) -> Pieces:
    arms = ("two_turn_cumulative", "two_turn_combined", "ppo")
    jobs = [{"arm": arm, "ppo.seed": str(seed)} for seed in seeds for arm in arms]
    sweep = Sweep("x", "x", runs.folder, jobs, PREREGISTRATION, {*seeds} - {100}, [])
    deadline = time.monotonic() + 60 * minutes
    return Pieces(sweep, tmp_path / "kept", runs, 2, deadline, say=lambda text: None, poll_s=0.02)


def test_what_is_kept_is_not_run_again(tmp_path: Path) -> None:
    first = Runs(tmp_path / "first", "a")
    assert pieces(tmp_path, first, seeds=(1,)).run() == []
    assert sorted(first.started) == [("ppo", "1"), ("two_turn_combined", "1"), ("two_turn_cumulative", "1")]
    assert json.loads((tmp_path / "kept" / RECORD).read_text())["sha256"] == sha256()
    second = Runs(tmp_path / "second", "b")  # a fresh machine: only the repository is left
    assert pieces(tmp_path, second).run() == []
    assert {seed for _, seed in second.started} == {"2"}
    assert second.most == 2
    assert len(kept_members(tmp_path / "kept")) == 6


def test_a_member_took_the_time_of_all_its_attempts(tmp_path: Path) -> None:
    """Killed at 1000 s, when the phase of PPO had no end yet; the second attempt took 890 s."""
    make_member(tmp_path / "runs", 0, "ppo", 1)
    (run,) = (tmp_path / "runs").iterdir()
    with_models(run, {"sft": "a"})
    jsonl(run / "metrics.jsonl", [{"stage": "ppo", "step": n, "wall_s": t} for n, t in enumerate((70, 1000, 60, 880))])
    jsonl(run / "phases.jsonl", [{"stage": "ppo", "start_s": 0.0, "end_s": t} for t in (10, 45, 12, 48, 890)])
    (member,) = members_of_study(tmp_path / "runs")
    assert read_kept(keep(member, "0" * 64, tmp_path / "kept")).run.wall_s == member.run.wall_s == 1890.0


def test_a_setting_with_a_gain_and_no_drift_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, setting in enumerate(("lower", "upper")):
        make_member(tmp_path, number, "ppo_from_base", 100, setting=setting)
    (lower,) = tmp_path.glob("0-*")
    (lower / "metrics.jsonl").write_text("")  # where the KL from the base model was
    say_tuning([str(tmp_path)])
    first, second = capsys.readouterr().out.splitlines()
    assert re.search(r"0.0001: drift not known, gain \+1.6\d", first)
    assert re.search(r"0.0004: objective [+-][\d.]+, gain \+1.9\d", second)


def test_conversations_do_not_share_the_memory(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", "a")
    pieces(tmp_path, runs, seeds=(1,)).run()
    assert [arm for arm, _ in runs.started] == ["two_turn_cumulative", "ppo", "two_turn_combined"]


def test_a_seed_is_begun_only_where_there_is_time_for_all_its_arms(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", "a")
    work = pieces(tmp_path, runs, minutes=23)  # three members of unknown length, two of them conversations
    assert work.minutes(work.missing()[:3]) == pytest.approx(24)
    assert len(work.run()) == 6
    assert runs.started == []
    work = pieces(tmp_path, runs, minutes=25)
    assert len(work.run()) == 3  # one seed, and no second: by now members are known to take an hour
    assert work.minutes(work.missing()) == 120  # two of three are conversations, one after the other


def test_a_member_that_fails_twice_takes_its_seed_out_for_good(tmp_path: Path) -> None:
    """Tried until it succeeds, seeds would be chosen by success."""
    first = Runs(tmp_path / "first", "a", failing=("ppo",))
    assert pieces(tmp_path, first, seeds=(1,)).run() == []
    assert first.started.count(("ppo", "1")) == 2
    second = Runs(tmp_path / "second", "b")
    assert pieces(tmp_path, second, seeds=(1,)).run() == []
    assert second.started == []
    [failed] = [m for m in kept_members(tmp_path / "kept") if m.state == "failed"]
    assert (failed.arm, failed.seed, failed.error) == ("ppo", 1, "exit code 0, 2 times")
    contrast = Contrast(title="x", metric="gold", contrast={"ppo": 1.0, "two_turn_combined": -1.0})
    assert cells(kept_members(tmp_path / "kept"), contrast, []) == ({}, [1])


def test_what_did_not_train_is_no_failed_member(tmp_path: Path) -> None:
    """A member that was refused or interrupted, and two in a row that end without a judged model: the machine is to blame,
    and the seeds after would go the same way."""
    for state in ("refused", "interrupted"):
        runs = Runs(tmp_path / state, "a", failing=("ppo",), state=state)
        with pytest.raises(StudyError, match=rf"arm=ppo ppo.seed=1 ended without a judged model \({state}\)"):
            pieces(tmp_path / state, runs, seeds=(1, 2)).run()
        assert {seed for _, seed in runs.started} == {"1"}
        assert [m for m in kept_members(tmp_path / state / "kept") if m.state == "failed"] == []
    runs = Runs(tmp_path / "disk", "a", failing=("ppo", "two_turn_combined", "two_turn_cumulative"))
    with pytest.raises(StudyError, match=r"arm=ppo ppo\.seed=1 and arm=two_turn_cumulative ppo\.seed=1 ended without"):
        pieces(tmp_path / "disk", runs, seeds=(1, 2)).run()
    assert kept_members(tmp_path / "disk/kept") == []


def test_a_study_is_not_gone_on_with_by_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pieces(tmp_path, Runs(tmp_path / "runs", "a"), seeds=(1,)).run() == []
    for file in (tmp_path / "kept/members").glob("*.json"):
        content = json.loads(file.read_text())
        content["facts"]["code"] = "0" * 64
        file.write_text(json.dumps(content))
    (tmp_path / "kept").rename(tmp_path / "x")
    sweep = pieces(tmp_path, Runs(tmp_path / "more", "a"), seeds=(1, 2)).sweep
    deadline = time.monotonic() + 600
    with pytest.raises(StudyError, match=r"made by other code \(000000000000\): check out the commit"):
        run_sweep(sweep, tmp_path, 2, deadline, dry_run=False, other_code=False)
    assert len(run_sweep(sweep, tmp_path, 2, deadline, dry_run=True, other_code=False)) == 3
    monkeypatch.setattr(run_missing, "make_models", lambda sweep: None)
    monkeypatch.setattr(Pieces, "run", lambda self: [])
    assert run_sweep(sweep, tmp_path, 2, deadline, dry_run=False, other_code=True) == []


def broken_off(tmp_path: Path, seed: int) -> None:
    """A seed of which PPO had not ended when the session did."""
    first = Runs(tmp_path / "first", "a")
    assert pieces(tmp_path, first, seeds=(seed,)).run() == []
    [kept] = [member for member in kept_members(tmp_path / "kept") if member.arm == "ppo"]
    kept.run.path.unlink()


def test_members_of_a_broken_off_seed_run_again_where_their_models_are_gone(tmp_path: Path) -> None:
    broken_off(tmp_path, 1)
    second = Runs(tmp_path / "second", "b")
    assert pieces(tmp_path, second, seeds=(1,)).run() == []
    assert sorted(second.started) == [("ppo", "1"), ("two_turn_combined", "1"), ("two_turn_cumulative", "1")]
    assert {m.facts["models"]["sft"] for m in kept_members(tmp_path / "kept")} == {"b"}


def test_of_a_tuning_an_arm_is_compared_with_itself_alone(tmp_path: Path) -> None:
    broken_off(tmp_path, 100)
    second = Runs(tmp_path / "second", "b")
    assert pieces(tmp_path, second, seeds=(100,)).run() == []
    assert second.started == [("ppo", "100")]


def test_settings_that_are_compared_are_of_one_sweep() -> None:
    """Whose members run again together where models turn out to be others."""
    made = re.findall(
        r"\bfive_reasons_2_tuning\w*",
        (ROOT / "Makefile").read_text().split("study-second-tuning: ")[1].split("$(PY)")[0],
    )
    sweeps = [sweep_of(name) for name in made]
    arms = [arm for sweep in sweeps for arm in {job["arm"] for job in sweep.jobs}]
    assert len(arms) == len(set(arms)) == 7
    assert sum(len(sweep.jobs) for sweep in sweeps) == 21  # as preregistration_2.yaml says


def test_conversations_alone_have_every_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(run_missing, "make_models", lambda sweep: None)
    monkeypatch.setattr(Pieces, "run", lambda self: seen.append(self.at_a_time))
    for arms in (["two_turn_combined"], ["two_turn_combined", "ppo"]):
        sweep = Sweep(
            "x", "x", tmp_path / "runs", [{"arm": arm, "ppo.seed": "1"} for arm in arms], PREREGISTRATION, {1}, []
        )
        run_sweep(sweep, tmp_path / "results", 2, time.monotonic() + 600, dry_run=False, other_code=False)
    assert seen == [1, 2]


def test_a_sweep_is_read_from_its_configuration() -> None:
    sweep = sweep_of("five_reasons_quick")
    assert sweep.name == "five_reasons_quick"
    assert sweep.registration == PREREGISTRATION
    assert len(sweep.jobs) == 12
    assert sweep.jobs[0] == {"ppo.seed": "1", "arm": "ppo"}
    assert sweep.runs == ROOT / "runs/five_reasons_quick"
    narrower = sweep_of("five_reasons_quick", ["arm=ppo,rank", "ppo.seed=7", "sft.epochs=1"])
    assert narrower.jobs == [{"ppo.seed": "7", "arm": "ppo"}, {"ppo.seed": "7", "arm": "rank"}]
    assert narrower.overrides == ["sft.epochs=1"]
