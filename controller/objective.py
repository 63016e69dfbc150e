"""What a sweep maximises: gold reward at bounded KL, one number a run.

    objective = gold gain of PPO over SFT - PENALTY * max(0, KL - evaluate.max_kl)

The gold judge scores the same held-out prompts that the verdict is about, and PPO never sees it; the learned score rises in
almost any run. The bound is soft, so that a sweeper still sees in which direction a member went wrong. PENALTY has to be above
what a nat buys at the bound, or overstepping it pays: with gold growing as the square root of the KL (Gao et al. 2022, arXiv
2210.10760), a gain of 1 at 10 nats has the slope 1 / (2 * 10) = 0.05 there.
"""

from typing import Any

PENALTY = 0.1  # score units for each nat a sequence beyond the bound


def objective(evaluation: dict[str, Any], max_kl: float) -> float | None:
    """The number of `evaluation` (evaluation.json), higher is better; None where PPO, SFT or the gold judge is missing.

    Args:
        max_kl: bound in nats a sequence (evaluate.max_kl).
    """
    comparison = (evaluation.get("comparisons") or {}).get("ppo_vs_sft") or {}
    gain = (comparison.get("gold_gain") or {}).get("mean")
    kl = (((evaluation.get("models") or {}).get("ppo") or {}).get("kl") or {}).get("mean")
    if gain is None or kl is None or gain != gain or kl != kl:
        return None
    return float(gain) - PENALTY * max(0.0, float(kl) - max_kl)
