"""The study as a user starts it, with the tiny model: two arms, one of which trains on turns alone, and what follows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.integration.test_pipeline import states, sweep, sweep_command

pytestmark = pytest.mark.full


def test_two_arms_a_negation_test_and_a_page(tmp_path: Path, tiny_model: Path) -> None:
    lengths = ["ppo.sampling.max_completion_tokens=24", "evaluate.sampling.max_completion_tokens=24"]
    study = ["+experiment=five_reasons_quick", "arm=best_of_n,two_turn_separate", *lengths]
    study += ["evaluate.best_of_n=2", "environment.max_turn_tokens=16"]
    study += ["data.test.max_rows=null"]  # of 96 texts few can be negated
    done = sweep(tmp_path, tiny_model, "study", *study)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    folder = tmp_path / "study"
    assert states(folder) == {"0-arm=best_of_n,ppo.seed=1": "done", "1-arm=two_turn_separate,ppo.seed=1": "done"}
    assert done.stdout.count("reward_model/proxy: nothing has changed, reusing") == 1
    again = sweep(tmp_path, tiny_model, "study", *study)
    assert again.stdout.count("is done already") == 2
    for module in ("controller.study.negation", "controller.study"):
        drawn = subprocess.run([sys.executable, "-m", module, str(folder)], cwd=ROOT, capture_output=True, text=True)
        assert drawn.returncode == 0, drawn.stdout + drawn.stderr
    results = json.loads((folder / "study.json").read_text())
    assert results["problems"] == []
    assert {row["arm"]: row["state"] for row in results["members"]} == {
        "best_of_n": "done",
        "two_turn_separate": "done",
    }
    assert all(row["gold_gain"]["prompts"] == 8 for row in results["arms"])
    negation = results["claims"][2]["estimate"]
    assert negation["prompts"] > 50
    assert -0.6 < negation["mean"] < 0.6  # random weights: both measures are blind or nearly so
    (trained,) = folder.glob("1-*")
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert next(row["kl/ref_seq"] for row in rows if row["stage"] == "ppo") == 0.0


def test_a_study_in_pieces_keeps_what_its_page_needs(tmp_path: Path, tiny_model: Path) -> None:
    """Two members side by side, whose runs are then gone: nothing is left to run, and what is kept makes the page."""
    same = ["evaluate.prompts=96", "data.eval_prompts.max_rows=12"]  # else every seed draws prompts of its own
    words = sweep_command(tmp_path, tiny_model, "runs", *same)
    shared = [word for word in words if "=" in word and not word.startswith("+experiment")]
    module = [sys.executable, "-m", "studies.five_reasons.run_missing", "five_reasons_2", "arm=ppo"]
    pieces = [*module, "ppo.seed=11,12", *shared, "--into", str(tmp_path / "kept")]
    done = subprocess.run(pieces, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "five_reasons_2: 2 of 2 members missing" in done.stdout
    assert done.stdout.count("✓ ppo.seed=1") == 2
    (tmp_path / "runs").rename(tmp_path / "gone")
    again = subprocess.run(pieces, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "0 of 2 members missing" in again.stdout
    folder = tmp_path / "kept/five_reasons_2"
    drawn = subprocess.run(
        [sys.executable, "-m", "controller.study", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert drawn.returncode == 0, drawn.stdout + drawn.stderr
    results = json.loads((folder / "study.json").read_text())
    assert results["problems"] == []
    assert [(row["arm"], row["seed"], row["state"]) for row in results["members"]] == [
        ("ppo", 11, "done"),
        ("ppo", 12, "done"),
    ]
    (arm,) = results["arms"]
    assert arm["gold_gain"]["seeds"] == [11, 12]
    assert max(path.stat().st_size for path in (folder / "members").iterdir()) < 16 << 10
