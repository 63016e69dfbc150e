"""Directories of members, the comparison of runs, and what a sweep maximises. The run directories are invented here."""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from common.files.outcome import write_outcome
from common.flatten import flat
from common.models.precision import choose_dtypes
from contracts.config import PromptSourceConfig, ScorerConfig, TandemConfig
from controller.pipeline.ingredients import made_of
from controller.record.evaluation import evaluation_metrics, objective
from controller.record.reader import ReportError
from controller.record.redaction import redacted
from controller.report.__main__ import main
from controller.report.comparison_charts import unbeaten
from controller.report.comparison_page import comparison_page
from controller.report.members import best_of, members_of
from controller.report.status import main as status
from controller.sweep import finished_objective, keep_in_names_what_is_swept, member_name, report_sweep, share_directory
from tests.unit.test_pinned_model import files_of, hub_of
from tests.unit.test_report import around, jsonl, parsed


def test_the_directory_of_a_member_is_readable_and_safe() -> None:
    assert member_name(3, "ppo.kl.coef=0.02,ppo.seed=1") == "3-ppo.kl.coef=0.02,ppo.seed=1"
    assert member_name(0, "") == "0"
    assert member_name(0, "model.path=/a/b,seed=2") == "0-model.path=b,seed=2"
    assert (
        member_name(1, "reward_service.scorers.proxy={kind: ensemble}")
        == "1-reward_service.scorers.proxy=_kind_ensemble_"
    )
    assert len(member_name(1, "x=" + "y" * 400)) == 120


def evaluation(gold: float, kl: float, passed: bool = True) -> dict[str, Any]:
    against = {"gold_gain": around(gold, 0.1), "proxy_gain": around(gold + 0.2, 0.1), "win_rate": around(0.7, 0.1)}
    models = {"ppo": {"kl": around(kl, 0.3), "gold": around(gold, 0.1), "proxy": around(gold, 0.1), "prompts": 24}}
    return {
        "models": models,
        "comparisons": {"ppo_vs_sft": against | {"length_ratio": 0.9}},
        "verdict": {"passed": passed, "text": "Passed: it rose.", "checks": []},
    }


def test_the_objective_is_gold_less_what_lies_beyond_the_bound() -> None:
    assert objective(evaluation(0.8, 4.0), 10.0) == 0.8
    assert objective(evaluation(0.8, 12.0), 10.0) == pytest.approx(0.8 - 0.1 * 2)
    assert objective({}, 10.0) is None
    no_gold = evaluation(0.8, 4.0)
    del no_gold["comparisons"]["ppo_vs_sft"]["gold_gain"]
    assert objective(no_gold, 10.0) is None
    assert set(evaluation_metrics(no_gold, 10.0)) == {"proxy_gain", "win_rate", "kl", "length_ratio"}
    assert objective(evaluation(float("nan"), 4.0), 10.0) is None


def make_member(path: Path, coef: float, gold: float | None, kl: float, state: str = "done", error: str = "") -> None:
    """A run directory with three versions; without an evaluation where `gold` is None."""
    path.mkdir(parents=True)
    config = f"name: x\nrun_dir: {path}\nppo: {{kl: {{coef: {coef}}}, updates: 3}}\nevaluate: {{max_kl: 10.0}}\n"
    (path / "config.yaml").write_text(config)
    (path / "hydra").mkdir()
    (path / "hydra/overrides.yaml").write_text(f"- ppo.kl.coef={coef}\n")
    (path / "status.json").write_text(json.dumps({"state": state, "started": 1.0, "ended": 9.0, "error": error}))
    rows = [
        {"stage": "ppo", "step": v, "wall_s": 10.0 * v, "progress/version": v, "kl/ref_seq": kl * v / 3}
        | {"reward/score_mean": 0.1 * v, "reward/gold_mean": 0.1 * v, "policy/clipfrac": 0.4}
        for v in (1, 2, 3)
    ]
    jsonl(path / "metrics.jsonl", rows)
    if gold is not None:
        (path / "evaluation.json").write_text(json.dumps(evaluation(gold, kl)))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "my-sweep"
    make_member(folder / "0-ppo.kl.coef=0.02", 0.02, gold=0.9, kl=14.0)  # 0.9 - 0.4
    make_member(folder / "1-ppo.kl.coef=0.05", 0.05, gold=0.8, kl=6.0)
    make_member(folder / "2-ppo.kl.coef=0.5", 0.5, gold=None, kl=1.0, state="failed", error="OutOfMemory: <8 GiB>")
    refused = folder / "3-ppo.kl.coef=9" / "hydra"
    refused.mkdir(parents=True)
    (refused / "overrides.yaml").write_text("- ppo.kl.coef=9\n")
    return folder


def test_members_are_found_ranked_and_told_apart(sweep: Path) -> None:
    members = members_of([sweep])
    assert [m.label for m in members] == [
        "1-ppo.kl.coef=0.05",
        "0-ppo.kl.coef=0.02",
        "2-ppo.kl.coef=0.5",
        "3-ppo.kl.coef=9",
    ]
    assert [m.objective for m in members] == [0.8, pytest.approx(0.5), None, None]
    assert [m.state for m in members] == ["done", "done", "failed", "not started"]
    assert [m.settings.get("ppo.kl.coef") for m in members] == [0.05, 0.02, 0.5, None]
    assert all(set(m.settings) <= {"ppo.kl.coef"} for m in members)  # run_dir does not tell them apart
    best = best_of(members)
    assert best is not None
    assert best.command == ["python", "train.py", "ppo.kl.coef=0.05"]
    assert best_of([m for m in members if m.state != "done"]) is None


def test_the_page_names_the_best_its_command_and_the_failed(sweep: Path) -> None:
    (sweep / "1-ppo.kl.coef=0.05/report.html").write_text("x")
    main([str(sweep)])
    found = parsed(sweep / "report.html")
    text = " ".join(found.texts)
    assert "python train.py ppo.kl.coef=0.05" in text
    assert "1-ppo.kl.coef=0.05: gold gain +0.80 [+0.70, +0.90] at a KL of 6.0 nats a sequence." in text
    assert "<li><b>3</b> failed: OutOfMemory: &lt;8 GiB&gt;</li>" in (sweep / "report.html").read_text()  # by its place
    assert "4 runs, 2 done · they differ in ppo.kl.coef" in text
    assert "1 other member" in text  # 0.9 +- 0.1 overlaps
    assert "Much of every batch is clipped 1, 2, 3 " in text  # one line for the three members
    html = (sweep / "report.html").read_text()
    assert 'href="1-ppo.kl.coef=0.05/report.html"' in html
    assert html.count("<polyline") >= 4  # two trails a panel, and the threads
    assert "<script" not in html


def test_any_runs_can_be_compared(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main([str(sweep / "0-ppo.kl.coef=0.02"), str(sweep / "1-ppo.kl.coef=0.05")])
    assert "2 runs, 2 done" in (tmp_path / "report.html").read_text()


def test_one_member_alone_and_none_at_all(sweep: Path, tmp_path: Path) -> None:
    assert "No best member" in comparison_page(members_of([sweep / "2-ppo.kl.coef=0.5"]), sweep)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match="no run directory in"):
        members_of([tmp_path / "empty"])


def test_what_a_user_reads_at_the_end_of_a_sweep(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_sweep(sweep)
    said = capsys.readouterr().out
    assert "sweep: 2 of 4 members done" in said
    assert said.endswith(f"best member: {sweep}/1-ppo.kl.coef=0.05\n  python train.py ppo.kl.coef=0.05\n")
    report_sweep(sweep / "nothing")
    assert "sweep: no run directory" in capsys.readouterr().err


def test_the_status_of_a_sweep_is_that_of_each_member(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status([str(sweep)]) == 2  # one has not started
    said = capsys.readouterr()
    heads = [line.split(": ", 1)[1] for line in said.out.splitlines() if line.startswith("x (")]
    assert heads == ["done", "done", "failed; OutOfMemory: <8 GiB>"]
    assert said.out.count("objective +0.") == 2
    assert "3-ppo.kl.coef=9" in said.err


def test_the_frontier_keeps_what_no_other_beats() -> None:
    points = [(3.0, 0.5), (1.0, 0.2), (2.0, 0.6), (4.0, 0.7), (2.0, 0.1)]
    assert unbeaten(points) == [(1.0, 0.2), (2.0, 0.6), (4.0, 0.7)]
    assert unbeaten([]) == []


def test_flattened() -> None:
    assert flat({"a": {"b": 1, "c": {"d": None}}, "e": {}, "f": [1]}) == {
        "a.b": 1,
        "a.c.d": None,
        "e": {},
        "f": [1],
    }


def test_what_all_members_share_is_not_in_their_names() -> None:
    given = ["name=x", "ppo.updates=3", "ppo.seed=1,2", "ppo.updates=4,5", "+experiment=grpo"]
    hydra = {"overrides": {"task": given, "hydra": ["hydra.sweep.dir=d"]}, "sweeper": {}}
    config = OmegaConf.create({"hydra": hydra})
    keep_in_names_what_is_swept(config)
    assert config.hydra.overrides.hydra == [
        "hydra.sweep.dir=d",
        "hydra.job.config.override_dirname.exclude_keys=[experiment,name]",
    ]


def test_members_of_several_experiments_share_a_directory() -> None:
    """Each experiment has a `name` of its own, from which the directory of a sweep is made."""
    given = {"task": ["+experiment=grpo,dapo"], "hydra": []}
    config = OmegaConf.create(
        {"name": "my run", "hydra": {"overrides": given, "sweep": {"dir": "runs/${name}"}, "sweeper": {}}}
    )
    share_directory(config)
    [override] = config.hydra.overrides.hydra
    assert OverridesParser.create().parse_override(override).value() == "runs/my run"


def test_what_an_experiment_sweeps_is_in_the_names_with_one_value_too() -> None:
    """Else `arm=ppo ppo.seed=1,2` and `arm=raft ppo.seed=1,2` would write into the same directories."""
    given = ["+experiment=study", "name=x", "arm=raft", "ppo.seed=1,2"]
    hydra = {"overrides": {"task": given, "hydra": []}, "sweeper": {"params": {"arm": "ppo,raft", "ppo.seed": 1}}}
    config = OmegaConf.create({"hydra": hydra})
    keep_in_names_what_is_swept(config)
    assert config.hydra.overrides.hydra == ["hydra.job.config.override_dirname.exclude_keys=[experiment,name]"]


@pytest.fixture
def done(tmp_path: Path) -> TandemConfig:
    """The configuration of a member that is done, as it is composed again."""
    model, prompts, rules = tmp_path / "model", tmp_path / "prompts.jsonl", tmp_path / "rules.py"
    model.mkdir()
    (model / "config.json").write_text("{}")
    prompts.write_text('{"prompt": "a"}\n')
    rules.write_text("def brevity(**_): return []\n")
    config = TandemConfig(stage="evaluate", method="none", run_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "c"))
    config.model.path = str(model)
    config.data.eval_prompts.path = str(prompts)
    config.reward_service.scorers = {"rule": ScorerConfig(kind="function", function=f"{rules}:brevity")}
    written = copy.deepcopy(config)
    choose_dtypes(written)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(redacted(asdict(written)), sort_keys=False))
    (tmp_path / "run/status.json").write_text(json.dumps({"state": "done", "made_of": made_of(written)}))
    write_outcome(tmp_path / "run", 0.25)
    return config


def test_a_member_that_is_done_is_known_by_its_configuration(done: TandemConfig) -> None:
    assert finished_objective(done) == (True, 0.25)
    coef, done.ppo.kl.coef = done.ppo.kl.coef, 0.1
    assert finished_objective(done) == (False, None)
    done.ppo.kl.coef = coef
    assert finished_objective(done) == (True, 0.25)
    status = Path(done.run_dir) / "status.json"
    status.write_text(status.read_text().replace("done", "failed"))
    assert finished_objective(done) == (False, None)


def test_a_member_that_was_done_elsewhere_has_the_number_format_of_that_machine(done: TandemConfig) -> None:
    written = copy.deepcopy(done)
    written.model.dtype, written.reward_service.dtype = "bfloat16", "bfloat16"
    config, status = Path(done.run_dir) / "config.yaml", Path(done.run_dir) / "status.json"
    config.write_text(yaml.safe_dump(redacted(asdict(written))))
    status.write_text(json.dumps({"state": "done", "made_of": made_of(written)}))
    assert finished_objective(done) == (True, 0.25)
    done.model.dtype = "float32"
    assert finished_objective(done) == (False, None)


@pytest.mark.parametrize("file", ["prompts.jsonl", "model/config.json", "rules.py"])
def test_a_member_whose_files_have_changed_runs_again_and_says_so(
    file: str, done: TandemConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / file).write_text((tmp_path / file).read_text() + "\n")
    assert finished_objective(done) == (False, None)
    assert "run was done with other data, checkpoints, functions or code: it runs again" in capsys.readouterr().out
    done.reuse_stages = True  # as it says
    assert finished_objective(done) == (True, 0.25)
    done.seed = 7
    assert finished_objective(done) == (False, None)


def test_a_member_that_other_packages_made_runs_again(done: TandemConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.pipeline.ingredients.package_versions", lambda: {"torch": "1.0"})
    assert finished_objective(done) == (False, None)


def test_a_member_is_made_of_the_hub_checkpoints_that_it_reads(
    done: TandemConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done.sft_model, done.preference_model = "owner/model", "owner/nobody-asks"
    found = []
    for words in (("no", "yes"), ("up", "down"), ("no", "yes")):  # somebody uploads another, and takes it back
        hub_of(tmp_path, monkeypatch, main=files_of(*words))
        found.append(made_of(done))
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("way", ["sources", "home"])
def test_prompts_of_several_sources_and_of_the_home_count(
    way: str, done: TandemConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else does: the path of what has several sources is open, and no file of the working directory."""
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path))
    done.stage, done.sft_model = "ppo", str(tmp_path / "model")
    if way == "home":
        done.data.prompts.path = "~/prompts.jsonl"
    else:
        done.data.prompts.path = ""
        done.data.prompt_sources = {"sums": PromptSourceConfig(path=str(tmp_path / "prompts.jsonl"))}
    before = made_of(done)
    (tmp_path / "run/metrics.jsonl").write_text("{}")
    assert made_of(done) == before
    (tmp_path / "prompts.jsonl").write_text("{}")
    assert made_of(done) != before


@pytest.mark.parametrize(
    "file", ["run/config.yaml", "run/result.json", "run/status.json", "rules.py", "model/config.json"]
)
@pytest.mark.parametrize("content", [None, "", "{", "- 1\n", "[]"])
def test_a_member_whose_files_are_torn_runs_again(
    file: str, content: str | None, done: TandemConfig, tmp_path: Path
) -> None:
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    assert finished_objective(done) == (False, None)
