"""The metric catalogue: every metric of Tandem, and those that estimators declare beside themselves.

`python -m contracts.catalogue > docs/metrics.md` writes it for people.
"""

from collections.abc import Mapping
from typing import Any

from contracts.estimators import ESTIMATORS, find_estimator
from contracts.metrics import Metric, core_metrics
from contracts.plugins import names

HEADER = """# Metrics

Every number of `metrics.jsonl`, as `contracts/metrics.yaml` and the estimators declare it. Written by
`python -m contracts.catalogue > docs/metrics.md`.

`<n>` in a name stands for what varies. Where nothing else is said, a metric is of the rollouts of one update that have
a score, or of those of their tokens that the policy sampled; shares are from 0 to 1. Scores are in the unit of whoever
gave them: those of a reward model are standard deviations of the texts that it was trained on. What tokens are paid is
in standard deviations of the run's first scores; an environment's own rewards keep their unit. "Mean over the steps"
is over the optimizer steps of the update. "So far" counts from the start of the run, faults from that of its driver.
*Better* says which way is better while all else stays the same; "neither" is also what depends on the settings.
"""


def catalogue(*estimators: Any) -> dict[str, Metric]:
    """All metrics by name, in the order of docs/metrics.md; of `estimators` those of others than ours."""
    plugins = (*map(find_estimator, names(ESTIMATORS)), *estimators)
    metrics = (*core_metrics(), *(metric for plugin in plugins for metric in getattr(plugin, "metrics", ())))
    return {metric.name: metric for metric in metrics}


def charted(panel: str, metrics: Mapping[str, Metric]) -> list[str]:
    """Names of the metrics of a panel that have a chart of their own."""
    return [name for name, metric in metrics.items() if metric.panel == panel and metric.title]


def page() -> str:
    """docs/metrics.md: a table a panel."""
    metrics = catalogue().values()
    parts = [HEADER]
    for panel in dict.fromkeys(metric.panel for metric in metrics):
        rows = [f"| `{m.name}` | {m.unit} | {m.meaning} | {m.better} |\n" for m in metrics if m.panel == panel]
        parts.append(f"\n## {panel}\n\n| metric | unit | what it means | better |\n|---|---|---|---|\n{''.join(rows)}")
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
