"""The model that is judged against SFT goes by the name of its method wherever it is read."""

import json
from pathlib import Path
from typing import Any

import pytest

from contracts.config import LoggerConfig, TandemConfig
from controller.alarms.rules import loses_to_sft
from controller.pipeline.pipeline import set_aside_reports
from controller.pipeline.summary import summary_rows
from controller.record.evaluation import against_sft, judged_model, judged_title, objective
from controller.record.reader import Run, load, read
from controller.record.run_log import RunLog
from controller.report.members import members_of
from controller.report.run_page import run_page
from tests.unit.test_report import invented_evaluation, write_run


def of_method(method: str) -> dict[str, Any]:
    """The invented evaluation of a PPO run as another method would have left it."""
    found = invented_evaluation()
    found["models"] = {"base": found["models"]["base"], method: found["models"]["ppo"], "sft": found["models"]["sft"]}
    comparisons = found["comparisons"]
    found["comparisons"] = {f"{method}_vs_sft": comparisons["ppo_vs_sft"], "base_vs_sft": comparisons["base_vs_sft"]}
    return {"method": method} | found


@pytest.fixture
def dpo_run(tmp_path: Path) -> Path:
    """A run of stage preference: no rollout, no update."""
    path = write_run(tmp_path / "run", versions=2)
    kept = [row for row in map(json.loads, (path / "metrics.jsonl").read_text().splitlines()) if row["stage"] == "sft"]
    kept += [
        {"stage": "preference", "step": k, "wall_s": 9.0, "preference/loss": 0.7 - k / 50, "preference/accuracy": 0.6}
        for k in range(1, 6)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    samples = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    samples = [row | {"model": "dpo"} if row.get("model") == "ppo" else row for row in samples if row["stage"] != "ppo"]
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (path / "evaluation.json").write_text(json.dumps(of_method("dpo")))
    (path / "config.yaml").write_text("name: x\nmethod: dpo\nevaluate: {max_kl: 10.0}\n")
    return path


def test_runs_that_did_not_write_their_method_are_of_ppo() -> None:
    old = invented_evaluation()
    assert judged_title(old) == "PPO"
    assert judged_model(old) is old["models"]["ppo"]
    assert against_sft(old) is old["comparisons"]["ppo_vs_sft"]


@pytest.mark.parametrize(("method", "title"), [("dpo", "DPO"), ("rank", "Rank-SL"), ("best_of_n", "Best of n")])
def test_another_method_is_read_under_its_name(method: str, title: str) -> None:
    found = of_method(method)
    assert judged_title(found) == title
    assert objective(found, 10.0) == objective(invented_evaluation(), 10.0)
    rows = dict(summary_rows(TandemConfig(), {"evaluate": found}, Path("report.html")))
    assert rows[f"gold reward, {title} - SFT"] == "+0.62 [+0.53, +0.71]"
    assert rows[f"learned score of SFT, of {title}"] == "0.36 [0.28, 0.44], 1.50 [1.42, 1.58]"
    assert rows["KL, EOS share"] == "6.0 nats a sequence, 97%"


def test_nothing_was_trained() -> None:
    found = {"method": "none", "models": {"base": {}, "sft": {}}, "comparisons": {"base_vs_sft": {}}}
    assert judged_model(found) == {}
    assert objective(found, 10.0) is None


def test_the_report_shows_another_method(dpo_run: Path) -> None:
    run = load(dpo_run)
    text = run_page(run)
    for part in (
        "Base, SFT, DPO on held-out prompts",
        "DPO against SFT",
        "gold gain of DPO over SFT",
        "Preference loss",
    ):
        assert part in text
    for part in ("PPO, version by version", "while PPO ran", 'id="rollouts"'):
        assert part not in text
    [member] = members_of([dpo_run])
    assert member.comparison("gold_gain")["mean"] == 0.62
    assert member.evaluated("kl")["mean"] == 6.0


def test_a_run_of_another_estimator_goes_by_its_name(tmp_path: Path) -> None:
    """And what it has no number of is not drawn: RAFT has no critic, and no clip."""
    path = write_run(tmp_path / "run", versions=3)
    gone = ("value/", "policy/clipfrac")
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rows = [
        {name: v for name, v in row.items() if not name.startswith(gone)} | {"raft/kept_frac": 0.25} for row in rows
    ]
    assert "Explained variance" in run_page(load(path))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "evaluation.json").write_text(json.dumps(invented_evaluation() | {"method": "ppo", "title": "RAFT"}))
    (path / "config.yaml").write_text("name: x\nppo: {estimator: raft}\nevaluate: {max_kl: 10.0}\n")
    text = run_page(load(path))
    for part in ("RAFT, version by version", "while RAFT ran", "RAFT against SFT", "kept by raft 0.25"):
        assert part in text
    for part in ("PPO against SFT", "Explained variance", "Clipped tokens"):
        assert part not in text


def test_the_frontier_draws_best_of_n_over_its_bound(dpo_run: Path) -> None:
    found = of_method("best_of_n")
    found["models"]["best_of_n"]["best_of_n"] = [
        {"n": n, "kl": kl, "gold": {"mean": gold, "low": gold, "high": gold}}
        for n, kl, gold in ((1, 0.0, 0.2), (2, 0.193, 0.5), (4, 0.636, 0.8))
    ]
    (dpo_run / "evaluation.json").write_text(json.dumps(found))
    text = run_page(load(dpo_run))
    [line] = [
        part for part in text.split("<polyline ") if part.startswith('class="edge"')
    ]  # on the panel of the gold judge
    assert line.split('points="')[1].split('"')[0].count(",") == 3


def test_the_alarm_names_the_method() -> None:
    run = Run(Path())
    run.evaluation = {
        "method": "rank",
        "comparisons": {"rank_vs_sft": {"win_rate": {"mean": 0.4, "low": 0.3, "high": 0.48}}},
    }
    [alarm] = loses_to_sft(run) or []
    assert alarm.title == "Rank-SL loses to SFT"


def test_a_new_attempt_does_not_show_what_another_has_found_out(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(of_method("dpo")))
    said: list[str] = []
    log = RunLog(tmp_path, {}, LoggerConfig(wandb="disabled"), "pipeline", attempt=2)
    log.samples([{"stage": stage, "step": 1} for stage in ("ppo", "evaluate")])
    set_aside_reports(tmp_path, log, said.append)
    assert read(tmp_path).evaluation == {}
    assert [row["stage"] for row in read(tmp_path).samples] == ["ppo"]
    assert said == ["evaluation.json of an earlier attempt is evaluation.before.json now"]
    assert json.loads((tmp_path / "evaluation.before.json").read_text()) == of_method("dpo")
    set_aside_reports(tmp_path, log, said.append)
    log.close()
    assert len(said) == 1
