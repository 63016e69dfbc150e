#!/usr/bin/env bash
# verl 0.9.1: the advantages of GPG are scaled by how many rewards are zero, not by how many groups say nothing.
#
# - GPG (arXiv 2504.02546) subtracts a group's mean and multiplies by alpha = B / (B - M), where M of the B answers are in groups
#   whose rewards are all equal; its authors' code counts these groups too. `adv_estimator: gpg` of verl multiplies by
#   B / (number of rewards that are not 0).
# - With rewards of 1 and 0 that is one over the accuracy of the batch: at 2% right all advantages are 50 times what they should
#   be where every group has right and wrong answers, and they shrink while the policy learns. The same batch with rewards of
#   1 and -1, or with 1 added to each, which a group's mean takes away again, is not scaled at all.
# - Where groups are all right or all wrong, for which alpha is there, it is wrong too: 1.6 and 8 in place of 2.
# - GRPO without division by the standard deviation, and RLOO, give the same advantages for rewards 0/1 and 1/2.
#
# Needs python3.11 and network for pip; takes 2 to 3 minutes. Exits 1 where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
export PATH=$folder/venv/bin:$PATH
pip install --quiet torch==2.13.0 numpy==2.3.5 transformers==5.24.0 tensordict==0.15.3 ray==2.60.0 omegaconf==2.3.1 \
    codetiming==1.4.0 orjson==3.13.0 accelerate==1.15.0
pip install --quiet --no-deps verl==0.9.1
cd "$folder"

cat >gpg.py <<'PYTHON'
from functools import partial
from importlib.metadata import version

import numpy as np
import torch
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

TOKENS = 4
estimators = {name: get_adv_estimator_fn(name) for name in ("gpg", "rloo", "grpo")}
estimators["grpo"] = partial(estimators["grpo"], norm_adv_by_std_in_grpo=False)


def advantages(name: str, groups: list[list[float]]) -> torch.Tensor:
    """Of answers of four tokens, the last of which has the reward."""
    rewards = torch.tensor([reward for group in groups for reward in group])
    index = np.array([str(i) for i, group in enumerate(groups) for _ in group])
    by_token = torch.zeros(len(rewards), TOKENS)
    by_token[:, -1] = rewards
    return estimators[name](token_level_rewards=by_token, response_mask=torch.ones(len(rewards), TOKENS), index=index)[0][:, 0]


def alphas(groups: list[list[float]]) -> tuple[float, float]:
    """What verl multiplies by, and what the paper does."""
    centred = torch.tensor([reward - sum(group) / len(group) for group in groups for reward in group])
    made = advantages("gpg", groups)
    at = centred.abs().argmax()
    factor = (made[at] / centred[at]).item()
    torch.testing.assert_close(made, factor * centred)
    answers = sum(len(group) for group in groups)
    silent = sum(len(group) for group in groups if len(set(group)) == 1)
    return round(factor, 3), round(answers / (answers - silent), 3)


print("found: verl", version("verl"), "torch", torch.__version__)
one, rare = [1.0, 0.0, 0.0, 0.0], [1.0] + [0.0] * 49
for what, groups, expected in (
    ("1 of 4 right, 1 and 0", [one, one], (4.0, 1.0)),
    ("1 of 4 right, 1 and -1", [[2 * reward - 1 for reward in one]] * 2, (1.0, 1.0)),
    ("1 of 4 right, 2 and 1", [[reward + 1 for reward in one]] * 2, (1.0, 1.0)),
    ("1 of 50 right, 1 and 0", [rare, rare], (50.0, 1.0)),
    ("1 of 4 right, and a group all right", [one, [1.0] * 4], (1.6, 2.0)),
    ("1 of 4 right, and a group all wrong", [one, [0.0] * 4], (8.0, 2.0)),
    ("the same with 1 and -1", [[1.0, -1.0, -1.0, -1.0], [-1.0] * 4], (1.0, 2.0)),
):
    found = alphas(groups)
    print(f"found: {what}: alpha is {found[0]}, by the paper {found[1]}")
    assert found == expected, what
for name in ("rloo", "grpo"):
    shifted = [[reward + 1 for reward in group] for group in (one, one)]
    torch.testing.assert_close(advantages(name, [one, one]), advantages(name, shifted))
PYTHON
python gpg.py 2>errors.txt | grep "^found:" || { tail -5 errors.txt; exit 1; }
