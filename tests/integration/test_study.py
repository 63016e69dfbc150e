"""The study as a user starts it, with the tiny model: two arms, one of which trains on turns alone, and what follows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.integration.test_pipeline import states, sweep

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
