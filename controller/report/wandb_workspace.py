"""The curated wandb workspace: `python -m controller.dashboard ENTITY/PROJECT` writes it once, for all runs of the project.

wandb's own page draws one panel for each of some eighty metrics, in alphabetical order. This one asks the questions of a run
in the order in which they arise: does it improve, by a judge it does not see; how far did it drift; is learning stable; do
the samples read well; are rollouts fresh; where does the time go; what failed. Sections, titles and units are those of the
metric catalogue, in the order of wandb_workspace.yaml, and the axes are Tandem's own counters, never wandb's `_step`.
"""

import argparse
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from common.error_text import typed_line
from contracts.catalogue import catalogue, charted
from controller.alarms.limits import limits_of

Chart = tuple[str, list[Any]]  # title, metrics


@cache
def layout() -> dict[str, Any]:
    """What wandb_workspace.yaml says."""
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def charts(section: dict[str, Any]) -> list[Chart]:
    """Those of a section, each metric alone with its own title and unit."""
    metrics, result = catalogue(), list[Chart]()
    for chart in section.get("charts") or charted(section["panel"], metrics):
        if isinstance(chart, str):
            alarms = "".join(f"; alarm {limit:g}" for limit, _ in limits_of(chart))
            result.append((f"{metrics[chart].title} ({metrics[chart].unit}{alarms})", [chart]))
        else:
            result += chart.items()
    return result


def metrics_shown() -> list[str]:
    return [name for section in layout()["sections"] for _, names in charts(section) for name in names]


def workspace(entity: str, project: str, name: str = "Tandem") -> Any:
    """The workspace as a wandb-workspaces object; nothing is sent."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    sections = []
    for index, section in enumerate(layout()["sections"]):
        plots: list[Any] = [wr.LinePlot(title=title, x=section["axis"], y=names) for title, names in charts(section)]
        sections.append(ws.Section(name=section["panel"], panels=plots, is_open=index < 2))
    frontier = wr.ScatterPlot(
        title="Frontier: gold gain against KL, one point a run",
        x=wr.SummaryMetric("evaluate/kl"),
        y=wr.SummaryMetric("evaluate/gold_gain"),
    )
    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(key)) for key in layout()["swept"]]
    columns += [wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(name)) for name in layout()["results"]]
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
