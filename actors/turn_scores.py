"""Asking the reward service for what the environment leaves open, in one call for many rollouts."""

from collections.abc import Callable
from statistics import fmean

from contracts.interfaces import RewardClient
from contracts.records import Rollout, Score
from contracts.scoring import scoring_ids


def score_rollouts(client: RewardClient, scorer: str, rollouts: list[Rollout], end_ids: tuple[int, ...]) -> None:
    """Set `scores[scorer]` of each rollout, and for the scorer that trains (proxy) the scores of turns.

    A scorer sees a conversation up to each turn that has no reward of the environment, and there is no score of a rollout
    where one of these is missing.

        proxy         the sum over all turns of reward or score: what the conversation is paid
        any other     the mean over the turns that it was asked about, in the scorer's own unit whatever their number;
                      where the environment rewards every turn, its score of the whole conversation

    A rollout with a fault is not scored.

    Args:
        end_ids: the tokens that end a completion; a scoring input ends with the first of them.
    """
    wanted = [(rollout, end) for rollout in rollouts for end in _ends(rollout, scorer)]
    sequences = [
        scoring_ids([*rollout.prompt.token_ids, *rollout.completion.token_ids[:end].tolist()], *end_ids)
        for rollout, end in wanted
    ]
    prompts = [rollout.prompt for rollout, _ in wanted]
    prompt_tokens = [len(prompt.token_ids) for prompt in prompts]
    answers = iter(client.score(scorer, sequences, prompt_tokens, prompts) if sequences else [])
    for rollout in rollouts:
        scores = [next(answers) for _ in _ends(rollout, scorer)]
        rollout.scores[scorer] = _combined(rollout, scorer, scores)


def _ends(rollout: Rollout, scorer: str) -> list[int]:
    """Where in the completion the scorer is asked."""
    if rollout.fault is not None:
        return []
    left_open = [turn.end for turn in rollout.turns if turn.reward is None]
    if left_open or (rollout.turns and scorer == "proxy"):
        return left_open
    return [len(rollout.completion.token_ids)]


def _combined(rollout: Rollout, scorer: str, scores: list[Score]) -> Score:
    if rollout.fault is not None:
        return Score(None, rollout.fault)
    is_paid_by_turns = scorer == "proxy" and bool(rollout.turns)
    if is_paid_by_turns:
        for turn, score in zip((t for t in rollout.turns if t.reward is None), scores, strict=True):
            turn.score = score
    failed = [score for score in scores if score.value is None]
    if failed:
        return failed[0]
    values = [score.value for score in scores if score.value is not None]
    if is_paid_by_turns:
        total = sum([*(turn.reward for turn in rollout.turns if turn.reward is not None), *values])
        return Score(total, parts=_parts(scores, sum))
    # Of one answer with all that the service says of it.
    return scores[0] if len(scores) == 1 else Score(fmean(values), parts=_parts(scores, fmean))


def _parts(scores: list[Score], joined: Callable[[list[float]], float]) -> dict[str, float] | None:
    """Of several turns, each part over those that have it."""
    names = dict.fromkeys(name for score in scores for name in score.parts or {})
    return {name: joined([s.parts[name] for s in scores if s.parts and name in s.parts]) for name in names} or None
