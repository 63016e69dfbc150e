"""Which texts a supervised stage holds out."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from contracts.config import TandemConfig
from contracts.records import Example
from controller.data.inputs import Inputs
from controller.stages import filtered_sft, sft


class Taken(Exception):
    """What the learner would have got."""


def divided(texts: list[Example], ranks: int = 1) -> tuple[list[Example], list[Example]]:
    config = TandemConfig()
    config.cluster.num_learner_ranks = ranks

    @contextmanager
    def learner(task: str, config: TandemConfig, trained: list[Example], held_out: list[Example]) -> Any:
        raise Taken(trained, held_out)
        yield

    with pytest.raises(Taken) as taken:
        sft.train_supervised(SimpleNamespace(learner=learner), "SFT", config, texts)  # type: ignore[arg-type]
    trained, held_out = taken.value.args
    return trained, held_out


def text(number: int) -> Example:
    return Example([number, 2], [False, True])


@pytest.mark.parametrize("copies", [1, 2, 10])
def test_a_text_stands_on_one_side_alone_and_a_twentieth_is_held_out(copies: int) -> None:
    """Copies, as a chosen side has in several pairs, stay together; none is lost."""
    trained, held_out = divided([text(number) for number in range(100, 300)] * copies)
    assert len(trained) + len(held_out) == 200 * copies
    sides = [{tuple(one.token_ids) for one in side} for side in (trained, held_out)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 10


@pytest.mark.parametrize(
    ("count", "ranks", "parts"), [(2, 2, 1), (255, 1, 1), (600, 1, 2), (600, 400, 1), (1100, 4, 4)]
)
def test_held_out_texts_are_asked_for_some_at_a_time(count: int, ranks: int, parts: int) -> None:
    """All of them once, and an example for each rank in every call."""
    asked: list[tuple[int, int]] = []

    def call(method: str, start: int, stop: int) -> list[tuple[float, int]]:
        asked.append((start, stop))
        return [(2.0 * (stop - start), stop - start)]

    group: Any = SimpleNamespace(actors=[None] * ranks, call=call)
    assert sft._held_out_loss(group, count) == {"sft/eval_loss": 2.0}
    assert [row for start, stop in asked for row in range(start, stop)] == list(range(count))
    assert len(asked) == parts
    assert min(stop - start for start, stop in asked) >= ranks


def test_every_rank_has_a_text_on_each_side() -> None:
    trained, held_out = divided([*[text(5)] * 20, text(6), text(7), text(8)], ranks=2)
    assert len({one.token_ids[0] for one in trained}) >= 2
    assert len({one.token_ids[0] for one in held_out}) == 2


def test_too_few_different_texts_are_refused() -> None:
    config, same = TandemConfig(), [text(5)] * 50
    assert "found 1 usable" in sft.problems(config, Inputs({"sft": same}))[0]
    assert "leaves 1" in filtered_sft.problems(config, Inputs({"best_sft": same}))[0]
    assert sft.problems(config, Inputs({"sft": [text(5), text(6)]})) == []
