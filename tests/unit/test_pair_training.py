"""What stages that compare texts say of themselves: held-out accuracy with its interval, and the lines of their steps."""

import math
import re
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common import statistics
from contracts.config import TandemConfig
from contracts.records import Example, ExamplePair, PreferencePair, RatedExample, RatedText
from controller.cluster.runtime import Runtime
from controller.data.inputs import Inputs
from controller.pipeline.pair_training import accuracy, prompts_of, train_on_pairs
from controller.stages import preference, reward_model

BOS, END = 1, 2


def test_pairs_of_one_prompt_are_known_by_what_their_sides_begin_with() -> None:
    first, second = [BOS, 10, 11], [BOS, 20]
    pairs = [
        ([*first, 5, END], [*first, 6, END]),
        ([*second, 5, END], [*second, 7, END]),
        ([*first, 7, END], [*first, 8, END]),
        ([*first, 9, 3, END], [*first, 9, 4, END]),  # their answers begin alike
        ([BOS, 30, END], [BOS, 40, END]),  # without a prompt
        ([BOS, 50, END], [BOS, 60, END]),
    ]
    found = prompts_of(pairs)
    assert found[0] == found[2] == found[3]
    assert len({*found}) == 4
    assert prompts_of([]) == []
    assert prompts_of(pairs[:1]) == [0]


def pair_of(prompt: int, right: bool, answer: int, kind: type) -> PreferencePair | ExamplePair:
    """Texts are scored by their third token."""
    better, worse = ([BOS, prompt, score, answer, END] for score in (90 if right else 70, 80))
    if kind is PreferencePair:
        return PreferencePair(better, worse)
    return ExamplePair(*(Example(ids, [0, 0, 1, 1, 1]) for ids in (better, worse)))  # type: ignore[arg-type]


def sides_of(pair: PreferencePair | ExamplePair) -> tuple[list[int], list[int]]:
    if isinstance(pair, PreferencePair):
        return pair.chosen_ids, pair.rejected_ids
    return pair.chosen.token_ids, pair.rejected.token_ids


@pytest.mark.parametrize("kind", [PreferencePair, ExamplePair])
def test_the_interval_is_over_prompts_not_over_their_pairs(kind: type) -> None:
    """Two prompts with ten pairs each, of which one has all right: a resample has 0, 10 or 20 right."""
    items = [pair_of(prompt, prompt == 10, 100 + i, kind) for i in range(10) for prompt in (10, 20)]
    texts = [side for item in items for side in sides_of(item)]
    config = TandemConfig()
    found = accuracy(config, items, lambda rows: [float(texts[i][2]) for i in rows], 0)
    assert found == {"accuracy": 0.5, "accuracy_low": 0.0, "accuracy_high": 1.0, "pairs": 20}


def test_of_many_prompts_whose_pairs_are_all_right_the_interval_is_that_of_so_many_prompts() -> None:
    items: list[Any] = [pair_of(prompt, True, answer, PreferencePair) for prompt in range(10, 30) for answer in (5, 6)]
    found = accuracy(TandemConfig(), items, lambda rows: [1.0 - i % 2 for i in rows], 0)
    assert (found["accuracy"], found["accuracy_high"]) == (1.0, 1.0)
    assert found["accuracy_low"] == pytest.approx(0.025 ** (1 / 20))


def test_pairs_of_prompts_of_their_own_have_the_interval_of_a_win_rate() -> None:
    items: list[Any] = [pair_of(prompt, True, 5, PreferencePair) for prompt in range(10, 30)]
    config, a, b = TandemConfig(), [1.0] * 15 + [0.0] * 5, [0.5] * 20
    found = accuracy(config, items, lambda rows: [(b if i % 2 else a)[i // 2] for i in rows], 0)
    wins = statistics.win_rate(a, b, config.evaluate.bootstrap_samples, config.seed)
    assert found == {**wins.row("accuracy"), "pairs": 20}


class Group:
    """A task with these accuracies, one a step."""

    def __init__(self, *accuracies: float):
        self.accuracies = accuracies

    def call(self, method: str, *step: int) -> list[Any]:
        if method == "num_steps":
            return [len(self.accuracies)]
        told = {"loss": 0.5, "accuracy": self.accuracies[step[0]]}
        return [{f"preference/{k}": v for k, v in told.items()} | {"perf/train_tokens_per_s": 100.0}]


class Context:
    """What `train_on_pairs` has of its stage."""

    def __init__(self) -> None:
        self.result, self.said, self.logged = "preference", list[str](), list[float]()
        self.progress = self

    def line(self, text: str) -> None:
        self.said.append(text)

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        self.logged.append(metrics["preference/accuracy"])


def test_batches_without_a_decided_pair_do_not_lower_the_share() -> None:
    context: Any = Context()
    train_on_pairs(context, Group(1.0, math.nan, 0.5), "DPO")
    assert context.said == ["  DPO step 3/3 | loss 0.500 | pairs right 75.0% | 100 tok/s"]
    assert math.isnan(context.logged[1])
    train_on_pairs(context, Group(math.nan), "DPO")
    assert context.said[1] == "  DPO step 1/1 | loss 0.500 | pairs right none to tell | 100 tok/s"


@pytest.mark.parametrize(("batch_size", "refused"), [(1, True), (2, False)])
def test_a_step_of_one_rated_text_is_refused(batch_size: int, refused: bool) -> None:
    """It has no pair: the loss would be 0 in all steps."""
    config = TandemConfig(method="dpo")
    config.reward_model.batch_size = config.preference.batch_size = batch_size
    rated = [RatedText("a", [1, 2], [float(number)]) for number in range(4)]
    data = Inputs({"preferences/proxy": rated, "test": rated})
    told = "batch_size must be at least 2 with rated texts"
    assert any(told in text for text in reward_model.problems(config, data)) == refused
    texts = [RatedExample(Example([1, 2], [False, True]), [float(number)]) for number in range(4)]
    data = Inputs({"completions": texts, "test_completions": texts})
    assert any(told in text for text in preference.problems(config, data)) == refused
    pairs = Inputs({"preferences/proxy": [PreferencePair([1, 2], [1, 3], 1.0)] * 4})
    assert not any(told in text for text in reward_model.problems(config, pairs))


def test_what_comes_after_sft_draws_from_the_seed_that_its_key_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks (dropout of adapters among the rest) and held-out accuracy; a stage before it from the run's."""
    seeds: list[int] = []

    class Ranks:
        actors = (None,)

        def __init__(self, cluster: Any, task: str, seed: int, *_: Any):
            seeds.append(seed)

        def call(self, method: str, *arguments: Any) -> list[Any]:
            return [np.zeros(len(arguments[0]))] if method == "logprobs" else [None]

        def stop(self) -> None: ...

    def counted(config: TandemConfig, *_: Any) -> dict[str, float]:
        seeds.append(config.seed)
        return {"accuracy": 0.5, "pairs": 1}

    monkeypatch.setattr("learner.learner_actor.LearnerGroup", Ranks)
    monkeypatch.setattr("controller.pipeline.pair_training.accuracy", counted)
    monkeypatch.setattr("controller.pipeline.pair_training.train_on_pairs", lambda *_: None)
    config = TandemConfig(method="rank", seed=3)
    config.ppo.seed = 7
    runtime: Any = Runtime(config)
    runtime.start, runtime._placement = lambda: None, SimpleNamespace(learner=lambda rank: {})
    pair = ExamplePair(Example([1, 2], [False, True]), Example([1, 3], [False, True]), 1.0)
    context: Any = SimpleNamespace(
        config=config, learner=runtime.learner, checkpoint=str, phase=lambda text: nullcontext(), path="",
        data=Inputs({"completions": [pair], "test_completions": [pair]}), progress=SimpleNamespace(line=print),
    )  # fmt: skip
    preference.run(context)
    assert seeds == [7, 7, 7]  # ranks, the policy's accuracy and SFT's
    with runtime.learner("sft", config, [], []), runtime.learner("of_ones_own", "without one"):
        assert seeds[3:] == [3, 3]


TIE, DECIDED = PreferencePair([1, 2], [1, 3], 0.5), PreferencePair([1, 2], [1, 3], 0.75)


@pytest.mark.parametrize(
    ("items", "of_reward_models", "of_preference"),
    [
        (
            [TIE] * 4,
            "1 usable rows for reward models; found 0, where",
            "2 usable rows for stage preference; found 0, where",
        ),
        ([TIE, DECIDED, TIE], None, "2 usable rows for stage preference; found 1, where"),
        ([DECIDED], None, "2 usable rows for stage preference; found 1$"),
        ([TIE, DECIDED, DECIDED], None, None),
        ([[3.0], [2.0, 4.0], [3.0]], "2 usable .*; found 0, where ties do not count$", "2 usable .*; found 0, where"),
        ([[3.0]], "2 usable rows for reward models; found 1$", "2 usable rows for stage preference; found 1$"),
        ([[3.0], [2.0, 4.0], [3.5]], None, None),
    ],
)
def test_held_out_preferences_without_a_better_text_are_refused(
    items: list[Any], of_reward_models: str | None, of_preference: str | None
) -> None:
    """Else everything trains before `accuracy` has no pair to tell of."""
    config, example = TandemConfig(method="dpo"), Example([1, 2], [False, True])
    is_rated = isinstance(items[0], list)
    texts = [RatedText("a", [1, 2], given) for given in items] if is_rated else items
    completions: list[Any] = [
        RatedExample(example, given) if is_rated else ExamplePair(example, example, given.preference) for given in items
    ]
    trained = [RatedExample(example, [float(number)]) for number in range(4)]
    found = reward_model.problems(config, Inputs({"test": texts}))
    assert (len(found) == 1 and re.search(of_reward_models, found[0])) if of_reward_models else found == []
    found = preference.problems(config, Inputs({"completions": trained, "test_completions": completions}))
    assert (len(found) == 1 and re.search(of_preference, found[0])) if of_preference else found == []
    assert len(preference.problems(config, Inputs({"completions": trained[:1], "test_completions": trained}))) == 1
