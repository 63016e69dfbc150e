"""The verdict on a run: is its policy better than SFT, by limits fixed before the run, and what does it show if not?

A gain counts on the gold judge, which no training saw; the learned ("proxy") score rises in almost any run. It counts
only at about SFT's length, with completions that end, and near the reference policy: stopping early can please a judge.
"""

import math
from typing import Any

from contracts.config import EvaluateConfig
from controller.record.number_text import bounds

STATES = {"passed": "Passed", "failed": "Not passed", "inconclusive": "Inconclusive"}


def _number(value: Any) -> float:
    """A measured number, or NaN for one that is absent: comparisons with NaN are false, so it passes no check."""
    return float("nan") if value is None else float(value)


def _interval(values: dict[str, Any] | None) -> tuple[float, float, float]:
    mean, low, high = bounds(values)
    return _number(mean), _number(low), _number(high)


def _direction(interval: tuple[float, float, float]) -> str:
    _, low, high = interval
    if math.isnan(low) or math.isnan(high):
        return "unknown"
    return "rose" if low > 0 else "fell" if high < 0 else "unclear"


def _shown(interval: tuple[float, float, float]) -> str:
    mean, low, high = interval
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _check(name: str, value: float, side: str, limit: float, passed: bool) -> dict[str, Any]:
    """`side`: where the value has to be, as `above 0.0`."""
    return {"name": name, "value": value, "side": side, "limit": limit, "passed": bool(passed)}


def _limits(
    length_change: float, eos_share: float, kl: float, config: EvaluateConfig
) -> list[tuple[dict[str, Any], str]]:
    """The checks apart from the gold score, each with the clause that speaks against a run where it fails."""
    most, least, max_kl = config.max_length_change, config.min_eos_share, config.max_kl
    way = "shorter" if length_change < 0 else "longer"
    rows = [
        (
            _check("length change from SFT, relative", length_change, "within ±", most, abs(length_change) <= most),
            f"completions got {abs(length_change):.1%} {way} than SFT's (limit {most:.1%})",
            "the change of length is not known",
        ),
        (
            _check("EOS share of the completions", eos_share, "at least", least, eos_share >= least),
            f"only {eos_share:.1%} of the completions end with EOS (limit {least:.1%})",
            "the EOS share is not known",
        ),
        (
            _check("KL from the reference, nats a sequence", kl, "at most", max_kl, kl <= max_kl),
            f"the KL is {kl:.1f} nats a sequence (limit {max_kl:.1f})",
            "the KL is not known",
        ),
    ]
    return [(check, unknown if math.isnan(check["value"]) else clause) for check, clause, unknown in rows]


def _finding(
    gold: tuple[float, float, float], proxy: tuple[float, float, float], reservations: list[str], is_known: bool
) -> tuple[str, str]:
    """The state, and why; `is_known`: some of the reservations are of what was measured."""
    proxy_direction = _direction(proxy)
    learned = {
        "rose": f"the learned score rose ({_shown(proxy)})",
        "fell": f"the learned score fell ({_shown(proxy)})",
        "unclear": f"the learned score did not clearly change ({_shown(proxy)})",
        "unknown": "the change of the learned score is not known",
    }[proxy_direction]
    against = " and ".join(reservations)
    besides = f"; besides, {against}" if reservations else ""
    match _direction(gold):
        case "rose" if not reservations:
            within = "within the limits of length, EOS share and KL"
            return "passed", f"the gold score rose over SFT's ({_shown(gold)}) {within}, and {learned}."
        case "rose":
            state = "failed" if is_known else "inconclusive"
            return state, f"the gold score rose over SFT's ({_shown(gold)}), but {against}."
        case "fell" if proxy_direction == "rose":
            return "failed", f"{learned} while the gold score fell below SFT's ({_shown(gold)}){besides}."
        case "fell":
            return "failed", f"the gold score fell below SFT's ({_shown(gold)}), and {learned}{besides}."
        case "unclear" if proxy_direction == "rose":
            return "failed", f"{learned}, but the gold score did not clearly change ({_shown(gold)}){besides}."
        case "unclear":
            return "inconclusive", f"the gold score did not clearly change ({_shown(gold)}), and {learned}{besides}."
    return "inconclusive", f"the gold gain over SFT is not known, and {learned}{besides}."


def verdict(model: dict[str, Any], against_sft: dict[str, Any], config: EvaluateConfig) -> dict[str, Any]:
    """Judge a policy by the limits in `config`.

    Args:
        model: its "kl" from SFT as {"mean", "low", "high"} in nats a sequence and its "eos_share".
        against_sft: "gold_gain" and "proxy_gain" as {"mean", "low", "high"} and "length_ratio".
        config: `max_length_change` (relative), `min_eos_share` and `max_kl`.

    Returns:
        {"passed", "state" (passed | failed | inconclusive), "text" (one sentence), "checks": [{"name", "value", "side",
        "limit", "passed"}]}. What was not measured (absent, None or NaN) has the value NaN and does not pass.
    """
    gold, proxy = _interval(against_sft.get("gold_gain")), _interval(against_sft.get("proxy_gain"))
    length_change = _number(against_sft.get("length_ratio")) - 1.0
    eos_share, (kl, _, _) = _number(model.get("eos_share")), _interval(model.get("kl"))
    limits = _limits(length_change, eos_share, kl, config)
    gained = _check("gold gain over SFT, lower end of its 95% interval", gold[1], "above", 0.0, gold[1] > 0)
    checks = [gained, *(check for check, _ in limits)]
    reservations = [clause for check, clause in limits if not check["passed"]]
    is_known = any(not check["passed"] and not math.isnan(check["value"]) for check, _ in limits)
    state, reason = _finding(gold, proxy, reservations, is_known)
    passed, text = all(check["passed"] for check in checks), f"{STATES[state]}: {reason}"
    return {"passed": passed, "state": state, "text": text, "checks": checks}
