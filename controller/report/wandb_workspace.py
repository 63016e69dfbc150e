"""The curated wandb workspace: `python -m controller.dashboard ENTITY/PROJECT` writes it once, for all runs of the project.

wandb's own page draws one panel for each of some eighty metrics, in alphabetical order. This one asks the questions of a run
in the order in which they arise: does it improve, by a judge it does not see; how far did it drift; is learning stable; do
the samples read well; are rollouts fresh; where does the time go; what failed. Sections, titles and units are those of the
metric catalogue (`contracts.metrics`), and the axes are Tandem's own counters, never wandb's `_step`.
"""

import argparse
import sys
from typing import Any

from common.error_text import typed_line
from contracts import metrics as panels
from contracts.catalogue import catalogue, charted
from controller.alarms.limits import limits_of

VERSION, ROLLOUTS, WALL = "progress/version", "ledger/trained", "progress/wall_s"

# A metric alone, with its own title and unit; several, with a title for all.
Chart = str | tuple[str, tuple[str, ...]]

# (panel of the catalogue, x axis, charts); the first two are open.
SECTIONS: tuple[tuple[str, str, tuple[Chart, ...]], ...] = (
    (
        panels.REWARD, ROLLOUTS,
        (
            ("Gold judge (never trained on) and learned score", ("reward/gold_mean", "reward/score_mean")),
            "reward/score_std",
            ("Reward after the KL penalty", ("reward/total_mean", "reward/kl_penalty_mean")),
        ),
    ),
    (panels.DRIFT, VERSION, ("kl/ref_seq", "kl/coef", "kl/mismatch_k3", "kl/mismatch_logp_max")),
    (
        panels.POLICY, VERSION,
        (
            "policy/approx_kl", "policy/clipfrac", "policy/ratio_max", "policy/entropy", "policy/grad_norm", "policy/loss",
            ("Lambda of the combined loss, and the score that it is to reach", ("combined/lambda", "combined/score_mean")),
        ),
    ),
    (panels.VALUE, VERSION, ("value/explained_var", "value/loss", "value/grad_norm")),
    (panels.ESTIMATOR, VERSION, ()),  # whatever they chart
    (
        panels.TEXT, ROLLOUTS,
        (
            ("Length, tokens", ("completion/len_mean", "completion/len_p95")),
            "completion/truncated_frac", "completion/repeat_frac", "completion/distinct_2",
        ),
    ),
    (
        panels.ASYNC, VERSION,
        (
            ("Staleness, updates", ("staleness/mean", "staleness/max")),
            "off_policy/ess",
            ("Rollouts that wait, and that are being sampled", ("ledger/waiting", "ledger/in_flight")),
        ),
    ),
    (
        panels.TIME, WALL,
        (
            ("A step and its parts, s", ("perf/step_s", "perf/rollout_s", "perf/train_s", "perf/sync_s")),
            ("Tokens a second", ("perf/gen_tokens_per_s", "perf/train_tokens_per_s")),
            "progress/eta_s",
        ),
    ),
    (
        panels.FAULTS, WALL,
        (
            ("Actors lost, and without an update", ("fault/actors_lost", "fault/actors_without_update")),
            ("Rollouts without a score or a sibling", ("fault/unscored", "fault/no_sibling")),
            "ledger/quarantined",
        ),
    ),
    ("Before PPO", "sft/step", (("SFT loss", ("sft/loss", "sft/eval_loss")),)),
)  # fmt: skip

# Columns of the parallel coordinates. What else a member differs in, such as its arm, is in its name.
SWEPT = ("method", "ppo.estimator", "ppo.kl.coef", "ppo.optimizer.learning_rate", "ppo.seed")
RESULTS = ("evaluate/kl", "evaluate/gold_gain", "evaluate/objective")


def charts(panel: str, listed: tuple[Chart, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """(title, metrics) of the charts of a section."""
    metrics, result = catalogue(), []
    for chart in listed or charted(panel, metrics):
        if isinstance(chart, str):
            alarms = "".join(f"; alarm {limit:g}" for limit, _ in limits_of(chart))
            chart = f"{metrics[chart].title} ({metrics[chart].unit}{alarms})", (chart,)
        result.append(chart)
    return result


def metrics_shown() -> list[str]:
    return [name for panel, _, listed in SECTIONS for _, names in charts(panel, listed) for name in names]


def workspace(entity: str, project: str, name: str = "Tandem") -> Any:
    """The workspace as a wandb-workspaces object; nothing is sent."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    sections = []
    for index, (title, axis, listed) in enumerate(SECTIONS):
        plots: list[Any] = [wr.LinePlot(title=text, x=axis, y=list(names)) for text, names in charts(title, listed)]
        sections.append(ws.Section(name=title, panels=plots, is_open=index < 2))
    frontier = wr.ScatterPlot(
        title="Frontier: gold gain against KL, one point a run",
        x=wr.SummaryMetric("evaluate/kl"),
        y=wr.SummaryMetric("evaluate/gold_gain"),
    )
    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(key)) for key in SWEPT]
    columns += [wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(name)) for name in RESULTS]
    sweep: list[Any] = [
        frontier,
        wr.ParallelCoordinatesPlot(title="Sweep", columns=columns),
        wr.RunComparer(diff_only=True),
    ]
    sections.insert(2, ws.Section(name="Runs compared", panels=sweep, is_open=True))
    samples = wr.WeavePanelSummaryTable(table_name="samples/table")
    sections.append(ws.Section(name="Samples (with logger.wandb_text=true)", panels=[samples]))
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m controller.dashboard", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("project", metavar="ENTITY/PROJECT")
    parser.add_argument("--name", default="Tandem", help="of the workspace; default: Tandem")
    parser.add_argument("--print", action="store_true", help="print the specification as JSON and send nothing")
    given = parser.parse_args(arguments)
    entity, slash, project = given.project.partition("/")
    if not (entity and slash and project):
        print(f"dashboard: write ENTITY/PROJECT, such as my-team/tandem; found {given.project}", file=sys.stderr)
        return 2
    view = workspace(entity, project, given.name)
    if given.print:
        print(view._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
        return 0
    try:
        view.save()
    except Exception as error:  # wandb raises many kinds: no key, no network, no such project
        print(f"dashboard: wandb did not take it ({typed_line(error)})", file=sys.stderr)
        return 1
    print(f"workspace: {view.url}")
    return 0
