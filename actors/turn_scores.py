"""Asking the reward service for what the environment leaves open, in one call for many rollouts."""

from contracts.interfaces import RewardClient
from contracts.records import Rollout, Score
from contracts.scoring import scoring_ids


def score_rollouts(client: RewardClient, scorer: str, rollouts: list[Rollout], eos_token_id: int) -> None:
    """Set `scores[scorer]` of each rollout, and for the scorer that trains (proxy) the scores of turns.

    The proxy sees a conversation up to each turn that has no reward of the environment; its score of the rollout is the
    sum over the turns of reward or score, and there is none where one of them is missing. Any other scorer sees whole
    conversations. A rollout with a fault is not scored.
    """
    wanted = [(rollout, end) for rollout in rollouts for end in _ends(rollout, scorer)]
    sequences = [
        scoring_ids([*rollout.prompt.token_ids, *rollout.completion.token_ids[:end].tolist()], eos_token_id)
        for rollout, end in wanted
    ]
    answers = iter(client.score(scorer, sequences) if sequences else [])
    for rollout in rollouts:
        scores = [next(answers) for _ in _ends(rollout, scorer)]
        rollout.scores[scorer] = _combined(rollout, scorer, scores)


def _ends(rollout: Rollout, scorer: str) -> list[int]:
    """Where in the completion the scorer is asked."""
    if rollout.fault is not None:
        return []
    if scorer == "proxy" and rollout.turns:
        return [turn.end for turn in rollout.turns if turn.reward is None]
    return [len(rollout.completion.token_ids)]


def _combined(rollout: Rollout, scorer: str, scores: list[Score]) -> Score:
    if rollout.fault is not None:
        return Score(None, rollout.fault)
    if scorer != "proxy" or not rollout.turns:
        return scores[0]
    for turn, score in zip((t for t in rollout.turns if t.reward is None), scores, strict=True):
        turn.score = score
    failed = [score for score in scores if score.value is None]
    rewards = [turn.reward for turn in rollout.turns if turn.reward is not None]
    return failed[0] if failed else Score(sum([*rewards, *(s.value for s in scores if s.value is not None)]))
