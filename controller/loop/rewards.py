"""From what the judges say to what each token of a rollout is paid.

Turn k of a conversation ends at token e_k and is worth

    u_k = r_k               the environment's own reward, as it is
    u_k = (s_k - m) / d     where the environment leaves it open: the reward service's score of everything up to e_k
    u_k -= missing_eos_penalty where the turn did not end by itself
    u_K -= overlong_penalty of the last turn, by the length of the whole conversation

    per_turn:    token e_k is paid u_k, for every k
    cumulative:  the last token is paid u_1 + ... + u_K
    separate:    token e_k is paid u_k, and every turn trains as an episode of its own whose prompt is all that came before

A completion without turns is a conversation of one turn, for which the two are the same. m and d are mean and standard
deviation of the service's scores in the first batch, which is the reference policy's; d is 1 where these are all equal but
for rounding. The environment's rewards are left alone: their author chose the unit, and a shift would pay for the number of
turns.
"""

from dataclasses import dataclass, replace

import numpy as np

from common.statistics import spread
from contracts.config import EnvironmentConfig, PPOConfig
from contracts.records import Rollout, Turn


@dataclass
class ScoreNormalizer:
    """Scores to mean 0 and variance 1 on samples of the reference policy, fixed from the first batch on."""

    mean: float = 0.0
    std: float = 1.0
    is_fitted: bool = False

    def fit(self, scores: list[float]) -> None:
        """Take mean and deviation of `scores`; where there are none, wait for the next batch. Equal ones have no deviation:
        the scorer's own unit stays."""
        if scores:
            self.mean = float(np.mean(scores))
            self.std = spread(scores) or 1.0
            self.is_fitted = True

    def __call__(self, score: float) -> float:
        return (score - self.mean) / self.std


def turns_of(rollout: Rollout) -> list[Turn]:
    """The turns of a conversation; a completion without any is one, scored as a whole."""
    completion = rollout.completion
    whole = Turn(len(completion.token_ids), completion.finish_reason, None, rollout.scores.get("proxy"))
    return rollout.turns or [whole]


def service_scores(rollouts: list[Rollout]) -> list[float]:
    """What the reward service said, of whole conversations or of their turns: what `ScoreNormalizer` is fitted on."""
    scores = [turn.score for rollout in rollouts for turn in turns_of(rollout) if turn.reward is None]
    return [score.value for score in scores if score is not None and score.value is not None]


def shaped(rollout: Rollout, normalizer: ScoreNormalizer, ppo: PPOConfig, environment: EnvironmentConfig) -> np.ndarray:
    """What each completion token is paid: float32 [completion tokens], 0 but at the ends of turns.

    Raises:
        ValueError: where a turn has neither a reward nor a score.
    """
    turns = turns_of(rollout)
    worth = [_worth(turn, normalizer) - ppo.missing_eos_penalty * (turn.finish_reason != "stop") for turn in turns]
    result = np.zeros(len(rollout.completion.token_ids), dtype=np.float32)
    if environment.reward in ("per_turn", "separate"):
        for turn, value in zip(turns, worth, strict=True):
            result[turn.end - 1] = value
    elif len(result):  # an empty completion has no token to be paid
        result[turns[-1].end - 1] = sum(worth)
    if len(result):
        result[turns[-1].end - 1] -= overlong_penalty(len(result), ppo)
    return result


def overlong_penalty(tokens: int, ppo: PPOConfig) -> float:
    """0 up to max_completion_tokens - buffer_tokens, and from there linearly up to `ppo.overlong.penalty` at the limit.

    Source: Yu et al. 2025 (arXiv 2503.14476, DAPO), equation 13, with L_max the limit of sampling, its cache the buffer, and
    a penalty of 1; there on answers that are worth -1 or 1, here on normalised scores.

    Args:
        tokens: of a completion, observations included, as the limit counts them.
    """
    buffer = ppo.overlong.buffer_tokens
    if buffer is None:
        return 0.0
    beyond = tokens - (ppo.sampling.max_completion_tokens - buffer)
    return ppo.overlong.penalty * min(max(beyond / buffer, 0.0), 1.0)


def episodes(
    rollouts: list[Rollout], paid: list[np.ndarray], environment: EnvironmentConfig
) -> tuple[list[Rollout], list[np.ndarray]]:
    """What trains: the rollouts themselves, or with `separate` each of their turns alone, with what its tokens are paid.

    A turn that is alone sees nothing of later rewards. That is how supervised learning takes a conversation: as pairs of a
    question and an answer.
    """
    if environment.reward != "separate":
        return rollouts, paid
    parts = [part for rollout, row in zip(rollouts, paid, strict=True) for part in _turns_alone(rollout, row)]
    return [rollout for rollout, _ in parts], [row for _, row in parts]


def _turns_alone(rollout: Rollout, paid: np.ndarray) -> list[tuple[Rollout, np.ndarray]]:
    completion, result, before = rollout.completion, [], 0
    if len(rollout.turns) < 2:
        return [(rollout, paid)]
    for turn in rollout.turns:
        mask = slice(None) if completion.loss_mask is None else completion.loss_mask[before : turn.end]
        start = before + int(np.arange(turn.end - before)[mask][0])  # behind the observation
        prompt = replace(rollout.prompt, token_ids=(*rollout.prompt.token_ids, *completion.token_ids[:start].tolist()))
        part = slice(start, turn.end)
        alone = replace(
            completion,
            token_ids=completion.token_ids[part],
            behavior_logprobs=completion.behavior_logprobs[part],
            policy_versions=completion.policy_versions[part],
            finish_reason=turn.finish_reason,
            loss_mask=None,
        )
        result.append((replace(rollout, prompt=prompt, completion=alone, turns=[]), paid[part]))
        before = turn.end
    return result


def _worth(turn: Turn, normalizer: ScoreNormalizer) -> float:
    if turn.reward is not None:
        return turn.reward
    if turn.score is None or turn.score.value is None:
        raise ValueError("a turn without a reward or a score cannot be shaped: its rollout leaves the batch before")
    return normalizer(turn.score.value)


def overlong_metrics(rollouts: list[Rollout], ppo: PPOConfig) -> dict[str, float]:
    """What completions are paid less for their length, on average; nothing where length costs nothing."""
    if ppo.overlong.buffer_tokens is None:
        return {}
    penalties = [overlong_penalty(len(rollout.completion.token_ids), ppo) for rollout in rollouts]
    return {"reward/overlong_mean": -float(np.mean(penalties))}


def paid_metrics(paid: list[np.ndarray]) -> dict[str, float]:
    """The largest amount that a token is paid, in either direction: what the value model, the clip of its loss and the KL
    penalty see."""
    return {"reward/paid_abs_max": max((float(np.abs(row).max()) for row in paid if row.size), default=0.0)}


def turn_metrics(rollouts: list[Rollout]) -> dict[str, float]:
    """Of conversations alone: nothing where every completion is one turn."""
    if not any(rollout.turns for rollout in rollouts):
        return {}
    tokens = sum(len(r.completion.token_ids) for r in rollouts)
    sampled = sum(len(r.completion.sampled_ids) for r in rollouts)
    return {
        "completion/turns_mean": float(np.mean([len(turns_of(r)) for r in rollouts])),
        "completion/observation_frac": (tokens - sampled) / max(tokens, 1),
    }
