#!/usr/bin/env bash
# AReaL 1.0.4: its reward for Geometry3K compares the last number of the text with the last number of the right answer.
#
# - Its own data set's prompt asks for the answer in \boxed{}; `geometry3k_reward_fn` looks for square brackets, and where there
#   are none takes the last number of the completion, whatever is around it. The same is done with the right answer, and what
#   Math-Verify is then asked are these two numbers.
# - Answers of this data set are partly roots, fractions and multiples of pi: "2 \sqrt { 221 }" is compared as 221,
#   "\frac { 12 } { 5 }" as 5, "36 \pi" as 36. So 221, 7 \sqrt{221} and \sqrt{221} are all paid as answers to the first; 2.4 is not
#   paid as an answer to the second, and 1/5 is.
# - For whole numbers too the last number of the text counts, not the box: after \boxed{30} a remark "as in step 2" costs the
#   reward, and "so it is \boxed{45}, not 30" earns it.
# - mathruler, with which verl scores the same data set, judges all of these as one would expect.
#
# Needs python3.11 and network for pip; takes half a minute. Exits 1 where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
export PATH=$folder/venv/bin:$PATH
pip install --quiet "math-verify[antlr4_9_3]==0.9.0" mathruler==0.1.0 pylatexenc==2.11 tqdm==4.70.1 colorlog==6.12.0
pip install --quiet --no-deps areal==1.0.4
cd "$folder"

cat >score.py <<'PYTHON'
import sys
import types
from importlib.metadata import distribution, version

# The rewards alone: what imports the training stack is left out.
for name in ("areal", "areal.utils"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(distribution("areal").locate_file(name.replace(".", "/")))]

from areal.reward.geometry3k import geometry3k_reward_fn
from mathruler.grader import extract_boxed_content, grade_answer


def scores(gold: str, text: str) -> tuple[bool, bool]:
    """What AReaL says, and mathruler."""
    return geometry3k_reward_fn(None, text, None, None, gold) > 0, bool(grade_answer(extract_boxed_content(text), gold))


def boxed(answer: str) -> str:
    return f"<think> By the theorem of Pythagoras. </think> The answer is \\boxed{{{answer}}}."


ROOT, FRACTION, PI = "2 \\sqrt { 221 }", "\\frac { 12 } { 5 }", "36 \\pi"
print("found: areal", version("areal"), "mathruler", version("mathruler"))
for gold, text, expected in (
    ("30", boxed("30"), (True, True)),
    ("30", boxed("45"), (False, False)),
    (ROOT, boxed("2\\sqrt{221}"), (True, True)),
    (ROOT, boxed("221"), (True, False)),
    (ROOT, boxed("7\\sqrt{221}"), (True, False)),
    (ROOT, boxed("\\sqrt{221}"), (True, False)),
    (FRACTION, boxed("\\frac{12}{5}"), (True, True)),
    (FRACTION, boxed("2.4"), (False, True)),
    (FRACTION, boxed("\\frac{1}{5}"), (True, False)),
    (FRACTION, boxed("5"), (True, False)),
    (PI, boxed("36\\pi"), (True, True)),
    (PI, boxed("36"), (True, False)),
    ("30", "The angle is \\boxed{30} degrees, as in step 2.", (False, True)),
    ("30", "So it is \\boxed{45}, not 30.", (True, False)),
):
    found = scores(gold, text)
    print(f"found: {gold} answered by {text.split('</think> ')[-1]}  AReaL {'pays' if found[0] else 'does not'}, "
          f"mathruler {'pays' if found[1] else 'does not'}")
    assert found == expected, (gold, text, found)
PYTHON
python score.py 2>errors.txt | grep "^found:" || { tail -5 errors.txt; exit 1; }
