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

from markupsafe import Markup

from common.files.durable import replace_text
from controller.alarms import rules
from controller.record.evaluation import PENALTY, verdict_state
from controller.record.number_text import bounds, count, num, number
from controller.report import comparison_charts
from controller.report.comparison_charts import COMPARISON
from controller.report.members import Member, best_of, settings_that_differ
from controller.report.rendering import links
from controller.report.run_page import PAGE
from controller.report.svg import colour

CONTENTS = links("members", "frontier", "parallel", "curves", "alarms", "commands")


def render_comparison(members: list[Member], output: str | Path) -> Path:
    """Write the page and return its path."""
    target = Path(output)
    replace_text(target, comparison_page(members, target.resolve().parent))
    return target


def comparison_page(members: list[Member], folder: Path) -> Markup:
    title = folder.name if all(member.run.path.parent == folder for member in members) else "Runs compared"
    this_page = ["python", "-m", "controller.report", *(str(member.run.path) for member in members)]
    sections = (
        _best(members),
        _table(members, folder),
        comparison_charts.frontier(members),
        comparison_charts.parallel(members),
        comparison_charts.curves(members),
        COMPARISON.alarms(_alarms(members)),
        COMPARISON.commands([(m.label, shlex.join(m.command)) for m in members], shlex.join(this_page)),
    )
    return PAGE.page("Tandem sweep", title, _facts(members), CONTENTS, sections)


def _facts(members: list[Member]) -> str:
    done = sum(member.state == "done" for member in members)
    keys = settings_that_differ(members)
    differ = f" · they differ in {', '.join(keys)}" if keys else ""
    return f"{count(len(members), 'run')}, {done} done{differ}"


def _best(members: list[Member]) -> Markup:
    best = best_of(members)
    if best is None:
        return COMPARISON.no_best()
    gain, low, high = bounds(best.comparison("gold_gain"))
    others = [bounds(m.comparison("gold_gain"))[2] for m in members if m is not best]
    overlap = sum(other is not None and low is not None and other > low for other in others)
    sentence = (
        f"{best.label}: gold gain {num(gain, 2, signed=True)} [{num(low, 2, signed=True)}, {num(high, 2, signed=True)}] at "
        f"a KL of {num(bounds(best.evaluated('kl'))[0], 1)} nats a sequence."
    )
    passed = verdict_state(best.run.evaluation) == "passed"
    return COMPARISON.best(passed, sentence, overlap, best.evaluated("prompts"), shlex.join(best.command))


def _table(members: list[Member], folder: Path) -> Markup:
    keys = settings_that_differ(members)
    rows = []
    for place, member in enumerate(members):
        report = member.run.path / "report.html"
        numbered = re.match(r"(\d+)-", member.label) if keys else None  # what it sets has columns of its own
        row = {
            "colour": colour(place),
            "name": f"#{numbered[1]}" if numbered else member.label,
            "link": os.path.relpath(report, folder) if report.exists() else "",
            "settings": [_shown(member.settings.get(key)) for key in keys],
            "length_ratio": number(member.comparison("length_ratio")),
            "verdict": verdict_state(member.run.evaluation),
            "wall_s": member.run.wall_s,
        }
        rows.append((member, row))
    return COMPARISON.members(rows, _short(keys), f"{PENALTY:g}")


def _short(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, and as many more as it takes to tell them apart."""

    def is_enough(tail: str) -> bool:
        return sum(key == tail or key.endswith(f".{tail}") for key in keys) == 1

    out = {}
    for key in keys:
        parts = key.split(".")
        tails = (".".join(parts[-n:]) for n in range(1, len(parts)))
        out[key] = next(filter(is_enough, tails), key)
    return out


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _alarms(members: list[Member]) -> list[tuple[tuple[bool, str, str], list[int]]]:
    """(whether it is a note, title, advice), and the members where it fired, by their place."""
    fired: dict[tuple[bool, str, str], list[int]] = {}
    for place, member in enumerate(members):
        for alarm in rules.evaluate(member.run)[0]:
            fired.setdefault((alarm.severity != "alarm", alarm.title, alarm.advice), []).append(place + 1)
    return sorted(fired.items())
