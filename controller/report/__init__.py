"""One static HTML page about one run, drawn from the files in its directory: `python -m controller.report RUN`.

    RUN/*.jsonl, *.json, config.yaml -> data.load -> Run -> sections, curves, samples, alarms -> one page

The page needs no network, no account and no script. It renders half-finished runs as well and says what is missing.
"""

import os
from pathlib import Path

from controller.report import curves, flow, samples, sections, timeline
from controller.report.data import ReportError, Run, load
from controller.report.markup import count, esc
from controller.report.style import CSS

__all__ = ["ReportError", "page", "render"]

CONTENTS = (
    ("curves", "Curves"),
    ("frontier", "Frontier"),
    ("models", "Models"),
    ("reward-models", "Reward models"),
    ("losses", "Losses"),
    ("samples", "Samples"),
    ("rollouts", "Rollouts"),
    ("time", "Time"),
    ("alarms", "Alarms"),
    ("configuration", "Configuration"),
    ("reproduce", "Reproduce"),
)


def render(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the report, by default to RUN/report.html, and return its path.

    Raises:
        ReportError: the directory has nothing to report on.
    """
    run = load(run_dir)
    target = Path(output) if output is not None else Path(run_dir) / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(page(run), encoding="utf-8")
    os.replace(partial, target)  # a browser that reloads never sees half a page
    return target


def page(run: Run) -> str:
    """The whole page."""
    # Another method has no updates to draw.
    has_updates = run.setting("method") in (None, "ppo") or bool(run.stages_of("ppo"))
    parts = (
        sections.verdict(run),
        sections.key_numbers(run),
        curves.ppo_curves(run) if has_updates else "",
        curves.frontier(run),
        sections.models(run),
        sections.reward_models(run),
        curves.training_losses(run),
        samples.side_by_side(run),
        samples.during_ppo(run) if has_updates else "",
        flow.rollouts(run) if has_updates else "",
        timeline.time_spent(run),
        sections.alarm_list(run),
        sections.configuration(run),
        sections.reproduce(run),
    )
    body = "".join(parts)
    links = "".join(f'<a href="#{anchor}">{text}</a>' for anchor, text in CONTENTS if f'id="{anchor}"' in body)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(run.name)} – Tandem</title><style>{CSS}</style></head><body><main>"
        f'<header><p class="over">Tandem run</p><h1>{esc(run.name)}</h1><p class="facts">{_facts(run)}</p>'
        f"<nav>{links}</nav></header>{body}"
        "<footer>Drawn from the files of the run directory; nothing was fetched, nothing was sent.</footer>"
        "</main></body></html>\n"
    )


def _facts(run: Run) -> str:
    facts = []
    if run.setting("model.path"):
        facts.append(Path(str(run.setting("model.path"))).name)
    if run.setting("stage"):
        facts.append(f"stage {run.setting('stage')}")
    if run.setting("seed") is not None:
        facts.append(f"seed {run.setting('seed')}")
    versions = len(run.curve("ppo", "reward/score_mean"))
    if versions:
        facts.append(count(versions, "policy update"))
    return esc(" · ".join(facts))
