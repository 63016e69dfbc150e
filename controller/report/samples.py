"""Completions to read: of the judged models on the same prompt, and how they changed while PPO ran."""

from typing import Any

from controller.record.evaluation import judged_name, judged_title
from controller.record.number_text import count, num
from controller.record.reader import Run, number
from controller.report.rendering import absent, esc, section

MAX_PROMPT, MAX_COMPLETION = 160, 700  # characters shown; a prompt keeps its end, a completion its beginning
EACH = 2  # prompts shown for "best", "median" and "worst"


def chosen(run: Run) -> tuple[list[tuple[str, float, dict[str, dict[str, Any]]]], int]:
    """[(why, gain, samples by model)] and the number of prompts chosen from.

    Sorted by the gold gain over SFT: the largest, those in the middle, the smallest. Where there are too few
    prompts for all three, each is shown once.
    """
    third = judged_name(run.evaluation)
    by_prompt: dict[Any, dict[str, dict[str, Any]]] = {}
    for row in run.samples:
        if row.get("stage") == "evaluate" and row.get("model"):
            by_prompt.setdefault(str(row.get("prompt_id")), {})[str(row["model"])] = row  # of two evaluations the later
    ranked = []
    for models in by_prompt.values():
        mine, sft = number(models.get(third, {}).get("gold")), number(models.get("sft", {}).get("gold"))
        if mine is not None and sft is not None:
            ranked.append((mine - sft, models))
    ranked.sort(key=lambda item: -item[0])
    middle = (len(ranked) - EACH) // 2
    places = [("largest gain", i) for i in range(EACH)]
    places += [("median gain", middle + i) for i in range(EACH)]
    places += [("smallest gain", len(ranked) - EACH + i) for i in range(EACH)]
    found: dict[int, str] = {}
    for why, i in places:
        if 0 <= i < len(ranked):
            found.setdefault(i, why)
    return [(why, *ranked[i]) for i, why in sorted(found.items())], len(ranked)


def side_by_side(run: Run) -> str:
    picks, total = chosen(run)
    if not picks:
        text = "No completions of SFT and its successor with a gold score yet: samples.jsonl gets them in stage “evaluate”."
        return section("samples", "The same prompt, model by model", absent(text))
    title, cards = judged_title(run.evaluation), []
    shown = (("base", "Base", "base"), ("sft", "SFT", "sft"), (judged_name(run.evaluation), title, "ppo"))
    for why, gain, models in picks:
        columns = "".join(
            f'<div class="sample"><h4 class="{css}">{esc(label)}</h4>{_text(models[model])}{_scores(models[model])}</div>'
            for model, label, css in shown
            if model in models
        )
        head = f'<h3>{esc(why)} <span class="gain">{num(gain, 2, signed=True)} gold</span></h3>'
        cards.append(f'<article class="card">{head}<div class="samples">{columns}</div></article>')
    intro = (
        f"Not picked by hand: of {count(total, 'prompt')}, sorted by the gold gain of {title} over SFT, the {EACH} with the "
        f"largest gain, the {EACH} in the middle and the {EACH} with the smallest. The prompt is dimmed."
    )
    return section("samples", "The same prompt, model by model", "".join(cards), intro)


def during_ppo(run: Run) -> str:
    by_version: dict[int, list[dict[str, Any]]] = {}
    for row in run.samples:
        step = number(row.get("step"))
        if row.get("stage") == "ppo" and step is not None:
            by_version.setdefault(int(step), []).append(row)
    if not by_version:
        return section(
            "during", f"Before and after, while {run.loop_title} ran", absent("No rollouts in samples.jsonl yet.")
        )
    versions = sorted(by_version)
    shown = sorted({versions[0], versions[len(versions) // 2], versions[-1]})
    columns = "".join(
        f'<div class="sample"><h4>version {version}</h4>'
        + "".join(f'<div class="one">{_text(row)}{_scores(row)}</div>' for row in by_version[version][:4])
        + "</div>"
        for version in shown
    )
    intro = "What was logged at the first, the middle and the last version: the first rollouts of each, in their order."
    body = f'<article class="card"><div class="samples">{columns}</div></article>'
    return section("during", f"Before and after, while {run.loop_title} ran", body, intro)


def _text(row: dict[str, Any]) -> str:
    prompt, completion = str(row.get("prompt") or ""), str(row.get("completion") or "")
    if len(prompt) > MAX_PROMPT:
        prompt = "… " + prompt[-MAX_PROMPT:]
    if len(completion) > MAX_COMPLETION:
        completion = completion[:MAX_COMPLETION] + " …"
    return f'<p class="text"><span class="prompt">{esc(prompt)}</span>{esc(completion)}</p>'


def _scores(row: dict[str, Any]) -> str:
    parts = []
    for name, label in (("gold", "gold"), ("proxy", "learned"), ("vader", "VADER")):
        if name in row:
            parts.append(f'<span>{label} <b class="{name}">{num(row[name], 2, signed=True)}</b></span>')
    if number(row.get("kl")) is not None:
        parts.append(f"<span>KL <b>{num(row['kl'], 1)}</b></span>")
    if number(row.get("tokens")) is not None:
        parts.append(f"<span><b>{num(row['tokens'], 0)}</b> tokens</span>")
    if row.get("eos") is False:
        parts.append('<span class="cut">cut off</span>')
    return f'<p class="scores">{"".join(parts)}</p>'
