"""One static HTML page about one run, drawn from the files in its directory: `python -m controller.report RUN`.

    RUN/*.jsonl, *.json, config.yaml -> reader.load -> Run -> tables, curves, samples, alarms -> one page

The page needs no network, no account and no script. It renders half-finished runs as well and says what is missing.
"""

import shlex
from pathlib import Path

import yaml
from markupsafe import Markup

from common.files.durable import replace_text
from controller.alarms import rules
from controller.record.number_text import count
from controller.record.reader import Run, load
from controller.report import curves, evaluation_tables, rollout_flow, samples, timeline
from controller.report.rendering import links, macros

PAGE, RUN = macros("page.html"), curves.RUN
CONTENTS = links(
    "curves", "frontier", "models", "reward-models", "losses", "samples", "rollouts", "time", "alarms", "configuration",
    "reproduce",
)  # fmt: skip


def render(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the report, by default to RUN/report.html, and return its path.

    Raises:
        ReportError: the directory has nothing to report on.
    """
    run = load(run_dir)
    target = Path(output) if output is not None else Path(run_dir) / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_text(target, run_page(run))  # a browser that reloads never sees half a page
    return target


def run_page(run: Run) -> Markup:
    # Another method has no updates to draw.
    has_updates = run.setting("method") in (None, "ppo") or bool(run.stages_of("ppo"))
    configuration = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=100) if run.config else ""
    again = None if run.command is None else shlex.join(run.command)
    sections = (
        evaluation_tables.verdict(run),
        evaluation_tables.key_numbers(run),
        curves.ppo_curves(run) if has_updates else "",
        curves.frontier(run),
        evaluation_tables.models(run),
        evaluation_tables.reward_models(run),
        curves.training_losses(run),
        samples.side_by_side(run),
        samples.during_ppo(run) if has_updates else "",
        rollout_flow.rollouts(run) if has_updates else "",
        timeline.time_spent(run),
        RUN.alarms(*rules.evaluate(run)),
        RUN.configuration(configuration),
        RUN.reproduce(run.stages, again, f"python -m controller.report {shlex.quote(str(run.path))}"),
    )
    return PAGE.page("Tandem run", run.name, _facts(run), CONTENTS, sections)


def _facts(run: Run) -> str:
    model, stage, seed = (run.setting(key) for key in ("model.path", "stage", "seed"))
    versions = len(run.curve("ppo", "reward/score_mean"))
    facts = [
        Path(str(model)).name if model else "",
        f"stage {stage}" if stage else "",
        "" if seed is None else f"seed {seed}",
        count(versions, "policy update") if versions else "",
    ]
    return " · ".join(filter(None, facts))
