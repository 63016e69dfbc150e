"""The table that a run ends with."""

from pathlib import Path
from typing import Any

from contracts.config import TandemConfig
from contracts.stages import find_stage
from controller.record.evaluation import against_sft, judged_model, judged_title, measured_passes, pass_title


def summary_rows(config: TandemConfig, results: dict[str, Any], report: Path) -> list[tuple[str, str]]:
    """(name, value) rows: each stage's result in words, the verdict, and where everything lies."""
    rows = []
    for name, metrics in results.items():
        if metrics.get("eval_loss") is not None:
            before, after = metrics["eval_loss_before"], metrics["eval_loss"]
            stage = find_stage(name)
            title = stage.title if stage else name
            rows.append((title, f"held-out loss {before:.2f} -> {after:.2f} nats a token"))
        if "accuracy" in metrics:
            text = f"{metrics['accuracy']:.1%} [{metrics['accuracy_low']:.1%}, {metrics['accuracy_high']:.1%}]"
            text += f" of {metrics['pairs']} held-out pairs"
            if "vader_accuracy" in metrics:
                text += f"; VADER's rules {metrics['vader_accuracy']:.1%}"
            if "sft_accuracy" in metrics:
                text += f"; SFT {metrics['sft_accuracy']:.1%}"
            kind, _, which = name.partition("/")
            rows.append((f"reward model ({which})" if which else f"stage {kind}", text))
    rows += _evaluation_rows(results.get("evaluate", {}))
    rows += [("run directory", config.run_dir), ("report", str(report))]
    return rows


def _evaluation_rows(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    comparison, model, name = against_sft(evaluation), judged_model(evaluation), judged_title(evaluation)
    for key in measured_passes(model):
        level, gain = model[key], comparison.get(f"{key}_gain")
        against = f"; against SFT {gain['mean']:+.1%} [{gain['low']:+.1%}, {gain['high']:+.1%}]" if gain else ""
        rows.append((pass_title(key), f"{level['mean']:.1%} [{level['low']:.1%}, {level['high']:.1%}]{against}"))
    titles = {"gold": f"gold reward, {name} - SFT", "proxy": f"learned score, {name} - SFT", "vader": "VADER"}
    for judge, title in titles.items():
        gain = comparison.get(f"{judge}_gain")
        if gain:
            rows.append((title, f"{gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"))
    before = ((evaluation.get("models") or {}).get("sft") or {}).get("proxy")
    if before and "proxy" in model:  # of right and wrong answers: the accuracy
        shown = [f"{score['mean']:.2f} [{score['low']:.2f}, {score['high']:.2f}]" for score in (before, model["proxy"])]
        rows.append((f"learned score of SFT, of {name}", ", ".join(shown)))
    if comparison:
        win = comparison["win_rate"]
        rows.append(("win rate against SFT", f"{win['mean']:.0%} [{win['low']:.0%}, {win['high']:.0%}]"))
        rows.append(("length against SFT", f"{comparison['length_ratio']:.0%}"))
        rows.append(("KL, EOS share", f"{model['kl']['mean']:.1f} nats a sequence, {model['eos_share']:.0%}"))
    if "verdict" in evaluation:
        rows.append(("verdict", evaluation["verdict"]["text"]))
    return rows
