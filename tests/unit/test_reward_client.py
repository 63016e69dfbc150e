"""Retries: what is sent again, when, and what is left after the budget."""

import time

import pytest

from contracts.records import Score
from reward_service import client
from reward_service.client import Reply, wished_pause_s, with_retries


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr(client.time, "sleep", pauses.append)
    return pauses


def test_only_what_failed_is_sent_again_and_final_errors_are_not() -> None:
    tried: list[list[int]] = []

    def attempt(rows: list[int], left_s: float) -> Reply:
        tried.append(rows)
        errors = {1: "unavailable: ActorDiedError", 2: "poison: ValueError"} if len(tried) < 3 else {2: "poison"}
        return Reply([Score(None, errors[r]) if r in errors else Score(float(r)) for r in rows])

    scores = with_retries(4, attempt, 60)
    assert tried == [[0, 1, 2, 3], [1], [1]]
    assert [s.value for s in scores] == [0.0, 1.0, None, 3.0]
    assert scores[2].error == "poison: ValueError"


@pytest.mark.parametrize("code", ["timeout", "overloaded", "unavailable"])
def test_after_the_budget_an_item_carries_its_last_error(code: str) -> None:
    start = time.monotonic()
    scores = with_retries(2, lambda rows, left_s: Reply([Score(None, f"{code}: x") for _ in rows]), 0.0)
    assert time.monotonic() - start < 1
    assert [(s.value, s.error) for s in scores] == [(None, f"{code}: x")] * 2


def test_pauses_grow_with_jitter_and_honour_the_service(no_sleep: list[float]) -> None:
    asked = iter([0.0, 0.0, 0.0, 7.0, 0.0])

    def attempt(rows: list[int], left_s: float) -> Reply:
        retry_after = next(asked, None)
        done = retry_after is None
        return Reply([Score(1.0) if done else Score(None, "overloaded")] * len(rows), retry_after or 0.0)

    with_retries(1, attempt, 60)
    assert len(no_sleep) == 5
    for pause, longest in zip(no_sleep[:3], (0.2, 0.4, 0.8), strict=True):
        assert longest / 2 <= pause <= longest
    assert no_sleep[3] == 7.0


def test_a_pause_that_outlasts_the_budget_is_not_begun(no_sleep: list[float]) -> None:
    scores = with_retries(1, lambda rows, left_s: Reply([Score(None, "overloaded")], retry_after_s=90), 60)
    assert scores[0].error == "overloaded"
    assert no_sleep == []


def test_nothing_to_score_asks_nobody() -> None:
    assert with_retries(0, lambda rows, left_s: Reply([]), 1) == []


def test_a_pause_is_wished_in_seconds() -> None:
    assert [wished_pause_s(text) for text in ("7", "0", "", "²", "-1", "Wed, 21 Oct 2026 07:28:00 GMT")] == [
        7,
        0,
        0,
        0,
        0,
        0,
    ]
