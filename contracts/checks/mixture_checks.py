"""The rules on several sources of prompts together, for `contracts.checks.validation`: their names and their weights."""

import math
import re

from omegaconf import MISSING

from contracts.checks.check import Check, shown
from contracts.config import DataConfig

WEIGHTS_TOLERANCE = 1e-6  # of their sum: 0.333333 three times


def mixture_checks(data: DataConfig) -> list[Check]:
    sources, alone = data.prompt_sources, data.prompts.path
    if not sources:
        return []
    weights = {name: source.weight for name, source in sources.items()}
    given = [weight for weight in weights.values() if weight is not None]
    odd = [name for name in sources if not re.fullmatch(r"[\w.-]+", name, re.ASCII)]
    is_whole = not given or (len(given) == len(sources) and abs(math.fsum(given) - 1) <= WEIGHTS_TOLERANCE)
    found = ", ".join(f"{name}: {shown(weight)}" for name, weight in weights.items())
    return [
        Check(
            is_whole,
            "data.prompt_sources.*.weight",
            "numbers that sum to 1, one of each source, or null of all (each by its size)",
            f"{found}; their sum is {math.fsum(given):.6g}",
            "weights that sum to 1",
        ),
        Check(not odd, "data.prompt_sources", "names of letters, digits, _, - and .", ", ".join(odd), "another name"),
        Check(
            alone in (MISSING, None, ""),
            "data.prompts.path",
            "left open where data.prompt_sources has the prompts",
            alone,
            "data.prompts.path=??? or no data.prompt_sources",
        ),
    ]
