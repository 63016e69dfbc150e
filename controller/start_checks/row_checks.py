"""Whether the rows of the prompts have what scorers read of them, before an engine starts."""

from collections.abc import Callable
from typing import Any

from contracts.checks.validation import ConfigError
from contracts.config import TandemConfig
from contracts.scorer_roles import ROLES, chosen_scorers
from controller.data.inputs import Inputs
from reward_service.scorer_kind import scorer_kind

SHOWN_ROWS = 5


def check_rows(config: TandemConfig, data: Inputs) -> None:
    """Refuse prompts whose rows lack a column that a scorer asks for, or have an answer that it cannot compare with.

    Raises:
        ConfigError: naming scorer, column, source and the first such rows.
    """
    sources, problems = [name for name in ("prompts", "eval_prompts") if data[name]], []
    if not sources:
        return
    for name, entry in chosen_scorers(config.reward_service.scorers, dict.fromkeys(ROLES)).items():
        if fits := scorer_kind(entry.kind).row_check(entry):
            problems += unfit(config, data, name, fits)
        lacks = scorer_kind(entry.kind).needs_rows(entry)
        if lacks is None:
            continue
        for source in sources:
            found = ((p, missing) for p in data[source] if (missing := lacks(p.columns)))
            prompt, missing = next(found, (None, ""))
            if prompt is not None:
                problems.append(
                    f"reward_service.scorers.{name} needs {missing} of every row, which row {prompt.prompt_id} of "
                    f"data.{source} does not have; found {', '.join(prompt.columns) or 'no columns'}; add it to the data, "
                    f"and to data.{source}.keep where that names columns"
                )
    if problems:
        raise ConfigError("\n".join(problems))


def unfit(config: TandemConfig, data: Inputs, scorer: str, fits: Callable[[dict[str, Any]], str | None]) -> list[str]:
    """What a scorer says of the rows that it cannot score by, the first `SHOWN_ROWS` of each source."""
    lines = []
    for source in ("prompts", "eval_prompts"):
        said: dict[str | None, str | None] = {}  # by row: many prompts may have one
        found = []
        for prompt in data[source]:
            if prompt.row not in said:
                said[prompt.row] = fits(prompt.columns)
            if problem := said[prompt.row]:
                found.append(f"row {prompt.prompt_id}: {problem}")
        where = f"reward_service.scorers.{scorer}: data.{source} ({getattr(config.data, source).path}),"
        lines += [f"{where} {line}" for line in found[:SHOWN_ROWS]]
        if len(found) > SHOWN_ROWS:
            lines.append(f"{where} and {len(found) - SHOWN_ROWS} more of {len(data[source])} rows")
    return lines
