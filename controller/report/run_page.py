"""One static HTML page about one run, drawn from the files in its directory: `python -m controller.report RUN`.

    RUN/*.jsonl, *.json, config.yaml -> data.load -> Run -> sections, curves, samples, alarms -> one page

The page needs no network, no account and no script. It renders half-finished runs as well and says what is missing.
"""

from pathlib import Path

from common.files.durable import replace_text
from controller.record.number_text import count
from controller.record.reader import Run, load
from controller.report import curves, evaluation_tables, rollout_flow, samples, timeline
from controller.report.rendering import document

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
    replace_text(target, page(run))  # a browser that reloads never sees half a page
    return target


def page(run: Run) -> str:
    """The whole page."""
    # Another method has no updates to draw.
    has_updates = run.setting("method") in (None, "ppo") or bool(run.stages_of("ppo"))
    parts = (
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
        evaluation_tables.alarm_list(run),
        evaluation_tables.configuration(run),
        evaluation_tables.reproduce(run),
    )
    body = "".join(parts)
    return document("Tandem run", run.name, _facts(run), CONTENTS, body)


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
    return " · ".join(facts)
