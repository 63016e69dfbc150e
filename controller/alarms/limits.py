"""The thresholds on single metrics, as limits.yaml has them."""

from pathlib import Path
from typing import Any

import yaml

from controller.alarms.alarm import Limit


def _limit(row: dict[str, Any]) -> Limit:
    side = "above" if "above" in row else "below"
    return Limit(side=side, limit=float(row.pop(side)), **row)


LIMITS = tuple(map(_limit, yaml.safe_load(Path(__file__).with_name("limits.yaml").read_text(encoding="utf-8"))))


def limits_of(metric: str) -> list[tuple[float, str]]:
    """(value, text) of the fixed limits on one metric, for its chart."""
    found = [limit.limit for limit in LIMITS if limit.metric == metric]
    return [(value, "limit" if value else "no better than the mean") for value in found]
