"""The pre-registration: its schema, its hash, and that a study cannot be judged by another one than it began with."""

import hashlib
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from studies.five_reasons.registration import PREREGISTRATION, RECORD, Registration, StudyError, parse, record, sha256

TEXT = PREREGISTRATION.read_text()


def test_the_shipped_one_has_five_claims_with_a_contrast_and_a_margin_each() -> None:
    plan = parse(TEXT)
    assert [claim.number for claim in plan.claims] == [1, 2, 3, 4, 5]
    assert all(claim.margin > 0 and claim.claim and claim.test for claim in plan.claims)
    assert [claim.arms for claim in plan.claims if not claim.arms] == [[]]  # the negation test needs no arm
    assert sha256() == hashlib.sha256(PREREGISTRATION.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("contrast: {ppo: 1, rank: -1}\n    margin", "contrast: {ppo: 1, rank: -2}\n    margin", "must add up to 0"),
        ("margin: 0.2", "margin: 0", "margin: Input should be greater than 0"),
        ("alpha: 0.05", "alpha: 0.05\nalpa: 1", "alpa: Extra inputs are not permitted"),
        ('"rank:sft": -1', '"rank:ppo": -1', "rank:ppo names no model"),
        ("cross_entropy_sum: -1", "perplexity: -1", "perplexity is no measure of the negation test"),
        ("number: 5", "number: 4", "claims must be numbered in order, each once"),
        (
            "metric: gold\n    contrast: {ppo: 1, rank",
            "metric: golden\n    contrast: {ppo: 1, rank",
            "metric: Input should be",
        ),
    ],
)
def test_faults_are_named(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(StudyError, match=message):
        parse(TEXT.replace(old, new, 1))


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(StudyError) as error:
        parse(TEXT.replace("alpha: 0.05", "alpha: 2").replace("seeds: 3", "seeds: 0"))
    assert "alpha: " in str(error.value)
    assert "seeds: " in str(error.value)


def test_the_record_is_made_once_and_a_changed_file_is_another_study(tmp_path: Path) -> None:
    path, sweep = tmp_path / "plan.yaml", tmp_path / "sweep"
    path.write_text(TEXT)
    first = record(sweep, path)
    assert json.loads((sweep / RECORD).read_text()) == first
    assert first["sha256"] == sha256(path)
    assert first["text"] == TEXT
    assert record(sweep, path) == first  # the time is that of the first start
    path.write_text(TEXT.replace("margin: 0.2", "margin: 0.1"))
    with pytest.raises(StudyError, match=r"plan.yaml has changed since .*hydra.sweep.dir=ANOTHER"):
        record(sweep, path)
    assert json.loads((sweep / RECORD).read_text()) == first


def test_the_sweep_does_not_start_with_another_registration(tmp_path: Path) -> None:
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    Registration().on_multirun_start(config)
    note = json.loads((tmp_path / RECORD).read_text())
    (tmp_path / RECORD).write_text(json.dumps(note | {"sha256": "0" * 64}))
    with pytest.raises(SystemExit, match=r"study: .*registration\.json has been changed"):
        Registration().on_multirun_start(config)
    changed = TEXT.replace("margin: 0.2", "margin: 0.1")
    (tmp_path / RECORD).write_text(
        json.dumps(note | {"text": changed, "sha256": hashlib.sha256(changed.encode()).hexdigest()})
    )
    with pytest.raises(SystemExit, match=r"study: preregistration\.yaml has changed"):
        Registration().on_multirun_start(config)
