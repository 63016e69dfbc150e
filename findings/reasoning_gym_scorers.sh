#!/usr/bin/env bash
# reasoning-gym 0.1.25: two kinds of data set whose own scorers say nothing of an answer.
#
# - game_of_life_halting pays 1.0 for every answer that is not empty: it compares bool(answer) with bool(entry["answer"]), and
#   both are texts, of which "False" is as true as "True". Of 20 rows 8 are answered "True", 12 "False". A policy that trains on it
#   learns to write anything.
# - rearc and arc_agi pay 0.05 for their own right answer once the entry has been to JSON and back, as every data set of
#   prompts is: the board in `metadata` was made of tuples, JSON makes lists of them, and a list is equal to no tuple. 0.05 is
#   also what a wrong answer gets, so nothing looks broken but the reward, which does not rise.
#
# Of the other data sets each pays its own right answers 1.0 before and after JSON, where it has such answers.
#
# Needs python3.11 and network for pip; takes 2 minutes. Exits 1 where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet reasoning-gym==0.1.25
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
from importlib.metadata import version

import reasoning_gym
from reasoning_gym.factory import DATASETS, get_score_answer_fn

print(f"reasoning-gym {version('reasoning-gym')}")
rows = list(reasoning_gym.create_dataset("game_of_life_halting", size=20, seed=1))
score = get_score_answer_fn("game_of_life_halting")
other = {"True": "False", "False": "True"}
paid = {what: [score(said(row), row) for row in rows] for what, said in {
    "right": lambda row: row["answer"], "the other one": lambda row: other[row["answer"]], "no idea": lambda row: "no idea",
}.items()}
print("answers of game_of_life_halting:", {answer: sum(row["answer"] == answer for row in rows) for answer in other})
for what, scores in paid.items():
    print(f"  {what}: mean score {sum(scores) / len(scores)}")

lost = {}
for name in sorted(set(DATASETS) - {"composite"}):
    row = reasoning_gym.create_dataset(name, size=1, seed=1)[0]
    if row["answer"] is not None:
        score = get_score_answer_fn(name)
        before, after = score(row["answer"], row), score(row["answer"], json.loads(json.dumps(row)))
        if (before, after) != (1.0, 1.0):
            lost[name] = (before, after)
print("right answers, (scored, scored after JSON), where that is not (1.0, 1.0):", lost)
assert all(set(scores) == {1.0} for scores in paid.values())
assert lost == {"arc_agi": (1.0, 0.05), "rearc": (1.0, 0.05)}
PYTHON
