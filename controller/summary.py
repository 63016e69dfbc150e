"""The table that a run ends with."""

from pathlib import Path
from typing import Any

from contracts.config import TandemConfig


def summary_rows(config: TandemConfig, results: dict[str, Any], report: Path) -> list[tuple[str, str]]:
    """(name, value) rows: each stage's result in words, the verdict, and where everything lies."""
    rows = []
    for name, metrics in results.items():
        if name == "sft" and metrics.get("eval_loss") is not None:
            before, after = metrics["eval_loss_before"], metrics["eval_loss"]
            rows.append(("SFT", f"held-out loss {before:.2f} -> {after:.2f} nats a token"))
        if name.startswith("reward_model/") and "accuracy" in metrics:
            text = f"{metrics['accuracy']:.1%} [{metrics['accuracy_low']:.1%}, {metrics['accuracy_high']:.1%}]"
            text += f" of {metrics['pairs']} held-out pairs"
            if "vader_accuracy" in metrics:
                text += f"; VADER's rules {metrics['vader_accuracy']:.1%}"
            rows.append((f"reward model ({name.split('/')[1]})", text))
    rows += _evaluation_rows(results.get("evaluate", {}))
    rows += [("run directory", config.run_dir), ("report", str(report))]
    return rows


def _evaluation_rows(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    comparison = evaluation.get("comparisons", {}).get("ppo_vs_sft", {})
    for judge, title in (("gold", "gold reward, PPO - SFT"), ("proxy", "learned score, PPO - SFT"), ("vader", "VADER")):
        gain = comparison.get(f"{judge}_gain")
        if gain:
            rows.append((title, f"{gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"))
    if comparison:
        win, ppo = comparison["win_rate"], evaluation["models"]["ppo"]
        rows.append(("win rate against SFT", f"{win['mean']:.0%} [{win['low']:.0%}, {win['high']:.0%}]"))
        rows.append(("length against SFT", f"{comparison['length_ratio']:.0%}"))
        rows.append(("KL, EOS share", f"{ppo['kl']['mean']:.1f} nats a sequence, {ppo['eos_share']:.0%}"))
    if "verdict" in evaluation:
        rows.append(("verdict", evaluation["verdict"]["text"]))
    return rows
