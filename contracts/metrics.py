"""What each metric is called and what it says, declared once: pages, wandb's workspace and docs/metrics.md read it here.

A metric is a number of a line of metrics.jsonl, named group/name; `<n>` in a name stands for what varies. Those of Tandem
itself are in metrics.yaml. An estimator declares its own beside itself, in `metrics`: `contracts.catalogue` has them all.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

ESTIMATOR = "Estimators: what does each have of its own?"


@dataclass(frozen=True)
class Metric:
    name: str
    unit: str
    meaning: str  # sentences
    better: str  # "up" | "down" | "neither"
    panel: str = ESTIMATOR  # the table of docs/metrics.md, and the section of wandb's workspace
    title: str = ""  # of a chart of it alone; empty: it has none

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z_]+(/[a-z_0-9<>]+){1,2}", self.name) or self.better not in ("up", "down", "neither"):
            raise ValueError(f"a metric is named group/name, and better is up, down or neither; found {self}")


@cache
def core_metrics() -> tuple[Metric, ...]:
    """Of Tandem itself, in the order of docs/metrics.md."""
    panels = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return tuple(Metric(name, panel=panel, **said) for panel, rows in panels.items() for name, said in rows.items())


def declared(name: str, metrics: Mapping[str, Metric]) -> Metric | None:
    """The declaration of a metric, by its name or by a name of which a part varies."""
    if name in metrics:
        return metrics[name]
    families = (metric for metric in metrics.values() if "<" in metric.name)
    return next((metric for metric in families if re.fullmatch(re.sub("<.*?>", "[^/]+", metric.name), name)), None)
