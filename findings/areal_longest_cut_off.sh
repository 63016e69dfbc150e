#!/usr/bin/env bash
# AReaL 1.0.4: the longest answers of a batch count as cut off, and cut-off answers that are not the longest as finished.
#
# - An answer counts as one without an end where its row of the batch has no padding. A batch is padded to its longest row,
#   prompt and answer together; the limit of tokens and the last token are not looked at. So at least one answer of each
#   batch always is.
# - PPO with a critic, with default options: to the return of the longest answer, which has ended, the critic's value behind
#   its last token is added, at which the critic is never trained. A reward of 1 is learnt as 1.5.
# - `mask_no_eos_with_zero`, documented as to mask truncated generations without an EOS token, takes the reward from the
#   longest answer although it ends in EOS, and leaves it to answers that were cut off behind a shorter prompt.
# - The metric `no_eos_ratios` is a count of the longest rows: 0.25 where none of four was cut off, 0.25 where three were.
# - What an answer is paid depends on which others are in its batch. OpenRLHF takes the engine's reason of an end for this.
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

cat >longest.py <<'PYTHON'
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

import torch
from areal.api.cli_args import PPOActorConfig
from areal.trainer.ppo.actor import PPOActor
from areal.utils import stats_tracker

EOS, LIMIT = 2, 8


class Engine:
    """In place of a model: the batch is taken, and nothing is trained."""

    def train(self):
        pass

    def get_version(self):
        return 0

    def train_batch(self, *args, **kwargs):
        return {}


def answer(length: int, prompt: int = 4, value: float = 0.0) -> dict[str, torch.Tensor]:
    """With a reward of 1, as RLVRWorkflow returns it, and a critic's values; one of eight tokens is cut off."""
    ids = torch.full((1, prompt + length), 9, dtype=torch.int32)
    if length < LIMIT:
        ids[0, -1] = EOS
    mask = torch.ones_like(ids)
    mask[:, :prompt] = 0
    return {
        "input_ids": ids, "loss_mask": mask, "logprobs": -1.0 * mask, "versions": mask - 1, "rewards": torch.tensor([1.0]),
        "attention_mask": torch.ones_like(ids, dtype=torch.bool), "values": torch.full(ids.shape, value),
    }


def step(answers: list[dict], **options) -> tuple[list[float], list[float], float]:
    """Rewards and returns that are trained on, and the metric."""
    config = PPOActorConfig(kl_ctl=0.0, max_new_tokens=LIMIT, ppo_n_minibatches=1, **options)
    actor = PPOActor(config, Engine())
    made = actor.compute_advantages([dict(data) for data in answers])
    rewards = [data["tot_rewards"].sum().item() for data in made]
    returns = [data["returns"][data["loss_mask"].bool()][-1].item() for data in made]
    actor.ppo_update(made)
    metric, = (value for key, value in stats_tracker.export_all().items() if key.endswith("no_eos_ratios/avg"))
    return rewards, returns, round(metric, 2)


print("found: areal", version("areal"), "torch", torch.__version__)
found = step([answer(n, value=0.5) for n in (3, 5, 6, 4)])[1]
print(f"found: 3, 5, 6 and 4 tokens, all with EOS, rewards 1, values 0.5: returns of the last token {found}")
assert found == [1.0, 1.0, 1.5, 1.0]
for what, answers, expected, metric in (
    ("3, 5, 6 and 4 tokens, all with EOS", [answer(n) for n in (3, 5, 6, 4)], [1.0, 1.0, 0.0, 1.0], 0.25),
    ("without the third", [answer(n) for n in (3, 5, 4)], [1.0, 0.0, 1.0], 0.33),
    ("three of four cut off at 8 tokens, prompts of 4, 5 and 6",
     [answer(8), answer(8, prompt=5), answer(8, prompt=6), answer(5)], [1.0, 1.0, 0.0, 1.0], 0.25),
    ("one cut off, and one with EOS behind a longer prompt", [answer(8), answer(7, prompt=9)], [1.0, 0.0], 0.5),
    ("two of three cut off, all behind the same prompt", [answer(8), answer(8), answer(5)], [0.0, 0.0, 1.0], 0.67),
):
    found = step(answers, mask_no_eos_with_zero=True)
    print(f"found: mask_no_eos_with_zero, {what}: rewards {found[0]}, no_eos_ratios {found[2]}")
    assert found == (expected, expected, metric)
    assert step(answers)[0] == [1.0] * len(answers)
PYTHON
python longest.py 2>errors.txt | grep "^found:" || { tail -5 errors.txt; exit 1; }
