"""What leaves a run: a plain checkpoint with a card, from a commit that verifies."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.files.fingerprints import json_digest
from controller.commits.commit_store import step_path
from controller.commits.export import base_licence, main
from tests.unit.test_commits import commit, flip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    config = {
        "name": "demo",
        "seed": 7,
        "model": {"path": str(base)},
        "ppo": {"estimator": "gae", "kl": {"coef": 0.05}},
        "data": {"sft": {"path": "texts.jsonl"}, "prompts": {"path": "prompts.jsonl"}, "preferences": {"path": ""}},
    }
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"stage": "ppo", "step": i, "reward/score_mean": i / 4, "perf/step_s": 9.0} for i in range(4)]
    torn = '{"stage": "ppo", "st\n'  # a disk was full
    (run / "metrics.jsonl").write_text(torn + "".join(json.dumps(row) + "\n" for row in rows))
    for step, quality in ((2, 0.9), (4, 0.1)):
        commit(run, step, quality, config)
    return run


def test_a_card_that_is_no_yaml_has_no_licence(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [a\n---\n")
    assert base_licence(str(tmp_path)) is None


def test_a_model_card_says_where_it_comes_from(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(run_dir), "--step", "best", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json"]
    _, head, text = (out / "README.md").read_text().split("---", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": str(tmp_path / "base"),
        "license": "apache-2.0",
    }
    for part in (
        "update 2",
        "version 1",
        "reward/x 0.9",
        "`texts.jsonl`",
        "seed 7",
        "torch 2",
        "| reward/score_mean | 0.25 |",
    ):
        assert part in text
    assert "perf/" not in text
    assert "reward model: ``" not in text
    assert "gae on completions that its scorers (below) scored; seed 7, KL coefficient 0.05 against" in text


def test_a_model_card_says_nothing_of_what_was_not_used(run_dir: Path, tmp_path: Path) -> None:
    path = step_path(run_dir, 4) / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    content = manifest["content"]
    content["sources"], content["config"]["ppo"]["kl"]["place"] = ["prompts"], "none"
    manifest["sha256"] = json_digest(content)
    path.write_text(json.dumps(manifest))
    out = tmp_path / "out"
    assert main([str(run_dir), str(out)]) == 0
    text = (out / "README.md").read_text()
    assert "texts.jsonl" not in text
    content["config"]["data"]["prompt_sources"] = {"a": {"path": "sums.jsonl"}, "b": {"path": "code.jsonl"}}
    manifest["sha256"] = json_digest(content)
    path.write_text(json.dumps(manifest))
    assert main([str(run_dir), str(tmp_path / "mixed")]) == 0
    mixed = (tmp_path / "mixed/README.md").read_text()
    assert [mixed.count(f"- PPO's prompts: `{name}.jsonl`") for name in ("sums", "code", "prompts")] == [1, 1, 0]
    assert "prompts.jsonl" in text
    assert "KL" not in text


def test_the_newest_without_a_name_and_never_over_something(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(run_dir), str(out)]) == 0
    assert "after update 4" in (out / "README.md").read_text()
    assert main([str(run_dir), str(out)]) == 1


@pytest.mark.parametrize(
    ("step", "message"),
    [("3", "there are: 2, 4, and best"), ("4", "rank_0.safetensors has SHA-256"), ("x", "--step x")],
)
def test_nothing_is_exported_that_does_not_verify(
    step: str, message: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(step_path(run_dir, 4) / "rank_0.safetensors")
    assert main([str(run_dir), "--step", step, str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_leaves_that_the_manifest_does_not_name(run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    """What a link points to, or a file beside the commit's own."""
    (tmp_path / "elsewhere.txt").write_text("not of the run")
    (step_path(run_dir, 4) / "policy/notes.txt").symlink_to(tmp_path / "elsewhere.txt")
    assert main([str(run_dir), "--step", "4", str(tmp_path / "out")]) == 1
    assert "policy/notes.txt is not in MANIFEST.json" in capsys.readouterr().err
    config = step_path(run_dir, 2) / "policy/config.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    config.unlink()
    config.symlink_to(tmp_path / "config.json")
    assert main([str(run_dir), "--step", "2", str(tmp_path / "out")]) == 1
    assert "policy/config.json is a link" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
