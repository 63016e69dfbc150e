#!/usr/bin/env bash
# math-verify 0.9.0 (latex2sympy2_extended 1.11.0): a variable behind a number is taken for a unit and dropped, if it has one of
# nine names; the number alone is then right.
#
# 3t, 3c, 3d, 3g, 3h, 3l, 3m, 3o and 3s are read as 3, the other letters as what they are (3x, 3a, 3n). So are 2ab and 3ab, which
# are read as 2 and 3 where 2ba and 2xy are products, and "x t" with a space is x. With verify(), as trainers with verifiable
# rewards call it, "3" and "3s" pay as answers to "3t", and "2" to "2ab". Arithmetic around it keeps the letter: 3t+1, 3 t^2, 3*t.
# A data set whose answers are coefficients of t, of an arithmetic progression with difference d, or products ab is scored wrong
# without a word. Writing the factor out (3*t) on both sides avoids it.
#
# Needs python3.11 and network for pip; takes half a minute. Exits 1 where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "math-verify[antlr4_9_3]==0.9.0" latex2sympy2_extended==1.11.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version
from string import ascii_letters

from math_verify import parse, verify

print(f"math-verify {version('math-verify')}, latex2sympy2_extended {version('latex2sympy2_extended')}")


def read(text):
    return str(parse(f"\\boxed{{{text}}}")[0])


dropped = [letter for letter in ascii_letters if read(f"3{letter}") == "3"]
print("read as 3: 3 followed by", ", ".join(dropped))
others = {text: read(text) for text in ("2ab", "2ba", "2xy", "x t", "3t+1", "3 t^2", "3*t")}
print("read as:", others)
paid = {(gold, answer): verify(parse(f"\\boxed{{{gold}}}"), parse(f"\\boxed{{{answer}}}")) for gold, answer in (
    ("3t", "3"), ("3t", "3s"), ("2ab", "2"), ("3x", "3"), ("3*t", "3"),
)}
print("(right answer, answer): paid", paid)
assert dropped == list("cdghlmost")
assert others == {
    "2ab": "2", "2ba": "2*a*b", "2xy": "2*x*y", "x t": "x", "3t+1": "3*t + 1", "3 t^2": "3*t**2", "3*t": "3*t",
}
assert paid == {("3t", "3"): True, ("3t", "3s"): True, ("2ab", "2"): True, ("3x", "3"): False, ("3*t", "3"): False}
PYTHON
