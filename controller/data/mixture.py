"""Prompts of several sources (`data.prompt_sources`): whose turn it is, and how each is told from the others."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from common.text.encoding import DataError
from contracts.records import SOURCE, SOURCE_STRIDE, Prompt, row_text


def exact_shares(weights: Sequence[float]) -> list[Fraction]:
    """Of positive weights as they are written: 0.1 is a tenth, which no float is. Their sum is 1."""
    written = [Fraction(repr(float(weight))) for weight in weights]
    return [weight / sum(written) for weight in written]


def next_turn(drawn: Sequence[int], shares: Sequence[Fraction]) -> int:
    """Which source the next prompt comes from, after `drawn` of each. None ever has a whole prompt more or less than its
    share: of n sources at most 1 - 1 / (2n - 2) (Tijdeman 1980, "The chairman assignment problem", whose bound is the best
    there is). Of those that are behind by 1 / (2n - 2) or more the one whose next turn is due first; of equal ones the
    first."""
    if len(shares) == 1:
        return 0
    least, turn = Fraction(1, 2 * len(shares) - 2), sum(drawn) + 1
    behind = [i for i, share in enumerate(shares) if share * turn - drawn[i] >= least]
    return min(behind, key=lambda i: (drawn[i] + 1 - least) / shares[i])


def of_source(prompts: list[Prompt], name: str, place: int) -> list[Prompt]:
    """With ids that no other source has, and the column `source`.

    Args:
        place: of the source, from 1 on.

    Raises:
        DataError: the rows have such a column of their own.
    """
    if taken := next((prompt for prompt in prompts if SOURCE in prompt.columns), None):
        raise DataError(
            f"data.prompt_sources.{name}: the column {SOURCE!r} that travels with a prompt has the name of its source; "
            f"{taken.place} has {taken.columns[SOURCE]!r} there; name the columns to keep without it, in "
            f"data.prompt_sources.{name}.keep"
        )
    return [
        replace(p, prompt_id=place * SOURCE_STRIDE + p.prompt_id, row=row_text(p.columns | {SOURCE: name}))
        for p in prompts
    ]
