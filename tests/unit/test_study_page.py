"""A whole study from run directories that this file invents: verdicts, files, page. Nothing here is a result of any run."""

import hashlib
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from studies.five_reasons.__main__ import main
from studies.five_reasons.frontier import Path as Way
from studies.five_reasons.frontier import path_of
from studies.five_reasons.members import members_of_study, planned_episodes
from studies.five_reasons.registration import PREREGISTRATION, RECORD, StudyError, parse, record
from studies.five_reasons.results import study_of
from studies.five_reasons.tuning import tuned
from tests.unit.test_report import jsonl, parsed

PROMPTS = 40
# Gold gain over SFT, KL, and the method, of each arm.
ARMS: dict[str, tuple[float, float, str]] = {
    "ppo": (0.9, 4.0, "ppo"),
    "rank": (-0.6, 9.0, "rank"),
    "filtered_sft": (0.86, 1.0, "filtered_sft"),  # so close to PPO that it does not matter
    "best_of_n": (0.7, 1.2, "best_of_n"),
    "raft": (0.4, 2.0, "ppo"),
    "combined": (0.5, 3.0, "ppo"),
    "ppo_from_base": (1.8, 36.0, "ppo"),  # more than PPO from SFT, and far away: it diverged
    "two_turn_cumulative": (0.5, 3.0, "ppo"),
    "two_turn_combined": (0.1, 2.0, "ppo"),
}


def make_member(folder: Path, number: int, arm: str, seed: int, failed: bool = False, setting: str = "") -> None:
    gain, kl, method = ARMS[arm]
    swept = f"arm={arm},ppo.seed={seed}" + (f",tuning={setting}" if setting else "")
    path = folder / f"{number}-{swept}"
    (path / "hydra").mkdir(parents=True)
    (path / "hydra/overrides.yaml").write_text(yaml.safe_dump(["+experiment=five_reasons", *swept.split(",")]))
    rate = {"lower": 1e-4, "middle": 2e-4, "upper": 4e-4}.get(setting, 2e-4)
    estimator = "raft" if arm == "raft" else "gae"
    ppo = {"seed": seed, "updates": 8, "rollouts_per_update": 80 if arm == "raft" else 64, "value_warmup_updates": 2}
    ppo |= {"init_from": "base"} if arm == "ppo_from_base" else {}
    ppo |= {"combined": {"target": 0.5}} if arm == "combined" else {}
    ppo |= {"estimator": estimator, "gold_rollouts": 32, "optimizer": {"learning_rate": rate}}
    environment = {"name": "two_turn" if arm.startswith("two_turn") else "single_turn"}
    config = {"name": "five_reasons", "method": method, "ppo": ppo, "environment": environment}
    config |= {"evaluate": {"max_kl": 10.0, "best_of_n": 8, "seed": seed}, "sft": {"top_fraction": 0.5}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    status: dict[str, Any] = {"state": "failed" if failed else "done", "started": 2e9, "ended": 2e9 + 60}
    if failed:
        (path / "status.json").write_text(json.dumps(status | {"error": "RayActorError: <lost>"}))
        return
    (path / "status.json").write_text(json.dumps(status))
    rng = np.random.default_rng(100 * seed)
    bonus = {"lower": -0.2, "upper": 0.1}.get(setting, 0.0)
    rows: list[dict[str, Any]] = []
    of_prompts = rng.normal(0, 0.5, PROMPTS)
    for model, score, drift in (("base", -0.1, 20.0), ("sft", 0.0, 0.0), (method, gain + bonus, kl)):
        noise = np.random.default_rng([seed, list(ARMS).index(arm), len(model)]).normal(0, 0.05, PROMPTS)
        for p in range(PROMPTS):
            value = float(score + of_prompts[p] + noise[p])
            row = {
                "stage": "evaluate",
                "model": model,
                "prompt_id": p,
                "prompt": "A",
                "completion": "b",
                "tokens": 20 + p % 3,
            }
            rows.append(row | {"gold": value, "proxy": value + 0.1, "vader": value / 4, "kl": drift, "eos": p > 0})
    jsonl(path / "samples.jsonl", rows)
    known = {"distinct_1": 0.5, "distinct_2": 0.8, "prompts": PROMPTS}
    if arm == "best_of_n":
        known |= {
            "best_of_n": [{"n": n, "kl": math.log(n) - (n - 1) / n, "gold": {"mean": 0.2 * n}} for n in (1, 2, 4)]
        }
    (path / "evaluation.json").write_text(json.dumps({"method": method, "models": {method: known}, "comparisons": {}}))
    curve = [
        {"stage": "ppo", "step": v, "progress/version": v, "kl/ref_seq": kl * v / 8, "reward/gold_mean": gain * v / 8}
        for v in range(1, 9)
    ]
    if arm == "combined":
        curve = [row | {"combined/lambda": 2.0, "combined/score_mean": 0.4} for row in curve]
    jsonl(path / "metrics.jsonl", curve)
    if arm == "rank":
        metrics = {"accuracy": 0.71, "accuracy_low": 0.69, "accuracy_high": 0.73, "sft_accuracy": 0.5}
        stage = {"name": "preference", "metrics": metrics}
        (path / "stages.json").write_text(json.dumps([stage]))


def make_study(folder: Path, seeds: tuple[int, ...] = (1, 2, 3)) -> Path:
    record(folder)
    number = 0
    for seed in seeds:
        for arm in ARMS:
            make_member(folder, number, arm, seed, failed=(arm, seed) == ("raft", 2))
            number += 1
    refused = folder / f"{number}-arm=dpo,ppo.seed=1/hydra"
    refused.mkdir(parents=True)
    (refused / "overrides.yaml").write_text("- arm=dpo\n- ppo.seed=1\n")
    return folder


def negation(folder: Path, sha: str) -> None:
    """A reward model that sees every negation, and a cross-entropy that sees none."""
    triples = [
        {"text": f"It is {i}", "negated": f"It is not {i}", "control": f"It is also {i}", "rating": 2.0}
        for i in range(12)
    ]
    scored = {
        "cross_entropy": [[3.0, 3.1 + i % 2, 3.1 + (i + 1) % 2] for i in range(12)],
        "cross_entropy_sum": [[30.0, 31.0 + i % 2, 31.0 + (i + 1) % 2] for i in range(12)],
        "proxy": [[1.0, -1.0, 1.1] for _ in range(12)],
    }
    content = {"preregistration": sha, "models": {}, "texts": 20, "left_out": {"a question": 8}}
    (folder / "negation.json").write_text(json.dumps(content | {"triples": triples, "scored": scored}))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_study(tmp_path_factory.mktemp("runs") / "five_reasons")
    negation(folder, json.loads((folder / RECORD).read_text())["sha256"])
    tuning = folder.parent / "five_reasons_tuning"
    for number, setting in enumerate(("lower", "middle", "upper")):
        make_member(tuning, number, "ppo", 100, setting=setting)
    main([str(folder)])
    return folder


def test_every_conclusion_is_drawn_where_it_belongs(study: Path) -> None:
    found = {claim["number"]: claim for claim in json.loads((study / "study.json").read_text())["claims"]}
    assert {n: claim["verdict"] for n, claim in found.items()} == {
        1: "reproduced",  # 0.9 against -0.6
        2: "inconclusive",  # (0.5 - 0.1) - (0.9 - 0.5) = 0: the margin is wide, but see below
        3: "reproduced",
        4: "equivalent",  # 0.04, within 0.2
        5: "opposite",  # (0.9 - 0) - (1.8 + 0.1)
    } | {2: "equivalent"}
    assert found[1]["estimate"]["mean"] == pytest.approx(1.5, abs=0.05)
    assert found[5]["estimate"]["mean"] == pytest.approx(-1.0, abs=0.05)
    assert found[3]["estimate"]["mean"] == pytest.approx(0.5)  # an area of 1 against one of 1/2
    assert found[1]["estimate"]["seeds"] == [1, 2, 3]
    assert not any(claim["preliminary"] for claim in found.values())
    sha = json.loads((study / RECORD).read_text())["sha256"]
    assert all(claim["preregistration"] == sha for claim in found.values())


def test_beside_the_verdict(study: Path) -> None:
    claims = json.loads((study / "study.json").read_text())["claims"]
    beside = {row["title"]: row for row in claims[3]["secondary"]}
    assert beside["PPO against SFT"]["mean"] == pytest.approx(0.9, abs=0.05)
    assert beside["PPO against RAFT"]["seeds"] == [1, 3]  # seed 2 of RAFT failed
    assert beside["PPO against DPO"]["missing"] == "no evaluation of every arm in seeds 1, 2, 3"
    assert beside["PPO against online DPO"]["missing"] == "not in this study: online_dpo"
    wins = claims[0]["wins_at_equal_length"]
    assert wins["mean"] == pytest.approx(1.0)
    assert wins["prompts"] == 3 * PROMPTS


def test_the_page_shows_every_run_and_says_what_it_is_made_of(study: Path) -> None:
    page = parsed(study / "study.html")
    text = " ".join(" ".join(page.texts).split())
    for said in (
        "RayActorError: <lost>",
        "diverged: drift of 31.5 nats > 30",
        "not started",
        "Of 5 claims",
        "2 reproduced, 1 opposite, 2 equivalent",
        "10 arms · 3 seeds (1, 2, 3) · 26 of 28 runs judged",
        "gold: ppo − ppo (SFT) − ppo_from_base + ppo_from_base (base)",
        "An arm can be good at this",
        "71.0%",
        "NOT every arm got 3 runs: rank 0, filtered_sft 0",
        "score 0.40, target 0.5 missed; lambda 2.0",
        "12 held-out snippets",
        "8 a question",
    ):
        assert said in text, said
    html = (study / "study.html").read_text()
    assert "<script" not in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert html.count('class="whisker') > 5 + 7
    for anchor in ("claims", "arms", "frontier", "ranking", "matched", "mdp", "negation", "members", "tuning", "check"):
        assert anchor in page.ids


def test_the_picture_stands_alone(study: Path) -> None:
    root = ET.fromstring((study / "study.svg").read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = " ".join(root.itertext())
    assert "5. The combination is what works" in text.replace("  ", " ")
    assert text.count("reproduced") == 2


def test_the_tuning_names_the_best_and_what_the_study_used(study: Path) -> None:
    rows = study_of(study).tuning
    assert [(row.setting, row.value, row.is_best, row.is_used) for row in rows] == [
        ("lower", 1e-4, False, False),
        ("middle", 2e-4, False, True),
        ("upper", 4e-4, True, False),
    ]
    assert rows[2].objective == pytest.approx(1.0, abs=0.05)  # 0.9 + 0.1, and no KL beyond the bound


def test_equal_kl_reads_ppos_path_where_an_arm_ended(study: Path) -> None:
    rows = {(row.arm, row.seed): row for row in study_of(study).matched}
    # KL 4 v / 8 and gain 0.9 v / 8 are a line of slope 0.225 from (0.5, 0) on: at 2 nats 0.225 x 1.5.
    assert rows["raft", 1].ppo_gain == pytest.approx(0.3375)
    assert math.isnan(rows["rank", 1].ppo_gain)  # PPO never went so far as 9 nats
    assert not any(arm.startswith("two_turn") for arm, _ in rows)
    assert ("raft", 2) not in rows


def test_a_path_is_read_where_it_first_came() -> None:
    way = Way([1.0, 2.0, 4.0], [0.0, 1.0, 0.5], 160)
    assert way.at(1.5) == 0.5
    assert way.at(3.0) == 0.75
    assert math.isnan(way.at(0.5))
    assert math.isnan(Way([], [], 0).at(1.0))


def test_one_seed_is_preliminary(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "quick", seeds=(1,))
    found = study_of(folder)
    assert all(judged.is_preliminary for judged in found.claims if judged.claim.number != 3)
    assert found.claims[2].verdict == "not judged"  # the negation test has not run
    assert found.claims[2].estimate.missing == "python -m controller.study.negation has not run"
    main([str(folder)])
    assert "preliminary: fewer than 3 seeds" in (folder / "study.html").read_text()
    assert "An arm that lost may be one that nobody tuned" in (folder / "study.html").read_text()


def test_what_a_reader_must_know_first(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "x", seeds=(1,))
    assert study_of(folder).problems == []
    negation(folder, "0" * 64)
    note = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(note | {"time": 3e9}))
    first, second = study_of(folder).problems
    assert first == "9 members started before the registration."
    assert second.startswith("negation.json was made under another pre-registration")
    # Another file than the one that the study began with: judged by the old one, and said so.
    changed = note["text"].replace("margin: 0.2", "margin: 2.0")
    sha = hashlib.sha256(changed.encode()).hexdigest()
    (folder / RECORD).write_text(json.dumps(note | {"text": changed, "sha256": sha}))
    found = study_of(folder)
    assert found.plan.claims[0].margin == 2.0
    assert found.claims[0].verdict == "equivalent"
    assert f"preregistration.yaml has changed since this study began ({sha[:12]} ->" in found.problems[0]
    (folder / RECORD).write_text(json.dumps(note | {"text": changed}))
    with pytest.raises(StudyError, match="its text is not the one whose SHA-256 it gives"):
        study_of(folder)
    (folder / RECORD).unlink()
    assert "nothing shows that claims and margins were fixed" in study_of(folder).problems[0]
    (folder / RECORD).write_text("{}")
    with pytest.raises(StudyError, match=r"registration\.json cannot be read"):
        study_of(folder)


def test_a_member_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "x", seeds=(1,))
    make_member(folder, 99, "ppo", 1)
    with pytest.raises(
        StudyError, match=r"arm ppo, seed 1 is there twice: 0-arm=ppo,ppo.seed=1 and 99-arm=ppo.*move one"
    ):
        study_of(folder)


def test_members_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "x", seeds=(1, 3))
    for number, (arm, seed, code) in enumerate((("ppo", 1, "a" * 64), ("ppo", 3, "b" * 64))):
        path = folder / f"{number * len(ARMS)}-arm={arm},ppo.seed={seed}"
        (path / "status.json").write_text(json.dumps({"state": "done", "started": 2e9, "code": code}))
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["ppo"]["optimizer"]["learning_rate"] = 1.0
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    assert study_of(folder).problems == [
        "The members were made by 2 versions of the code (arm and seed by digest): "
        "aaaaaaaaaaaa: ppo 1; bbbbbbbbbbbb: ppo 3.",
        "ppo, seed 3, was not run as its first seed was: ppo.optimizer.learning_rate.",
    ]


def test_the_best_setting_counts_drift_from_where_training_started_and_must_have_passed_its_check(
    tmp_path: Path,
) -> None:
    tuning = tmp_path / "tuning"
    for number, (arm, setting) in enumerate((a, s) for a in ("ppo_from_base", "rank") for s in ("lower", "upper")):
        make_member(tuning, number, arm, 100, setting=setting)
    path = next(tuning.glob("*rank*upper"))
    stage = {"name": "preference", "metrics": {"accuracy": 0.52, "accuracy_low": 0.5, "sft_accuracy": 0.5}}
    (path / "stages.json").write_text(json.dumps([stage]))
    plan = parse(PREREGISTRATION.read_text())
    rows = tuned([tuning], [], plan)
    assert [(row.arm, row.setting, row.is_best) for row in rows] == [
        ("ppo_from_base", "lower", False),
        ("ppo_from_base", "upper", True),
        ("rank", "lower", True),
        ("rank", "upper", False),  # the larger gain, of a model that has not learnt to rank
    ]
    assert rows[0].drift == pytest.approx(36 * 7 / 8)  # mean of its last three versions, by its own reference
    assert rows[2].drift == 9.0
    assert rows[2].objective < rows[3].objective
    assert rows[3].missed[0].startswith("rank, seed 100, orders 52.0%")
    assert {row.source for row in rows} == {"tuning"}


def test_tuning_that_an_earlier_study_has_written_down(tmp_path: Path) -> None:
    """Of arms that were tuned anew the best is one of the new rows; what else was tried before is shown beside."""
    for number, (arm, setting) in enumerate((a, s) for a in ("ppo", "raft") for s in ("upper", "lower")):
        make_member(tmp_path / "five_reasons_tuning", number, arm, 100, setting=setting)
    main([str(make_study(tmp_path / "earlier", seeds=(1,)))])
    (earlier,) = tmp_path.glob("earlier/study.json")
    written = json.loads(earlier.read_text())
    assert [row["value"] for row in written["tuning"]] == [1e-4, 4e-4, 1e-4, 4e-4]  # by arm, then by value
    make_member(tmp_path / "anew", 0, "raft", 100, setting="middle")
    folder = make_study(tmp_path / "elsewhere" / "study", seeds=(1,))
    rows = study_of(folder, [tmp_path / "missing", tmp_path / "anew", earlier]).tuning
    assert [(row.arm, row.value, row.source, row.is_best, row.is_used) for row in rows] == [
        ("raft", 1e-4, "five_reasons_tuning", False, False),
        ("raft", 2e-4, "anew", True, True),
        ("raft", 4e-4, "five_reasons_tuning", False, False),
        ("ppo", 1e-4, "five_reasons_tuning", False, False),
        ("ppo", 4e-4, "five_reasons_tuning", True, False),
    ]
    # A file from before the rows had a source.
    for row in written["tuning"]:
        del row["source"]
    earlier.write_text(json.dumps(written))
    rows = study_of(folder, [earlier]).tuning
    assert {row.source for row in rows} == {f"study {written['preregistration'][:12]}"}
    earlier.write_text("{}")
    with pytest.raises(StudyError, match=r"study\.json has no tuning: write a study\.json, or the directory"):
        study_of(folder, [earlier])


def test_no_study_at_all(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"study: .* holds no member of a study"):
        main([str(tmp_path)])
    with pytest.raises(StudyError, match="holds no member"):
        members_of_study(tmp_path / "nothing")


def test_members_are_in_the_order_of_the_sweep_with_every_score(study: Path) -> None:
    members = members_of_study(study)
    assert list(dict.fromkeys(m.arm for m in members)) == [*ARMS, "dpo"]
    assert [m.seed for m in members if m.arm == "ppo"] == [1, 2, 3]
    ppo = members[0]
    assert set(ppo.scores) == {"base", "sft", "own"}
    assert set(ppo.scores["own"]) == {"gold", "proxy", "vader", "length", "kl", "ended"}
    assert ppo.mean("own", "ended") == pytest.approx(1 - 1 / PROMPTS)
    assert ppo.kl == 4.0
    assert path_of(ppo).kl[-1] == pytest.approx(4.0)


def test_a_run_that_was_judged_twice_counts_once_and_a_failed_judge_is_nan(tmp_path: Path) -> None:
    make_member(tmp_path, 0, "ppo", 1)
    row = {
        "stage": "evaluate",
        "model": "ppo",
        "prompt_id": 0,
        "tokens": 5,
        "gold": None,
        "proxy": 7.0,
        "kl": 1.0,
        "eos": True,
    }
    path = next(tmp_path.iterdir()) / "samples.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"stage": "ppo", "prompt_id": 0, "gold": 99.0}) + "\n" + json.dumps(row) + "\n")
    (member,) = members_of_study(tmp_path)
    assert member.scores["own"]["proxy"][0] == 7.0
    assert math.isnan(member.scores["own"]["gold"][0])
    assert len(member.scores["own"]["gold"]) == PROMPTS


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {
                "method": "ppo",
                "ppo": {"updates": 8, "rollouts_per_update": 64, "estimator": "gae", "value_warmup_updates": 2},
            },
            640,
        ),
        ({"ppo": {"updates": 8, "rollouts_per_update": 80, "estimator": "raft", "value_warmup_updates": 2}}, 640),
        ({"method": "dpo", "ppo": {"updates": 8}}, 0),
        ({}, None),
    ],
)
def test_episodes(config: dict[str, Any], expected: int | None) -> None:
    assert planned_episodes(config) == expected


def test_the_registration_is_the_file() -> None:
    assert PREREGISTRATION.name == "preregistration.yaml"
