"""What evaluation.json says of the model that was judged against SFT, under the name of its method."""

from typing import Any

from contracts.methods import method_title


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
