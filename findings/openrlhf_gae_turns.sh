#!/usr/bin/env bash
# OpenRLHF 0.11.2: PPO over several turns with lambda below 1 ends an episode for the critic at its first turn.
#
# - The texts of the environment between two turns are masked, and `estimator: gae` sets the critic's values there to 0. So
#   the last token of a turn is followed by a value of 0, as if the episode ended, and what comes behind the gap is
#   multiplied by lambda once for each token of the environment's text. With 0.95 and 200 such tokens nothing is left of it.
# - Masked tokens are no actions: GAE (arXiv 1506.02438) goes from action to action. `gae` of verl passes over them, and
#   OpenRLHF gives the same numbers as verl if no text stands between the turns.
# - A tool's output has hundreds of tokens. With a reward of 1 and values of 0.5 the critic is taught 0 for every turn but
#   the last, and these turns are punished. Where the first turn decides and the critic is right, right first turns and wrong
#   ones get the same advantage: all turns but the last are not trained. How much depends on how long the environment's text
#   is. With lambda 1, the default, the values cancel and all is right.
#
# Needs python3.11 and network for pip; takes 2 to 3 minutes. Exits 1 where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
export PATH=$folder/venv/bin:$PATH
pip install --quiet torch==2.13.0 numpy==2.3.5 transformers==5.24.0 tensordict==0.15.3 ray==2.60.0 omegaconf==2.3.1 \
    codetiming==1.4.0 orjson==3.13.0 accelerate==1.15.0
pip install --quiet --no-deps verl==0.9.1 openrlhf==0.11.2
cd "$folder"

cat >turns.py <<'PYTHON'
import sys
import types
from importlib.metadata import distribution, version
from types import SimpleNamespace

# Advantages alone: engines and the start of actors, which nothing here uses, are left out.
for name in ("deepspeed", "vllm"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["vllm"].SamplingParams = None
for name in ("openrlhf.utils", "openrlhf.models", "openrlhf.trainer.ray"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(distribution("openrlhf").locate_file(name.replace(".", "/")))]
for name, attribute in (("launcher", "RayActorGroup"), ("vllm_engine", "batch_vllm_engine_call")):
    sys.modules[f"openrlhf.trainer.ray.{name}"] = types.ModuleType(name)
    setattr(sys.modules[f"openrlhf.trainer.ray.{name}"], attribute, None)

import openrlhf.models.utils
import torch

del sys.modules["deepspeed"]
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

del sys.modules["vllm"]
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

PROMPT, TURN, LAMBDA = 3, 2, 0.95


def maker(lambd: float) -> RemoteExperienceMaker:
    """With the defaults of OpenRLHF, but for lambda and the division of advantages by their standard deviation."""
    advantage = SimpleNamespace(estimator="gae", gamma=1.0, lambd=lambd, no_std_norm=True)
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage), rollout=SimpleNamespace(n_samples_per_prompt=1),
        reward=SimpleNamespace(clip_range=(-10, 10), overlong_buffer_len=None, stop_properly_penalty_coef=None),
    )
    return RemoteExperienceMaker(None, None, None, None, SimpleNamespace(value=0.0), SimpleNamespace(args=args), None)


def experience(index: int, reward: float, values: list[float], gap: int):
    """An episode with a turn for each value and texts of the environment between them, as an agent reports it."""
    start, ranges = PROMPT, []
    for _ in values:
        ranges.append((start, start + TURN))
        start += TURN + gap
    made = SamplesGenerator._process_response_into_experience(None, {
        "prompt": "", "label": "", "observation_tokens": list(range(ranges[-1][1])), "action_ranges": ranges,
        "reward": reward, "scores": reward, "rollout_log_probs": None,
    })
    made.index, made.kl = [index], torch.zeros(made.action_mask.shape)
    made.values = torch.zeros(made.action_mask.shape)
    for (begin, end), value in zip(ranges, values):
        made.values[:, begin - 1:end - 1] = value
    assert (made.values.bool() <= made.action_mask.bool()).all() and made.action_mask.sum() == TURN * len(values)
    return made


def by_turn(tensor: torch.Tensor, made) -> list[float]:
    """At the last token of each turn."""
    return [round(number, 2) + 0.0 for number in tensor[made.action_mask.bool()].view(-1, TURN)[:, -1].tolist()]


def episodes(gap: int, *shown: tuple[float, list[float]], lambd: float = LAMBDA):
    made = [experience(i, reward, values, gap) for i, (reward, values) in enumerate(shown)]
    return maker(lambd).compute_advantages_and_returns(made)


def of_verl(made, lambd: float = LAMBDA) -> list[float]:
    rewards = torch.zeros(made.values.shape)
    rewards[:, -1] = made.rewards
    return by_turn(get_adv_estimator_fn("gae")(rewards, made.values, made.action_mask, 1.0, lambd)[1], made)


print("found: openrlhf", version("openrlhf"), "verl", version("verl"), "torch", torch.__version__)
right = [0.91, 0.95, 1.0]
for gap, expected in ((0, right), (10, [0.34, 0.57, 1.0]), (50, [0.01, 0.07, 1.0]), (200, [0.0, 0.0, 1.0])):
    made, = episodes(gap, (1.0, [0.5] * 3))
    found = by_turn(made.returns, made)
    verl = of_verl(made)
    print(f"found: reward 1, values 0.5, lambda {LAMBDA}, {gap} tokens between turns: returns {found}, of verl {verl}")
    assert found == expected and verl == right
    made, = episodes(gap, (1.0, [0.5] * 3), lambd=1.0)
    assert by_turn(made.returns, made) == of_verl(made, 1.0) == [1.0] * 3

# The first turn decides, half of them are right, and the critic is right: 0.5 before it, and the reward after it.
shown = ((1.0, [0.5, 1.0]), (1.0, [0.5, 1.0]), (0.0, [0.5, 0.0]), (0.0, [0.5, 0.0]))
for gap, expected in ((0, (0.5, -0.5)), (10, (0.1, -0.5)), (50, (-0.42, -0.5)), (200, (-0.5, -0.5))):
    made = episodes(gap, *shown)
    found = tuple(by_turn(one.returns - one.values, one)[0] for one in (made[0], made[-1]))
    print(f"found: the first turn decides, {gap} tokens behind it: its advantage if right {found[0]}, if wrong {found[1]}")
    assert found == expected
    assert [of_verl(one)[0] for one in (made[0], made[-1])] == [1.0, 0.0]
PYTHON
python turns.py 2>errors.txt | grep "^found:" || { tail -5 errors.txt; exit 1; }
