"""A conversation of two turns in which the best first answer is not the one that is paid best: with two tokens in all,
and so with a known optimum.

    turn 1: a in {0, 1}          u_1(a) + noise      a = 0 pays 1 at once, a = 1 pays nothing
    turn 2: b in {0, 1}          u_2(a, b)           after a = 0 at most 0.2 is left, after a = 1 there are 2

    best: a = 1, b = 1, worth 2.0        greedy in every turn: a = 0, b = 1, worth 1.2

A tabular policy and a tabular critic learn it through the very functions that train the language model: `shaped` and
`episodes` on rollouts of a turn, an observation that is masked, and a turn, then `token_rewards`, `gae`, `whiten`,
`policy_loss`, `value_loss`. What must come out:

    cumulative, per_turn   find the best: a turn is credited with all that follows
    separate               finds the greedy one: to a turn that is an episode of its own the next one does not exist
    per_turn               keeps the noise of turn 1 out of the advantages of turn 2; cumulative does not
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from contracts.config import EnvironmentConfig, PPOConfig
from contracts.records import Completion, Prompt, Rollout, Turn
from controller.loop.rewards import ScoreNormalizer, episodes, shaped
from learner.advantages import token_rewards, whiten, whitening_moments
from learner.estimators.gae import gae
from learner.losses import policy_loss, value_loss

FIRST = torch.tensor([1.0, 0.0])  # u_1(a)
SECOND = torch.tensor([[0.0, 0.2], [0.0, 2.0]])  # u_2(a, b)
NOISE = 1.0  # standard deviation of what turn 1 is paid
PAYMENTS = ("cumulative", "per_turn", "separate")
BEST, GREEDY = 2.0, 1.2
MASK = (True, False, True)  # turn, observation, turn


@dataclass
class Learned:
    worth: float  # expected worth of a conversation under the learned policy, by enumeration
    first_action: float  # P(a = 1)
    noise_in_second: float  # variance of the advantage of turn 2 that its action does not explain, before whitening

    def as_dict(self) -> dict[str, float]:
        return vars(self)


def worth(first_logits: Tensor, second_logits: Tensor) -> float:
    """Expected worth of the policy."""
    p, q = first_logits.softmax(0), second_logits.softmax(1)
    return float((p * (FIRST + (q * SECOND).sum(dim=1))).sum())


def learn(payment: str, updates: int = 200, conversations: int = 64, seed: int = 0) -> Learned:
    """Train from the uniform policy.

    Args:
        payment: as `environment.reward`: cumulative | per_turn | separate.
    """
    torch.manual_seed(seed)
    policy = [torch.zeros(2, requires_grad=True), torch.zeros(2, 2, requires_grad=True)]
    critic = [torch.zeros(1, requires_grad=True), torch.zeros(2, requires_grad=True)]
    optimizers = [torch.optim.Adam(policy, lr=0.05), torch.optim.Adam(critic, lr=0.1)]
    noise = torch.zeros(())
    for _ in range(updates):
        with torch.no_grad():
            a = torch.multinomial(policy[0].softmax(0), conversations, replacement=True)
            b = torch.multinomial(policy[1].softmax(1)[a], 1).squeeze(1)
            paid = torch.stack([FIRST[a] + NOISE * torch.randn(conversations), SECOND[a, b]])
        logprobs, values, scores, mask = _rows(payment, policy, critic, a, b, paid)
        proximal, before = logprobs.detach(), values.detach()
        rewards = token_rewards(scores, proximal, proximal, mask, kl_coef=0.0)
        advantages, returns = gae(rewards, before, mask, gamma=1.0, lam=1.0)
        noise = _unexplained(advantages[mask][1::2], a, b)  # turn after turn, conversation after conversation
        advantages = whiten(advantages, mask, whitening_moments(advantages, mask))
        loss, _ = policy_loss(logprobs, proximal, advantages, mask, clip=0.2, dual_clip=3.0)
        fit, _ = value_loss(values, before, returns, mask, clip=None)
        for optimizer in optimizers:
            optimizer.zero_grad()
        ((loss + fit) / mask.sum()).backward()
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        return Learned(worth(*policy), float(policy[0].softmax(0)[1]), float(noise))


def _rows(
    payment: str, policy: list[Tensor], critic: list[Tensor], a: Tensor, b: Tensor, paid: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, values, what is paid and the mask [rows, columns]: a row is a conversation, or with `separate`
    a turn."""
    rollouts = [_conversation(i, first, second) for i, (first, second) in enumerate(paid.T.tolist())]
    ppo, environment = PPOConfig(missing_eos_penalty=0.0), EnvironmentConfig(reward=payment)
    worth = [shaped(rollout, ScoreNormalizer(), ppo, environment) for rollout in rollouts]
    parts, scores = episodes(rollouts, worth, environment)
    place = torch.from_numpy(np.stack([part.completion.token_ids for part in parts])).long()
    mask = torch.tensor(MASK).repeat(len(a))[place]
    logprobs = torch.stack([policy[0].log_softmax(0)[a], torch.zeros(len(a)), policy[1].log_softmax(1)[a, b]], dim=1)
    values = torch.stack([critic[0].expand(len(a)), torch.zeros(len(a)), critic[1][a]], dim=1)
    return logprobs.reshape(-1)[place], values.reshape(-1)[place], torch.from_numpy(np.stack(scores)), mask


def _conversation(number: int, first: float, second: float) -> Rollout:
    """Rewarded turn by turn. A token's id is its place among all conversations, so that it is known again in an episode."""
    width, ends = len(MASK), [i + 1 for i, is_sampled in enumerate(MASK) if is_sampled]
    ids = np.arange(number * width, (number + 1) * width, dtype=np.int32)
    nothing = np.zeros(width, dtype=np.float32)
    completion = Completion(ids, nothing, nothing.astype(np.int32), "stop", "", np.array(MASK))
    turns = [Turn(end, "stop", reward) for end, reward in zip(ends, (first, second), strict=True)]
    return Rollout((0, number, 0), Prompt(number, "", ()), completion, turns=turns)


def _unexplained(advantages: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Variance within the conversations of the same (a, b), weighted by their number."""
    parts = [advantages[(a == i) & (b == j)] for i in range(2) for j in range(2)]
    return sum((part.var(correction=0) * len(part) for part in parts if len(part)), start=torch.zeros(())) / len(a)


@lru_cache
def results(seeds: int = 3) -> dict[str, Any]:
    """Every payment with several seeds, as the report shows them."""
    return {
        "best": BEST,
        "greedy": GREEDY,
        "noise_variance": NOISE**2,
        "payments": {payment: [learn(payment, seed=seed).as_dict() for seed in range(seeds)] for payment in PAYMENTS},
    }
