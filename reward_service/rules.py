"""Rule functions that come with the service, and examples of how to write one. Each runs in processes of its own."""

import math
import re
from decimal import Decimal
from typing import Any

THOUSANDS = r"(?<=\d),(?=\d{3}(?!\d))"  # a comma within a number; others part two


def brevity(completions: list[str], **_: object) -> list[float]:
    """0 for up to 20 words, then falling by 1 for every doubling."""
    return [-max(0.0, math.log2(max(1, len(text.split())) / 20)) for text in completions]


def exact_answer(completions: list[str], labels: list[Any]) -> list[float | None]:
    """1 where the last number of the completion is the label's, 0 where it is not or there is none. Without a number in the
    label there is no score."""

    def last_number(text: str) -> Decimal | None:
        found = re.findall(r"-?\d+(?:\.\d+)?", re.sub(THOUSANDS, "", text))
        return Decimal(found[-1]) if found else None  # exact: as float, all numbers of over 308 digits are one

    answers = [None if label is None else last_number(str(label)) for label in labels]
    return [
        None if answer is None else float(last_number(text) == answer)
        for text, answer in zip(completions, answers, strict=True)
    ]


def answer_and_work(completions: list[str], answer: list[Any]) -> list[dict[str, float]]:
    """1 where the column `answer` stands anywhere in the completion, and 0.1 for every number, as a reward for work that is
    shown. An example of a reward that can be hacked, as it pays for naming many numbers: docs/verifiers.md."""
    parts = [
        {"named": float(str(right) in text), "numbers": float(len(re.findall(r"\d+", text)))}
        for text, right in zip(completions, answer, strict=True)
    ]
    return [{"score": part["named"] + 0.1 * part["numbers"], **part} for part in parts]
