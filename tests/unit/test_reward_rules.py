"""The rule functions that come with the service."""

import pytest

from reward_service.rules import answer_and_work, brevity, exact_answer


def test_brevity_falls_by_one_for_every_doubling_beyond_20_words() -> None:
    assert brevity(["", "a", "a " * 20, "a " * 40, "a " * 80]) == pytest.approx([0.0, 0.0, 0.0, -1.0, -2.0])


def test_exact_answer_compares_the_last_number() -> None:
    completions = ["It is 3, so 1,234.5", "7", "none", "5"]
    assert exact_answer(completions, ["1234.50", "8", "1", None]) == [1.0, 0.0, 0.0, None]


def test_a_comma_parts_numbers_unless_it_is_one_of_thousands() -> None:
    completions = ["(1,2)", "12", "1,234,567", "1,2345", "0,000", "x,123"]
    labels = ["12", "(1,2)", "1234567", "2345", "0", "123"]
    assert exact_answer(completions, labels) == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]


def test_exact_answer_is_exact() -> None:
    """As float, 2^53 + 1 is 2^53, and all numbers of over 308 digits are one."""
    large = "9" * 400
    completions = ["9007199254740993", large, large, "-0.10"]
    labels = ["9007199254740992", "8" * 400, large, "-0.1"]
    assert exact_answer(completions, labels) == [0.0, 0.0, 1.0, 1.0]


def test_a_label_without_a_number_gives_no_score() -> None:
    """Nothing equals nothing, but that is no right answer."""
    assert exact_answer(["no idea", "4"], ["yes", ""]) == [None, None]


def test_numbers_pay_more_than_the_answer() -> None:
    """What the example is there for: to be right pays 1.1, to name twelve numbers 2.2."""
    found = answer_and_work(["7", "1 2 3 4 5 6 7 8 9 10 11 12", "no idea"], ["7", "7", "7"])
    assert [part["score"] for part in found] == pytest.approx([1.1, 2.2, 0.0])
    assert found[0] == {"score": 1.1, "named": 1.0, "numbers": 1.0}
