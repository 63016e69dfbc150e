"""Whether the rows of the prompts have what scorers read of them, before an engine starts."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from contracts.checks.validation import ConfigError
from contracts.config import ScorerConfig, TandemConfig
from contracts.records import Prompt
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
    chosen = chosen_scorers(config.reward_service.scorers, dict.fromkeys(ROLES))
    asked = {row: _asked(chosen, row) for name in sources for row in {prompt.row for prompt in data[name]}}
    for name, entry in chosen.items():
        kind = scorer_kind(entry.kind)
        own = {source: [prompt for prompt in data[source] if name in asked[prompt.row]] for source in sources}
        if kind.routes:
            problems += unfit(config, own, name, partial(kind.unroutable, entry))
        if fits := kind.row_check(entry):
            problems += unfit(config, own, name, partial(_of_columns, fits))
        lacks = kind.needs_rows(entry)
        if lacks is None:
            continue
        for source in sources:
            found = ((p, missing) for p in own[source] if (missing := lacks(p.columns)))
            prompt, missing = next(found, (None, ""))
            if prompt is not None:
                problems.append(
                    f"reward_service.scorers.{name} needs {missing} of every row, which {prompt.place} of "
                    f"data.{source} does not have; found {', '.join(prompt.columns) or 'no columns'}; add it to the data, "
                    f"and to data.{source}.keep where that names columns"
                )
    if problems:
        raise ConfigError("\n".join(problems))


def _of_columns(fits: Callable[[dict[str, Any]], str | None], row: str | None) -> str | None:
    return fits(json.loads(row) if row else {})


def _asked(chosen: dict[str, ScorerConfig], row: str | None) -> set[str]:
    """The scorers that see a completion of a prompt with this row."""
    found: set[str] = set()
    todo = [role for role in ROLES if role in chosen]
    while todo:
        name = todo.pop()
        if name in chosen and name not in found:
            found.add(name)
            todo += scorer_kind(chosen[name].kind).parts_of(chosen[name], row)
    return found


def unfit(
    config: TandemConfig, data: dict[str, list[Prompt]], scorer: str, fits: Callable[[str | None], str | None]
) -> list[str]:
    """What a scorer says of the rows that it cannot score by, the first `SHOWN_ROWS` of each source."""
    lines = []
    for source, prompts in data.items():
        said: dict[str | None, str | None] = {}  # by row: many prompts may have one
        found = []
        for prompt in prompts:
            if prompt.row not in said:
                said[prompt.row] = fits(prompt.row)
            if problem := said[prompt.row]:
                found.append(f"{prompt.place}: {problem}")
        path = getattr(config.data, source).path
        where = f"reward_service.scorers.{scorer}: data.{source}{f' ({path})' if path else ''},"
        lines += [f"{where} {line}" for line in found[:SHOWN_ROWS]]
        if len(found) > SHOWN_ROWS:
            lines.append(f"{where} and {len(found) - SHOWN_ROWS} more of {len(prompts)} rows")
    return lines
