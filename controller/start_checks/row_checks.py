"""Whether the rows of the prompts have what scorers read of them, before an engine starts."""

from contracts.checks.validation import ConfigError
from contracts.config import TandemConfig
from contracts.scorer_roles import ROLES, chosen_scorers
from controller.data.inputs import Inputs
from reward_service.scorer_kind import scorer_kind


def check_rows(config: TandemConfig, data: Inputs) -> None:
    """Refuse prompts whose rows lack a column that a scorer asks for.

    Raises:
        ConfigError: naming scorer, column, source and the first such row.
    """
    sources, problems = [name for name in ("prompts", "eval_prompts") if data[name]], []
    if not sources:
        return
    for name, entry in chosen_scorers(config.reward_service.scorers, dict.fromkeys(ROLES)).items():
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
