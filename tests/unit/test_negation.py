"""The rules that negate, and what is concluded from the change of a measure: worked out by hand. No model is loaded."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from studies.five_reasons import negation
from studies.five_reasons.negation import auc, auc_draws, changes, checkpoints, find_run, wins
from studies.five_reasons.negation_rules import Triple, triple
from studies.five_reasons.registration import Bootstrap, StudyError, record

BOOTSTRAP = Bootstrap(samples=2000, seed=0)


def test_a_snippet_is_negated_after_its_first_form_of_be() -> None:
    assert triple("The acting is superb and the plot is fun.", 2.5) == Triple(
        "The acting is superb and the plot is fun.",
        "The acting is not superb and the plot is fun.",
        "The acting is also superb and the plot is fun.",
        2.5,
    )
    found = triple("The jokes were stale", -2.0)
    assert isinstance(found, Triple)
    assert (found.negated, found.control) == ("The jokes were not stale", "The jokes were also stale")


@pytest.mark.parametrize(
    ("text", "rating", "reason"),
    [
        ("The film is fine", 0.9, "rated closer to 0 than 1"),
        ("The film isn't funny", -2.0, "negated already"),
        ("It is never dull", 2.0, "negated already"),
        ("The film is hardly funny", -2.0, "negated already"),
        ("is this a film", -2.0, "begins with its verb"),
        ("Why is this a film?", -2.0, "a question"),
        ("It is long. It is dull.", -2.0, "more than one sentence"),
        ("It is long; it drags", -2.0, "more than one sentence"),
        ("It is long but good", 2.0, "turns its meaning itself"),
        ("A film to love", 2.0, "no form of be"),
        ("A film that is lovely", 2.0, "the verb may belong to a side clause"),
        ("There is joy in it", 2.0, "there is, here is"),
        ("It is also good", 2.0, "no plain word after the verb"),
        ("The film, it is, delights", 2.0, "no plain word after the verb"),
        ("All that it is", 2.0, "the verb may belong to a side clause"),
    ],
)
def test_what_the_rules_cannot_be_sure_of_is_left_out(text: str, rating: float, reason: str) -> None:
    assert triple(text, rating) == reason


def test_words_inside_words_are_none() -> None:
    """`this` holds `is`, `history` too; `note` holds `not`; `Rembrandt` holds a verb of the list in capitals."""
    found = triple("This note on history was fine", 2.0)
    assert isinstance(found, Triple)
    assert found.negated == "This note on history was not fine"


SCORED = {
    "proxy": [[1.0, -1.0, 1.5], [0.0, 0.4, 0.6], [-1.0, 1.0, -1.0]],
    "cross_entropy": [[3.0, 3.5, 3.2], [4.0, 3.0, 4.1], [2.0, 2.0, 2.3]],
}


def test_an_area_by_hand() -> None:
    negation, control = changes(SCORED, "proxy")
    assert negation.tolist() == [2.0, pytest.approx(0.4), 2.0]
    assert control.tolist() == [0.5, pytest.approx(0.6), 0.0]
    # 2.0 beats 0.5, 0.6, 0; 0.4 beats 0 alone; 2.0 beats all three: 7 of 9
    assert wins(negation, control).mean() == pytest.approx(7 / 9)
    # |change| of the cross-entropy: 0.5, 1.0, 0 against 0.2, 0.1, 0.3: 3 + 3 + 0 of 9
    assert auc(SCORED, {"cross_entropy": 1.0}, BOOTSTRAP).mean == pytest.approx(6 / 9)
    # signed: 0.5, -1.0, 0: 3 + 0 + 0
    assert auc(SCORED, {"cross_entropy_signed": 1.0}, BOOTSTRAP).mean == pytest.approx(3 / 9)
    both = auc(SCORED, {"proxy": 1.0, "cross_entropy": -1.0}, BOOTSTRAP)
    assert both.mean == pytest.approx(1 / 9)
    assert both.prompts == 3


def test_ties_count_half() -> None:
    assert wins(np.array([1.0, 2.0]), np.array([1.0, 1.0])).tolist() == [[0.5, 0.5], [1.0, 1.0]]


def test_a_draw_is_the_area_of_the_drawn_triples() -> None:
    """Against a plain loop over resampled triples: the distributions agree."""
    rng = np.random.default_rng(4)
    negation, control = rng.normal(1.0, 1.0, 30), rng.normal(0.0, 1.0, 30)
    draws = auc_draws(wins(negation, control), BOOTSTRAP)
    plain = []
    for _ in range(2000):
        rows = rng.integers(0, 30, 30)
        plain.append((negation[rows][:, None] > control[rows][None, :]).mean())
    assert draws.mean() == pytest.approx(np.mean(plain), abs=0.01)
    assert draws.std() == pytest.approx(np.std(plain), rel=0.1)
    certain = auc_draws(wins(np.ones(5), np.zeros(5)), BOOTSTRAP)
    assert certain == pytest.approx(np.ones(2000))


def test_a_difference_of_areas_uses_the_same_draws() -> None:
    """A measure against itself differs by 0 in every draw."""
    found = auc(SCORED | {"gold": SCORED["proxy"]}, {"proxy": 1.0, "gold": -1.0}, BOOTSTRAP)
    assert found.interval(0.95) == (0.0, 0.0)


def test_what_was_not_measured_is_said() -> None:
    assert auc(SCORED, {"proxy": 1.0, "gold": -1.0}, BOOTSTRAP).missing == "not measured: gold"
    assert auc({"proxy": [[1.0, 2.0, 3.0]]}, {"proxy": 1.0}, BOOTSTRAP).missing == "1 triples"


def test_of_a_study_in_pieces_the_models_that_were_first_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured again with others in each session, the verdict would be the last one's."""
    monkeypatch.setattr(negation, "measure", lambda run, registration: pytest.fail("measured again"))
    registration = record(tmp_path)["sha256"]
    (tmp_path / negation.NAME).write_text(json.dumps({"preregistration": registration}))
    negation.main(["runs", "--into", str(tmp_path)])
    assert "is there, of the models that were first" in capsys.readouterr().out
    (tmp_path / negation.NAME).write_text(json.dumps({"preregistration": "of another"}))
    with pytest.raises(SystemExit, match="negation: runs"):  # there is no such run
        negation.main(["runs", "--into", str(tmp_path)])


def test_the_models_of_a_study_are_those_of_its_first_finished_member(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="has no run with an SFT model and a reward model"):
        find_run(tmp_path)
    for number, names in enumerate((["sft"], ["sft", "reward_model/proxy", "reward_model/gold", "ppo"])):
        run = tmp_path / f"{number}-arm=ppo"
        run.mkdir()
        (run / "stages.json").write_text(json.dumps([{"name": n, "path": f"{n}/model"} for n in names]))
        (run / "config.yaml").write_text(yaml.safe_dump({"gold_model": None}))
    found = find_run(tmp_path)
    assert found == tmp_path / "1-arm=ppo"
    assert checkpoints(found) == {
        "sft": "sft/model",
        "proxy": "reward_model/proxy/model",
        "gold": "reward_model/gold/model",
    }
    (found / "config.yaml").write_text(yaml.safe_dump({"gold_model": "mine"}))
    assert checkpoints(found)["gold"] == "mine"
    assert find_run(found) == found
    with pytest.raises(StudyError, match="is not a directory"):
        find_run(tmp_path / "nothing")
