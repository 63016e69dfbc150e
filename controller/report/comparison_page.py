"""Several runs on one page: `python -m controller.report RUN RUN ...`, or the directory of a sweep.

    directories -> members_of -> [Member] -> best, table, frontier, parallel coordinates, curves, alarms -> one page

What tells the members apart is read from their configurations: the keys whose values differ.
"""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.files.durable import replace_text
from controller.alarms import rules
from controller.record.evaluation import PENALTY
from controller.record.number_text import bounds, count, duration, num
from controller.record.reader import Run, number
from controller.report import comparison_charts
from controller.report.members import Member, best_of
from controller.report.rendering import document, esc, interval, section, table


def render_comparison(members: list[Member], output: str | Path) -> Path:
    """Write the page and return its path."""
    target = Path(output)
    replace_text(target, page(members, target.resolve().parent))
    return target


def page(members: list[Member], folder: Path) -> str:
    title = folder.name if all(member.run.path.parent == folder for member in members) else "Runs compared"
    parts = [
        _best(members),
        _table(members, folder),
        comparison_charts.frontier(members),
        comparison_charts.parallel(members),
        comparison_charts.curves(members),
        _alarms(members),
        _commands(members),
    ]
    anchors = ("members", "frontier", "parallel", "curves", "alarms", "commands")
    contents = [(anchor, anchor.capitalize()) for anchor in anchors]
    return document("Tandem sweep", title, _facts(members), contents, "".join(parts))


def _facts(members: list[Member]) -> str:
    done = sum(member.state == "done" for member in members)
    keys = sorted({key for member in members for key in member.settings})
    differ = f" · they differ in {', '.join(keys)}" if keys else ""
    return f"{count(len(members), 'run')}, {done} done{differ}"


def _best(members: list[Member]) -> str:
    best = best_of(members)
    if best is None:
        text = "No member has been evaluated with a gold judge yet, so none is the best."
        return (
            f'<section id="verdict" class="verdict none"><p class="word">No best member</p><p>{esc(text)}</p></section>'
        )
    passed = (best.run.evaluation.get("verdict") or {}).get("passed")
    gain, low, high = bounds(best.comparison("gold_gain"))
    kl = bounds(best.evaluated("kl"))[0]
    sentence = (
        f"{best.label}: gold gain {num(gain, 2, signed=True)} [{num(low, 2, signed=True)}, {num(high, 2, signed=True)}] at "
        f"a KL of {num(kl, 1)} nats a sequence."
    )
    overlap = [
        member.label
        for member in members
        if member is not best
        and (other := bounds(member.comparison("gold_gain"))[2]) is not None
        and other > (low or 0.0)
    ]
    caution = ""
    if overlap and low is not None:
        caution = (
            f"The intervals of {count(len(overlap), 'other member')} overlap with it: on "
            f"{num(best.evaluated('prompts'), 0)} prompts the difference to them may be chance."
        )
    kind, word = ("good", "Best member") if passed else ("unsure", "Best member, which did not pass its own verdict")
    return (
        f'<section id="verdict" class="verdict {kind}"><p class="word">{word}</p><p class="sentence">{esc(sentence)}</p>'
        f'<p class="note">{esc(caution)}</p><pre>{esc(shlex.join(best.command))}</pre></section>'
    )


def _table(members: list[Member], folder: Path) -> str:
    keys = sorted({key for member in members for key in member.settings})
    short = _short(keys)
    rows = []
    for place, member in enumerate(members):
        verdict = member.run.evaluation.get("verdict")
        passed = (
            ""
            if verdict is None
            else '<span class="yes">✓</span>'
            if verdict.get("passed")
            else '<span class="no">✗</span>'
        )
        report = member.run.path / "report.html"
        numbered = re.match(r"(\d+)-", member.label) if keys else None  # what it sets has columns of its own
        shown = f"#{numbered[1]}" if numbered else member.label
        name = f'<b>{place + 1}</b> <span title="{esc(member.label)}">{esc(shown)}</span>'
        link = f'<a href="{esc(os.path.relpath(report, folder))}">{name}</a>' if report.exists() else name
        ratio = number(member.comparison("length_ratio"))
        rows.append(
            [
                f'<i class="swatch {comparison_charts.colour(place)}"></i>{link}',
                esc(member.state),
                *(esc(_shown(member.settings.get(key))) for key in keys),
                f"<b>{num(member.objective, 3, signed=True)}</b>",
                interval(member.comparison("gold_gain"), 2, signed=True),
                interval(member.comparison("proxy_gain"), 2, signed=True),
                interval(member.comparison("win_rate"), 0, share=True),
                interval(member.evaluated("kl"), 1),
                "–" if ratio is None else f"× {num(ratio, 2)}",
                passed,
                duration(_wall_s(member.run)),
            ]
        )
    head = ["Member", "State", *(f'<abbr title="{esc(key)}">{esc(short[key])}</abbr>' for key in keys)]
    head += ["Objective", "Gold gain", "Learned gain", "Win rate", "KL, nats", "Length", "Passed", "Time"]
    intro = (
        f"Objective: gold gain over SFT, less {PENALTY:g} for each nat of KL beyond evaluate.max_kl. Brackets are "
        "95% intervals over prompts; they say nothing about other seeds."
    )
    failed = "".join(
        f"<li><b>{place + 1}</b> {esc(member.state)}: {esc(member.error[:300])}</li>"
        for place, member in enumerate(members)
        if member.error
    )
    body = table(head, rows, "members", text_columns=2) + (f'<ul class="gaps">{failed}</ul>' if failed else "")
    return section("members", "Members, the best first", body, intro)


def _wall_s(run: Run) -> float | None:
    return max((number(row.get("end_s")) or 0.0 for row in run.phases), default=None)


def _short(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, and as many more as it takes to tell them apart."""
    out = {}
    for key in keys:
        parts = key.split(".")
        tails = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        out[key] = next(
            tail for tail in tails if sum(k == tail or k.endswith(f".{tail}") for k in keys) == 1 or tail == key
        )
    return out


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _alarms(members: list[Member]) -> str:
    fired: dict[tuple[bool, str, str], list[int]] = {}
    for place, member in enumerate(members):
        for alarm in rules.evaluate(member.run)[0]:
            fired.setdefault((alarm.severity != "alarm", alarm.title, alarm.advice), []).append(place + 1)
    if not fired:
        return section("alarms", "Alarms", '<p class="quiet">✓ No alarm in any member.</p>')
    rows = [
        [f"{'ℹ' if note else '⚠'} {esc(title)}", ", ".join(map(str, places)), esc(advice)]
        for (note, title, advice), places in sorted(fired.items())
    ]
    body = table(("Alarm", "Members", "Try"), rows, "alarm-list", text_columns=3)
    return section(
        "alarms", "Alarms", body, "Members by their place in the table. What each means is in their own reports."
    )


def _commands(members: list[Member]) -> str:
    lines = "".join(f"<p>{esc(member.label)}</p><pre>{esc(shlex.join(member.command))}</pre>" for member in members)
    paths = shlex.join(["python", "-m", "controller.report", *(str(member.run.path) for member in members)])
    return section(
        "commands", "Each member alone, and this page again", f"{lines}<p>This page:</p><pre>{esc(paths)}</pre>"
    )
