"""One run of each kind, and what the verdict says of it."""

import math
from typing import Any

import pytest

from contracts.config import EvaluateConfig
from controller.evaluation.verdict import verdict

ROSE = {"mean": 0.3, "low": 0.1, "high": 0.5}
UNCLEAR = {"mean": 0.1, "low": -0.1, "high": 0.3}
FELL = {"mean": -0.3, "low": -0.5, "high": -0.1}


def judge(gold: Any, proxy: Any, length_ratio: Any = 1.1, eos_share: Any = 0.95, kl: Any = 4.0) -> dict[str, Any]:
    model = {"eos_share": eos_share, "kl": {"mean": kl, "low": kl, "high": kl}}
    against_sft = {"gold_gain": gold, "proxy_gain": proxy, "length_ratio": length_ratio}
    return verdict(model, against_sft, EvaluateConfig(max_length_change=0.25, min_eos_share=0.9, max_kl=10.0))


def passed(result: dict[str, Any]) -> list[bool]:
    return [check["passed"] for check in result["checks"]]


@pytest.mark.parametrize(
    ("gold", "proxy", "text"),
    [
        (
            ROSE,
            ROSE,
            "Passed: the gold score rose over SFT's (+0.300 [+0.100, +0.500]) within the limits of length, EOS share "
            "and KL, and the learned score rose (+0.300 [+0.100, +0.500]).",
        ),
        (
            UNCLEAR,
            ROSE,
            "Not passed: the learned score rose (+0.300 [+0.100, +0.500]), but the gold score did not clearly change "
            "(+0.100 [-0.100, +0.300]).",
        ),
        (
            FELL,
            ROSE,
            "Not passed: the learned score rose (+0.300 [+0.100, +0.500]) while the gold score fell below SFT's "
            "(-0.300 [-0.500, -0.100]).",
        ),
        (
            FELL,
            FELL,
            "Not passed: the gold score fell below SFT's (-0.300 [-0.500, -0.100]), and the learned score fell "
            "(-0.300 [-0.500, -0.100]).",
        ),
        (
            UNCLEAR,
            UNCLEAR,
            "Inconclusive: the gold score did not clearly change (+0.100 [-0.100, +0.300]), and the learned score did "
            "not clearly change (+0.100 [-0.100, +0.300]).",
        ),
        (
            None,
            ROSE,
            "Inconclusive: the gold gain over SFT is not known, and the learned score rose (+0.300 [+0.100, +0.500]).",
        ),
    ],
    ids=["passed", "proxy only", "exploited", "both fell", "inconclusive", "no gold"],
)
def test_text_of_each_kind_of_run(gold, proxy, text):
    result = judge(gold, proxy)
    assert result["text"] == text
    assert result["passed"] is text.startswith("Passed")
    assert result["state"] == {"Passed": "passed", "Not passed": "failed"}.get(text.split(":")[0], "inconclusive")
    assert passed(result) == [gold is ROSE, True, True, True]


def test_gold_that_rose_by_stopping_early_does_not_pass():
    result = judge(ROSE, ROSE, length_ratio=0.54)
    assert not result["passed"]
    assert passed(result) == [True, False, True, True]
    assert result["text"] == (
        "Not passed: the gold score rose over SFT's (+0.300 [+0.100, +0.500]), but completions got 46.0% shorter than "
        "SFT's (limit 25.0%)."
    )


def test_every_reservation_is_named():
    result = judge(ROSE, ROSE, length_ratio=1.5, eos_share=0.8, kl=12.0)
    assert passed(result) == [True, False, False, False]
    assert result["text"].endswith(
        "but completions got 50.0% longer than SFT's (limit 25.0%) and only 80.0% of the completions end with EOS "
        "(limit 90.0%) and the KL is 12.0 nats a sequence (limit 10.0)."
    )


def test_reservations_are_named_where_gold_did_not_rise_too():
    text = judge(UNCLEAR, ROSE, length_ratio=0.5)["text"]
    assert text.endswith("; besides, completions got 50.0% shorter than SFT's (limit 25.0%).")


def test_checks_hold_values_and_limits():
    checks = judge(ROSE, ROSE, length_ratio=0.75, eos_share=0.9, kl=10.0)["checks"]
    assert [check["side"] for check in checks] == ["above", "within ±", "at least", "at most"]
    assert [check["limit"] for check in checks] == [0.0, 0.25, 0.9, 10.0]
    assert [check["value"] for check in checks] == [0.1, -0.25, 0.9, 10.0]
    assert all(check["passed"] for check in checks)  # each at its limit


def test_an_interval_that_touches_zero_is_not_above_it():
    assert passed(judge({"mean": 0.1, "low": 0.0, "high": 0.2}, ROSE))[0] is False


@pytest.mark.parametrize("absent", [None, math.nan])
def test_what_was_not_measured_does_not_pass(absent):
    result = judge({"mean": 1.0, "low": absent, "high": absent}, None, length_ratio=absent, eos_share=absent, kl=absent)
    assert passed(result) == [False, False, False, False]
    assert result["text"] == (
        "Inconclusive: the gold gain over SFT is not known, and the change of the learned score is not known; besides, "
        "the change of length is not known and the EOS share is not known and the KL is not known."
    )


def test_a_rise_whose_kl_is_not_known_is_inconclusive() -> None:
    """Samples at another temperature tell no KL; what was measured and is beyond its limit does count against it."""
    found = judge(ROSE, ROSE, kl=math.nan)
    assert (found["state"], found["passed"]) == ("inconclusive", False)
    assert found["text"] == (
        "Inconclusive: the gold score rose over SFT's (+0.300 [+0.100, +0.500]), but the KL is not known."
    )
    assert judge(ROSE, ROSE, length_ratio=2.0, kl=math.nan)["state"] == "failed"
