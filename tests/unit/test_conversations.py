"""Conversations on an engine that is a function of its requests: sequences, masks, seeds, limits, faults and scores."""

import argparse
import asyncio
import json
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.conversation import Conversation, Conversations, Limits, turn_seed
from actors.environment import SingleTurn
from actors.turn_scores import score_rollouts
from contracts.config import SamplingConfig
from contracts.environments import Step
from contracts.records import Completion, Prompt, Rollout, RolloutRequest, Score, Turn
from controller.ledger.ledger import Ledger
from controller.loop.unscored import ScoreError, scored

EOS = 2
PROMPT = Prompt(3, "three", (5, 6, 7))
REQUEST = RolloutRequest(1, 0, PROMPT, seed=77)
SAMPLING = SamplingConfig(max_completion_tokens=20)
LIMITS = Limits(vocab_size=512, max_model_len=64, max_turn_tokens=None)


def decode(ids: list[int]) -> str:
    return f"<{' '.join(map(str, ids))}>"


class FakeEngine:
    """Answers with what it is told, from a thread of its own as the real one does. Log-probabilities are -0.1, -0.2, ... of
    a turn, the version of its weights is the number of the request."""

    def __init__(self, *answers: list[int] | Exception):
        self.answers, self.asked = list(answers), list[tuple[list[int], SamplingConfig, int]]()

    def submit(self, token_ids: list[int], sampling: SamplingConfig, seed: int) -> "Future[Completion]":
        number = len(self.asked)
        self.asked.append((token_ids, sampling, seed))
        result: Future[Completion] = Future()
        threading.Thread(target=self._resolve, args=(result, self.answers[number], number)).start()
        return result

    def _resolve(self, result: "Future[Completion]", answer: list[int] | Exception, version: int) -> None:
        if isinstance(answer, Exception):
            result.set_exception(answer)
            return
        ids = np.array(answer, dtype=np.int32)
        logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32) / 10
        versions = np.full(len(ids), version, dtype=np.int32)
        result.set_result(
            Completion(ids, logprobs, versions, "stop" if answer[-1] == EOS else "length", decode(answer))
        )


class Scripted:
    """Plays a list of steps and remembers what it was told."""

    def __init__(self, *steps: Step | BaseException, begin: list[int] | None = None):
        self.steps, self.begin, self.heard = list(steps), begin, list[list[int]]()

    def reset(self, prompt: Prompt) -> Any:
        return prompt.token_ids if self.begin is None else self.begin

    def step(self, token_ids: list[int]) -> Step:
        self.heard.append(token_ids)
        step = self.steps[len(self.heard) - 1]
        if isinstance(step, BaseException):
            raise step
        return step


def play(
    engine: FakeEngine,
    environment: Any,
    limits: Limits = LIMITS,
    sampling: SamplingConfig = SAMPLING,
    request: RolloutRequest = REQUEST,
) -> Rollout:
    conversations = Conversations(engine, lambda: environment, limits, decode)  # type: ignore[arg-type]
    return conversations.submit(request, sampling).result(timeout=10)


def test_three_turns_by_hand() -> None:
    engine = FakeEngine([10, 11, EOS], [20], [30, EOS])
    environment = Scripted(Step([40, 41], 0.5, False), Step([42], None, False), Step([43], -1.0, True))
    rollout = play(engine, environment)
    completion = rollout.completion
    assert completion.token_ids.tolist() == [10, 11, EOS, 40, 41, 20, 42, 30, EOS]  # 43 is dropped: nothing follows it
    mask = [True, True, True, False, False, True, False, True, True]
    assert completion.loss_mask is not None
    assert completion.loss_mask.tolist() == mask
    assert completion.behavior_logprobs.round(3).tolist() == pytest.approx(
        [-0.1, -0.2, -0.3, 0, 0, -0.1, 0, -0.1, -0.2]
    )
    assert completion.policy_versions.tolist() == [
        0,
        0,
        0,
        0,
        0,
        1,
        1,
        2,
        2,
    ]  # an observation has that of the token before
    assert completion.sampled_ids.tolist() == [10, 11, EOS, 20, 30, EOS]
    assert completion.text == "<10 11 2><40 41><20><42><30 2>"
    assert completion.finish_reason == "stop"
    assert rollout.turns == [Turn(3, "stop", 0.5), Turn(6, "length", None), Turn(9, "stop", -1.0)]
    assert (rollout.key, rollout.prompt, rollout.fault) == ((1, 3, 0), PROMPT, None)
    assert environment.heard == [[10, 11, EOS], [20], [30, EOS]]
    arrays = (completion.token_ids, completion.behavior_logprobs, completion.policy_versions, completion.loss_mask)
    assert [a.dtype for a in arrays] == [np.int32, np.float32, np.int32, np.bool_]
    # Each turn is sampled from everything before it, with a seed of its own, in the room that is left.
    assert [ids for ids, _, _ in engine.asked] == [
        [5, 6, 7],
        [5, 6, 7, 10, 11, EOS, 40, 41],
        [5, 6, 7, 10, 11, EOS, 40, 41, 20, 42],
    ]
    assert [sampling.max_completion_tokens for _, sampling, _ in engine.asked] == [20, 15, 13]
    assert [seed for _, _, seed in engine.asked] == [77, turn_seed(77, 1), turn_seed(77, 2)]


def test_a_single_turn_asks_and_returns_what_it_did_without_an_environment() -> None:
    engine = FakeEngine([10, 11, EOS])
    sampling = SamplingConfig(max_completion_tokens=20, min_completion_tokens=3, temperature=0.7)
    rollout = play(engine, SingleTurn(), sampling=sampling)
    assert engine.asked == [([5, 6, 7], sampling, 77)]
    plain = FakeEngine([10, 11, EOS]).submit([5, 6, 7], sampling, 77).result(timeout=10)
    assert repr(rollout) == repr(Rollout(REQUEST.key, PROMPT, plain))
    assert rollout.prompt is PROMPT
    assert rollout.completion.loss_mask is None


def test_seeds_of_turns() -> None:
    seeds = {turn_seed(rollout, turn) for rollout in range(50) for turn in range(1, 5)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert turn_seed(12345, 0) == 12345
    assert turn_seed(1, 2) == turn_seed(1, 2)


def test_the_longest_turn() -> None:
    engine = FakeEngine([10, 11, 12, 13], [20, 21, 22, 23], [30])
    steps = Step([40] * 7, 0.0, False), Step([41, 42], 0.0, False), Step([], 0.0, True)
    play(engine, Scripted(*steps), limits=Limits(512, 64, max_turn_tokens=4))
    # 20 in all: 4, then 4 + 7 + 4, then 17 are used
    assert [sampling.max_completion_tokens for _, sampling, _ in engine.asked] == [4, 4, 3]


@pytest.mark.parametrize(("observed", "turns"), [(16, 2), (17, 1), (18, 1)])
def test_a_conversation_without_room_for_another_token_is_cut_off(observed: int, turns: int) -> None:
    engine = FakeEngine([10, 11, EOS], [20])
    rollout = play(engine, Scripted(Step([40] * observed, 0.0, False), Step([41], 0.0, False)))
    assert len(rollout.turns) == turns
    assert len(rollout.completion.token_ids) == (20 if turns == 2 else 3)
    # The first turn ended by itself; the conversation did not.
    assert rollout.completion.finish_reason == rollout.turns[-1].finish_reason == "length"
    assert rollout.fault is None


def test_the_fewest_tokens_count_from_the_start_of_the_completion() -> None:
    """As the learner does, which bans EOS at the first positions of the completion."""
    engine = FakeEngine([10, 11], [20, EOS], [30, EOS])
    steps = Step([40], 0.0, False), Step([], 0.0, False), Step([], 0.0, True)
    sampling = SamplingConfig(max_completion_tokens=20, min_completion_tokens=4)
    play(engine, Scripted(*steps), Limits(512, 64, max_turn_tokens=2), sampling)
    # Positions 0 to 3: both of the first turn, the observation, one of the second turn, none of the third.
    assert [sampling.min_completion_tokens for _, sampling, _ in engine.asked] == [2, 1, 0]


def test_the_fewest_tokens_of_a_turn_count_from_its_start() -> None:
    engine = FakeEngine([10, 11, 12, EOS], [20, 21, 22, EOS], [30, 31])
    steps = Step([40], 0.0, False), Step([41] * 7, 0.0, False), Step([], 0.0, True)
    sampling = SamplingConfig(max_completion_tokens=18, min_completion_tokens=5)
    play(engine, Scripted(*steps), Limits(512, 64, max_turn_tokens=6, min_turn_tokens=3), sampling)
    # The first turn is bound by the completion's least, the second by its own, the third by the two tokens that are left.
    assert [sampling.min_completion_tokens for _, sampling, _ in engine.asked] == [5, 3, 2]


def test_the_fewest_tokens_of_a_turn_need_an_observation_to_count_from() -> None:
    limits = Limits(512, 64, max_turn_tokens=4, min_turn_tokens=1)
    rollout = play(FakeEngine([10, EOS], [20, EOS]), Scripted(Step([], 0.0, False), Step([], 1.0, True)), limits)
    assert rollout.fault is not None
    assert "with environment.min_turn_tokens step() must observe something between two turns" in rollout.fault


def test_an_observation_may_be_empty() -> None:
    rollout = play(FakeEngine([10, EOS], [20, EOS]), Scripted(Step([], 0.0, False), Step([], 1.0, True)))
    assert rollout.completion.token_ids.tolist() == [10, EOS, 20, EOS]
    assert rollout.completion.loss_mask is None
    assert [turn.end for turn in rollout.turns] == [2, 4]


def test_an_environment_may_rewrite_the_prompt() -> None:
    engine = FakeEngine([10, EOS])
    rollout = play(engine, Scripted(Step([], None, True), begin=[1, 2, 3, 4]))
    assert engine.asked[0][0] == [1, 2, 3, 4]
    assert rollout.prompt == Prompt(3, "three", (1, 2, 3, 4))
    assert rollout.key == REQUEST.key
    assert rollout.turns == []


@pytest.mark.parametrize(
    ("steps", "begin", "fault", "tokens"),
    [
        ([Step([512], 0.0, False)], None, "EnvironmentFault: the observation of step() holds token 512", [10, 11]),
        ([Step([40], 0.0, False), KeyError("answer")], None, "KeyError: 'answer'", [10, 11, 40, 20, EOS]),
        ([Step([40], 0.0, False), Step([], float("nan"), True)], None, "must be finite", [10, 11, 40, 20, EOS]),
        ([], [5, -1], "EnvironmentFault: reset() holds token -1", []),
        ([], [4] * 45, "exceed engine.max_model_len (64)", []),
    ],
)
def test_a_fault_costs_its_own_rollout(
    steps: list[Any], begin: list[int] | None, fault: str, tokens: list[int]
) -> None:
    rollout = play(FakeEngine([10, 11], [20, EOS]), Scripted(*steps, begin=begin))
    assert rollout.fault is not None
    assert fault in rollout.fault
    assert rollout.fault.startswith("environment: ")
    assert rollout.completion.token_ids.tolist() == tokens
    lengths = {len(a) for a in (rollout.completion.behavior_logprobs, rollout.completion.policy_versions)}
    assert lengths == {len(tokens)}
    client = FakeClient([])
    score_rollouts(client, "proxy", [rollout], (EOS,))
    assert rollout.scores == {"proxy": Score(None, rollout.fault)}
    assert client.asked == []
    # It goes the way of any rollout without a score.
    ledger = Ledger(1, max_staleness=1)
    ledger.admit([REQUEST])
    (lease,) = ledger.lease(1, "actor")
    assert ledger.complete(lease.number, rollout)
    assert ledger.take(1, 1) == [rollout]
    ledger.quarantine(rollout.key, "no score")


def argparse_of_a_tool() -> None:
    tool = argparse.ArgumentParser("tool")
    tool.add_argument("--x", type=int)
    tool.parse_args(["--x", "seven"])


async def cancelled() -> None:
    task = asyncio.create_task(asyncio.sleep(5))
    task.cancel()
    await task


class SaysNothing(Exception):
    def __str__(self) -> str:
        return self.text  # type: ignore[attr-defined, no-any-return]  # it has none


def say_nothing() -> None:
    raise SaysNothing


@pytest.mark.parametrize(
    ("act", "fault"),
    [
        (argparse_of_a_tool, "SystemExit: 2"),
        (lambda: asyncio.run(cancelled()), "CancelledError"),
        (say_nothing, "SaysNothing"),
    ],
)
@pytest.mark.parametrize("place", ["make", "reset", "step"])
def test_whatever_an_environment_raises_costs_its_own_rollout(act: Any, fault: str, place: str) -> None:
    class Acts(Scripted):
        def __init__(self) -> None:
            super().__init__(Step([], 1.0, True))
            if place == "make":
                act()

        def reset(self, prompt: Prompt) -> Any:
            return act() if place == "reset" else super().reset(prompt)

        def step(self, token_ids: list[int]) -> Step:
            return act() if place == "step" else super().step(token_ids)  # type: ignore[no-any-return]

    conversations = Conversations(FakeEngine([10, EOS]), Acts, LIMITS, decode)  # type: ignore[arg-type]
    rollout = conversations.submit(REQUEST, SAMPLING).result(timeout=10)
    assert rollout.fault == f"environment: {fault}"
    assert rollout.completion.token_ids.tolist() == ([10, EOS] if place == "step" else [])


def test_a_fault_has_a_text_that_every_file_takes(tmp_path: Path) -> None:
    """Half an emoji's escape is what a policy writes that is cut off; a tool's megabyte is no reason."""
    told = ValueError("no tool \ud83d " + "x" * 2**20)
    rollout = play(FakeEngine([10, EOS]), Scripted(told))
    assert rollout.fault == "environment: ValueError: no tool ? " + "x" * 490
    score_rollouts(FakeClient([]), "proxy", [rollout], (EOS,))
    with pytest.raises(ScoreError, match=r"no tool \? x"):
        scored([rollout], 0.0, 0, tmp_path)
    [row] = (tmp_path / "unscored.jsonl").read_text().splitlines()
    assert json.loads(row)["fault"] == rollout.fault


def test_an_engine_that_refuses_fails_the_future() -> None:
    with pytest.raises(ValueError, match="too long"):
        play(FakeEngine(ValueError("too long")), SingleTurn())
    with pytest.raises(ValueError, match="too long"):
        play(FakeEngine([10], ValueError("too long")), Scripted(Step([40], 0.0, False)))


def test_a_slow_environment_holds_up_nobody_else() -> None:
    """The first conversation's step waits for the second conversation to end."""
    ended = threading.Event()

    class Waits(Scripted):
        def step(self, token_ids: list[int]) -> Step:
            assert ended.wait(timeout=10)
            return super().step(token_ids)

    environments = iter([Waits(Step([], 1.0, True)), Scripted(Step([], 2.0, True))])
    conversations = Conversations(FakeEngine([10], [20]), lambda: next(environments), LIMITS, decode)  # type: ignore[arg-type]
    slow, quick = (conversations.submit(REQUEST, SAMPLING) for _ in range(2))
    assert quick.result(timeout=10).turns[0].reward == 2.0
    ended.set()
    assert slow.result(timeout=10).turns[0].reward == 1.0


def test_what_goes_wrong_inside_reaches_whoever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conversation, "rollout", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        play(FakeEngine([10]), SingleTurn())


# ---- scores of turns


class FakeClient:
    def __init__(self, answers: list[Score]):
        self.answers, self.asked = answers, list[tuple[str, list[list[int]]]]()
        self.prompts: list[Prompt] | None = None

    def score(
        self,
        scorer: str,
        sequences: list[list[int]],
        prompt_tokens: list[int] | None = None,
        prompts: list[Prompt] | None = None,
    ) -> list[Score]:
        self.asked.append((scorer, sequences))
        self.prompts = prompts
        assert len(sequences) == len(self.answers)
        return self.answers


def conversation(*rewards: float | None) -> Rollout:
    """Two turns of two tokens, one observed between them."""
    steps = Step([40], rewards[0], False), Step([], rewards[1], True)
    return play(FakeEngine([10, EOS], [20, 21]), Scripted(*steps))


def test_the_service_scores_what_the_environment_leaves_open() -> None:
    single = play(FakeEngine([30, EOS]), SingleTurn())
    both, first, none = conversation(None, None), conversation(None, 0.5), conversation(0.25, 0.5)
    client = FakeClient([Score(1.0), Score(2.0), Score(4.0), Score(8.0)])
    score_rollouts(client, "proxy", [single, both, first, none], (EOS,))
    up_to_first, whole = [5, 6, 7, 10, EOS], [5, 6, 7, 10, EOS, 40, 20, 21, EOS]
    assert client.asked == [("proxy", [[5, 6, 7, 30, EOS], up_to_first, whole, up_to_first])]
    assert [turn.score for turn in both.turns] == [Score(2.0), Score(4.0)]
    assert [turn.score for turn in first.turns] == [Score(8.0), None]
    assert [r.scores["proxy"].value for r in (single, both, first, none)] == [1.0, 2.0 + 4.0, 8.0 + 0.5, 0.75]


def test_another_scorer_judges_the_same_turns_and_its_score_is_their_mean() -> None:
    single = play(FakeEngine([30, EOS]), SingleTurn())
    rollouts = [single, conversation(None, None), conversation(None, 0.5), conversation(0.25, 0.5)]
    client = FakeClient([Score(v) for v in (1.0, 2.0, 4.0, 3.0, 5.0)])
    score_rollouts(client, "gold", rollouts, (EOS,))
    up_to_first, whole = [5, 6, 7, 10, EOS], [5, 6, 7, 10, EOS, 40, 20, 21, EOS]
    assert client.asked == [("gold", [[5, 6, 7, 30, EOS], up_to_first, whole, up_to_first, whole])]
    assert [r.scores["gold"].value for r in rollouts] == [1.0, (2.0 + 4.0) / 2, 3.0, 5.0]
    assert all(turn.score is None for r in rollouts for turn in r.turns)


def test_a_score_that_failed_leaves_the_rollout_without_one() -> None:
    rollout = conversation(None, None)
    for scorer in ("proxy", "gold"):
        score_rollouts(FakeClient([Score(1.0), Score(None, "deadline")]), scorer, [rollout], (EOS,))
        assert rollout.scores[scorer] == Score(None, "deadline")


def test_without_anything_to_score_the_service_is_not_asked() -> None:
    client, rollout = FakeClient([]), conversation(1.0, 0.5)
    score_rollouts(client, "proxy", [rollout], (EOS,))
    assert (client.asked, rollout.scores["proxy"]) == ([], Score(1.5))


def test_the_row_of_a_prompt_goes_to_the_environment_and_to_the_scorer() -> None:
    prompt = replace(PROMPT, row='{"answer": "7"}', messages='[{"role": "user", "content": "three"}]')
    seen: list[Prompt] = []

    class Looks(Scripted):
        def reset(self, prompt: Prompt) -> list[int]:
            seen.append(prompt)
            return [1, 2]  # other tokens than it came with

    rollout = play(FakeEngine([10, EOS]), Looks(Step([], None, True)), request=replace(REQUEST, prompt=prompt))
    client = FakeClient([Score(1.0, parts={"format": 0.5})])
    score_rollouts(client, "proxy", [rollout], (EOS,))
    assert seen[0].columns == {"answer": "7"}
    assert client.prompts == [replace(prompt, token_ids=(1, 2))]
    assert rollout.scores["proxy"].parts == {"format": 0.5}


def test_parts_of_several_turns_are_summed_for_the_scorer_that_trains_and_else_their_mean() -> None:
    answers = [Score(1.0, parts={"format": 0.5, "right": 1.0}), Score(2.0, parts={"format": 0.25})]
    both = conversation(None, None)
    for scorer in ("proxy", "gold"):
        score_rollouts(FakeClient(answers), scorer, [both], (EOS,))
    assert both.scores["proxy"] == Score(3.0, parts={"format": 0.75, "right": 1.0})
    assert both.scores["gold"] == Score(1.5, parts={"format": 0.375, "right": 1.0})
