#!/usr/bin/env bash
# AReaL 1.0.4: without a reference model the KL penalty stays on, and pays for each improbable token.
#
# - `actor.kl_ctl` is 0.1 by default and `ref` is None, with which no reference model is made. The missing log-probabilities
#   of the reference are then taken as 0: a reference that is sure of each token. The penalty on a token is 0.1 times its own
#   log-probability.
# - With the default estimator k1 the reward grows by 0.1 for each nat of surprise. A wrong answer of 300 tokens, each of
#   probability 0.37, has 30, a right one of 100 tokens of 0.9 has 2: a bonus for entropy and length that outweighs the task.
# - With k2 and k3 the sign is the other: improbable tokens cost, up to 1 each, and the policy is made sure of itself.
# - Nothing is said, also not where `kl_ctl` is set by hand and `ref` is forgotten; the metric `kl_rewards` has the name of a
#   KL. With no reference OpenRLHF takes the KL as 0, and verl makes one where the KL is on.
#
# Needs python3.11 and network for pip; takes 2 to 3 minutes. Exits 1 where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
export PATH=$folder/venv/bin:$PATH
pip install --quiet torch==2.13.0 numpy==2.3.5 transformers==5.24.0 ray==2.60.0 numba==0.68.1 einops==0.8.2 pillow==13.0.0 \
    torchdata==0.11.0 hydra-core==1.3.8 omegaconf==2.3.1 uvloop==0.23.0 orjson==3.13.0 colorlog==6.12.0 lark==1.3.1
pip install --quiet --no-deps areal==1.0.4
cd "$folder"

cat >kl.py <<'PYTHON'
import sys
import types
from importlib.metadata import distribution, version

# The algorithm alone: engines, launchers and trainers, which nothing here uses, are left out.
for name in ("areal", "areal.infra", "areal.trainer", "areal.trainer.ppo"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(distribution("areal").locate_file(name.replace(".", "/")))]
for name in ("areal.experimental.training_service.controller.controller", "areal.infra.rpc.serialization"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].GatewayTrainController = sys.modules[name].serialize_value = object
sys.modules["areal.infra"].TrainController = object

from dataclasses import fields

import torch
from areal.api.cli_args import PPOActorConfig, PPOConfig
from areal.trainer.ppo.actor import PPOActor

PROMPT = 5


def answer(length: int, logprob: float, reward: float, reference: bool) -> dict[str, torch.Tensor]:
    """As RLVRWorkflow returns it; the reference is the policy itself."""
    mask = torch.ones(1, PROMPT + length, dtype=torch.int32)
    mask[:, :PROMPT] = 0
    data = {
        "input_ids": mask + 8, "loss_mask": mask, "logprobs": logprob * mask, "versions": mask - 1,
        "rewards": torch.tensor([reward]), "attention_mask": torch.ones_like(mask, dtype=torch.bool),
    }
    return {**data, "ref_logp": data["logprobs"].roll(-1, -1)} if reference else data


def paid(reference: bool, **options) -> list[float]:
    """The reward that is trained on, of two answers, and that the first token's advantage is the same."""
    # A right answer, each token of which has a probability of 0.9, and a wrong one with 0.37.
    answers = [answer(100, -0.1, 1.0, reference), answer(300, -1.0, 0.0, reference)]
    made = PPOActor(PPOActorConfig(**options), None).compute_advantages(answers)
    for data in made:
        torch.testing.assert_close(data["advantages"][0, PROMPT - 1], data["tot_rewards"].sum(), atol=1e-3, rtol=1e-3)
    return [round(data["tot_rewards"].sum().item(), 2) + 0.0 for data in made]


print("found: areal", version("areal"), "torch", torch.__version__)
default = {field.name: field.default for field in fields(PPOConfig)}["ref"]
print(f"found: defaults: kl_ctl {PPOActorConfig().kl_ctl}, ref {default}, estimator {PPOActorConfig().kl_estimator}")
assert (PPOActorConfig().kl_ctl, default, PPOActorConfig().kl_estimator) == (0.1, None, "k1")
for what, options, expected in (
    ("default options", {}, [2.0, 30.0]),
    ("k2", {"kl_estimator": "k2"}, [0.95, -15.0]),
    ("k3", {"kl_estimator": "k3"}, [0.95, -21.55]),
    ("kl_ctl 0", {"kl_ctl": 0.0}, [1.0, 0.0]),
):
    found = paid(False, **options)
    print(f"found: {what}, no reference: a right answer of 100 tokens has {found[0]}, a wrong one of 300 {found[1]}")
    assert found == expected, what
    assert paid(True, **options) == [1.0, 0.0]
print("found: with a reference that is the policy itself: 1 and 0, with all of these options")
PYTHON
python kl.py 2>errors.txt | grep "^found:" || { tail -5 errors.txt; exit 1; }
