#!/usr/bin/env bash
# lighteval 0.13.0: its MATH tasks score right answers 0, and its probability of the right choice is that of the likeliest one.
#
# - The seven tasks math:* hand `normalize_pred` and `normalize_gold`, which take the answer out of \boxed{}, to maj@n. That
#   metric has no such options: parameters of a task are set as attributes, whatever their names, and what maj@n reads is
#   `normalize`, which stays None. So the most frequent of four whole generations is compared with the whole reference solution,
#   letter by letter. A right derivation that ends in the right \boxed{} scores 0; so does the box alone; a wrong one scores 0
#   too. With `normalize` set the same metric is right. Other tasks that we loaded have no such options.
# - ProbabilityMetric, for tasks of one's own ("returns the probability of the gold choice given normalization"), takes the
#   largest probability of all choices and never looks which is right: four right answers with 0.7, 0.15, 0.1 and 0.05 all have
#   0.7. The accuracy and NormalizedMultiChoiceProbMetric beside it use the right choice.
#
# Needs python3.11 and network for pip; takes 3 to 4 minutes. Exits 1 where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
export PATH=$folder/venv/bin:$PATH HF_HUB_OFFLINE=1
pip install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 datasets==5.2.0 inspect-ai==0.3.285 lighteval==0.13.0 \
    "latex2sympy2_extended[antlr4_13_2]==1.0.6"
cd "$folder"

cat >metrics.py <<'PYTHON'
import copy
import math
from importlib.metadata import version

from lighteval.metrics.dynamic_metrics import LogLikelihoodAccMetric, NormalizedMultiChoiceProbMetric, ProbabilityMetric
from lighteval.metrics.normalizations import math_normalizer
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.requests import Doc
from lighteval.tasks.tasks import math as tasks

print("found: lighteval", version("lighteval"))


def score(metric, doc: Doc, response: ModelResponse) -> float:
    (value,) = metric.compute_sample(doc=doc, model_response=response).values()
    return round(float(value), 3)


line = {"problem": "x + y = 4 and x - y = 2. Find x.", "solution": "Adding both gives $2x = 6$, so $x = \\boxed{3}$."}
right, other = "We add: 2x = 6. So x is $\\boxed{3}$.", "x = 3, that is \\boxed{3}."
box, wrong = "\\boxed{3}", "It is \\boxed{7}."
subsets = [value for name, value in vars(tasks).items() if getattr(value, "name", "").startswith("math:")]
for task in subsets:
    doc = task.prompt_function(line, task.name)
    (metric,) = task.metrics
    mended = copy.deepcopy(metric)
    mended.sample_level_fn.normalize = math_normalizer
    found = {}
    for what, texts in {
        "right": [right] * 4, "right in two ways": [right, right, other, wrong], "the box alone": [box] * 4, "wrong": [wrong] * 4,
        "the reference itself": [line["solution"]] * 4,
    }.items():
        response = ModelResponse(text=texts)
        found[what] = (score(metric, doc, response), score(mended, doc, response))
    print(f"found: {task.name}, (scored, scored with `normalize`):", found)
    assert found == {
        "right": (0.0, 1.0), "right in two ways": (0.0, 1.0), "the box alone": (0.0, 1.0), "wrong": (0.0, 0.0),
        "the reference itself": (1.0, 1.0),
    }
assert len(subsets) == 7

probabilities = (0.7, 0.15, 0.1, 0.05)
response = ModelResponse(logprobs=[math.log(value) for value in probabilities], output_tokens=[[1], [2], [3], [4]])
for gold, expected in enumerate(probabilities):
    doc = Doc(query="Which?", choices=[" A", " B", " C", " D"], gold_index=gold)
    metrics = (ProbabilityMetric(), NormalizedMultiChoiceProbMetric(), LogLikelihoodAccMetric())
    found = [score(metric, doc, response) for metric in metrics]
    print(f"found: right choice with probability {expected}: prob {found[0]}, normalized {found[1]}, accuracy {found[2]}")
    assert found == [0.7, expected, float(gold == 0)]
PYTHON
python metrics.py 2>errors.txt | grep "^found:" || { tail -5 errors.txt; exit 1; }
