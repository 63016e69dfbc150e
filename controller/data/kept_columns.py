"""The columns of a row that travel with its prompt, as JSON: to rule functions, environments, samples.jsonl and the report.

JSON text is compact between processes, can be part of a cache's key, and keeps nested values as they are.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from common.text.encoding import DataError
from contracts.config import SourceConfig
from contracts.plugins import closest
from contracts.records import Prompt, row_text


@dataclass
class KeptColumns:
    """Of one source."""

    columns: list[str]
    dropped: dict[str, str] = field(default_factory=dict)  # column -> why it cannot be kept

    def row(self, row: dict) -> str | None:
        """The JSON text of a row's columns, with null for a value that it does not have; None where nothing is kept."""
        return row_text({column: row.get(column) for column in self.columns}) if self.columns else None


def kept_columns(rows: list[dict], source: SourceConfig, prompt: Iterable[str], base: str) -> KeptColumns:
    """What is kept of `rows`: the columns of `source.keep`, or all but those of the `prompt` that JSON can carry.

    Raises:
        DataError: where a column of `source.keep` is in no row, or has a value that JSON cannot carry.
    """
    there = list(dict.fromkeys(column for row in rows for column in row))
    missing = [column for column in source.keep or [] if column not in there]
    if missing:
        near = closest(missing[0], there)
        raise DataError(
            f"{base}.keep must name columns of the data; no row of {source.path} has {missing[0]!r}"
            f"{f', did you mean {near!r}?' if near else ''}; there are {', '.join(there)}"
        )
    if source.keep is None:
        kept = KeptColumns([column for column in there if column not in {*prompt}])
    else:
        kept = KeptColumns(list(source.keep))
    for number, row in enumerate(rows):
        try:
            kept.row(row)
        except (TypeError, ValueError, RecursionError):
            kept.dropped |= {
                column: f"row {number}: {why}" for column in kept.columns if (why := _problem(row, column))
            }
            kept.columns = [column for column in kept.columns if column not in kept.dropped]
    if kept.dropped and source.keep is not None:
        column, why = next(iter(kept.dropped.items()))
        raise DataError(
            f"{base}.keep must name columns with values that JSON can carry; found {column!r} of {source.path}, {why}; "
            "write it as a text or a number in the data, or leave the column out"
        )
    return kept


def require_values(rows: dict[int, dict], source: SourceConfig, base: str) -> None:
    """That each of `rows`, by number, has a value in every column that `source.keep` names.

    Raises:
        DataError: naming file, column and the first such row.
    """
    for column in source.keep or []:
        missing = [number for number, row in rows.items() if row.get(column) is None]
        if missing:
            raise DataError(
                f"{base}.keep must name columns with a value in every row; {source.path} has none of {column!r} in "
                f"{len(missing)} of {len(rows)} rows, first in row {missing[0]}, counted from 0; give it one, or leave "
                f"{base}.keep at null, which keeps every column and passes a missing value on as null"
            )


def _problem(row: dict, column: str) -> str | None:
    try:
        row_text({column: row.get(column)})
    except UnicodeEncodeError:
        return "a lone surrogate, which is not valid Unicode"
    except TypeError as error:  # Object of type bytes is not JSON serializable
        return str(error)
    except (ValueError, RecursionError) as error:  # Out of range float values are not JSON compliant: nan
        return str(error).partition(": ")[0] or type(error).__name__
    return None


def source_of(prompt: Prompt, column: str | None) -> str:
    """What `evaluate.by` tells prompts apart by; a value that is no text as JSON, a missing one as `none`."""
    value = prompt.columns.get(column) if column else None
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
