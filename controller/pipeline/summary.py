"""The table that a run ends with."""

from pathlib import Path
from typing import Any

from contracts.config import TandemConfig
from contracts.stages import find_stage
from controller.record.evaluation import against_sft, judged_model, judged_title, measured_passes, pass_title
from controller.record.number_text import MISSING, bounds, number


def summary_rows(config: TandemConfig, results: dict[str, Any], report: Path) -> list[tuple[str, str]]:
    """(name, value) rows: each stage's result in words, the verdict, and where everything lies."""
    rows = []
    for name, metrics in results.items():
        if metrics.get("eval_loss") is not None:
            before, after = (_shown(metrics[name], ".2f") for name in ("eval_loss_before", "eval_loss"))
            stage = find_stage(name)
            title = stage.title if stage else name
            rows.append((title, f"held-out loss {before} -> {after} nats a token"))
        if "accuracy" in metrics:
            accuracy = {"mean": metrics["accuracy"], "low": metrics["accuracy_low"], "high": metrics["accuracy_high"]}
            text = f"{_interval(accuracy, '.1%')} of {metrics['pairs']} held-out pairs"
            if "vader_accuracy" in metrics:
                text += f"; VADER's rules {_shown(metrics['vader_accuracy'], '.1%')}"
            if "sft_accuracy" in metrics:
                text += f"; SFT {_shown(metrics['sft_accuracy'], '.1%')}"
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
        against = f"; against SFT {_interval(gain, '+.1%')}" if gain else ""
        rows.append((pass_title(key), f"{_interval(level, '.1%')}{against}"))
    titles = {"gold": f"gold reward, {name} - SFT", "proxy": f"learned score, {name} - SFT", "vader": "VADER"}
    for judge, title in titles.items():
        gain = comparison.get(f"{judge}_gain")
        if gain:
            rows.append((title, _interval(gain, "+.2f")))
    before = ((evaluation.get("models") or {}).get("sft") or {}).get("proxy")
    if before and "proxy" in model:  # of right and wrong answers: the accuracy
        shown = ", ".join(_interval(score, ".2f") for score in (before, model["proxy"]))
        rows.append((f"learned score of SFT, of {name}", shown))
    if comparison:
        rows.append(("win rate against SFT", _interval(comparison["win_rate"], ".0%")))
        rows.append(("length against SFT", _shown(comparison["length_ratio"], ".0%")))
        kl, ended = _shown(bounds(model["kl"])[0], ".1f"), _shown(model["eos_share"], ".0%")
        rows.append(("KL, EOS share", f"{kl} nats a sequence, {ended}"))
    if "verdict" in evaluation:
        rows.append(("verdict", evaluation["verdict"]["text"]))
    return rows


def _shown(value: Any, form: str) -> str:
    known = number(value)
    return MISSING if known is None else f"{known:{form}}"


def _interval(values: dict[str, Any], form: str) -> str:
    mean, low, high = (_shown(value, form) for value in bounds(values))
    return f"{mean} [{low}, {high}]"
