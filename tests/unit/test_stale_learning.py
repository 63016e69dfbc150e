"""A known problem on samples that are four updates old: with the correction it is learnt as on fresh ones.

Three positions, twelve tokens, a value for each token and a KL penalty of weight beta against the uniform policy. The best
policy is softmax(value / beta); how far a policy is from it is known exactly.
"""

import math

import pytest
import torch

from learner.losses import off_policy_weights, policy_loss

POSITIONS, TOKENS, BATCH, UPDATES, BETA = 3, 12, 64, 100, 0.3


def distance(seed: int, staleness: int, correction: str) -> float:
    """KL(policy || best policy), summed over the positions; mean over the last 20 updates."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.linspace(0, 1, TOKENS)[torch.randperm(TOKENS, generator=generator)].expand(POSITIONS, TOKENS)
    best = (value / BETA).log_softmax(-1)
    logits = torch.zeros(POSITIONS, TOKENS, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    versions, distances = [logits.detach().clone()], []
    place, mask = torch.arange(POSITIONS).expand(BATCH, POSITIONS), torch.ones(BATCH, POSITIONS, dtype=torch.bool)
    for _ in range(UPDATES):
        behavior = versions[max(0, len(versions) - 1 - staleness)].log_softmax(-1)
        token = torch.multinomial(behavior.exp(), BATCH, replacement=True, generator=generator).T
        policy_logprobs = logits.log_softmax(-1)[place, token]
        proximal_logprobs = policy_logprobs.detach()
        rewards = value[place, token] - BETA * (proximal_logprobs + math.log(TOKENS))
        weights, _ = off_policy_weights(proximal_logprobs, behavior[place, token], mask, correction, 2.0, 0.5, 5.0)
        advantages = rewards - rewards.mean(0)
        loss, _ = policy_loss(policy_logprobs, proximal_logprobs, advantages, mask, 0.2, 3.0, weights)
        optimizer.zero_grad()
        (loss / mask.sum()).backward()
        optimizer.step()
        versions.append(logits.detach().clone())
        now = versions[-1].log_softmax(-1)
        distances.append((now.exp() * (now - best)).sum().item())
    return sum(distances[-20:]) / 20


@pytest.mark.parametrize("correction", ["truncated", "masked"])
def test_corrected_stale_samples_teach_as_well_as_fresh_ones(correction: str) -> None:
    seeds, start = range(8), 1.49  # nats, the distance of the uniform policy

    def mean(staleness: int, correction: str) -> float:
        return sum(distance(seed, staleness, correction) for seed in seeds) / len(seeds)

    fresh, corrected, uncorrected = mean(0, "none"), mean(4, correction), mean(4, "none")
    assert max(fresh, corrected) < start / 1000
    assert corrected < 1.5 * fresh
    assert uncorrected > 2 * corrected
