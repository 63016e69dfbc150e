"""What evaluation.json says of the model that was judged against SFT, and what a sweep maximises: gold reward at bounded KL,
one number a run.

    objective = gold gain over SFT - PENALTY * max(0, KL - evaluate.max_kl)

The gold judge scores the same held-out prompts that the verdict is about, and no training sees it; the learned score rises
in almost any run. The bound is soft, so that a sweeper still sees in which direction a member went wrong. PENALTY has to be
above what a nat buys at the bound, or overstepping it pays: with gold growing as the square root of the KL (Gao et al. 2022,
arXiv 2210.10760), a gain of 1 at 10 nats has the slope 1 / (2 * 10) = 0.05 there.
"""

import re
from typing import Any

from contracts.methods import method_title
from controller.record.number_text import number

PENALTY = 0.1  # score units for each nat a sequence beyond the bound


def judged_name(evaluation: dict[str, Any]) -> str:
    """Of the third model, beside base and SFT. Runs that did not write their method are of PPO."""
    return str(evaluation.get("method") or "ppo")


def judged_title(evaluation: dict[str, Any]) -> str:
    """As a reader knows the method: PPO, DPO, ..."""
    return str(evaluation.get("title") or method_title(judged_name(evaluation), None))


def judged_model(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Its row of `models`; empty where there is none."""
    return (evaluation.get("models") or {}).get(judged_name(evaluation)) or {}


def against_sft(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Its comparison with SFT; empty where there is none."""
    return (evaluation.get("comparisons") or {}).get(f"{judged_name(evaluation)}_vs_sft") or {}


def measured_passes(model: dict[str, Any]) -> list[str]:
    """Keys of pass@k in a row of `models`, pass_at_K and pass_at_K/SOURCE, in the order of a table: all prompts first."""
    found = [match for name in model if (match := re.fullmatch(r"pass_at_(\d+)(/.*)?", name, re.DOTALL))]
    return [match[0] for match in sorted(found, key=lambda match: (match[2] or "", int(match[1])))]


def pass_title(name: str) -> str:
    """pass_at_4/easy as a reader knows it: pass@4, easy."""
    k, _, source = name.removeprefix("pass_at_").partition("/")
    return f"pass@{k}, {source}" if source else f"pass@{k}"


def verdict_state(evaluation: dict[str, Any]) -> str:
    """passed | failed | inconclusive, or empty where nothing was judged. A file from before `state` says it by `passed` and
    the first word of its text."""
    found = evaluation.get("verdict") or {}
    if not found:
        return ""
    old = "inconclusive" if str(found.get("text")).lower().startswith("inconclusive") else "failed"
    return str(found.get("state") or ("passed" if found.get("passed") else old))


def verdict_reason(evaluation: dict[str, Any]) -> str:
    """Its sentence without the word that says the state."""
    text = str((evaluation.get("verdict") or {}).get("text") or "").strip()
    head, colon, reason = text.partition(": ")
    reason = reason if colon and head in ("Passed", "Not passed", "Inconclusive") else text
    return reason[:1].upper() + reason[1:]


def evaluation_metrics(evaluation: dict[str, Any], max_kl: float) -> dict[str, float]:
    """What is known of the judged model against SFT as flat metrics: gold_gain, proxy_gain, win_rate, kl, length_ratio,
    objective, pass_at_<k>.

    Args:
        evaluation: the content of evaluation.json.
        max_kl: bound in nats a sequence (evaluate.max_kl).
    """
    comparison, model = against_sft(evaluation), judged_model(evaluation)
    found = {name: (comparison.get(name) or {}).get("mean") for name in ("gold_gain", "proxy_gain", "win_rate")}
    found |= {"kl": (model.get("kl") or {}).get("mean"), "length_ratio": comparison.get("length_ratio")}
    found |= {name: (model.get(name) or {}).get("mean") for name in measured_passes(model) if "/" not in name}
    known = {name: value for name, given in found.items() if (value := number(given)) is not None}
    if "gold_gain" in known and "kl" in known:
        known["objective"] = known["gold_gain"] - PENALTY * max(0.0, known["kl"] - max_kl)
    return known


def objective(evaluation: dict[str, Any], max_kl: float) -> float | None:
    """Higher is better; None where its model, SFT or the gold judge is missing. Arguments as `evaluation_metrics`."""
    return evaluation_metrics(evaluation, max_kl).get("objective")
