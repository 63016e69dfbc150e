#!/usr/bin/env bash
# verl 0.9.1: its scorer of NuminaMath's data sets pays whole numbers that are wrong: 100 times too large, too small, or near.
#
# - `default_compute_score` sends the six data sources "numina_*" to prime_math. That first compares as whole numbers ("if the
#   ground truth answer is an integer, we require the given answer to be a strict match", its comment says), and where this
#   refuses, asks a second judge, which takes every number for a percentage: right are the answer, 100 times and a hundredth of
#   it, each within 1 part in 10,000. So 50 is answered by 5000, 0.5 and 50.005, and 12345 by 12344 and 12346. Nothing in
#   question or answer has to do with percentages or rounding.
# - A policy that guesses has three chances at each of these questions, and near misses of counts and sums from 10,000 on pay.
# - The scorers of the same package for MATH and for AIME and DAPO pay none of these, nor does Math-Verify.
# - On the other side 2^{10} is not answered by 1024, nor 10^{-3} by 0.001.
#
# Needs python3.11 and network for pip; takes 2 to 3 minutes. Exits 1 where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
export PATH=$folder/venv/bin:$PATH
pip install --quiet torch==2.13.0 numpy==2.3.5 transformers==5.24.0 tensordict==0.15.3 ray==2.60.0 omegaconf==2.3.1 \
    sympy==1.14.0 pylatexenc==2.11 "math-verify[antlr4_9_3]==0.9.0"
pip install --quiet --no-deps verl==0.9.1
cd "$folder"

cat >score.py <<'PYTHON'
from importlib.metadata import version

from math_verify import parse, verify
from verl.utils.reward_score import default_compute_score


def scores(gold: str, answer: str) -> dict[str, bool]:
    text = f"So the answer is \\boxed{{{answer}}}."
    found = {}
    for source in ("numina_olympiads", "HuggingFaceH4/MATH-500", "aime"):
        score = default_compute_score(source, text, gold)
        found[source] = (score["score"] if isinstance(score, dict) else score) > 0
    found["Math-Verify"] = verify(parse(f"\\boxed{{{gold}}}"), parse(f"\\boxed{{{answer}}}"))
    return found


print("found: verl", version("verl"), "math-verify", version("math-verify"))
NUMINA = {"numina_olympiads"}
ALL = {"numina_olympiads", "HuggingFaceH4/MATH-500", "aime", "Math-Verify"}
for gold, answer, expected in (
    ("50", "50", ALL), ("50", "51", set()), ("5050", "5051", set()), ("12345", "12345", ALL),
    ("50", "5000", NUMINA), ("50", "0.5", NUMINA), ("50", "50.005", NUMINA), ("1", "100", NUMINA), ("3", "0.03", NUMINA),
    ("12345", "12344", NUMINA), ("12345", "12346", NUMINA), ("100000", "100010", NUMINA),
    ("2^{10}", "1024", {"Math-Verify"}), ("10^{-3}", "0.001", {"Math-Verify"}),
):
    found = {judge for judge, pays in scores(gold, answer).items() if pays}
    print(f"found: {gold} answered by {answer}: paid by {', '.join(sorted(found)) or 'none'}")
    assert found == expected, (gold, answer, found)
PYTHON
python score.py 2>errors.txt | grep "^found:" || { tail -5 errors.txt; exit 1; }
