"""Rows made of reasoning-gym's tasks: which ones, in which part, and that their verifiers take their answers for right."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from controller.data.demo_assets import SUMS, SUMS_SPLIT, write_sums
from controller.data.reasoning_gym_rows import make_rows
from reward_service.verifier import find_verifier

ROOT = Path(__file__).parents[2]
# Answers that are texts, numbers, lists and none, and metadata with tuples, which JSON has no word for.
TASKS = ("chain_sum", "word_sorting", "rearc", "number_sorting", "propositional_logic", "gcd")


def prompts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["prompt"] for row in rows]


def score(verifier: str, row: dict[str, Any], completion: str) -> float:
    """By the verifier's own functions, of a row that comes from JSON."""
    found = find_verifier(verifier)
    options = found.chosen(None, {})
    result = found.verify(completion, found.right(json.loads(json.dumps(row)), options), options)
    assert isinstance(result, dict)
    return result["score"]


@pytest.mark.parametrize("task", TASKS)
def test_parts_share_no_prompt_and_no_entry_and_come_out_again(task: str) -> None:
    made = make_rows(task, {"held_out": 5, "train": 12}, seed=3)
    assert {part: len(rows) for part, rows in made.items()} == {"held_out": 5, "train": 12}
    assert len({*prompts(made["held_out"]), *prompts(made["train"])}) == 17
    assert make_rows(task, {"held_out": 5, "train": 12}, seed=3) == made
    assert make_rows(task, {"held_out": 5, "train": 12}, seed=300) != made
    assert {row["source"] for row in made["train"]} == {f"reasoning_gym:{task}"}


def test_more_rows_to_train_on_leave_the_held_out_ones_alone() -> None:
    few = make_rows("gcd", {"held_out": 5, "train": 5}, seed=1)
    many = make_rows("gcd", {"held_out": 5, "train": 50}, seed=1)
    assert many["held_out"] == few["held_out"]
    assert many["train"][:5] == few["train"]


@pytest.mark.parametrize("task", [task for task in TASKS if task != "propositional_logic"])
def test_the_scorer_of_the_task_takes_the_answer_for_right_and_another_not(task: str) -> None:
    """propositional_logic has no answer of its own: whatever follows is right."""
    first, second, *_ = make_rows(task, {"train": 8}, seed=1)["train"]
    assert first["answer"] != second["answer"]
    assert score("reasoning_gym", first, f"<answer>{first['answer']}</answer>") == 1
    assert score("reasoning_gym", first, f"<answer>{second['answer']}</answer>") < 1


def test_the_system_turn_is_a_column_where_it_is_asked_for() -> None:
    plain, told = (make_rows("gcd", {"train": 1}, seed=1, system=text)["train"][0] for text in (None, "Be brief."))
    assert "system" not in plain
    assert told == {"system": "Be brief.", **plain}


def test_the_demos_sums_are_all_there_are(tmp_path: Path) -> None:
    write_sums(tmp_path / "sums")
    parts = {
        part: [json.loads(line) for line in (tmp_path / f"sums/{part}.jsonl").read_text().splitlines()]
        for part in ("train", "held_out")
    }
    assert {part: len(rows) for part, rows in parts.items()} == SUMS_SPLIT
    seen = {}
    for row in parts["train"] + parts["held_out"]:
        asked = re.fullmatch(
            r"State the final answer to the following arithmetic problem: (\d) ([+-]) (\d) =", row["prompt"]
        )
        assert asked
        seen[asked.groups()] = int(row["answer"])
    assert len(seen) == 200
    assert seen == {
        (str(a), sign, str(b)): a + b if sign == "+" else a - b for a in range(10) for b in range(10) for sign in "+-"
    }


def test_what_the_demo_is_paid_for() -> None:
    """Ways in which the model answers, by the demo's verifier."""
    row = make_rows("chain_sum", {"train": 1}, seed=1, options=SUMS)["train"][0]
    right = row["answer"]
    for said in (right, f"The final answer is {right}.", f"{row['metadata']['expression']} = {right}"):
        assert score("math", row, said) == 1
    for said in (
        "",
        f"{right}1",
        f"The answer is {right} or 77.",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12",
        "State it.",
    ):
        assert score("math", row, said) == 0


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        ("sums", {}, "Dataset 'sums' not registered"),
        ("chain_sum", {"terms": 2}, "unexpected keyword argument 'terms'"),
        ("chain_sum", {"min_terms": 3, "max_terms": 2}, "max_terms must be >= min_terms"),
        ("chain_sum", SUMS, "chain_sum has 200 different prompts in 6000 entries, 300 are wanted; ask for fewer"),
    ],
)
def test_what_cannot_be_made_is_said_by_its_name(task: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        make_rows(task, {"held_out": 100, "train": 200}, seed=1, options=options)


def test_the_command_writes_both_files_and_the_same_again(tmp_path: Path) -> None:
    words = ["--train", "6", "--held-out", "3", "--seed", "9", "--options", '{"max_terms": 2}']
    for name in ("first", "second"):
        command = [
            sys.executable,
            "-m",
            "controller.data.reasoning_gym_rows",
            "chain_sum",
            str(tmp_path / name),
            *words,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    for part, size in (("train", 6), ("held_out", 3)):
        text = (tmp_path / f"first/{part}.jsonl").read_text()
        assert len(text.splitlines()) == size
        assert (tmp_path / f"second/{part}.jsonl").read_text() == text
